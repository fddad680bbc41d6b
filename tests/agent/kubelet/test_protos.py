"""The generated Python is what our .proto files give, and those say what the API says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.agent.kubelet import deviceplugin_pb2, podresources_pb2

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path("app/agent/kubelet")
APIS = Path.home() / "go/pkg/mod/k8s.io"
UPSTREAM = {"deviceplugin": "deviceplugin/v1beta1", "podresources": "podresources/v1"}


def test_generated_files_are_what_the_protos_give(tmp_path: Path):
    """`make protos` makes them; whoever changes a .proto file runs it."""
    protos = [str(PACKAGE / f"{name}.proto") for name in UPSTREAM]
    made = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]

    # in a process of its own: its C++ protobuf and OR-Tools' do not go together in one
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *made, *protos]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)

    fresh = {path.name: path.read_text() for path in (tmp_path / PACKAGE).iterdir()}
    assert len(fresh) == 6
    assert fresh == {name: (ROOT / PACKAGE / name).read_text() for name in fresh}


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_field_is_the_apis(name: str):
    """Against the kubelet's own definition, where the machine has it (the end-to-end tests download it)."""
    found = sorted(APIS.glob(f"kubelet@*/pkg/apis/{UPSTREAM[name]}/api.proto"))
    if not found:
        pytest.skip(f"k8s.io/kubelet is not in {APIS}; `make test` downloads it")
    theirs, ours = said(found[-1].read_text()), said((ROOT / PACKAGE / f"{name}.proto").read_text())

    assert ours["package"] == theirs["package"]
    assert ours.keys() <= theirs.keys()
    assert {where: missing for where in ours if (missing := ours[where] - theirs[where])} == {}


def test_packages_and_services_are_the_apis():
    assert deviceplugin_pb2.DESCRIPTOR.package == "v1beta1"
    assert set(deviceplugin_pb2.DESCRIPTOR.services_by_name) == {"Registration", "DevicePlugin"}
    assert podresources_pb2.DESCRIPTOR.package == "v1"
    assert set(podresources_pb2.DESCRIPTOR.services_by_name) == {"PodResourcesLister"}


def said(proto: str) -> dict[str, set[str]]:
    """Every field and method of a .proto file by message or service, without spaces and comments."""
    proto = re.sub(r"/\*.*?\*/|//[^\n]*", "", proto, flags=re.DOTALL)
    proto = re.sub(r"(\))\s*\{\s*\}", r"\1;", proto)
    found = {"package": set(re.findall(r"^package\s+(\S+);", proto, re.MULTILINE))}
    for kind, name, body in re.findall(r"(message|service)\s+(\w+)\s*\{([^}]*)\}", proto):
        found[f"{kind} {name}"] = {re.sub(r"\s+", "", line) for line in body.split(";") if line.strip()}
    return found
