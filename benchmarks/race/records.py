"""What was measured, and medians and ratios of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MEASURES", "OURS", "Measure", "Record", "Records"]

OURS = "amqptasks"


@dataclass(frozen=True)
class Measure:
    """One thing that is measured: `title` is its column, `more` whether more is better, `digits` behind the point."""

    title: str
    unit: str
    more: bool = True
    digits: int = 0


MEASURES = {
    "drain-noop": Measure("no-op", "tasks/s"),
    "drain-wait": Measure("10 ms asyncio", "tasks/s"),
    "drain-cpu": Measure("1 ms CPU", "tasks/s"),
    "publish-one_by_one": Measure("one by one", "messages/s"),
    "publish-threads": Measure("8 threads", "messages/s"),
    "publish-bulk": Measure("bulk", "messages/s"),
    "publish-callers": Measure("asyncio, 100 callers", "messages/s"),
    "trip-p50": Measure("round trip p50", "ms", more=False, digits=2),
    "trip-p99": Measure("round trip p99", "ms", more=False, digits=2),
    "memory-parent": Measure("parent", "MiB", more=False),
    "memory-children": Measure("children", "MiB", more=False),
    "memory": Measure("memory", "MiB", more=False),
    "start": Measure("command to first task", "s", more=False, digits=2),
    "help": Measure("`--help`", "s", more=False, digits=2),
}


@dataclass(frozen=True)
class Record:
    """One system's value in one round. `kind` is the queues' type, or empty where there is no queue."""

    measure: str
    kind: str
    system: str
    round: int
    value: float


class Records:
    """All of a race."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.all = list(records)

    def values(self, measure: str, kind: str, system: str) -> dict[int, float]:
        """By round."""
        wanted = (measure, kind, system)
        return {one.round: one.value for one in self.all if (one.measure, one.kind, one.system) == wanted}

    def systems(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(one.system for one in self.all))

    def kinds(self, measure: str) -> list[str]:
        """Types of queues that it was measured with."""
        return list(dict.fromkeys(one.kind for one in self.all if one.measure == measure))

    def median(self, measure: str, kind: str, system: str) -> float | None:
        """Of all rounds; None where it was not measured."""
        values = self.values(measure, kind, system)
        return statistics.median(values.values()) if values else None

    def lead(self, measure: str, kind: str, system: str, ours: str = OURS) -> float | None:
        """How many times better than `system` ours is: the median of the rounds' own ratios.

        What slows the machine down for a while slows neighbours in a round down alike.
        """
        mine, theirs = self.values(measure, kind, ours), self.values(measure, kind, system)
        rounds = mine.keys() & theirs.keys()
        if not rounds:
            return None
        more = MEASURES[measure].more
        return statistics.median(mine[one] / theirs[one] if more else theirs[one] / mine[one] for one in rounds)

    def best(self, measure: str, kind: str, systems: Iterable[str]) -> str | None:
        """The best of `systems` by its median; None where none was measured."""
        found = {one: value for one in systems if (value := self.median(measure, kind, one)) is not None}
        if not found:
            return None
        return (max if MEASURES[measure].more else min)(found, key=lambda one: found[one])
