"""The bench harness itself: its figures, its JSON, its verdicts. What it measures is nobody's promise here."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import threading
from dataclasses import asdict, replace

import orjson
import pytest
from rich.console import Console

from solver import DEFAULT_POLICY
from tests.bench import changed, check, fits, growth, states
from tests.bench.__main__ import PARTS, Done, Part, chosen, run_part, summary
from tests.bench.client import Client
from tests.bench.driver import MOST_AT_ONCE, Load, asks_for
from tests.bench.echo import Echo
from tests.bench.figures import Spread, Target, in_units, show_targets, spread, target_of, write
from tests.bench.machine import machine, words
from tests.bench.verbs import Times, rows_of, targets_of
from tests.bench.world import ASKS, HELD, new_pod, reports_of, write_inventory

RATIO = Target("verbs.filter", "filter", 1.5, 1.2, ratio=True)


# --- figures ---


def test_percentiles_are_times_that_were_measured():
    """An interpolated p99 of few requests would be a time that no request took."""
    found = spread([1_000_000 * n for n in range(1, 101)])

    assert found == Spread(100, 50.0, 90.0, 99.0, 100.0)
    assert found.tail == pytest.approx(1.98)


def test_nothing_measured_is_no_division_by_zero():
    assert spread([]).tail == 0.0


@pytest.mark.parametrize(
    ("measured", "at_least", "held"), [(1.5, False, True), (1.51, False, False), (1.4, True, False)]
)
def test_a_target_is_held_from_its_own_side(measured, at_least, held):
    assert Target("k", "what", 1.5, measured, at_least=at_least).held is held


def test_a_target_survives_its_json(tmp_path):
    """Parts and the table are different processes."""
    write(tmp_path / "deep" / "part.json", {"rows": [1]}, [RATIO])

    said = json.loads((tmp_path / "deep" / "part.json").read_text())
    assert [target_of(each) for each in said["targets"]] == [RATIO]
    assert said["rows"] == [1]


def test_a_part_may_say_little_of_a_target():
    assert target_of({"what": "cold start", "target": 15, "measured": 9.5}).held


def test_the_table_says_what_is_not_held():
    console = Console(width=200, record=True, file=io.StringIO())

    show_targets([RATIO, replace(RATIO, what="prioritize", measured=9.0)], console)

    lines = console.export_text().splitlines()
    assert [line for line in lines if "not held" in line and "prioritize" in line]
    assert [line for line in lines if "filter" in line and "not held" not in line]


@pytest.mark.parametrize(
    ("value", "unit", "text"), [(1.234, "×", "1.23×"), (12.34, "ms", "12.3 ms"), (1234, "", "1,234")]
)
def test_figures_have_three_digits(value, unit, text):
    assert in_units(value, unit) == text


def test_the_machine_is_named():
    about = machine()

    assert about["cores"] >= 1
    assert set(about) >= {"date", "cpu", "python", "libraries", "load_average"}
    assert about["python"] in words(about)


# --- the client and the echo ---


def test_the_echo_answers_with_the_reply_it_was_told():
    """Else the ratio would compare with other bytes than Tangram's."""
    app = Echo()

    assert ask(app, "PUT", b"reply") == b""
    assert ask(app, "POST", b"{}") == b"reply"


def test_the_echo_reads_the_request():
    """An echo that does not parse would be no baseline for a service that must."""
    app = Echo()
    ask(app, "PUT", b"reply")

    with pytest.raises(orjson.JSONDecodeError):
        ask(app, "POST", b"not JSON")


def ask(app, method, body):
    sent = []

    async def receive():
        return {"body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": method, "path": "/filter"}, receive, send))
    return sent[-1]["body"]


def test_the_client_reads_a_reply_that_comes_in_pieces():
    """A large reply is many packets, and its head may be split too."""
    body = b"x" * 100_000
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 100000\r\n\r\n" + body[:5], body[5:]]
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=answer, args=(server, pieces))
        answering.start()
        client = Client(server.getsockname()[1])

        assert client.post("/filter", b"{}") == body
        assert client.nanoseconds > 0
        client.close()
        answering.join()


