"""`tangram plan`: files in, a joint plan out; every mistake in a file is one line that says where."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import cli
from app.errors import BadInput
from app.plan_files import read_files
from app.policy import policy_of, read_policy
from app.simulate import sample_reports
from app.translate import PLACEMENT_ANNOTATION, write_placement
from solver import Device, Policy


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Two boards of eight, one of them with CPU and memory said."""
    said = [report.model_dump(mode="json", by_alias=True) for report in sample_reports("8xH100:2")]
    said[0]["allocatable"] = {"cpu": "8", "memory": "64Gi"}
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps(said))
    return path


def pod(name: str, *, gpus: int = 1, cpu: str = "1", **fields: Any) -> dict[str, Any]:
    """A pod as kubectl prints it."""
    resources = {"limits": {"nvidia.com/gpu": gpus, "cpu": cpu}}
    meta = {"name": name, "namespace": "default", "uid": f"uid-{name}", "annotations": fields.pop("annotations", {})}
    return {"kind": "Pod", "metadata": meta, "spec": {"containers": [{"name": "c", "resources": resources}], **fields}}


def pods(path: Path, *items: dict[str, Any]) -> Path:
    """A List, as kubectl prints it."""
    path.write_text(json.dumps({"kind": "List", "items": items}))
    return path


def run(*args: object) -> Any:
    """The command's JSON."""
    result = CliRunner().invoke(cli.app, ["plan", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_pending_pods_are_planned_beside_those_that_are_placed(nodes: Path, tmp_path: Path) -> None:
    """A bound pod keeps its devices; what does not fit says why."""
    node = json.loads(nodes.read_text())[1]
    held = [Device(gpu["uuid"]) for gpu in node["gpus"][:5]]
    written = {PLACEMENT_ANNOTATION: write_placement("uid-old", node["node"], held)}
    old = pod("old", gpus=5, annotations=written, nodeName=node["node"])
    plan = run("--nodes", nodes, "--pods", pods(tmp_path / "p.json", old, pod("a", gpus=3), pod("b", gpus=8, cpu="9")))

    assert plan["status"] == "optimal"
    assert [(row["pod"], row["node"], row["where"]) for row in plan["placed"]] == [
        ("default/a", node["node"], "GPU 5, 6, 7")
    ]
    assert [row["pod"] for row in plan["unplaced"]] == ["default/b"]
    assert plan["unplaced"][0]["reason"]


def test_a_bound_pod_without_a_placement_keeps_its_node_back(nodes: Path, tmp_path: Path) -> None:
    """Nobody knows which GPUs it has."""
    stranger = pod("stranger", nodeName="8xh100-1")
    plan = run("--nodes", nodes, "--pods", pods(tmp_path / "p.json", stranger, pod("a", gpus=8)))

    assert [row["node"] for row in plan["placed"]] == ["8xh100-0"]
    assert plan["warnings"] == ["default/stranger is on 8xh100-1 without a placement: that node's GPUs are left out"]


def test_manifests_without_uids_will_do(nodes: Path, tmp_path: Path) -> None:
    """YAML documents as people write them."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "kind: Pod\nmetadata: {name: a}\n"
        "spec: {containers: [{name: c, resources: {limits: {nvidia.com/gpu: 2}}}]}\n---\n"
        "kind: Pod\nmetadata: {name: b, annotations: {tangram.gpu/color: red}}\n"
        "spec: {containers: [{name: c, resources: {limits: {nvidia.com/gpu: 1}}}]}\n"
    )
    plan = run("--nodes", nodes, "--pods", path)

    assert [row["pod"] for row in plan["placed"]] == ["default/a"]
    assert plan["malformed"][0]["pod"] == "default/b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is neither JSON nor YAML"),
        ('[{"kind": "Job"}]', "object 1 is a Job; only pods"),
        ("[3]", "object 1 is a int"),
        ('[{"kind": "Pod", "metadata": {"name": "a"}}]', "pod 1: spec is not an object"),
    ],
)
def test_a_bad_pod_file_is_refused_in_words(nodes: Path, tmp_path: Path, text: str, words: str) -> None:
    """With the object that is wrong."""
    path = tmp_path / "pods"
    path.write_text(text)

    with pytest.raises(BadInput, match=words):
        read_files(nodes, path)


def test_a_policy_file_changes_the_plan(nodes: Path, tmp_path: Path) -> None:
    """Tiers and weights are the file's."""
    path = tmp_path / "policy.yaml"
    path.write_text("name: open few\ntiers:\n  - {fresh_node: 1}\n  - {value: 1}\nworths: {serving: 3}\n")

    assert read_policy(path) == Policy("open few", ((("fresh_node", 1),), (("value", 1),)), (("serving", 3),))
    plan = run("--nodes", nodes, "--pods", pods(tmp_path / "p.json", pod("a"), pod("b")), "--policy", path)
    assert len({row["node"] for row in plan["placed"]}) == 1
    assert plan["policy"] == "open few"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"tier": []}, "tier: Extra inputs are not permitted"),
        ({"tiers": [{"speed": 1}]}, "no goal is called speed; there are value"),
        ({"tiers": [{"value": -1}]}, "tiers.0.value: Input should be greater than or equal to 0"),
        ({"worths": {"gaming": 2}}, "worths.gaming"),
        ([1], "the file: Input should be a valid dictionary"),
    ],
)
def test_a_bad_policy_is_refused_with_the_place(said: Any, words: str) -> None:
    """What is wrong, and where."""
    with pytest.raises(BadInput, match=words):
        policy_of(said)


def test_a_file_that_is_not_there_is_one_line(nodes: Path, tmp_path: Path) -> None:
    """And exit status 2."""
    with pytest.raises(cli.Failed, match="cannot read") as failed:
        cli.plan(nodes=nodes, pods=tmp_path / "none", policy=None, seconds=1.0, market=False, as_json=True)
    assert failed.value.status == cli.MISUSE
