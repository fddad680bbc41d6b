"""The replay of a trace: what it reads, what arrives, what is legal, and what each policy is by definition."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from app.cli import app as tangram
from app.errors import BadInput
from app.replay.openb import POLICIES, POTENTIAL, ByRule, Policy, Potential, Trace, as_json, forecast_of, replay
from app.replay.rules import Fragmentation
from app.replay.trace import Books, Machine, Pod, arrivals, read_machines, read_pods

MACHINES = (
    Machine("big", 96000, 300000, 8, "G2"),
    Machine("mid", 64000, 200000, 4, "V100"),
    Machine("small", 16000, 50000, 2, "T4"),
    Machine("bare", 32000, 100000, 0, ""),
)
PODS = (
    *[Pod(4000, 8000, 1, 500)] * 6,
    *[Pod(8000, 16000, 1, 1000)] * 4,
    *[Pod(3000, 9000, 1, 330, ("T4", "V100"))] * 3,
    *[Pod(32000, 60000, 4, 1000)] * 2,
    Pod(16000, 32000, 2, 1000, ("V100",)),
    *[Pod(6000, 9000, 0, 0)] * 3,
)
TRACE = Trace(MACHINES, PODS)

machines = st.lists(
    st.builds(
        Machine,
        name=st.uuids().map(str),
        cpu_milli=st.sampled_from((4000, 16000, 64000)),
        memory_mib=st.sampled_from((10000, 100000)),
        gpus=st.integers(0, 8),
        model=st.sampled_from(("G2", "T4")),
    ),
    min_size=1,
    max_size=4,
).filter(lambda them: any(machine.gpus for machine in them))
pods = st.lists(
    st.builds(
        Pod,
        cpu_milli=st.sampled_from((0, 1000, 4000)),
        memory_mib=st.sampled_from((0, 9000)),
        gpus=st.just(1),
        milli=st.sampled_from((50, 330, 500, 810, 1000)),
        models=st.sampled_from(((), (), ("T4",))),
    )
    | st.builds(Pod, st.just(2000), st.just(100), st.sampled_from((2, 4, 8)), st.just(1000), st.just(()))
    | st.just(Pod(3000, 0, 0, 0)),
    min_size=1,
    max_size=6,
).filter(lambda them: any(pod.gpus for pod in them))


def node_file(folder: Path, *lines: str, head: str = "sn,cpu_milli,memory_mib,gpu,model") -> Path:
    file = folder / "nodes.csv"
    file.write_text("\n".join((head, *lines)) + "\n")
    return file


def pod_file(folder: Path, *lines: str, head: str = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec") -> Path:
    file = folder / "pods.csv"
    file.write_text("\n".join((head, *lines)) + "\n")
    return file


# --- reading ---


def test_nodes_and_pods_are_read_as_they_stand(tmp_path: Path) -> None:
    assert read_machines(node_file(tmp_path, "n0,64000,262144,2,P100")) == (Machine("n0", 64000, 262144, 2, "P100"),)
    assert read_pods(pod_file(tmp_path, "p,12000,16384,1,460,V100|T4|T4", "q,1000,0,0,0,", "r,8,9,8,1000,")) == (
        Pod(12000, 16384, 1, 460, ("T4", "V100")),
        Pod(1000, 0, 0, 0),
        Pod(8, 9, 8, 1000),
    )


def test_a_list_without_models_is_one_where_all_will_do(tmp_path: Path) -> None:
    file = pod_file(tmp_path, "p,1,2,1,460", head="name,cpu_milli,memory_mib,num_gpu,gpu_milli")

    assert read_pods(file) == (Pod(1, 2, 1, 460),)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("n0,64000,x,2,P100", "line 2: memory_mib is 'x', not a whole number"),
        ("n0,64000,-1,2,P100", "memory_mib is -1"),
        ("n0,64000,1,2,", "GPUs of no model"),
        (",64000,1,2,P100", "without a name"),
        ("n0,64000", "not as many fields"),
        ("n0,1,1,1,P100,more", "not as many fields"),
        ("n0,64000,1,0,P100", "no node has a GPU"),
        ("n0,1,1,1,P100\nn0,1,1,1,P100", "line 3: n0 is there twice"),
    ],
)
def test_a_malformed_list_of_nodes_is_told_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as told:
        read_machines(node_file(tmp_path, line))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p,1,2,1,0,", "gpu_milli is 0"),
        ("p,1,2,1,1001,", "gpu_milli is 1001"),
        ("p,1,2,2,500,", "shares are of one GPU"),
        ("p,1,2,1.5,500,", "num_gpu is '1.5'"),
        ("p,1,2,0,0,", "no pod asks for a GPU"),
        ("p,99999999999,2,1,500,", "cpu_milli is 99999999999"),
    ],
)
def test_a_malformed_list_of_pods_is_told_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_pods(pod_file(tmp_path, line))


def test_a_file_that_is_not_there_or_no_csv_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*No such file"):
        read_pods(tmp_path / "none.csv")
    with pytest.raises(BadInput, match="no column sn"):
        read_machines(pod_file(tmp_path, "p,1,2,1,500,"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read"):
        read_machines(tmp_path / "binary")


# --- arriving ---


@given(st.integers(0, 5))
def test_arrivals_ask_for_the_load_and_hardly_more(seed: int) -> None:
    """The test for the end adds one pod's milli per GPU, as the authors' does, so the last may overshoot."""
    capacity = 14_000
    asked = [pod.demand_milli for pod in arrivals(PODS, capacity, seed)]

    assert sum(asked[:-1]) + 1000 <= 1.3 * capacity + 1000
    assert sum(asked) > 1.3 * capacity - 1000
    assert arrivals(PODS, capacity, seed) == arrivals(PODS, capacity, seed)


def test_a_list_that_asks_for_more_is_thinned() -> None:
    coming = arrivals(PODS * 9, 14_000, 1)

    assert sum(pod.demand_milli for pod in coming) <= 1.3 * 14_000
    assert not set(coming) - set(PODS)


# --- what is legal ---


@pytest.mark.parametrize(
    ("pod", "node", "gpus"),
    [
        (Pod(1, 1, 1, 500), 2, (2,)),
        (Pod(1, 1, 2, 1000), 2, (0, 0)),
        (Pod(1, 1, 2, 1000), 2, (0,)),
        (Pod(16001, 1, 1, 500), 2, (0,)),
        (Pod(1, 50001, 1, 500), 2, (0,)),
        (Pod(1, 1, 1, 500, ("G2",)), 2, (0,)),
        (Pod(1, 1, 1, 500), 3, (0,)),
        (Pod(1, 1, 0, 0), 2, (0,)),
    ],
)
def test_books_refuse_what_is_not_there(pod: Pod, node: int, gpus: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        Books(MACHINES).take(pod, node, gpus)


def test_books_give_nothing_twice() -> None:
    books = Books(MACHINES)
    books.take(Pod(1, 1, 1, 600), 2, (0,))
    with pytest.raises(ValueError, match="cannot be"):
        books.take(Pod(1, 1, 1, 600), 2, (0,))
    with pytest.raises(ValueError, match="cannot be"):
        books.take(Pod(1, 1, 2, 1000), 2, (0, 1))
    books.take(Pod(1, 1, 1, 400), 2, (0,))
    assert books.left[2].tolist()[:2] == [0, 1000]


# --- policies ---


def made(name: str, trace: Trace, books: Books, seed: int, *, fixed: bool) -> Policy:
    chance = random.Random(seed)
    if name == POTENTIAL:
        return Potential(trace, books, forecast_of(trace), chance=chance, fixed_ties=fixed)
    models = sorted({machine.model for machine in trace.machines})
    return ByRule(name, trace, books, Fragmentation(trace.pods, models), chance=chance, fixed_ties=fixed)


def fits_somewhere(books: Books, pod: Pod) -> bool:
    return any(
        pod.cpu_milli <= books.cpu[node]
        and pod.memory_mib <= books.memory[node]
        and (not pod.models or machine.model in pod.models)
        and sum(int(left) >= pod.milli for left in books.of_node(node)) >= pod.gpus
        for node, machine in enumerate(books.machines)
    )


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=15)
@given(machines, pods, st.integers(0, 3), st.booleans())
def test_every_policy_places_what_fits_and_only_that(
    name: str, them: list[Machine], asked: list[Pod], seed: int, fixed: bool
) -> None:
    """Books refuse the illegal; what is dropped had no place anywhere."""
    trace, books = Trace(tuple(them), tuple(asked)), Books(them)
    policy = made(name, trace, books, seed, fixed=fixed)
    for i, pod in enumerate(arrivals(asked, books.capacity_milli, seed)):
        if i % 7 == 0:
            policy.renew()
        choice = policy.choose(pod)
        assert (choice is None) == (not fits_somewhere(books, pod))
        if choice is not None:
            books.take(pod, *choice)
            policy.changed(pod, choice)


@pytest.mark.parametrize("name", POLICIES)
def test_a_seed_is_played_the_same_again(name: str) -> None:
    first, again = (replay(TRACE, name, (7, 8)).runs for _ in range(2))

    assert first == again
    assert first[0] != first[1]


def test_fragmentation_is_what_typical_pods_cannot_use() -> None:
    """Halves and whole GPUs, equally often, on one GPU with 700 left and one with 300: halves lose the 300."""
    common = Fragmentation([Pod(1000, 0, 1, 500), Pod(1000, 0, 1, 1000)], ["G2"])
    left = np.array([[700, 300]])

    assert common.of("G2", np.array([5000]), left) == pytest.approx([(300 + 1000) / 2])
    assert common.of("G2", np.array([999]), left) == pytest.approx([1000])


def test_fgd_goes_where_least_is_broken() -> None:
    """A half fits exactly beside another half; on an idle GPU it would break it."""
    trace = Trace((MACHINES[0],), (Pod(1000, 0, 1, 500), Pod(1000, 0, 1, 1000)))
    books = Books(trace.machines)
    books.take(trace.pods[0], 0, (5,))

    assert made("fgd", trace, books, 1, fixed=True).choose(trace.pods[0]) == (0, (5,))


def test_best_fit_takes_the_fuller_node_and_first_fit_the_first() -> None:
    trace = Trace(MACHINES[:3], PODS)
    books = Books(trace.machines)

    best, first = (made(name, trace, books, 1, fixed=True).choose(PODS[0]) for name in ("best-fit", "first-fit"))
    assert best == (2, (0,))
    assert first == (0, (0,))


def test_the_potential_keeps_scarce_models_for_those_who_need_them() -> None:
    """What may go anywhere leaves the T4s alone, although they are the tighter fit."""
    anywhere, only = Pod(1000, 0, 1, 1000), Pod(1000, 0, 1, 1000, ("T4",))
    trace = Trace((MACHINES[2], MACHINES[0]), (anywhere, only))
    books = Books(trace.machines)

    choice = made(POTENTIAL, trace, books, 1, fixed=True).choose(anywhere)
    assert choice is not None
    assert choice[0] == 1


# --- in words ---


def test_the_command_prints_tables_or_json(tmp_path: Path) -> None:
    nodes = node_file(tmp_path, *(",".join(map(str, machine)) for machine in MACHINES))
    asked = pod_file(
        tmp_path, *(f"p,{p.cpu_milli},{p.memory_mib},{p.gpus},{p.milli},{'|'.join(p.models)}" for p in PODS)
    )
    words = ["replay", "openb", "--nodes", str(nodes), "--pods", str(asked), "--seeds", "1-2", "--policy"]
    told = CliRunner().invoke(tangram, [*words, "potential", "--policy", "best-fit"])
    told_all = CliRunner().invoke(tangram, [*words, "all", "--ties", "random", "--json"])

    assert told.exit_code == 0, told.output
    assert "4 nodes, 14 GPUs, 19 pods in the list, 2 seeds" in told.output
    assert [each["policy"] for each in json.loads(told_all.output)["policies"]] == list(POLICIES)


def test_the_json_is_the_same_numbers() -> None:
    result = replay(TRACE, "best-fit", (1,))
    (told,) = json.loads(json.dumps(as_json([result])))["policies"]

    assert told["ties"] == "fixed"
    assert told["allocation_percent"]["130"] is None or told["allocation_percent"]["130"]["sd"] == 0
    assert set(told["rejected_percent"]) == {"CPU-only", "multi-GPU", "one GPU", "shares"}


def test_an_unknown_policy_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="no policy is called worst; there are potential"):
        replay(TRACE, "worst", (1,))
