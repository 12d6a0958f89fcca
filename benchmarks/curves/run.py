"""Measures the curves, and writes what came out."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.curves import picture
from benchmarks.curves.measure import Bench, Point
from benchmarks.curves.report import markdown, medians
from benchmarks.curves.shapes import CURVES, Curve
from benchmarks.race.node import machine, private_node
from benchmarks.race.report import given_command, replace_block
from benchmarks.race.run import IMAGES, PAGE

__all__ = ["run"]


def _chosen(named: str | None) -> list[Curve]:
    if named is None:
        return list(CURVES)
    wanted = [one.strip() for one in named.split(",")]
    if unknown := set(wanted) - {curve.name for curve in CURVES}:
        names = ", ".join(curve.name for curve in CURVES)
        raise SystemExit(f"no curve is named {', '.join(sorted(unknown))}; there are {names}")
    return [curve for curve in CURVES if curve.name in wanted]


def _measure(curves: Iterable[Curve], rounds: int, bench: Bench) -> dict[tuple[str, str], list[Point]]:
    found: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for turn in range(rounds):
        for curve in curves:
            for shape in curve.shapes:
                point = bench.measure(shape)
                found[curve.name, shape.at].append(point)
                told = f"round {turn + 1}  {curve.title:<26}{shape.at:>8}{point.rate:>10,.0f}/s{point.cpu:>10,.0f} µs"
                print(told, file=sys.stderr, flush=True)
    return found


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    curves = _chosen(options.only)
    started = time.monotonic()
    with private_node(options.rabbitmq) as node, tempfile.TemporaryDirectory(prefix="curves-") as folder:
        here = machine(node.url, options.rabbitmq)
        found = _measure(curves, options.rounds, Bench(node.url, Path(folder)))
    minutes = (time.monotonic() - started) / 60
    about = (
        f"{here}. {options.rounds} rounds in {minutes:.1f} minutes by `{given_command('benchmarks.curves')}`; medians."
    )
    if options.json:
        rows = [{"curve": key[0], "at": key[1], **asdict(one)} for key, points in found.items() for one in points]
        options.json.write_text(json.dumps({"about": about, "points": rows}, indent=1))
    points = medians(found)
    text = f"{about}\n\n{markdown(curves, points)}"
    print(text)
    if options.docs:
        picture.draw(curves, points, IMAGES / "curves.svg")
        replace_block(PAGE, "curves", f"![What a task costs as one thing grows](images/curves.svg)\n\n{text}")
