#!/usr/bin/env python3
"""How long a task waits between publish and start, on a private node: under load, and beside a queue that is flooded.

Saturation is what a worker finishes while a client publishes as fast as the worker takes it, on this machine. Then the
client publishes at shares of that rate, whatever the worker does, and some of the tasks write down when they start.
The flood fills one queue of a worker; tasks of its other queue write down when they start, during it and after it.

    python -m benchmarks.latency [--seconds 8] [--flood 100000] [-c 2] [--docs]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.counts import queue_counts
from amqptasks.testing.ledger import PATH_VARIABLE, Ledger
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from benchmarks.race.node import machine, private_node
from benchmarks.race.report import replace_block, table

__all__ = ["flood_beside", "flooding_leader", "quantile"]

#: Task ids, and when they were published.
Sent = dict[str, float]

ROOT = Path(__file__).resolve().parents[1]
NOOP, NOTE = "integration.apps.jobs.noop", "integration.apps.jobs.note"
#: Messages that wait at most while the saturation is looked for.
_BACKLOG = 4_000
#: Seconds between two batches of the open load, and one task in so many writes down when it starts.
_STEP, _SAMPLE = 0.005, 50
#: Tasks a second beside a flood.
_PROBES = 50


def quantile(waits: Sequence[float], share: float) -> float:
    """The value that this share of the waits does not exceed."""
    return sorted(waits)[min(len(waits) - 1, int(share * len(waits)))]


def _publish(app: AmqpTasks, queue: str, count: int, sample: int = 0) -> Sent:
    """Publish no-op tasks, some of which tell when they start: these, and when they were published."""
    noop, note = app.signature(NOOP).set(queue=queue, ignore_result=True), app.signature(NOTE).set(queue=queue)
    sampled = [bool(sample) and number % sample == 0 for number in range(count)]
    now = time.time()
    handles = app.send_many([note if one else noop for one in sampled])
    return {handle.id: now for handle, one in zip(handles, sampled, strict=True) if one}


def _waits(ledger: Ledger, sent: Sent, timeout: float = 60.0) -> list[float]:
    """Seconds between publish and start, of tasks that tell."""
    wait_until(lambda: sent.keys() <= ledger.ids("begin"), timeout, "the last task has started", pause=0.1)
    return [entry.at - sent[entry.task_id] for entry in ledger.entries("begin") if entry.task_id in sent]


def flooding_leader(worker: WorkerProcess, queue: str) -> psutil.Process:
    """The leader of a queue: one whose name is not cut to the same fifteen characters as another's."""
    return next(one for one in worker.leaders() if f"amqptasks:{queue}".startswith(one.name()))


def flood_beside(app: AmqpTasks, leader: psutil.Process, queue: str, flood: int, send: Callable[[], str]) -> Sent:
    """Call `send`, which publishes to another queue, fifty times a second while a flood of this queue is worked off.

    The flood's leader is stopped until all of it waits, so that this process's publishing delays nothing.
    """
    leader.suspend()
    for start in range(0, flood, 10_000):
        _publish(app, queue, min(10_000, flood - start))
    leader.resume()

    def waiting() -> bool:
        counts = queue_counts(app.settings.broker, [queue])[queue]
        return counts is not None and counts[0] > 0

    sent = _probe(send, waiting)
    wait_until(lambda: not waiting(), 120, "the flood is worked off", pause=0.1)
    return sent


def _probe(send: Callable[[], str], going: Callable[[], bool]) -> Sent:
    sent: Sent = {}
    following, asked = time.monotonic(), 0.0
    while True:
        if time.monotonic() > asked + 0.5:
            if not going():
                return sent
            asked = time.monotonic()
        following = max(following + 1 / _PROBES, time.monotonic())
        time.sleep(max(0.0, following - time.monotonic()))
        now = time.time()
        sent[send()] = now


