"""The `tangram` command as people type it: its tables, its errors, its exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.driver import PodSpec, args_body, binding_body, go_json, pod_object
from app.report import NodeReport
from tests.app.service import serving

WHOLE = PodSpec("train", "uid-train", (("nvidia.com/gpu", 2),))
SLICE = PodSpec("infer", "uid-infer", (("nvidia.com/mig-3g.40gb", 1),), namespace="team-a")
TOO_MUCH = PodSpec("huge", "uid-huge", (("nvidia.com/gpu", 16),))


def tangram(*words: str, url: str = "http://127.0.0.1:9") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *words],
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "160", "TANGRAM_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service where one pod has GPUs, one a slice, and one waits."""
    with serving(tmp_path_factory.mktemp("cli"), "8xH100:1,8xA100-mig:1") as url:
        for pod, node in ((WHOLE, "8xh100-0"), (SLICE, "8xa100-mig-0"), (TOO_MUCH, "")):
            _post(f"{url}/filter", args_body(pod_object(pod), ["8xh100-0", "8xa100-mig-0"]))
            if node:
                assert _post(f"{url}/bind", binding_body(pod, node))["Error"] == ""
        yield url


def _post(url: str, body: bytes) -> dict[str, str]:
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, trust_env=False)
    found: dict[str, str] = answer.raise_for_status().json()
    return found


def test_cluster_is_a_row_per_node_with_totals(service: str) -> None:
    said = tangram("cluster", url=service)

    assert said.returncode == 0, said.stderr
    assert "2 of 2 nodes offered · 2 of 8 whole GPUs held · 4 of 64 MIG units held (1 slices)" in said.stdout
    assert "8xh100-0" in said.stdout
    assert "6 of 8" in said.stdout


def test_cluster_can_be_narrowed_and_read_by_programs(service: str) -> None:
    assert "8xh100-0" not in tangram("cluster", "--filter", "a100", url=service).stdout
    assert len(json.loads(tangram("cluster", "--json", url=service).stdout)["nodes"]) == 2


def test_pods_says_who_has_what_and_who_waits_and_why(service: str) -> None:
    said = tangram("pods", url=service).stdout

    assert "default/train" in said
    assert "team-a/infer" in said
    assert "3g.40gb@" in said
    assert "Waiting, and why" in said
    assert "16 GPUs" in said


def test_pods_of_one_phase(service: str) -> None:
    found = json.loads(tangram("pods", "--phase", "waiting", "--json", url=service).stdout)["pods"]

    assert [pod["uid"] for pod in found] == ["uid-huge"]


@pytest.mark.parametrize("name", ["uid-infer", "team-a/infer"])
def test_explain_takes_a_uid_or_a_name(service: str, name: str) -> None:
    said = tangram("explain", name, url=service)

    assert said.returncode == 0, said.stderr
    assert "Why here" in said.stdout
    assert "8xa100-mig-0" in said.stdout


def test_explain_says_why_a_pod_waits(service: str) -> None:
    said = tangram("explain", "huge", url=service).stdout

    assert "Why it waits" in said
    assert "needs 16 GPUs" in said


@pytest.mark.parametrize("name", ["nobody", "default/nobody"])
def test_explain_of_an_unknown_pod_is_one_line(service: str, name: str) -> None:
    said = tangram("explain", name, url=service)

    assert said.returncode == 1
    assert said.stderr.startswith("tangram: Tangram knows no pod")
    assert said.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["cluster"], ["pods"], ["explain", "a"]])
def test_no_service_is_one_line(command: list[str]) -> None:
    said = tangram(*command)

    assert said.returncode == 1
    assert said.stderr.startswith("tangram: no answer from http://127.0.0.1:9/")
    assert said.stderr.count("\n") == 1


