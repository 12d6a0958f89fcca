"""The race as bars, one panel per measure, in an SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.race.records import MEASURES, OURS, Records

mpl.use("svg")

from matplotlib import pyplot as plt

__all__ = ["SETTINGS", "draw", "plt"]

#: Text stays text, and the same figures make the same file.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "amqptasks", "font.size": 9, "font.family": "sans-serif"}
_PANELS = (
    "drain-noop",
    "drain-wait",
    "drain-cpu",
    "trip-p50",
    "publish-one_by_one",
    "publish-threads",
    "publish-bulk",
    "memory",
)
_FULL = {OURS: "#d9480f", "bare pika": "#adb5bd"}
_PALE = {OURS: "#f4b183", "bare pika": "#dee2e6"}
_GROUPS = {"drain": "drain", "publish": "publish", "trip": "", "memory": ""}


def _panel(axes: Any, records: Records, measure: str) -> None:
    about = MEASURES[measure]
    kinds = records.kinds(measure)
    bars = [
        (system, kind, value)
        for system in records.systems()
        for kind in kinds
        if (value := records.median(measure, kind, system)) is not None
    ]
    colors = [
        (_FULL.get(system, "#1c7ed6") if kind != "classic" else _PALE.get(system, "#a5d8ff"))
        for system, kind, _value in bars
    ]
    places = list(range(len(bars)))[::-1]
    drawn = axes.barh(places, [value for _system, _kind, value in bars], color=colors, height=0.8)
    axes.bar_label(drawn, labels=[f" {value:,.{about.digits}f}" for *_name, value in bars], fontsize=8)
    names = [f"{system}, classic" if kind == "classic" else system for system, kind, _value in bars]
    axes.set_yticks(places, names)
    group = _GROUPS[measure.partition("-")[0]]
    better = "" if about.more else ", less is better"
    axes.set_title(f"{group} {about.title}".strip() + f" ({about.unit}{better})", fontsize=10, loc="left")
    axes.margins(x=0.22)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw(records: Records, file: Path) -> None:
    """Write the picture."""
    panels = [one for one in _PANELS if records.kinds(one)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(rows, columns, figsize=(6 * columns, 2.9 * rows), squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                _panel(axes, records, panels[place])
            else:
                axes.set_visible(False)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        plt.close(figure)
