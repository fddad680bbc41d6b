"""Counters and histograms, applied from outside: what is measured never knows of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import sub

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.loop import LoopWatch
from app.schedule import JointPlan

BUCKETS = (
    *(0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.0025, 0.0035, 0.005, 0.007),
    *(0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.07, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 12.0),
)
"""Fine where answers are, so that a percentile read from them is not far off; chosen by feel."""

Gauges = Callable[[], Iterable[tuple[str, str, dict[str, float]]]]


class Metrics:
    """One registry for one app. `gauges()` is asked at each scrape for (name, help, {state: value})."""

    def __init__(self, gauges: Gauges, loop: LoopWatch) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.seconds = Histogram(
            "tangram_request_seconds",
            "Time to answer kube-scheduler",
            ["verb"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.answers = Counter(
            "tangram_answers", "Answers to kube-scheduler by kind", ["verb", "kind"], registry=self.registry
        )
        self.reports = Counter("tangram_reports", "Agents' reports", ["kind"], registry=self.registry)
        self.listens = Counter("tangram_listens", "Agents' requests for orders", ["kind"], registry=self.registry)
        self.held = Gauge("tangram_held_requests", "Agents that wait for orders now", registry=self.registry)
        self.plans = Counter("tangram_plans", "Joint plans by how they ended", ["status"], registry=self.registry)
        self.plan_seconds = Histogram(
            "tangram_plan_seconds",
            "Time of a joint plan: all of it, and in the solver",
            ["part"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.slice_seconds = Histogram(
            "tangram_slices_made_seconds",
            "Time that a bind waited for its MIG slices, those refused included",
            ["outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.handed = Counter(
            "tangram_handed", "Containers by how they came by their devices", ["how"], registry=self.registry
        )
        self.matching = Counter(
            "tangram_matching", "Containers by the rule that told whose they are", ["rule"], registry=self.registry
        )
        self.exchanges = Counter(
            "tangram_exchanges", "Exchanges of placements by outcome", ["outcome"], registry=self.registry
        )
        self.wakes = Counter("tangram_wakes", "Nodes touched to wake refused pods", registry=self.registry)
        self.registry.register(_Now(gauges))
        self.registry.register(_Blocked(loop))

    @contextmanager
    def timed(self, verb: str) -> Iterator[None]:
        """Count the time of one request."""
        with self.seconds.labels(verb).time():
            yield

    def answered(self) -> dict[str, tuple[int, ...]]:
        """By verb, how many requests took up to each of BUCKETS and more than the one before; last, those beyond."""
        so_far: dict[str, list[int]] = {}
        for sample in next(iter(self.seconds.collect())).samples:
            if sample.name.endswith("_bucket"):
                so_far.setdefault(sample.labels["verb"], [0]).append(int(sample.value))
        return {verb: tuple(map(sub, counts[1:], counts)) for verb, counts in so_far.items()}

    def count(self, name: str, label: str, number: int) -> None:
        """Count what `handing` sees: containers by how and by rule, exchanges by outcome."""
        {"handed": self.handed, "matching": self.matching, "exchanges": self.exchanges}[name].labels(label).inc(number)

    def slices_waited(self, made: bool, seconds: float) -> None:
        """Count a wait for slices."""
        self.slice_seconds.labels("made" if made else "refused").observe(seconds)

    def plan_made(self, plan: JointPlan, seconds: float) -> None:
        """Count a plan and what it took in all."""
        self.plans.labels(plan.status).inc()
        self.plan_seconds.labels("all").observe(seconds)
        self.plan_seconds.labels("solving").observe(plan.solving_seconds)

    def text(self) -> bytes:
        """The Prometheus exposition."""
        return generate_latest(self.registry)


class _Now(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, about, values in self._gauges():
            family = GaugeMetricFamily(name, about, labels=["state"])
            for state, value in values.items():
                family.add_metric([state], value)
            yield family


class _Blocked(Collector):
    def __init__(self, loop: LoopWatch) -> None:
        self._clocks = {"wall": loop.wall, "own": loop.own}

    def collect(self) -> Iterator[Metric]:
        about = "How long the event loop did nothing else (wall), and how much of that was its own work (own)"
        family = HistogramMetricFamily("tangram_loop_blocked_seconds", about, labels=["clock"])
        longest = GaugeMetricFamily(
            "tangram_loop_blocked_longest_seconds", "The longest of it", labels=["clock", "since"]
        )
        for clock, late in self._clocks.items():
            family.add_metric([clock], late.buckets(), late.total)
            longest.add_metric([clock, "start"], late.longest)
            longest.add_metric([clock, "scrape"], late.take_longest_lately("scrape"))
        yield family
        yield longest