def test_the_client_takes_no_error_for_an_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=answer, args=(server, [b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\nbad"]))
        answering.start()
        client = Client(server.getsockname()[1])

        with pytest.raises(RuntimeError, match="500: bad"):
            client.post("/filter", b"{}")
        client.close()
        answering.join()


def answer(server, pieces):
    connection, _ = server.accept()
    with connection:
        connection.recv(1 << 16)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)


# --- the world and the driver ---


def test_a_fleet_comes_from_its_seed(tmp_path):
    """Two runs, and the service and the driver of one run, must speak of the same nodes."""
    write_inventory(reports_of(20), tmp_path / "a")
    write_inventory(reports_of(20), tmp_path / "b")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len({report.node for report in reports_of(20)}) == 20


def test_every_ask_can_be_a_pod():
    rng = random.Random(1)
    assert {new_pod(rng, ask).resources[0] for ask in ASKS} == set(ASKS.values())
    assert set(HELD) <= set(ASKS)


async def test_the_driver_drops_what_is_due_when_too_much_is_in_flight():
    """Open-loop must not become a pile of memory when the service stands still."""
    load = Load(1, [])
    flying = 0

    async def never():
        nonlocal flying
        flying += 1
        await asyncio.Event().wait()

    driving = asyncio.create_task(load.every(100_000.0, never))
    while not load.done.dropped:
        await asyncio.sleep(0)
    driving.cancel()
    await asyncio.gather(driving, return_exceptions=True)

    assert flying == MOST_AT_ONCE


# --- rows and targets ---


def times(tangram_ms, echo_ms):
    found = Times(count=2, names_sent=1000, reply_bytes=50)
    for ask, factor in (("1 GPU", 1), ("8 GPUs", 2)):
        found.tangram[ask] = [int(factor * tangram_ms * 1e6)] * 10
        found.echo[ask] = [int(echo_ms * 1e6)] * 10
    return found


def test_a_row_names_its_worst_kind_of_demand():
    (row,) = rows_of({"filter": times(1.0, 1.0)}, nodes=500, names=500, most_nodes="0", load=False)

    assert (row.ratio, row.worst, row.worst_ratio) == (1.0, "8 GPUs", 2.0)
    assert row.names_sent == 500


def test_quiet_rows_are_ratios_and_rows_under_load_are_not():
    """A tail depends on the machine's cores; only the ratio to the echo may be compared with another run's."""
    by_load = [
        targets_of(list(rows_of({"filter": times(1.0, 1.0)}, nodes=500, names=500, most_nodes="0", load=load)))
        for load in (False, True)
    ]

    assert [each.ratio for (each,) in by_load] == [True, False]
    assert len({each.key for (each,) in by_load}) == 2


def test_a_change_is_the_sum_of_its_steps():
    steps = changed.Steps()
    steps.add(("put", 3), ("settle", 4))
    steps.add(("put", 1), ("settle", 1), new=True)

    assert steps.took == {"put": [3, 1], "settle": [4, 1], "all": [7, 2], "new state": [2]}


def test_fifty_kinds_of_demand_are_fifty():
    assert len(set(changed.demands())) == 50


# --- parts ---


def test_parts_are_chosen_by_name(tmp_path):
    console = Console(quiet=True)

    assert [part.name for part in chosen(["plans", "verbs"], [], console)] == ["verbs", "plans"]
    assert "verbs" not in [part.name for part in chosen([], ["verbs"], console)]
    with pytest.raises(ValueError, match="no part is called vebs"):
        chosen(["vebs"], [], console)


def test_a_part_that_fails_is_told_and_leaves_the_others_alone(tmp_path):
    """One that cannot start (no control plane, say) must not hide what the others have measured."""
    done = run_part(Part("no_such_module", "nothing"), tmp_path, Console(quiet=True), quick=True)

    assert "status 1" in done.failed
    assert done.targets == []


def test_an_earlier_runs_figures_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "no_such_module.json").write_text('{"targets": [{"what": "x", "target": 1, "measured": 1}]}')

    assert run_part(Part("no_such_module", "nothing"), tmp_path, Console(quiet=True), quick=True).targets == []


def test_the_summary_has_every_target_with_its_verdict():
    done = Done("verbs", 1.0, "", {"targets": [asdict(RATIO)]})

    said = summary({"cores": 2}, [done], quick=True)

    assert [(each["part"], each["key"], each["held"]) for each in said["targets"]] == [("verbs", "verbs.filter", True)]
    assert json.loads(json.dumps(said)) == said


def test_parts_have_different_names():
    assert len({part.name for part in PARTS}) == len(PARTS)


# --- the check ---


def compared(then, now):
    return check.compare({each.key: each for each in then}, {each.key: each for each in now}, ["verbs"])


@pytest.mark.parametrize(("now", "worse"), [(1.2, False), (1.79, False), (1.8, True), (0.5, False)])
def test_a_ratio_fails_when_it_is_half_as_much_again(now, worse):
    (found,) = compared([RATIO], [replace(RATIO, measured=now)])

    assert found.is_worse is worse


def test_a_ratio_where_more_is_better_fails_when_it_shrinks():
    rate = replace(RATIO, measured=0.9, at_least=True)

    assert compared([rate], [replace(rate, measured=0.59)])[0].is_worse
    assert not compared([rate], [replace(rate, measured=0.61)])[0].is_worse


def test_a_ratio_that_is_measured_no_more_fails():
    """A renamed row would else be guarded by nothing."""
    assert compared([RATIO], [])[0].is_worse


def test_only_the_parts_that_ran_are_compared():
    assert compared([replace(RATIO, key="plans.growth")], []) == []


