"""`make bench-quality OPENB=PATH`: every figure about the quality of placement, as tables, JSON and plots.

    parts (each one `tangram …  --json`) ──as many at a time as there are cores──▶ out/bench/quality/PART.json
    all of them ──▶ tables in the terminal, out/bench/quality.json, plots in docs/

A part whose file is there already is not run again with `--resume`. Nothing here decides or measures anything
by itself; the commands do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TRACES = ("default", "gpuspec33", "gpushare40", "multigpu20")
BOUNDS = {"default": 96.9, "gpuspec33": 96.4, "gpushare40": 95.7, "multigpu20": 97.3}
"""What an offline plan that may reject freely could allocate at 100 % load (benchmarks.md, section 1)."""

OPENB_POLICIES = ("potential", "fgd", "best-fit", "first-fit", "dot-product", "random")
MIG_POLICIES = ("market", "options", "mfi", "best-fit", "first-fit", "repack")
MIG_LOADS = (0.7, 0.8, 0.85, 0.9, 1.0, 1.1, 1.2)
PLAN_MIXES = ("GPUs and slices", "several slices", "shares and CPU")
MIG_BOARDS = ("H100-80", "A30-24", "RTXPRO6000-96")
SHOWN_LOADS = ("80", "90", "95", "100", "110", "130")

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One command whose answer is JSON."""

    name: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", *self.arguments]


def parts(openb: Path | None, *, quick: bool) -> list[Part]:
    """Everything there is to run; `quick` means fewer seeds and worlds, for trying the bench itself."""
    found = []
    for trace in TRACES if openb is not None else ():
        for policy in OPENB_POLICIES:
            files = (f"--nodes={_nodes(openb)}", f"--pods={_pods(openb, trace)}")
            seeds = "42-43" if quick else "42-51"
            command = ("app.cli", "replay", "openb", *files, f"--policy={policy}", f"--seeds={seeds}", "--json")
            found.append(Part(f"openb-{trace}-{policy}", command))
    seeds = "7-8" if quick else "7-16"
    for policy in MIG_POLICIES:
        for mix, loads in (("uniform", MIG_LOADS), ("skew-big", (0.85, 1.0))):
            for load in loads:
                options = [f"--mix={mix}", f"--load={load}", f"--policy={policy}", f"--seeds={seeds}", "--json"]
                found.append(Part(f"mig-{mix}-{load}-{policy}", ("app.cli", "replay", "mig", *options)))
    for board in MIG_BOARDS:
        for policy in ("market", "options", "best-fit"):
            options = [f"--geometry={board}", f"--policy={policy}", f"--seeds={seeds}", "--json"]
            found.append(Part(f"mig-{board}-{policy}", ("app.cli", "replay", "mig", *options)))
    found.append(Part("boards", ("app.replay.boards",)))
    worlds = "20" if quick else "1000"
    for mix in PLAN_MIXES:
        options = ["compare", f"--worlds={worlds}", f"--mix={mix}", "--json"]
        found.append(Part(f"plans-{mix.replace(' ', '-')}", ("app.replay.plans", *options)))
    found.append(Part("plans-size", ("app.replay.plans", "size", "--json")))
    return found


def _nodes(openb: Path | None) -> Path:
    assert openb is not None
    return openb / "csv" / "openb_node_list_gpu_node.csv"


def _pods(openb: Path | None, trace: str) -> Path:
    assert openb is not None
    return openb / "csv" / f"openb_pod_list_{trace}.csv"


