#!/usr/bin/env python3
"""What a task costs in work: function calls and system calls, in the client, the leader and the executor.

    python -m benchmarks.guards            compare with the stored figures
    python -m benchmarks.guards --store    store what is found now

The figures stand in `benchmarks/guards.json`; `integration/test_guards.py` fails when there is more to do than they
say, and when there is so much less that they should be stored anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from amqptasks import AmqpTasks
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.work import FOLDER_VARIABLE, calls_so_far, each, strace
from amqptasks.testing.workers import WorkerProcess

__all__ = ["Figures", "compare"]

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "guards.json"
#: By how much the work for a task may differ from its figure: this share of it, or this number of calls. One system
#: call more for each task is seen.
SHARE, CALLS = 0.02, 6
SYSTEM_SHARE, SYSTEM_CALLS = 0.08, 0.75
#: How often threads wait for each other depends on what else the processor does.
_WAITS = frozenset({"futex", "epoll_wait"})
_ROUNDS = 3
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_COUNTED = 1_000
_TRACED = 2_000

#: calls: {path: {function: times a task}}; system calls: {path: times a task}.
Figures = dict[str, Any]
#: Counts something in processes, by name, and fills in what it has found when it ends.
Counting = Callable[[Mapping[str, int]], AbstractContextManager[dict[str, Counter[str]]]]


def stored() -> Figures:
    """The figures in the file."""
    figures: Figures = json.loads(FILE.read_text())
    return figures


class Subject:
    """A worker of one executor, and clients, on one broker."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "guarded.yaml"
        self._config.write_text(yaml.safe_dump({"broker": {"url": url}, "queues": {"default": {}}}))
        self._environment = {"PYTHONPATH": str(ROOT)}
        self._marks = 0

    def count(self) -> Figures:
        """Function calls."""
        folder = self._folder / "calls"
        folder.mkdir()
        self._environment[FOLDER_VARIABLE] = str(folder)

        @contextmanager
        def counting(pids: Mapping[str, int]) -> Iterator[dict[str, Counter[str]]]:
            found: dict[str, Counter[str]] = {}
            before = {name: calls_so_far(pid, folder) for name, pid in pids.items()}
            yield found
            found.update((name, calls_so_far(pid, folder) - before[name]) for name, pid in pids.items())

        found = self._measure(counting, _COUNTED)
        del self._environment[FOLDER_VARIABLE]
        return {name: each(counts, _COUNTED) for name, counts in found.items()}

    def trace(self) -> Figures:
        """System calls."""
        found = self._measure(strace, _TRACED)
        return {
            name: round(sum(many for call, many in counts.items() if call not in _WAITS) / _TRACED, 2)
            for name, counts in found.items()
        }

    def _measure(self, counting: Counting, tasks: int) -> dict[str, Counter[str]]:
        app = AmqpTasks("guards", config=self._config)
        app.declare()
        found: dict[str, Counter[str]] = {}
        for how in ("one", "many"):
            with self._client(how) as (pid, publish):
                publish(100)
                with counting({f"publish {how}": pid}) as counted:
                    publish(tasks)
            found.update(counted)
        try:
            found.update(self._drain(app, counting, tasks))
        finally:
            app.close()
        return found

    def _drain(self, app: AmqpTasks, counting: Counting, tasks: int) -> dict[str, Counter[str]]:
        options: dict[str, Any] = {
            "config": self._config,
            "log": self._folder / "guarded.log",
            "environment": self._environment,
        }
        with (
            self._client("many") as (_, publish),
            WorkerProcess("benchmarks.guarded:app", "default", "-c", "1", **options) as worker,
        ):
            worker.wait_ready(60)
            # What was published above comes first. Then the run time is known, and the prefetch has followed it.
            self._wait_drained(app)
            time.sleep(1.5)
            (leader,), (executor,) = worker.leaders(), worker.executors()
            with counting({"leader": leader.pid, "executor": executor.pid}) as counted:
                leader.suspend()
                publish(tasks)
                self._wait_drained(app, leader)
            worker.stop()
        return counted

    def _wait_drained(self, app: AmqpTasks, leader: psutil.Process | None = None) -> None:
        """One executor runs them in their order: wait for one more, and for its acknowledgement.

        A leader that is named works for a moment and stands still for a while, in turn: so it finds many messages and
        outcomes at a time, as on a machine where nothing else slows broker and executor.
        """
        self._marks += 1
        file = self._folder / f"mark{self._marks}"
        app.send_task("guarded.mark", (str(file),))
        until = time.monotonic() + 120
        while not file.exists():
            assert time.monotonic() < until, "the worker does not run all tasks"
            if leader is not None:
                leader.suspend()
                time.sleep(0.06)
                leader.resume()
            time.sleep(0.01)
        time.sleep(0.2)

    @contextmanager
    def _client(self, how: str) -> Iterator[tuple[int, Callable[[int], None]]]:
        command = [sys.executable, "-m", "benchmarks.guarded", str(self._config), how]
        environment = {**os.environ, **self._environment}
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            told, answers = process.stdin, process.stdout

            def publish(count: int) -> None:
                told.write(f"{count}\n")
                told.flush()
                said = answers.readline()
                assert said == "confirmed\n", f"the client said {said!r}"

            said = answers.readline()
            assert said == "ready\n", f"the client said {said!r}"
            try:
                yield process.pid, publish
            finally:
                told.close()


