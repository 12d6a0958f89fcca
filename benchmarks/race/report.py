"""The race as Markdown, and its place in a page."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.race.goals import Goal, goals
from benchmarks.race.records import MEASURES, OURS, Records

__all__ = ["given_command", "goal_table", "markdown", "number", "replace_block", "table"]

#: Title and columns (measure, kind) of each table; columns that were not measured are left out.
_TABLES = (
    (
        "Drain, tasks a second",
        [(f"drain-{what}", kind) for what in ("noop", "wait", "cpu") for kind in ("quorum", "classic")],
    ),
    (
        "Publish with confirms, messages a second",
        [
            (f"publish-{way}", kind)
            for way in ("one_by_one", "threads", "bulk", "callers")
            for kind in ("quorum", "classic")
        ],
    ),
    ("Round trip, ms", [(f"trip-{part}", kind) for kind in ("quorum", "classic") for part in ("p50", "p99")]),
    (
        "Memory (PSS of all processes, MiB) and start (s)",
        [
            ("memory-parent", "quorum"),
            ("memory-children", "quorum"),
            ("memory", "quorum"),
            ("start", "quorum"),
            ("help", ""),
        ],
    ),
)


def number(value: float, digits: int = 0) -> str:
    """For people."""
    return f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is left-aligned, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(records: Records, measure: str, kind: str, system: str) -> str:
    value = records.median(measure, kind, system)
    if value is None:
        return "–"
    text = number(value, MEASURES[measure].digits)
    lead = records.lead(measure, kind, system) if system != OURS else None
    return text if lead is None or measure in {"memory-parent", "memory-children"} else f"{text} ({lead:.2g}×)"


def _system_table(records: Records, columns: Sequence[tuple[str, str]]) -> str | None:
    there = [(measure, kind) for measure, kind in columns if kind in records.kinds(measure)]
    if not there:
        return None
    kinds = {kind for _measure, kind in there if kind}
    header = ["", *[MEASURES[m].title + (f", {kind}" if len(kinds) > 1 and kind else "") for m, kind in there]]
    rows = []
    for system in records.systems():
        cells = [_cell(records, measure, kind, system) for measure, kind in there]
        if any(cell != "–" for cell in cells):
            rows.append([f"**{system}**" if system == OURS else system, *cells])
    return table(header, rows)


def goal_table(found: Iterable[Goal]) -> str | None:
    """Goals, what was measured, and whether it is enough."""
    rows = []
    for goal in found:
        digits = 0 if goal.measured >= 100 else 2
        wanted = f"{'≤' if goal.most else '≥'} {number(goal.wanted, digits)} {goal.unit}"
        rows.append(
            [goal.text, wanted, f"{number(goal.measured, digits)} {goal.unit}", "yes" if goal.reached else "**no**"]
        )
    return table(["goal", "wanted", "measured", "reached"], rows) if rows else None


def markdown(records: Records, about: str, chart: str | None) -> str:
    """All tables. `about`: a sentence on the run; `chart`: the picture's path, from the page."""
    parts = [about]
    if chart:
        parts.append(f"![The race as bars]({chart})")
    if (judged := goal_table(goals(records))) is not None:
        parts.append(judged)
    for title, columns in _TABLES:
        if (made := _system_table(records, columns)) is not None:
            kinds = {kind for measure, kind in columns if kind in records.kinds(measure) and kind}
            parts.append(f"**{title}**{f' ({kinds.pop()} queues)' if len(kinds) == 1 else ''}")
            parts.append(made)
    return "\n\n".join(parts)


def given_command(module: str) -> str:
    """The command that runs, without the file that it writes its values to."""
    return re.sub(r" --json[ =]\S+", "", shlex.join(["python", "-m", module, *sys.argv[1:]]))


def replace_block(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's markers ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises ValueError when the page has no such markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = page.read_text()
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no {begin} … {end}")
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
