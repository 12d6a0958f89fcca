#!/usr/bin/env python3
"""How exactly workers keep a rate limit together, on a private node; and what 100 000 revokes cost a worker.

The limit holds for the cluster: so many workers, one rate. With --kill the worker that gives the turns is killed in the
middle. Each start is a line in a ledger, written by the task.

    python -m benchmarks.rate [--rate 100/m] [--workers 3] [--seconds 180] [--kill]
    python -m benchmarks.rate --revokes 100000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from amqptasks import AmqpTasks
from amqptasks.config.quantities import parse_rate
from amqptasks.testing.ledger import PATH_VARIABLE, Ledger
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.workers import WorkerProcess

ROOT = Path(__file__).resolve().parents[1]
TASK = "integration.apps.jobs.paced"


class Bench:
    """Workers on one node, and a client."""

    def __init__(self, url: str, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.config = folder / "amqptasks.yaml"
        self.config.write_text(yaml.safe_dump({"broker": {"url": url}, "result": {"backend": "none"}, **settings}))
        self.app = AmqpTasks("rate", config=self.config)
        self.app.declare()
        self.ledger = Ledger(folder / "ledger")

    def worker(self, name: str) -> WorkerProcess:
        environment = {PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": str(ROOT)}
        options: dict[str, Any] = {
            "config": self.config,
            "log": self.folder / f"{name}.log",
            "environment": environment,
        }
        return WorkerProcess("integration.apps.jobs:app", "default", "-c", "2", "-n", name, **options).wait_ready(120)


def measure(bench: Bench, rate: float, options: argparse.Namespace) -> None:
    """Let tasks wait for their turns, and see when they start."""
    workers = [bench.worker(f"worker{number}") for number in range(options.workers)]
    try:
        count = int(rate * options.seconds)
        bench.app.send_many([bench.app.signature(TASK) for _ in range(count)])
        deadline = time.monotonic() + options.seconds * 1.2 + 30
        while (done := len(bench.ledger.entries("begin"))) < count and time.monotonic() < deadline:
            if options.kill and done > count // 2:
                options.kill = False
                workers.pop(0).kill()
            time.sleep(0.2)
        starts = sorted(entry.at for entry in bench.ledger.entries("begin"))
        window = max(1.0, 10 / rate)
        most = max(sum(1 for other in starts if one <= other < one + window) for one in starts)
        mean = (len(starts) - 1) / (starts[-1] - starts[0])
        print(
            f"{len(starts)} of {count} started; {mean * 60:.1f}/min of {rate * 60:.1f}: "
            f"{100 * (mean / rate - 1):+.2f} %; "
            f"at most {most} in {window:.1f} s ({rate * window:.1f} by the rate)"
        )
    finally:
        for worker in workers:
            worker.kill()


def revokes(bench: Bench, count: int) -> None:
    """One message a revoke, as many callers would write them."""
    rss, took = [], []
    for number in (0, count):
        started = time.monotonic()
        for start in range(0, number, 1000):
            ids = [f"00000000-0000-0000-0000-{one:012}" for one in range(start, min(number, start + 1000))]
            bench.app.client.publish([one for id in ids for one in bench.app.control._envelopes(id, False, "SIGTERM")])
        published = time.monotonic() - started
        started = time.monotonic()
        with bench.worker(f"after{number}") as worker:
            took.append(time.monotonic() - started)
            rss.append(psutil.Process(worker.leaders()[0].pid).memory_info().rss / 1e6)
            worker.stop()
    print(
        f"{count} revokes, one message each: published in {published:.1f} s; a worker is ready after {took[1]:.1f} s "
        f"(without: {took[0]:.1f} s), and its leader holds {rss[1] - rss[0]:.0f} MB more ({rss[1]:.0f} MB)"
    )


def main() -> None:
    """Parse flags, start the node, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100/m")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--revokes", type=int, default=0)
    options = parser.parse_args()
    with PrivateNode("rate") as node, tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            node.url, Path(folder), {} if options.revokes else {"tasks": {TASK: {"rate_limit": options.rate}}}
        )
        try:
            if options.revokes:
                revokes(bench, options.revokes)
            else:
                measure(bench, parse_rate(options.rate), options)
        finally:
            bench.app.close()


if __name__ == "__main__":
    main()
