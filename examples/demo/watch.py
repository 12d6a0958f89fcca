"""Watches the work being done, by its results: rows, files, mails, dead letters. Nothing is taken on trust."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo.errors import DemoError

__all__ = ["Goal", "watch"]

# How long nothing may move. The longest wait in the work itself is a retry's, under a second.
_STALLED_SECONDS = 45.0
_LOOK_EVERY = 0.1


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that is to reach a number. `look` says where it stands."""

    label: str
    total: int
    look: Callable[[], int]


def watch(goals: list[Goal], console: Console, check: Callable[[], None]) -> float:
    """Show progress until all goals are reached; `check` raises when that has become impossible. Returns seconds.

    A live bar on a terminal, a line now and then elsewhere. Raises `DemoError` when nothing moves any more.
    """
    started = moved = time.monotonic()
    last: list[int] = []
    show = _bars(goals, console) if console.is_terminal else _lines(goals, console)
    with show as update:
        while True:
            now = [goal.look() for goal in goals]
            update(now)
            if all(count >= goal.total for count, goal in zip(now, goals, strict=True)):
                return time.monotonic() - started
            if now != last:
                last, moved = now, time.monotonic()
            elif time.monotonic() - moved > _STALLED_SECONDS:
                where = ", ".join(f"{goal.label} {count}/{goal.total}" for count, goal in zip(now, goals, strict=True))
                raise DemoError(f"nothing has moved for {_STALLED_SECONDS:.0f} s: {where}")
            check()
            time.sleep(_LOOK_EVERY)


@contextmanager
def _bars(goals: list[Goal], console: Console) -> Iterator[Callable[[list[int]], None]]:
    columns = (
        TextColumn("  {task.description:<18}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(goal.label, total=goal.total) for goal in goals]

        def update(counts: list[int]) -> None:
            for task, count in zip(tasks, counts, strict=True):
                progress.update(task, completed=count)

        yield update


@contextmanager
def _lines(goals: list[Goal], console: Console) -> Iterator[Callable[[list[int]], None]]:
    said: list[int] = []
    said_at = 0.0

    def update(counts: list[int]) -> None:
        nonlocal said, said_at
        done = all(count >= goal.total for count, goal in zip(counts, goals, strict=True))
        if counts == said or not (done or time.monotonic() - said_at >= 1.0):
            return
        said, said_at = counts, time.monotonic()
        parts = (f"{goal.label} {count}/{goal.total}" for count, goal in zip(counts, goals, strict=True))
        console.print("  " + ", ".join(parts), soft_wrap=True, highlight=False)

    yield update