def test_the_better_of_two_turns_counts():
    first = {"verbs.filter": replace(RATIO, measured=2.0)}
    second = {"verbs.filter": replace(RATIO, measured=1.1)}

    assert check.better_of(first, second)["verbs.filter"].measured == 1.1
    assert check.better_of(second, first)["verbs.filter"].measured == 1.1


def test_committed_ratios_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text(check.written({"cores": 2}, {RATIO.key: RATIO}))

    assert check.read(path) == {RATIO.key: RATIO}


def test_the_check_says_which_ratio_is_worse(tmp_path, capsys):
    write(tmp_path / "verbs.json", {}, [replace(RATIO, measured=3.0)])
    committed = tmp_path / "ratios.json"
    committed.write_text(check.written({}, {RATIO.key: RATIO}))
    options = ["--only", "verbs", "--figures", str(tmp_path), "--committed", str(committed)]

    assert check.main(options) == 1
    assert "worse: filter (verbs.filter)" in capsys.readouterr().out

    assert check.main([*options, "--update"]) == 0
    assert check.main(options) == 0


def test_ratios_are_kept_by_part(tmp_path):
    """Parts name their rows themselves, and only those of parts that ran may be compared."""
    found = check.ratios_in("throughput", [replace(RATIO, key="whole"), replace(RATIO, ratio=False)])

    assert list(found) == ["throughput.whole"]


# --- growth and states ---


def test_a_power_law_is_found():
    law = fits.growth([(x, 3.0 * x**1.5) for x in (1, 10, 100, 1000)])

    assert law is not None
    assert (law.exponent, law.r2) == (1.5, 1.0)
    assert law.at(4) == pytest.approx(24.0)


def test_what_does_not_grow_has_no_exponent():
    law = fits.growth([(1, 5.0), (10, 5.0), (100, 5.0)])

    assert law is not None
    assert law.exponent == pytest.approx(0.0, abs=1e-9)


def test_two_points_are_no_law():
    """Any two points lie on one, which says nothing; and nothing has a logarithm at 0."""
    assert fits.growth([(0, 1.0), (1, 1.0), (10, 2.0)]) is None


def test_a_plot_is_a_png(tmp_path):
    panel = fits.Panel("latency", "nodes", "ms", {"filter": [(1, 1.0), (10, 2.0), (100, 4.0)]})

    assert fits.plot([[panel]], tmp_path / "deep" / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("axis", list(growth.POINTS))
def test_a_growth_point_can_be_asked_without_a_server(axis):
    """In process the verbs must do what they do over HTTP, and never wait."""
    world = growth.world_of(axis, 3, nodes=3)
    inside = growth.Inside(world.reports, most_nodes=0)
    world.prepare(inside)

    took = growth.measured(inside, world, seconds=0.0)

    assert took["filter"].count == growth.LEAST
    assert 0 < took["filter"].p50 <= took["filter"].p99


def test_memory_is_told_against_the_base_of_its_axis():
    points = [growth.Point("pods", value, 1, {}, mib) for value, mib in ((0, 100.0), (10, 103.0), (20, 106.0))]

    assert growth.lines_of(points) == {"pods": {"memory, MiB": [(10, 3.0), (20, 6.0)]}}


@pytest.mark.parametrize("workload", [states.whole, states.mig, states.mixed])
def test_a_week_keeps_count_of_states(workload):
    """There cannot be more states than nodes, nor fewer seen than there are now."""
    week = states.live(workload(10), DEFAULT_POLICY, days=0.5)

    assert week.counts[0].day == 0.0
    assert week.last.day == 0.5
    assert all(1 <= count.states <= 10 for count in week.counts)
    assert all(count.states <= count.seen for count in week.counts)
    assert week.changes > 0


def test_the_offered_load_is_what_was_asked_for():
    """Too few pods would leave states out, too many would leave the fleet full."""
    (stream,) = states.whole(100).streams

    assert stream.rate * stream.held == pytest.approx(states.LOAD * stream.capacity_milli)


def test_a_trace_tells_stays(tmp_path):
    file = tmp_path / "pods.csv"
    file.write_text("name,deletion_time,scheduled_time\na,100,40\nb,,40\n")

    assert list(states.read_stays(file)) == [60.0, 0.0]


def test_the_driver_asks_a_node_for_what_it_can_give():
    """Pods that can never fit would be no load, and the stated rate not the real one."""
    asked = {name: asks_for({"node": name, "gpus": gpus}) for name, gpus in BOARDS.items()}

    assert all(ask.endswith("gb") for ask in asked["cut"])
    assert not any(ask.endswith("gb") for ask in asked["whole"])
    assert set(asked["both"]) == set(HELD)


BOARDS = {"whole": [{"mig": None}], "cut": [{"mig": {}}], "both": [{"mig": None}, {"mig": {}}]}
