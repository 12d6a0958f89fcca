"""Dead letters for people to read. What stands in them was written by others: it is shown, and steers no terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from amqptasks.deadletters import Group, Letter, Moved
from amqptasks.deadletters.written import plain
from amqptasks.protocol.jsontypes import dumps

__all__ = ["show_groups", "show_letter", "shown", "tell", "written"]

_CELL, _MESSAGE = 300, 120
#: Columns in which any table of them has room.
_WIDE = 2000
#: Headers that `show_letter` shows in another place.
_TOLD = ("x-task-traceback", "x-task-exception", "x-task-exception-message", "x-death")


def shown(text: str, *, most: int | None = None, lines: bool = False) -> str:
    """A text with what a terminal would obey written out; at most so many characters of it."""
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        one if one.isprintable() or one in kept else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )


def written(value: Any) -> str:
    """An argument or header as JSON."""
    try:
        return json.dumps(json.loads(dumps(value)), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(plain(value), ensure_ascii=False)


def show_groups(groups: Sequence[Group]) -> None:
    """One row for letters that died of the same; on a terminal that is too narrow for a table, some lines each."""
    table = Table(box=None, pad_edge=False)
    for column in ("count", "queue", "task", "reason", "exception", "message", "first", "last", "an id"):
        table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    for one in groups:
        cells = (one.queue, one.task or "-", one.reason)
        table.add_row(
            str(one.count),
            *(shown(cell, most=_CELL) for cell in cells),
            "\n".join(shown(line, most=_CELL) for line in (one.exception or "-", *_frame(one))),
            shown(one.message or "-", most=_MESSAGE),
            _ago(one.first),
            _ago(one.last),
            shown(one.examples[0], most=_CELL),
        )
    # Brackets are no markup, and colons no emoji: they are what somebody's task is called.
    console = Console(width=None if sys.stdout.isatty() else 220, markup=False, emoji=False, highlight=False)
    needed = table.__rich_measure__(console, console.options.update(width=_WIDE)).maximum
    if not sys.stdout.isatty() or needed <= console.width:
        console.print(table)
        return
    width = max(len(str(one.count)) for one in groups)
    for one in groups:
        _show_group(one, width)


def _show_group(one: Group, width: int) -> None:
    """An id stays in one piece, so that it can be marked and copied."""
    task, queue = shown(one.task or "-", most=_CELL), shown(one.queue, most=_CELL)
    click.secho(f"{one.count:>{width}}  {task}", bold=True, nl=False)
    click.echo(f" in {queue}: {shown(one.reason, most=_CELL)}")
    error = ": ".join(filter(None, (one.exception, one.message)))
    lines = [shown(error, most=_CELL)] if error else []
    lines += [shown(line, most=_CELL) for line in _frame(one)]
    since = f"first {_ago(one.first)}, last {_ago(one.last)}" if one.count > 1 else _ago(one.first)
    for line in (*lines, since, shown(one.examples[0], most=_CELL)):
        click.echo(f"{'':>{width}}  {line}")


def _frame(one: Group) -> list[str]:
    return [one.top_frame] if one.top_frame else []


def _ago(moment: datetime | None) -> str:
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit} ago"
    return f"{max(0.0, seconds):.0f}s ago"


def show_letter(letter: Letter, call: dict[str, Any]) -> None:
    """One letter: call, error, traceback, how it came here, headers."""
    for name, value in _rows(letter, call):
        label = f"{name:<12}"
        click.echo(f"{click.style(label, bold=True) if sys.stdout.isatty() else label}{shown(value)}")
    if letter.traceback:
        click.echo(f"\n{shown(letter.traceback, lines=True)}")
    if letter.deaths:
        click.echo("\ndead-lettered by the broker, the latest first")
        for line in letter.deaths:
            click.echo(f"  {shown(line)}")
    click.echo("\nheaders")
    if letter.unreadable:
        click.echo("  (they cannot be read: there is a value of a kind that AMQP or Python does not have)")
    for name, value in sorted(letter.headers.items(), key=lambda item: str(item[0])):
        if name not in _TOLD:
            click.echo(f"  {shown(name if isinstance(name, str) else repr(name)):<24} {shown(written(value))}")


def _rows(letter: Letter, call: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from (("id", letter.id), ("queue", letter.queue), ("task", letter.task), ("reason", letter.reason))
    if letter.kept_in:
        yield "stands in", letter.kept_in
    yield "dead since", letter.died_at.isoformat() if letter.died_at else "-"
    yield from ((name, written(value)) for name, value in call.items())
    yield "exception", f"{letter.exception}: {letter.message}" if letter.exception else "-"


def tell(moved: Moved, word: str, as_json: bool, stopped: str | None = None, stay: str = "") -> None:
    """Say how many letters went, and which did not. Exits with 1 when some did not."""
    if as_json:
        ended = {} if stopped is None else {"stopped": stopped}
        click.echo(json.dumps({word: moved.moved, "failed": moved.failed, **ended}))
    else:
        click.echo(f"{moved.moved} letter{'' if moved.moved == 1 else 's'} {word}")
        for letter_id, error in moved.failed[:10]:
            click.echo(f"  {shown(letter_id, most=_CELL)}: {shown(error)}", err=True)
        if stopped is not None:
            click.echo(f"Error: it ended there: {shown(stopped)}{stay}", err=True)
        elif moved.failed:
            click.echo(f"Error: {len(moved.failed)} letters {stay or 'stay where they were'}", err=True)
    if moved.failed or stopped is not None:
        raise SystemExit(1)
