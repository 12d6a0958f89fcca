#!/usr/bin/env python3
"""Keeps a worker busy for minutes and looks at what it holds: memory, open files, threads. Exits with 1 when it grows.

One task in fifty raises. What counts is the difference between a tenth of the time and its end.

    python -m benchmarks.soak [--minutes 10] [-c 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.admin import queue_counts
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
BATCH = 2_000
#: The worker is never without work, and the queue never long.
MOST_WAITING = 20_000


@dataclass(frozen=True)
class Sample:
    """What the worker's processes hold together. Memory in MB, resident.

    Memory without what they share grows for a while after the fork, as pages are written to for the first time.
    """

    tasks: int
    memory: float
    files: int
    threads: int


def sample(root: int, tasks: int) -> Sample:
    """Look at a worker now."""
    processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return Sample(
        tasks,
        sum(one.memory_info().rss for one in processes) / 1e6,
        sum(one.num_fds() for one in processes),
        sum(one.num_threads() for one in processes),
    )


def soak(goes_on: Callable[[int, float], bool], *, concurrency: int = 2, every: int = 20_000) -> list[Sample]:
    """Feed a worker while `goes_on(tasks, seconds)`; a sample after each `every` tasks, with the queue empty."""
    with PrivateNode("soak", tune=False) as node, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "amqptasks.yaml"
        queue = {"dead_letter": {"max_length": 1000}}
        config.write_text(yaml.safe_dump({"broker": {"url": node.url}, "queues": {"default": queue}}))
        app = AmqpTasks("soak", config=config)
        app.declare()
        command = [sys.executable, "-m", "amqptasks", "-A", "benchmarks.apps:amqp_app", "--config", str(config)]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            [*command, "worker", "-Q", "default", "-c", str(concurrency)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=quiet,
            stderr=quiet,
        ) as worker:
            try:
                return _feed(app, worker.pid, goes_on, every)
            finally:
                worker.terminate()
                worker.wait(30)
                app.close()


def _feed(app: AmqpTasks, worker: int, goes_on: Callable[[int, float], bool], every: int) -> list[Sample]:
    broker = app.settings.broker

    def waiting() -> int:
        counts = queue_counts(broker, ["default"])["default"]
        assert counts is not None
        return counts[0]

    calls = [app.signature("bench.fails" if number % 50 == 0 else "bench.noop") for number in range(BATCH)]
    for call in calls:
        call.set(ignore_result=True)
    found: list[Sample] = []
    tasks, started = 0, time.monotonic()
    while goes_on(tasks, time.monotonic() - started):
        app.send_many(calls)
        tasks += BATCH
        wait_until(lambda: waiting() < MOST_WAITING, 60, "the worker keeps up", pause=0.05)
        if tasks % every == 0:
            wait_until(lambda: waiting() == 0, 60, "the queue is empty", pause=0.05)
            time.sleep(0.5)
            found.append(sample(worker, tasks))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("-c", "--concurrency", type=int, default=2)
    options = parser.parse_args()
    seconds = options.minutes * 60
    samples = soak(lambda _tasks, passed: passed < seconds, concurrency=options.concurrency)
    warm, last = samples[len(samples) // 10], samples[-1]
    print(f"{'tasks':>10}{'MB':>10}{'files':>8}{'threads':>9}")
    for one in (warm, samples[len(samples) // 2], last):
        print(f"{one.tasks:>10,}{one.memory:>10.1f}{one.files:>8}{one.threads:>9}")
    growth = last.memory / warm.memory - 1
    print(f"memory {growth:+.1%} from {warm.tasks:,} to {last.tasks:,} tasks")
    if growth > 0.1 or (last.files, last.threads) != (warm.files, warm.threads):
        sys.exit("the worker holds more than it did")


if __name__ == "__main__":
    main()
