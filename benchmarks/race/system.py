"""What the race knows of a system. Imported by workers: light."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["CALLERS", "DRAINS", "THREADS", "WINDOW", "Client", "System"]

#: What is drained: tasks that do nothing, that wait for 10 ms (asyncio where the system has it), that compute for 1 ms.
DRAINS = ("noop", "wait", "cpu")
#: Threads that publish at the same time; messages on their way in bulk; callers of asyncio.
THREADS, WINDOW, CALLERS = 8, 1000, 100


class Client(Protocol):
    """Publishes no-op tasks, each confirmed, and makes round trips. A system's file has one as `client()`.

    `callers`, publishing by `CALLERS` callers in asyncio, is left out by systems that have no asyncio.
    """

    def one_by_one(self, count: int) -> None:
        """The next when the last is confirmed."""

    def threads(self, count: int) -> None:
        """From `THREADS` threads, or as many coroutines where the system has asyncio only."""

    def bulk(self, count: int) -> None:
        """As fast as it can."""

    def trip(self, number: int) -> int:
        """Call the task that adds 1 and wait for its value."""


@dataclass(frozen=True)
class System:
    """One that races.

    Args:
        name: in tables.
        module: its file, under `benchmarks.race.systems`; that has `client()` too.
        worker: ``noop``, ``wait``, ``cpu`` or ``trip``, and the queue -> command of a worker, without the interpreter.
        wire: task's name and queue -> body and `pika.BasicProperties` of a message as its own client makes it.
        settings: what is drained, published or tripped -> the settings, in words, with the reason.
        help: its command line's `--help`, without the interpreter; None: it has none.
        ceiling: the limit of the broker, not a system to choose.
        publishes: whether it takes part in publishing; a second pool of a system has the same client.
        environment: more variables of its worker by what it is for.
    """

    name: str
    module: str
    worker: Callable[[str, str], list[str]]
    wire: Callable[[str, str], tuple[bytes, Any]]
    settings: Mapping[str, str]
    help: list[str] | None = None
    ceiling: bool = False
    publishes: bool = True
    environment: Callable[[str], Mapping[str, str]] = lambda _work: {}

    def queue(self, kind: str) -> str:
        """The queue of its own, by the queue's type."""
        return f"race-{self.name.replace(' ', '-')}-{kind}"