def measure(url: str, folder: Path) -> Figures:
    """All figures, on this broker. Takes some thirty seconds."""
    subject = Subject(url, Path(tempfile.mkdtemp(dir=folder)))
    return {"python": PYTHON, "calls": subject.count(), "system calls": subject.trace()}


def least(figures: Sequence[Figures]) -> Figures:
    """The least of several measurements, path by path: other work on the machine only adds, by smaller batches."""
    return {
        "python": PYTHON,
        "calls": {
            path: min((one["calls"][path] for one in figures), key=lambda functions: sum(functions.values()))
            for path in figures[0]["calls"]
        },
        "system calls": {
            path: min(one["system calls"][path] for one in figures) for path in figures[0]["system calls"]
        },
    }


def compare(url: str, folder: Path) -> tuple[Figures, list[str]]:
    """Measure up to three times: the least, and what of it is beyond its tolerance."""
    measured: list[Figures] = []
    while True:
        measured.append(measure(url, folder))
        now = least(measured)
        found = complaints(now, stored())
        if not found or len(measured) == _ROUNDS:
            return now, found


def complaints(now: Figures, figures: Figures) -> list[str]:
    """What is beyond its tolerance; a line each."""
    found = []
    for path, functions in figures["calls"].items():
        was, ran = Counter(functions), Counter(now["calls"][path])
        more, tolerance = ran.total() - was.total(), max(CALLS, SHARE * was.total())
        # Another Python may need fewer for the same lines.
        if more > tolerance or (more < -tolerance and figures["python"] == PYTHON):
            changed = [f"{name} {ran[name] - was[name]:+d}" for name in sorted(was | ran) if ran[name] != was[name]]
            found.append(f"{path}: {ran.total()} calls a task, stored are {was.total()}: {', '.join(changed)}")
    for path, was in figures["system calls"].items():
        value = now["system calls"][path]
        if abs(value - was) > max(SYSTEM_CALLS, SYSTEM_SHARE * was):
            found.append(f"{path}: {value} system calls a task, stored are {was}")
    return found


def main() -> None:
    """Measure on a private node; compare or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    found: list[str] = []
    with PrivateNode("guards") as node, tempfile.TemporaryDirectory() as folder:
        if options.store:
            now = least([measure(node.url, Path(folder)) for _ in range(_ROUNDS)])
            FILE.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n")
        else:
            now, found = compare(node.url, Path(folder))
    for path, functions in now["calls"].items():
        print(f"{path:<14}{sum(functions.values()):>5} calls {now['system calls'][path]:>7.2f} system calls a task")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
