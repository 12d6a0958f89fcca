"""The curves as lines, a panel each, in an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.curves.measure import Point
from benchmarks.curves.shapes import Curve
from benchmarks.race.chart import SETTINGS, plt

__all__ = ["draw"]

_RATE, _COST = "#d9480f", "#1c7ed6"


def draw(curves: Sequence[Curve], points: Mapping[tuple[str, str], Point], file: Path) -> None:
    """Write the picture: tasks a second on the left, microseconds of processor time a task on the right."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(rows, columns, figsize=(5.5 * columns, 2.6 * rows), squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(curves):
                axes.set_visible(False)
                continue
            curve = curves[place]
            values = [shape.at for shape in curve.shapes]
            found = [points[curve.name, at] for at in values]
            axes.plot(values, [one.rate for one in found], color=_RATE, marker="o")
            axes.set_ylim(0)
            axes.set_title(curve.title, fontsize=10, loc="left")
            axes.tick_params(axis="y", colors=_RATE)
            axes.yaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
            axes.set_ylabel("tasks/s", color=_RATE)
            cost = axes.twinx()
            cost.plot(values, [one.cpu for one in found], color=_COST, marker="s", linestyle="--")
            cost.set_ylim(0)
            cost.tick_params(axis="y", colors=_COST)
            cost.set_ylabel("µs of CPU a task", color=_COST)
            axes.spines["top"].set_visible(False)
            cost.spines["top"].set_visible(False)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        plt.close(figure)
