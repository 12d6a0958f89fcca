"""What varies along each curve, and how much of it is drained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["CURVES", "Curve", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One point of a curve.

    Args:
        at: the value that varies, as people read it.
        tasks: how many are drained and measured; at most as many as wait.
        waiting: how many wait when the worker starts; as many as are drained where it is 0.
        queues: how many queues, each with `processes` executors of its own.
        size: bytes of the argument; 0: there is none.
        prefetch: messages in hand, or ``auto``.
        delayed: so many other tasks wait in the delay ladder meanwhile.
    """

    at: str
    tasks: int = 20_000
    waiting: int = 0
    queues: int = 1
    processes: int = 2
    size: int = 0
    prefetch: str = "auto"
    delayed: int = 0

    @property
    def filled(self) -> int:
        """How many messages are put into the queues."""
        return max(self.tasks, self.waiting)


@dataclass(frozen=True)
class Curve:
    """One thing that varies. `title` heads its column; all else is the default, with two executors."""

    name: str
    title: str
    shapes: tuple[Shape, ...] = field(default=())


def _curve(name: str, title: str, values: Mapping[str, int], make: Callable[[str, int], Shape]) -> Curve:
    return Curve(name, title, tuple(make(at, value) for at, value in values.items()))


_SIZES = {"100 B": 100, "1 KiB": 1 << 10, "10 KiB": 10 << 10, "100 KiB": 100 << 10, "1 MiB": 1 << 20}

CURVES = (
    _curve(
        "processes",
        "executors of one queue",
        {str(one): one for one in (1, 2, 4, 8)},
        lambda at, value: Shape(at, processes=value),
    ),
    _curve(
        "queues",
        "queues, an executor each",
        {str(one): one for one in (1, 10, 100)},
        lambda at, value: Shape(at, queues=value, processes=1),
    ),
    _curve(
        "waiting",
        "messages that wait",
        {"10 k": 10_000, "100 k": 100_000, "1 M": 1_000_000},
        lambda at, value: Shape(at, tasks=min(value, 20_000), waiting=value),
    ),
    # As much data in all as ten thousand of 10 KiB, and no more tasks than elsewhere.
    _curve(
        "size",
        "size of the argument",
        _SIZES,
        lambda at, value: Shape(at, tasks=max(300, min(20_000, 100 * (1 << 20) // value)), size=value),
    ),
    _curve(
        "prefetch",
        "prefetch",
        {**{str(one): one for one in (1, 2, 8, 32, 128, 1000)}, "auto": 0},
        lambda at, _value: Shape(at, tasks=4_000 if at in {"1", "2"} else 20_000, prefetch=at),
    ),
    _curve(
        "delayed",
        "delayed tasks that wait",
        {"0": 0, "100 k": 100_000},
        lambda at, value: Shape(at, delayed=value),
    ),
)
