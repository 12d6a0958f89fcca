"""The curves as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.curves.measure import Point
from benchmarks.curves.shapes import Curve
from benchmarks.race.report import number, table

__all__ = ["markdown", "medians"]


def medians(found: Mapping[tuple[str, str], Sequence[Point]]) -> dict[tuple[str, str], Point]:
    """Of the rounds."""
    return {
        key: Point(statistics.median(one.rate for one in points), statistics.median(one.cpu for one in points))
        for key, points in found.items()
    }


def markdown(curves: Iterable[Curve], points: Mapping[tuple[str, str], Point]) -> str:
    """A table for each curve."""
    parts = []
    for curve in curves:
        rows = [
            [shape.at, number(points[curve.name, shape.at].rate), number(points[curve.name, shape.at].cpu)]
            for shape in curve.shapes
        ]
        parts.append(table([curve.title, "tasks/s", "µs of CPU a task"], rows))
    return "\n\n".join(parts)
