"""CDI files of ours before the JSON schema of the Container Device Interface (test_cdi.py has its library)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from app.agent.cdi import CdiFile
from tests.agent.driver_host import DriverHost, gpu, instance, report
from tests.e2e.toolchain import Program, build

pytestmark = pytest.mark.e2e

SCHEMA = Program("cdischema", usually="seconds")


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    """Run the schema over the files; it complains on standard error."""
    return subprocess.run([build(SCHEMA), *files], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The CDI file of a machine with a slice on one GPU, another GPU, the driver's files and NVIDIA's hook."""
    there = DriverHost(tmp_path / "host")
    there.devices(0, 1)
    there.driver()
    there.slice(0, 9, (84, 85))
    there.file("usr/bin/nvidia-cdi-hook")
    CdiFile(tmp_path / "cdi", host=there.host).keep(report(gpu(0, instance("1g.10gb", 3, 9, "MIG-1")), gpu(1)))
    (written,) = (tmp_path / "cdi").iterdir()
    return written


def test_our_file_follows_the_schema(file: Path) -> None:
    done = check(file)
    assert done.returncode == 0, done.stderr
    said = json.loads(file.read_text())
    assert said["devices"]
    assert said["containerEdits"]


def test_schema_would_notice_a_device_file_without_a_path(file: Path) -> None:
    said = json.loads(file.read_text())
    (nodes,) = [device["containerEdits"]["deviceNodes"] for device in said["devices"] if device["name"] == "MIG-1"]
    del nodes[0]["path"]
    file.write_text(json.dumps(said))
    done = check(file)
    assert done.returncode == 1
    assert "path is required" in done.stderr
