"""The order of the race: rounds, and in each of them every system in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.race import running
from benchmarks.race.records import Record, Records
from benchmarks.race.running import Place
from benchmarks.race.system import System

__all__ = ["Race", "Sizes", "spin_rounds"]


@dataclass(frozen=True)
class Sizes:
    """How much of it.

    Args:
        tasks: no-op tasks of a drain; the others have a part of it.
        seconds: the longest time of one drain or one way to publish. Slow systems do fewer tasks in it.
        calls: round trips.
    """

    tasks: int
    seconds: float
    calls: int

    @property
    def drains(self) -> dict[str, int]:
        """Tasks by what they do."""
        return {"noop": self.tasks, "wait": self.tasks, "cpu": self.tasks // 5}

    @property
    def publishing(self) -> dict[str, int]:
        """Messages by the way."""
        return {
            "one_by_one": self.tasks // 20,
            "threads": self.tasks // 4,
            "bulk": self.tasks,
            "callers": self.tasks // 4,
        }


def spin_rounds() -> int:
    """Rounds of an empty loop that take a millisecond: the fastest of some, as on a machine that is idle."""
    fastest = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100_000):
            pass
        fastest = min(fastest, time.perf_counter() - started)
    return int(100 / fastest)


class Race:
    """Runs it. `say` is called with a line for people for each value."""

    def __init__(
        self,
        systems: Sequence[System],
        only: Sequence[str],
        sizes: Sizes,
        *,
        everything: bool,
        say: Callable[[str], None],
    ) -> None:
        self._systems, self._only, self._sizes, self._everything, self._say = systems, only, sizes, everything, say
        self.records = Records()
        #: Drains of the last round, so that slow systems' queues are not filled in vain.
        self._rates: dict[tuple[str, str, str], float] = {}

    def prepare(self, places: Sequence[Place]) -> None:
        """Each system makes its queues."""
        for place in places:
            for system in self._systems:
                running.prepare(system, place)

    def round(self, number: int, places: Sequence[Place]) -> None:
        """Every discipline once. Each round begins with another system. The first place counts for all disciplines."""
        turn = number % len(self._systems)
        systems = [*self._systems[turn:], *self._systems[:turn]]
        for index, place in enumerate(places):
            for run in self._runs(everything=index == 0 or self._everything):
                for system in systems:
                    for measure, value in run(system, place):
                        self._add(measure, place.kind, system, number, value)
        if "help" in self._only:
            for system in systems:
                if system.help is not None:
                    self._add("help", "", system, number, running.help_seconds(system))

    def _add(self, measure: str, kind: str, system: System, number: int, value: float) -> None:
        self.records.all.append(Record(measure, kind, system.name, number, value))
        self._say(f"round {number + 1}  {measure:<20}{kind:<9}{system.name:<16}{value:>12,.2f}")

    def _runs(self, *, everything: bool) -> Iterator[Callable[[System, Place], Iterator[tuple[str, float]]]]:
        if "drain" in self._only:
            for what in self._sizes.drains if everything else ("noop",):
                yield lambda system, place, what=what: self._drain(system, place, what)
        if "publish" in self._only and everything:
            yield self._publish
        if "trip" in self._only and everything:
            yield self._trip

    def _drain(self, system: System, place: Place, what: str) -> Iterator[tuple[str, float]]:
        tasks = self._sizes.drains[what]
        key = (system.name, place.kind, what)
        if key in self._rates:
            tasks = min(tasks, max(1000, int(self._rates[key] * self._sizes.seconds * 2)))
        found = running.drain(system, place, what, tasks, self._sizes.seconds)
        self._rates[key] = found.rate
        yield f"drain-{what}", found.rate
        if what == "noop":
            yield "start", found.start
            yield "memory-parent", found.parent
            yield "memory-children", found.children
            yield "memory", found.parent + found.children

    def _publish(self, system: System, place: Place) -> Iterator[tuple[str, float]]:
        if system.publishes:
            found = running.publishing(system, place, self._sizes.publishing, self._sizes.seconds)
            yield from ((f"publish-{way}", rate) for way, rate in found.items())

    def _trip(self, system: System, place: Place) -> Iterator[tuple[str, float]]:
        times = sorted(running.trips(system, place, self._sizes.calls))
        yield "trip-p50", times[len(times) // 2] * 1000
        yield "trip-p99", times[int(len(times) * 0.99)] * 1000
