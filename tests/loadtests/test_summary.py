"""What is told of many calls."""

import json
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from loadtests.summary import Histogram, Recorder, console, table_of

TIMES = st.lists(st.floats(0.001, 1e5), min_size=1, max_size=200)


@given(TIMES, st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_within_one_percent_of_the_true_one(times, share):
    histogram = Histogram()
    for ms in times:
        histogram.add(ms)
    true = sorted(times)[math.ceil(share * len(times)) - 1]
    assert 0.99 * true <= histogram.percentile(share) <= 1.0101 * true
    assert histogram.largest == max(times)


def test_what_two_processes_record_is_as_if_one_had():
    """Sent as locust sends it: through something like JSON, without a loss."""
    rng = random.Random(1)
    whole, first, second = Recorder(), Recorder(), Recorder()
    for number in range(400):
        late, error = (rng.random(), "") if number % 3 else (None, "broken")
        for recorder in (whole, (first, second)[number % 2]):
            recorder.record(f"filter {number % 5}", number / 7, late_ms=late, error=error, refused=number % 11 == 0)
    first.add(Recorder.read(second.wire()))
    assert first.rows(10.0) == whole.rows(10.0)
    assert first.failures() == whole.failures()


def test_a_call_is_compared_with_its_echo():
    recorder = Recorder()
    for _ in range(10):
        recorder.record("filter 500", 3.0)
        recorder.record("echo filter 500", 2.0)
        recorder.record("bind", 1.0)
    rows = {row["name"]: row for row in recorder.rows(1.0)}
    assert 1.49 < rows["filter 500"]["to_echo"]["p50"] < 1.51
    assert rows["bind"]["to_echo"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_failed_calls_have_no_time_and_fail_the_test():
    recorder = Recorder()
    recorder.record("filter 5", 1.0)
    recorder.record("filter 5", 9000.0, error="status 500")
    assert recorder.rows(1.0)[0]["max_ms"] == 1.0
    assert recorder.failures() == ["1 × filter 5: status 500"]


def test_a_test_that_did_nothing_has_failed():
    assert Recorder().failures() == ["nothing was sent"]
    recorder = Recorder()
    recorder.record("bind", 1.0, refused=True)
    assert recorder.failures() == ["every bind was refused"]


def test_a_table_can_be_printed_of_everything(capsys):
    recorder = Recorder()
    recorder.record("filter 5000", 1.0)
    recorder.record("filter 100", 1.0, error="x")
    recorder.record("beat", 1.0, late_ms=5.0)
    console().print(table_of("all", recorder.rows(1.0)))
    assert "filter 5000" in capsys.readouterr().out