class Bench:
    """A worker of two queues and a client, on one node."""

    def __init__(self, url: str, folder: Path, concurrency: int) -> None:
        config = folder / "amqptasks.yaml"
        queues: dict[str, Any] = {"default": {}, "other": {}}
        config.write_text(yaml.safe_dump({"broker": {"url": url}, "queues": queues, "result": {"backend": "none"}}))
        self.app = AmqpTasks("latency", config=config)
        self.app.declare()
        self.ledger = Ledger(folder / "ledger")
        self.worker = WorkerProcess(
            "integration.apps.jobs:app",
            "default,other",
            "-c",
            str(concurrency),
            config=config,
            log=folder / "worker.log",
            environment={PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": str(ROOT)},
        ).wait_ready(60)

    def _ready(self) -> int:
        counts = queue_counts(self.app.settings.broker, ["default"])["default"]
        return counts[0] if counts is not None else 0

    def saturation(self, seconds: float) -> float:
        """Tasks a second, while a client publishes."""
        started, sent = time.monotonic(), Sent()
        while time.monotonic() < started + seconds:
            sent |= _publish(self.app, "default", 1000, _SAMPLE)
            wait_until(lambda: self._ready() < _BACKLOG, 60, "the worker keeps up")
        _waits(self.ledger, sent)
        starts = sorted(entry.at for entry in self.ledger.entries("begin") if entry.task_id in sent)
        half = starts[len(starts) // 4 :]  # the worker has found its prefetch
        return (len(half) - 1) * _SAMPLE / (half[-1] - half[0])

    def loaded(self, rate: float, seconds: float) -> tuple[float, list[float]]:
        """Publish at this rate: the rate that it came to, and what tasks waited."""
        started, count = time.monotonic(), 0
        sent: Sent = {}
        while (passed := time.monotonic() - started) < seconds:
            if (due := int(passed * rate) - count) > 0:
                # No sample is taken of the first second: the worker finds its prefetch.
                sent |= _publish(self.app, "default", due, max(2, due // 2) if passed > 1 else 0)
                count += due
            time.sleep(_STEP)
        return count / seconds, _waits(self.ledger, sent)

    def flooded(self, flood: int, seconds: float) -> tuple[list[float], list[float]]:
        """What tasks of the other queue wait: beside a flood, and when it is over."""

        def send() -> str:
            return self.app.send_task(NOTE, queue="other").id

        leader = flooding_leader(self.worker, "default")
        during = _waits(self.ledger, flood_beside(self.app, leader, "default", flood, send))
        until = time.monotonic() + seconds
        return during, _waits(self.ledger, _probe(send, lambda: time.monotonic() < until))


def report(bench: Bench, flood: int, seconds: float) -> str:
    """Two tables: at shares of saturation, and beside a flood."""
    most = bench.saturation(seconds)
    loads = []
    for share in (0.5, 0.8, 0.95):
        rate, waits = bench.loaded(most * share, seconds)
        loads.append([f"{share:.0%}", f"{rate:,.0f}/s", _ms(statistics.median(waits)), _ms(quantile(waits, 0.99))])
    floods = [
        [f"{name} ({len(waits)})", _ms(statistics.median(waits)), _ms(quantile(waits, 0.99))]
        for name, waits in zip(("while they are worked off", "afterwards"), bench.flooded(flood, seconds), strict=True)
    ]
    return (
        f"Saturation: {most:,.0f} tasks/s, published and worked off on this machine.\n\n"
        f"{table(['load', 'published', 'p50', 'p99'], loads)}\n\n"
        f"{table([f'beside {flood:,} tasks in another queue', 'p50', 'p99'], floods)}"
    )


def main() -> None:
    """Parse flags, start the node, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--flood", type=int, default=100_000)
    parser.add_argument("-c", "--concurrency", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    with private_node(None) as node, tempfile.TemporaryDirectory() as folder:
        here = machine(node.url, None)
        bench = Bench(node.url, Path(folder), options.concurrency)
        try:
            text = f"{here}. {report(bench, options.flood, options.seconds)}"
        finally:
            bench.worker.kill()
            bench.app.close()
    print(text)
    if options.docs:
        replace_block(ROOT / "docs" / "performance.md", "latency", text)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


if __name__ == "__main__":
    main()