def test_nodes_writes_reports_that_can_be_read_back(tmp_path: Path) -> None:
    said = tangram("nodes", "--sample", "8xH100:2,4xA30-mig:1", "--out", str(tmp_path / "nodes.json"))

    assert said.stdout.startswith("3 nodes, 20 GPUs written to")
    reports = [NodeReport.model_validate(each) for each in json.loads((tmp_path / "nodes.json").read_bytes())]
    assert [report.node for report in reports] == ["8xh100-0", "8xh100-1", "4xa30-mig-0"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["nodes", "--sample", "8xFOO"], 2, "tangram: --sample: no sample node is called '8xFOO'"),
        (["nodes", "--sample", "8xH100", "--out", "/nowhere/x"], 1, "tangram: cannot write /nowhere/x: No such file"),
        (["serve"], 2, "tangram: the extender verbs need --cert, --key and --client-ca"),
        (
            ["serve", "--standalone", "--port", "99999"],
            2,
            "tangram: --port: Input should be less than or equal to 65535",
        ),
        (["serve", "--nodes", "/nowhere.json"], 1, "tangram: "),
        (["demo", "--sample", "8xFOO"], 2, "tangram: no sample node is called '8xFOO'"),
        (["pods", "--url", "nonsense"], 1, "tangram: no answer from nonsense/v1/pods"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_status(words: list[str], status: int, says: str) -> None:
    said = tangram(*words)

    assert said.returncode == status, said.stderr
    assert said.stderr.startswith(says), said.stderr
    assert said.stderr.count("\n") == 1
    assert "Traceback" not in said.stderr


def test_serve_has_an_option_for_every_setting() -> None:
    """A knob is written once, in settings.py."""
    from app.settings import Settings

    said = tangram("serve", "--help").stdout

    assert all(f"--{name.replace('_', '-')}" in said for name in Settings.model_fields)


def test_the_agent_does_not_load_the_solver_or_the_server() -> None:
    """It runs on every GPU node, beside the workload: its memory counts."""
    code = (
        "import sys; sys.argv = ['tangram', 'agent', '--help']\n"
        "try:\n    import app.cli; app.cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('ortools', 'numpy', 'fastapi', 'kubernetes', 'rich.table') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert said.stdout.strip().endswith("[]"), said.stdout + said.stderr
    assert "tangram agent" in said.stdout


def test_certs_writes_them_and_says_which(tmp_path: Path) -> None:
    said = tangram("certs", "--out", str(tmp_path / "pki"))

    assert said.returncode == 0, said.stderr
    assert all(Path(line).is_file() for line in said.stdout.split())
    again = tangram("certs", "--out", str(tmp_path / "pki"))
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_manifests_writes_them_and_says_which(tmp_path: Path) -> None:
    said = tangram("manifests", "--out", str(tmp_path))

    assert said.returncode == 0, said.stderr
    assert all(Path(line).is_file() for line in said.stdout.split())
    (tmp_path / "file").touch()
    assert tangram("manifests", "--out", str(tmp_path / "file")).stderr.startswith("tangram: cannot write")


def test_version() -> None:
    assert tangram("version").stdout.startswith("tangram ")


def test_output_has_no_hostile_markup(service: str) -> None:
    """rich reads [..] as markup and pod names are the users'."""
    pod = PodSpec("[red]x[/red]", "uid-markup", (("nvidia.com/gpu", 16),))
    _post(f"{service}/filter", go_json({"Pod": pod_object(pod), "NodeNames": ["8xh100-0"]}))

    assert "[red]x[/red]" in tangram("explain", "uid-markup", url=service).stdout


# -- a whole service -----------------------------------------------------------------------------------


def test_stopping_waits_for_no_held_request(tmp_path: Path) -> None:
    """Each agent keeps one open; a restart must not take as long as they may be held."""
    asked = {"node": "8xh100-0", "boot": "simulated", "version": 1, "wait_seconds": 60}
    with ThreadPoolExecutor(1) as apart:
        with serving(tmp_path, "8xH100:1") as url:
            held = apart.submit(httpx.post, f"{url}/v1/orders", json=asked, timeout=60, trust_env=False)
            while "tangram_held_requests 1.0" not in httpx.get(f"{url}/metrics", trust_env=False).text:
                assert not held.done(), held.result().text
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 5
        assert held.result().status_code == 503
