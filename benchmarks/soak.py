#!/usr/bin/env python3
"""Keeps a worker busy and looks at what it holds: memory, open files, threads, channels. Exits with 1 when that grows.

Some tasks raise, and now and then the broker closes the worker's connections while tasks are in flight. What counts is
the difference between a tenth of the time and its end, and what the worker then holds after it had nothing to do for a
while.

    python -m benchmarks.soak [--minutes 10 | --tasks 1000000] [--idle 60] [-c 2]
    python -m benchmarks.soak --tasks 200000 --idle 7200
    python -m benchmarks.soak --tasks 100000 --every 10000 --one-fails-of 2 --lose-every 100000000
    python -m benchmarks.soak --tasks 800000 --every 40000 --lose-every 4000 --while-losing 1
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.counts import queue_counts
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
BATCH = 2_000
#: The worker is never without work, and the queue never long.
MOST_WAITING = 20_000
#: More than both is growth: a part of what there was, and MB.
GROWTH, MEGABYTES = 1.05, 10.0
#: An idle leader opens one channel to look whether messages wait (`broker/stall.py`), and keeps it.
LOOKS = 1


@dataclass(frozen=True)
class Sample:
    """What the worker's processes hold together. Memory in MB, resident; `channels` are those of the whole broker.

    Memory without what they share grows for a while after the fork, as pages are written to for the first time.
    """

    tasks: int
    memory: float
    files: int
    threads: int
    channels: int

    def outgrows(self, earlier: Sample) -> bool:
        """Whether it is more than it was then, beyond what memory may vary by."""
        counts = (self.files, self.threads) != (earlier.files, earlier.threads)
        most = max(earlier.memory * GROWTH, earlier.memory + MEGABYTES)
        return counts or self.channels > earlier.channels + LOOKS or self.memory > most


@dataclass
class Soaked:
    """What was seen: `samples` under load, one when `idle`.

    Connections were lost as often as `losses` says, and so often `in_flight`: while tasks came and ran.
    """

    samples: list[Sample] = field(default_factory=list)
    idle: Sample | None = None
    losses: int = 0
    in_flight: int = 0


@dataclass(frozen=True)
class Plan:
    """How a worker is kept busy.

    Attributes:
        every: a sample after so many tasks, with the queue empty.
        one_fails_of: every so manieth task raises.
        lose_every: after so many tasks the broker closes the worker's connections; 0: never.
        while_losing: so many batches at a time then, so that they are lost in the middle.
        idle: seconds without work at the end.
    """

    concurrency: int = 2
    every: int = 20_000
    one_fails_of: int = 50
    lose_every: int = 0
    while_losing: int = 5
    idle: float = 0.0


def soak(goes_on: Callable[[int, float], bool], plan: Plan = Plan()) -> Soaked:
    """Feed a worker while `goes_on(tasks, seconds)`."""
    with PrivateNode("soak", tune=False) as node, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "amqptasks.yaml"
        queue = {"dead_letter": {"max_length": 1000}}
        config.write_text(yaml.safe_dump({"broker": {"url": node.url}, "queues": {"default": queue}}))
        app = AmqpTasks("soak", config=config)
        app.declare()
        command = [sys.executable, "-m", "amqptasks", "-A", "benchmarks.apps:amqp_app", "--config", str(config)]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            [*command, "worker", "-Q", "default", "-c", str(plan.concurrency)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=quiet,
            stderr=quiet,
        ) as worker:
            try:
                return _Feed(app, worker.pid, node, plan).run(goes_on)
            finally:
                worker.terminate()
                worker.wait(30)
                app.close()


class _Feed:
    """Sends tasks to a worker and looks at it."""

    def __init__(self, app: AmqpTasks, worker: int, node: PrivateNode, plan: Plan) -> None:
        self._app, self._worker, self._node, self._plan = app, worker, node, plan
        self._management = Management(node.management_url)
        kinds = ["bench.fails" if number % plan.one_fails_of == 0 else "bench.noop" for number in range(BATCH)]
        self._calls = [app.signature(kind) for kind in kinds]
        for call in self._calls:
            call.set(ignore_result=True)
        self._found = Soaked()

    def run(self, goes_on: Callable[[int, float], bool]) -> Soaked:
        tasks, started, plan = 0, time.monotonic(), self._plan
        while goes_on(tasks, time.monotonic() - started):
            before = tasks
            if plan.lose_every and (tasks + BATCH) % plan.lose_every == 0:
                tasks += self._send_while_connections_are_lost()
            self._app.send_many(self._calls)
            tasks += BATCH
            wait_until(lambda: self._waiting() < MOST_WAITING, 60, "the worker keeps up", pause=0.05)
            if tasks // plan.every > before // plan.every:
                wait_until(lambda: self._waiting() == 0, 60, "the queue is empty", pause=0.05)
                self._found.samples.append(self._sample(tasks))
        if plan.idle:
            wait_until(lambda: self._waiting() == 0, 60, "the queue is empty", pause=0.05)
            time.sleep(plan.idle)
            self._found.idle = self._sample(tasks)
        return self._found

    def _waiting(self) -> int:
        counts = queue_counts(self._app.settings.broker, ["default"])["default"]
        assert counts is not None
        return counts[0]

    def _connections(self) -> list[str]:
        found = self._management.connections()
        return [one["name"] for one in found if "/consume" in str(one.get("client_properties"))]

    def _send_while_connections_are_lost(self) -> int:
        """Send some batches, and close the worker's connections meanwhile; how many tasks."""
        names = wait_until(self._connections, 30, "the broker shows the worker's connection", pause=0.1)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self._app.send_many, self._calls * self._plan.while_losing)
            wait_until(lambda: sending.done() or self._waiting(), 30, "tasks are in flight", pause=0.0)
            for name in names:
                self._management.close_connection(name)
            self._found.in_flight += not sending.done()
            sending.result()
        self._found.losses += 1
        wait_until(lambda: set(self._connections()) - set(names), 30, "the worker is connected again", pause=0.1)
        return BATCH * self._plan.while_losing

    def _sample(self, tasks: int) -> Sample:
        """What the worker holds now."""
        time.sleep(0.5)
        processes = [psutil.Process(self._worker), *psutil.Process(self._worker).children(recursive=True)]
        return Sample(
            tasks,
            sum(one.memory_info().rss for one in processes) / 1e6,
            sum(one.num_fds() for one in processes),
            sum(one.num_threads() for one in processes),
            len(self._node.rabbitmqctl("list_channels", "pid").split()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0)
    length.add_argument("--tasks", type=int)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds without work at the end")
    parser.add_argument("-c", "--concurrency", type=int, default=2)
    parser.add_argument("--every", type=int, default=50_000, help="tasks between two looks")
    parser.add_argument("--one-fails-of", type=int, default=50, help="every so manieth task raises")
    parser.add_argument("--lose-every", type=int, default=100_000, help="tasks between two losses of all connections")
    parser.add_argument("--while-losing", type=int, default=5, help=f"times {BATCH:,} tasks that are sent meanwhile")
    options = parser.parse_args()
    plan = Plan(
        options.concurrency, options.every, options.one_fails_of, options.lose_every, options.while_losing, options.idle
    )

    def goes_on(tasks: int, passed: float) -> bool:
        return passed < options.minutes * 60 if options.tasks is None else tasks < options.tasks

    started = time.monotonic()
    found = soak(goes_on, plan)
    minutes, samples = (time.monotonic() - started) / 60, found.samples
    warm, last = samples[len(samples) // 10], samples[-1]
    print(f"{'tasks':>12}{'MB':>8}{'files':>8}{'threads':>9}{'channels':>10}")
    for one in (warm, samples[len(samples) // 2], last, found.idle):
        if one is not None:
            print(f"{one.tasks:>12,}{one.memory:>8.1f}{one.files:>8}{one.threads:>9}{one.channels:>10}")
    print(f"{minutes:.1f} minutes; memory {last.memory / warm.memory - 1:+.1%} from {warm.tasks:,} tasks on")
    if found.idle is not None:
        print(f"memory {found.idle.memory / last.memory - 1:+.1%} in {options.idle:g} s without work")
    print(f"connections lost {found.losses} times, {found.in_flight} times while tasks were in flight")
    if last.outgrows(warm) or (found.idle is not None and found.idle.outgrows(last)):
        sys.exit("the worker holds more than it did")


if __name__ == "__main__":
    main()
