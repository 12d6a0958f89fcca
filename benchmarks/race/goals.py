"""What amqptasks is to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.race.records import OURS, Records

__all__ = ["Goal", "goals"]

_CEILING = "bare pika"
_CELERY = "celery prefork"


@dataclass(frozen=True)
class Goal:
    """One of them. `most`: the measured value is to be at most, not at least, what is wanted."""

    text: str
    wanted: float
    measured: float
    unit: str = "×"
    most: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.measured <= self.wanted if self.most else self.measured >= self.wanted


#: Measure, kind, beside whom (None: the best peer), how many times at least, in words.
_RATIOS = (
    ("drain-noop", "quorum", _CELERY, 7.0, "no-op drain, quorum"),
    ("drain-noop", "quorum", None, 3.0, "no-op drain, quorum"),
    ("drain-noop", "quorum", _CEILING, 0.7, "no-op drain, quorum"),
    ("drain-noop", "classic", _CELERY, 5.0, "no-op drain, classic"),
    ("drain-noop", "classic", None, 2.5, "no-op drain, classic"),
    ("drain-wait", "quorum", None, 2.0, "10 ms asyncio drain, quorum"),
    ("publish-one_by_one", "quorum", _CEILING, 0.9, "publish one by one, quorum"),
    ("publish-bulk", "quorum", _CEILING, 0.7, "publish in bulk, quorum"),
    ("memory", "quorum", _CELERY, 2.0, "memory of a worker"),
)


def goals(records: Records) -> Iterator[Goal]:
    """Those that this race can judge."""
    peers = [one for one in records.systems() if one not in {OURS, _CEILING}]
    for measure, kind, beside, wanted, words in _RATIOS:
        other = beside or records.best(measure, kind, peers)
        found = records.lead(measure, kind, other) if other else None
        if found is not None:
            name = other if beside else f"the best peer ({other})"
            yield Goal(f"{words}, beside {name}", wanted, found)
    threads, bulk = (records.median(f"publish-{way}", "quorum", OURS) for way in ("threads", "bulk"))
    if threads and bulk:
        if threads >= 8000:
            yield Goal("publish from 8 threads, quorum", 8000, threads, "messages/s")
        else:
            yield Goal("publish from 8 threads, quorum, beside bulk", 0.4, threads / bulk)
    for measure, kind, wanted, words in (
        ("start", "quorum", 0.5, "command to first task"),
        ("help", "", 0.15, "`amqptasks --help`"),
    ):
        found = records.median(measure, kind, OURS)
        if found is not None:
            yield Goal(words, wanted, found, "s", most=True)
