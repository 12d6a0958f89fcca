"""The table that ``amqptasks queues`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from amqptasks.broker.queue_figures import Age, QueueFigures

__all__ = ["table"]

_SIGNS = {"about": "", "at least": "> ", "at most": "< "}
_UNKNOWN = "-"


#: Columns that all figures need, beside a queue's name.
_FIGURES = 70


def table(queues: Sequence[QueueFigures], width: int) -> Table:
    """One row a queue. What is not known is a dash. Where `width` is too little, names are folded, and not figures."""
    with_type = width >= _FIGURES + max((len(one.name) for one in queues), default=0)
    shown = Table(box=None, pad_edge=False, padding=(0, 2 if with_type else 1, 0, 0))
    shown.add_column("queue", overflow="fold")
    if with_type:
        shown.add_column("type", no_wrap=True)
    for name in ("ready", "unacked", "consumers", "in/s", "out/s", "oldest", "empty in"):
        shown.add_column(name, no_wrap=True, justify="right")
    for one in queues:
        # Names may be anybody's: Text takes no markup from them, and what steers a terminal goes.
        name = "".join(letter if letter.isprintable() else " " for letter in one.name)
        if one.ready is None:
            missing = Text("not in the broker", style="red")
            shown.add_row(*([Text(name), missing] if with_type else [Text.assemble(name, " ", missing)]))
            continue
        shown.add_row(
            Text(name),
            *([one.kind or _UNKNOWN] if with_type else []),
            Text(str(one.ready), style=_colour(one)),
            _number(one.unacknowledged),
            _number(one.consumers),
            _rate(one.rate_in),
            _rate(one.rate_out),
            _age(one),
            _empty_in(one),
        )
    return shown


def _colour(one: QueueFigures) -> str:
    if not one.ready:
        return "green"
    # A dead-letter queue has no consumers, and yet wants a look.
    return "red" if not one.consumers else "yellow"


def _number(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)


def _rate(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0f}" if value >= 100 or not value else f"{value:.1f}"


def _age(one: QueueFigures) -> str:
    if not one.ready:
        return ""
    return _bounded(one.oldest)


def _bounded(age: Age | None) -> str:
    return _UNKNOWN if age is None else f"{_SIGNS[age.exactly]}{_duration(age.seconds)}"


def _empty_in(one: QueueFigures) -> str:
    if one.rate_in is None or one.rate_out is None:
        return _UNKNOWN if one.ready or one.unacknowledged else ""
    seconds = one.seconds_to_empty
    if seconds is None:
        return "grows" if one.rate_in > one.rate_out else "never"
    return _duration(seconds) if seconds else ""


def _duration(seconds: float) -> str:
    """In the two largest units: 42s, 3m10s, 2h05m, 4d12h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