def run_all(wanted: Sequence[Part], out: Path, *, workers: int, resume: bool, console: Console) -> dict[str, Any]:
    """Run the parts, some at a time; a part that fails is told and left out."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    began = time.monotonic()

    def run(part: Part) -> str:
        file = out / f"{part.name}.json"
        if resume and file.exists():
            found[part.name] = json.loads(file.read_text())
            return "kept"
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(part.command, capture_output=True, text=True, env={**os.environ, **threads})  # noqa: S603
        if done.returncode:
            return f"failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
        file.write_text(done.stdout)
        found[part.name] = json.loads(done.stdout)
        return "done"

    with ThreadPoolExecutor(workers) as pool:
        for number, (part, said) in enumerate(zip(wanted, pool.map(run, wanted), strict=True), start=1):
            console.print(f"[{number}/{len(wanted)}] {time.monotonic() - began:5.0f} s  {part.name}: {said}")
    return found


# --- tables ---


def show(found: Json, console: Console) -> None:
    """All tables that the parts allow."""
    _show_openb(found, console)
    _show_mig(found, console)
    _show_boards(found, console)
    compared = [found.get(f"plans-{mix.replace(' ', '-')}") for mix in PLAN_MIXES]
    rows = [row for part in compared if part is not None for row in part["rows"]]
    if rows:
        _show_rows("The joint plan of 200 pods on random half-full clusters, against one by one", rows, console)
    if "plans-size" in found:
        _show_rows("The joint plan by size", found["plans-size"]["rows"], console)


def _show_openb(found: Json, console: Console) -> None:
    table = Table(title="openb: GPU allocation, % (mean ± deviation over the seeds) at so much arrived load")
    for title in ("Trace", "Policy", "Ties", *(f"{load} %" for load in SHOWN_LOADS), "Bound"):
        table.add_column(title, justify="left" if title in ("Trace", "Policy", "Ties") else "right")
    dropped = Table(title="openb: pods dropped, % of their class; microseconds of a decision and of its upkeep")
    for title in ("Trace", "Policy", "CPU-only", "multi-GPU", "one GPU", "shares", "p50", "p99", "upkeep p50", "p99"):
        dropped.add_column(title, justify="left" if title in ("Trace", "Policy") else "right")
    for trace in TRACES:
        for policy in OPENB_POLICIES:
            part = found.get(f"openb-{trace}-{policy}")
            if part is None:
                continue
            said = part["policies"][0]
            cells = [_mean(said["allocation_percent"][load]) for load in SHOWN_LOADS]
            table.add_row(trace, policy, said["ties"], *cells, str(BOUNDS[trace]))
            sizes = [f"{said['rejected_percent'][size]:.2f}" for size in ("CPU-only", "multi-GPU", "one GPU", "shares")]
            times = [f"{said[kind][p]:.0f}" for kind in ("decision_us", "upkeep_us") for p in ("p50", "p99")]
            dropped.add_row(trace, policy, *sizes, *times)
    if table.rows:
        console.print(table)
        console.print(dropped)


def _mean(said: Json | None) -> str:
    return f"{said['mean']:.2f} ± {said['sd']:.2f}" if said else "–"


def _show_mig(found: Json, console: Console) -> None:
    table = Table(title="MIG loss system: slice-demand accepted, % (requests in brackets), 100 GPUs")
    for title in ("Board, mix, load", *MIG_POLICIES):
        table.add_column(title, justify="left" if title.startswith("Board") else "right")
    rows = [(f"classic, {mix}, {load}", f"mig-{mix}-{load}") for mix in ("uniform", "skew-big") for load in MIG_LOADS]
    rows += [(f"{board}, uniform, 1.0", f"mig-{board}") for board in MIG_BOARDS]
    for title, name in rows:
        cells = [found.get(f"{name}-{policy}") for policy in MIG_POLICIES]
        if any(cells):
            table.add_row(title, *(_accepted(cell) for cell in cells))
    if table.rows:
        console.print(table)


def _accepted(part: Json | None) -> str:
    if part is None:
        return "–"
    said = part["policies"][0]
    return f"{said['slice_demand_percent']:.2f} ({said['requests_percent']:.2f})"


def _show_boards(found: Json, console: Console) -> None:
    if "boards" in found:
        _show_rows("The best set of GPUs, against every set there is", found["boards"]["rows"], console)


def _show_rows(title: str, rows: Sequence[Json], console: Console) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# --- plots ---


def plot(found: Json, docs: Path) -> list[Path]:
    """Allocation and fragmentation against load, accepted against load. Needs matplotlib (`make setup` has it)."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "t"})
    written = []
    if any(name.startswith("openb-") for name in found):
        for what, words, name in (
            ("allocation_percent", "GPU allocation, %", "openb-allocation.svg"),
            ("fragmentation_percent", "idle GPU that the mix cannot use, % of all", "openb-fragmentation.svg"),
        ):
            figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), sharey=True)
            for axis, trace in zip(axes, TRACES, strict=True):
                for policy in OPENB_POLICIES:
                    part = found.get(f"openb-{trace}-{policy}")
                    if part is not None:
                        _line(axis, part["policies"][0][what], policy)
                if what == "allocation_percent":
                    axis.axhline(BOUNDS[trace], linestyle=":", color="black", linewidth=1, label="bound at 100 %")
                axis.set_title(trace)
                axis.set_xlabel("arrived load, %")
            axes[0].set_ylabel(words)
            axes[-1].legend(frameon=False, fontsize=8)
            written.append(_saved(figure, docs / name))
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for policy in MIG_POLICIES:
        points = [(load, found.get(f"mig-uniform-{load}-{policy}")) for load in MIG_LOADS]
        known = [(load, part["policies"][0]["slice_demand_percent"]) for load, part in points if part is not None]
        if known:
            _draw(axis, known, policy, dashed=policy == "repack")
    axis.set_xlabel("offered load")
    axis.set_ylabel("slice-demand accepted, %")
    axis.legend(frameon=False, fontsize=8)
    written.append(_saved(figure, docs / "mig-accepted.svg"))
    pyplot.close("all")
    return written


def _line(axis: Any, by_load: Mapping[str, Json | None], policy: str) -> None:
    known = [(float(load), said["mean"]) for load, said in by_load.items() if said]
    _draw(axis, known, policy)


def _draw(axis: Any, points: Iterable[tuple[float, float]], policy: str, *, dashed: bool = False) -> None:
    xs, ys = zip(*points, strict=True)
    ours = policy in ("potential", "market")
    axis.plot(xs, ys, label=policy, linewidth=2.2 if ours else 1.1, linestyle="--" if dashed else "-")


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path


def main() -> int:
    """Entry point of `make bench-quality`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--openb", type=Path, help="folder of the openb trace (with csv/ in it)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the plots go")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--resume", action="store_true", help="keep parts that have been run")
    parser.add_argument("--quick", action="store_true", help="few seeds and worlds: tries the bench, measures nothing")
    given = parser.parse_args()
    console = Console(highlight=False, width=160)
    if given.openb is None or not _nodes(given.openb).exists():
        console.print(
            "Without the openb trace its tables are left out. OPENB=PATH names the folder that has "
            "csv/openb_node_list_gpu_node.csv and csv/openb_pod_list_*.csv of the Alibaba GPU cluster trace 2023, "
            "as used by FGD (hkust-adsl/kubernetes-scheduler-simulator, data/csv)."
        )
        given.openb = None
    wanted = parts(given.openb, quick=given.quick)
    found = run_all(wanted, given.out / "quality", workers=given.workers, resume=given.resume, console=console)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    (given.out / "quality.json").write_text(json.dumps({"machine": machine, "parts": found}, indent=1))
    show(found, console)
    if not given.quick:
        for path in plot(found, given.docs):
            console.print(f"plot: {path}")
    return 0 if len(found) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
