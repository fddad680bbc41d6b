"""How a cost grows: a power law through measured points, and plots of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Growth:
    """y = factor * x ** exponent, fitted on logarithms; `r2` is the part of their variance that it explains.

    Where y hardly changes there is nothing to explain, and a low `r2` beside an exponent near 0 means flat.
    """

    exponent: float
    factor: float
    r2: float

    def at(self, x: float) -> float:
        """What it foretells."""
        return float(self.factor * x**self.exponent)

    def __str__(self) -> str:
        return f"x^{self.exponent:.2f} (R² {self.r2:.2f})"


def growth(points: Points) -> Growth | None:
    """The law through points with positive x and y; None through fewer than three."""
    positive = [(x, y) for x, y in points if x > 0 and y > 0]
    if len(positive) < 3:
        return None
    x, y = np.log(np.array(positive, dtype=float)).T
    exponent, intercept = np.polyfit(x, y, 1)
    missed = float(((y - (exponent * x + intercept)) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - missed / spread if spread else 1.0
    return Growth(round(float(exponent), 4), float(np.exp(intercept)), round(r2, 4))


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: lines by name, on logarithmic axes; `fitted` draws the law of each beside it."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    fitted: bool = True
    logarithmic: bool = True


def plot(rows: Sequence[Sequence[Panel]], path: Path) -> Path:
    """A PNG of panels. Needs matplotlib (`make setup` has it)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    most = max(len(row) for row in rows)
    figure, axes = pyplot.subplots(len(rows), most, figsize=(4.3 * most, 3.9 * len(rows)), squeeze=False)
    for line_of_axes, row in zip(axes, rows, strict=True):
        for axis, panel in zip(line_of_axes, row, strict=False):
            _draw(axis, panel)
        for axis in line_of_axes[len(row) :]:
            axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close("all")
    return path


def _draw(axis: Any, panel: Panel) -> None:
    for name, points in panel.lines.items():
        shown = [(x, y) for x, y in points if not panel.logarithmic or (x > 0 and y > 0)]
        if not shown:
            continue
        law = growth(points) if panel.fitted else None
        xs, ys = zip(*shown, strict=True)
        label = f"{name}: {law}" if law else name
        (line,) = axis.plot(xs, ys, marker="o" if panel.fitted else "", markersize=3, linewidth=1.4, label=label)
        if law:
            axis.plot(xs, [law.at(x) for x in xs], linestyle=":", linewidth=1, color=line.get_color())
    if panel.logarithmic:
        _logarithmic(axis, sorted({x for points in panel.lines.values() for x, _ in points if x > 0}))
    else:
        axis.set_ylim(bottom=0)
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _logarithmic(axis: Any, xs: Sequence[float]) -> None:
    """Ticks where something was measured, and plain numbers."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(xs, [f"{x:,g}" for x in xs])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:.3g}") if high < 5 * low else NullFormatter())
