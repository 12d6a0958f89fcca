"""One point of a curve: fill the queues, see how fast a worker drains them and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from amqptasks import AmqpTasks, Signature
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from benchmarks.curves.shapes import Shape
from benchmarks.race import filling
from benchmarks.race.work import MARK_BYTES

__all__ = ["ROOT", "Bench", "Drain", "Point", "computed", "family"]

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that a drain may take; 100 queues are a worker of 200 processes.
_LONGEST = 180.0
#: What is published at a time: messages, and bytes.
_BATCH, _BATCH_BYTES = 2_000, 16 << 20


@dataclass(frozen=True)
class Point:
    """What was measured.

    Args:
        rate: tasks a second, from the first mark to the last.
        cpu: microseconds of processor time that all processes of the worker took for each task.
    """

    rate: float
    cpu: float


class Drain:
    """A worker that drains what was put into its queues: made while its leaders stand still. One task in `step` is a
    mark."""

    def __init__(
        self, worker: WorkerProcess, processes: Sequence[psutil.Process], marks: Path, tasks: int, step: int
    ) -> None:
        self.worker, self._marks, self._tasks, self._step = worker, marks, tasks, step
        self._processes, self._before = processes, computed(processes)

    def ran(self) -> int:
        """How many tasks have run, about."""
        return self._step * (self._marks.stat().st_size // MARK_BYTES if self._marks.exists() else 0)

    def cpu(self) -> float:
        """Seconds of processor time for each task so far."""
        return (computed(self._processes) - self._before) / self.ran()

    def finish(self) -> float:
        """Wait for the end. Returns tasks a second, from the first mark to the last."""

        def drained() -> bool:
            if self.worker.process.poll() is not None:
                raise RuntimeError(f"the worker ended with {self.worker.process.returncode}\n{self.worker.log[-2000:]}")
            return self.ran() >= self._tasks

        wait_until(drained, _LONGEST, lambda: f"{self._tasks} tasks:\n{self.worker.log[-2000:]}", pause=0.005)
        times = sorted(float(line) for line in self._marks.read_text().split())[: -(-self._tasks // self._step)]
        return (len(times) - 1) * self._step / (times[-1] - times[0])


class Bench:
    """Measures on one node. `folder` is for what workers write."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder

    def measure(self, shape: Shape) -> Point:
        """Let a worker drain the queues."""
        with self.drain(shape) as drain:
            return Point(drain.finish(), drain.cpu() * 1e6)

    @contextmanager
    def drain(self, shape: Shape) -> Iterator[Drain]:
        """Start a worker, fill its queues while its leaders stand still, let them go on. The queues are empty at the
        end, whatever was drained."""
        names = [f"curve-{number}" for number in range(shape.queues)]
        marks = self._folder / "marks"
        marks.unlink(missing_ok=True)
        config = self._configure(names, shape)
        app = AmqpTasks("curves", config=config)
        worker = WorkerProcess(
            "benchmarks.curves.app:app",
            ",".join(names),
            "-c",
            str(shape.processes),
            config=config,
            log=self._folder / "worker.log",
            environment={"PYTHONPATH": str(ROOT), "RACE_MARKS": str(marks)},
        )
        step = max(1, shape.tasks // 200)
        try:
            with worker.wait_ready(_LONGEST):
                processes = family(worker)
                with _standing(worker.leaders()):
                    delayed = (_call(app, "noop", names[0], 0).set(countdown=86_400) for _ in range(shape.delayed))
                    _send(app, delayed, 0)
                    _send(app, _tasks(app, names, shape, step), shape.size)
                    drain = Drain(worker, processes, marks, shape.tasks, step)
                yield drain
            for name in names:
                filling.empty(self._url, name)
        finally:
            worker.kill()
            app.close()

    def _configure(self, names: list[str], shape: Shape) -> Path:
        config = self._folder / "curves.yaml"
        settings: dict[str, Any] = {
            # Nobody answers heartbeats while a leader stands still.
            "broker": {"url": self._url, "heartbeat": 600},
            "queues": {name: {} for name in names},
            "routes": [{"match": "*", "queue": names[0]}],
            "result": {"backend": "none"},
            "worker": {"prefetch": shape.prefetch if shape.prefetch == "auto" else int(shape.prefetch)},
        }
        config.write_text(yaml.safe_dump(settings))
        return config


@contextmanager
def _standing(processes: Sequence[psutil.Process]) -> Iterator[None]:
    for one in processes:
        one.suspend()
    yield
    for one in processes:
        one.resume()


def _call(app: AmqpTasks, task: str, queue: str, size: int) -> Signature:
    return app.signature(f"curves.{task}", ("x" * size,) if size else ()).set(queue=queue, ignore_result=True)


def _tasks(app: AmqpTasks, names: list[str], shape: Shape, step: int) -> Iterator[Signature]:
    """One in `step` is a mark. Each queue in turn gets one, and has its marks."""
    for number, name in zip(range(shape.filled), itertools.cycle(names), strict=False):
        yield _call(app, "noop" if number // len(names) % step else "mark", name, shape.size)


def _send(app: AmqpTasks, signatures: Iterator[Signature], size: int) -> None:
    most = min(_BATCH, max(1, _BATCH_BYTES // max(1, size)))
    while batch := list(itertools.islice(signatures, most)):
        app.send_many(batch)


def family(worker: WorkerProcess) -> list[psutil.Process]:
    """All processes of a worker."""
    parent = psutil.Process(worker.process.pid)
    return [parent, *parent.children(recursive=True)]


def computed(processes: Iterable[psutil.Process]) -> float:
    """Seconds of processor time so far."""
    return sum(times.user + times.system for times in (one.cpu_times() for one in processes))
