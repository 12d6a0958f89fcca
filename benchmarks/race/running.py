"""Workers and clients as processes of their own: started, measured, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from amqptasks.testing.waiting import wait_until
from benchmarks.race import filling
from benchmarks.race.environment import ROOT
from benchmarks.race.system import System
from benchmarks.race.work import MARK_BYTES, MARK_EVERY

__all__ = ["Drained", "Place", "Worker", "drain", "help_seconds", "prepare", "publishing", "trips"]

_START_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where it happens.

    Args:
        url: of the node.
        kind: of queues, quorum or classic.
        folder: for what workers write.
        redis: URL of results for systems without their own; empty where none runs.
        spin: rounds of a loop that take a millisecond.
    """

    url: str
    kind: str
    folder: Path
    redis: str
    spin: int

    def environment(self, system: System, what: str) -> dict[str, str]:
        """The variables of a worker or client."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RACE_URL": self.url,
            "RACE_TYPE": self.kind,
            "RACE_QUEUE": system.queue(self.kind),
            "RACE_MARKS": str(self.folder / "marks"),
            "RACE_REDIS": self.redis,
            "RACE_SPIN": str(self.spin),
            "RACE_WORK": what,
            **system.environment(what),
        }


class Worker:
    """A worker's processes, killed at the end of the context: what it had in hand goes back to its queue.

    `started` is the time of its command.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self.started = time.time()
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *command],
                env=dict(environment),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.tree():
            with suppress(psutil.NoSuchProcess):
                one.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def tree(self) -> list[psutil.Process]:
        """Parent first."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> tuple[float, float]:
        """MiB that the parent has, and that all others have together: proportional set size, so shared pages once."""
        sizes = [one.memory_full_info().pss / 2**20 for one in self.tree()]
        return sizes[0], sum(sizes[1:])

    def wait(self, until: Callable[[], Any], seconds: float, what: str) -> None:
        """Raises RuntimeError with the end of its log when the worker ends meanwhile, or the time."""

        def look() -> Any:
            if self.process.poll() is not None:
                raise RuntimeError(f"{what}: the worker ended with {self.process.returncode}\n{self._tail()}")
            return until()

        try:
            wait_until(look, seconds, what, pause=0.02)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self._tail()}") from None

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def worker(system: System, place: Place, what: str) -> Worker:
    """Start one."""
    command = system.worker(what, system.queue(place.kind))
    return Worker(command, place.environment(system, what), place.folder / f"{system.module}.log")


@dataclass(frozen=True)
class Drained:
    """What a drain showed.

    Args:
        rate: tasks a second, from the first mark to the last.
        start: seconds from the worker's command to its first task.
        parent, children: MiB at the end.
    """

    rate: float
    start: float
    parent: float
    children: float


def prepare(system: System, place: Place) -> None:
    """Start a worker once, so that it makes its queues and its files are in the cache."""
    with worker(system, place, "noop") as one:
        queue = system.queue(place.kind)
        one.wait(lambda: filling.consumers(place.url, queue), _START_SECONDS, f"{system.name} consumes")


def fill(system: System, place: Place, what: str, tasks: int) -> None:
    """Put so many tasks into its empty queue; one in `MARK_EVERY`, and the last, are marks."""
    queue = system.queue(place.kind)
    filling.empty(place.url, queue)
    messages = (
        system.wire("mark" if number % MARK_EVERY == 0 or number == tasks else what, queue)
        for number in range(tasks + 1)
    )
    filling.publish(place.url, queue, messages, tasks + 1)


def drain(system: System, place: Place, what: str, tasks: int, seconds: float) -> Drained:
    """Let a worker drain so many tasks, or as many as it does in so many seconds."""
    fill(system, place, what, tasks)
    marks = place.folder / "marks"
    marks.unlink(missing_ok=True)
    wanted = -(-tasks // MARK_EVERY) + 1

    def count() -> int:
        return marks.stat().st_size // MARK_BYTES if marks.exists() else 0

    with worker(system, place, what) as one:
        one.wait(count, _START_SECONDS, f"{system.name} runs a task")
        deadline = time.monotonic() + seconds
        # Two marks at least, however long it takes.
        one.wait(
            lambda: count() >= wanted or (count() >= 2 and time.monotonic() > deadline),
            seconds + 120,
            f"{system.name} runs its tasks",
        )
        parent, children = one.memory()
    times = sorted(float(line) for line in marks.read_text().split())
    if len(times) >= wanted:
        rate = tasks / (times[-1] - times[0])
    else:
        rate = (len(times) - 1) * MARK_EVERY / (times[-1] - times[0])
    return Drained(rate, times[0] - one.started, parent, children)


def _client(system: System, place: Place, what: str, *arguments: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.race.client", system.module, *arguments]
    done = subprocess.run(
        command, env=place.environment(system, what), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the client of {system.name} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def publishing(system: System, place: Place, counts: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Ways to publish and how many, or as many as fit in so many seconds -> messages a second by the system's ways."""
    filling.empty(place.url, system.queue(place.kind))
    found: dict[str, float] = _client(system, place, "noop", "publish", json.dumps([dict(counts), seconds]))
    filling.empty(place.url, system.queue(place.kind))
    return found


def trips(system: System, place: Place, calls: int) -> list[float]:
    """Seconds of each round trip, one after the other."""
    filling.empty(place.url, system.queue(place.kind))
    with worker(system, place, "trip") as one:
        queue = system.queue(place.kind)
        one.wait(lambda: filling.consumers(place.url, queue), _START_SECONDS, f"{system.name} consumes")
        found: list[float] = _client(system, place, "trip", "trip", str(calls))
    return found


def help_seconds(system: System) -> float:
    """Seconds that its `--help` takes."""
    assert system.help is not None
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *system.help], cwd=ROOT, capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    return time.perf_counter() - started
