#!/usr/bin/env python3
"""Round trips and chords with amqptasks and with Celery's prefork pool, in turn on one private node; prints ratios.

Both publish with confirms to quorum queues and acknowledge after the task. Round trips one after the other, from call
to value, and beside them bare pika's, whose worker does nothing else. Chords with Redis for both (Celery has none over
AMQP), and with amqptasks over AMQP alone. One client process per system, the same for all rounds; with --soak it asks
for so many results, and its memory is shown.

    python -m benchmarks.results [--calls 500] [--parts 1000] [--rounds 3] [--soak 100000] [--docs]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.servers import RedisServer
from benchmarks import bare_trips
from benchmarks.race.node import machine
from benchmarks.race.report import replace_block, table

#: (system, backend) -> seconds.
Times = dict[tuple[str, str], list[float]]

ROOT = Path(__file__).resolve().parents[1]


# --- in the client's process -----------------------------------------------------------------------------------------


def client(system: str, calls: int, parts: int) -> None:
    """Reads what to measure from stdin, a word a line, and answers with JSON."""
    from benchmarks import result_apps

    tasks: dict[str, Any] = result_apps.ours if system == "amqptasks" else result_apps.theirs
    add, total = tasks["add"], tasks["total"]
    if system == "amqptasks":
        from amqptasks import chord
    else:
        from celery import chord
    add.delay(1, 2).get(timeout=60)
    for line in sys.stdin:
        if line.strip() == "trips":
            times = []
            for number in range(calls):
                started = time.perf_counter()
                assert add.delay(number, 1).get(timeout=30) == number + 1
                times.append(time.perf_counter() - started)
            answer: Any = times
        elif line.strip() == "chord":
            started = time.perf_counter()
            value = chord([add.s(number, 1) for number in range(parts)], total.s()).apply_async().get(timeout=120)
            assert value == sum(range(1, parts + 1))
            answer = time.perf_counter() - started
        else:
            results = [add.delay(number, 1) for number in range(500)]
            assert [one.get(timeout=60) for one in results] == [number + 1 for number in range(500)]
            answer = psutil.Process().memory_info().rss / 1e6
        print(json.dumps(answer), flush=True)


# --- around it -------------------------------------------------------------------------------------------------------


class System:
    """A worker and a client of one system with one backend."""

    def __init__(self, name: str, broker: str, backend: str, options: argparse.Namespace) -> None:
        environment = {**os.environ, "BENCH_BROKER": broker, "BENCH_BACKEND": backend, "PYTHONPATH": str(ROOT)}
        if name == "amqptasks":
            worker = ["amqptasks", "-A", "benchmarks.result_apps:amqp_app", "worker", "-Q", "default", "-c", "2"]
        else:
            worker = ["celery", "-A", "benchmarks.result_apps:celery_app", "worker", "-P", "prefork", "-c", "2"]
            worker += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "info"]
        quiet = subprocess.DEVNULL
        self.worker = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *worker], env=environment, cwd=ROOT, stdout=quiet, stderr=quiet
        )
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.results", "--client", name]
        command += ["--calls", str(options.calls), "--parts", str(options.parts)]
        self.client = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(what + "\n")
        self.client.stdin.flush()
        return json.loads(self.client.stdout.readline())

    def end(self) -> None:
        assert self.client.stdin is not None
        self.client.stdin.close()
        self.client.wait(30)
        self.worker.send_signal(signal.SIGTERM)
        self.worker.wait(30)


def virtual_host(node: PrivateNode, name: str) -> str:
    """One per backend, so that each worker gets its own tasks. Made once."""
    node.rabbitmqctl("eval", f'catch rabbit_vhost:add(<<"{name}">>, <<"bench">>).')
    node.rabbitmqctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    return f"{node.url.rstrip('/')}/{name}"


def percentiles(times: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    ordered = sorted(times)
    return ordered[len(ordered) // 2] * 1000, ordered[int(len(ordered) * 0.99)] * 1000


class Measured:
    """What came of a run, in seconds."""

    def __init__(self) -> None:
        self.trips: Times = {}
        self.chords: Times = {}
        self.bare: list[float] = []
        #: Megabytes of our client's RSS: after two bursts of 500, and after the last.
        self.sizes: tuple[float, float] | None = None

    def report(self, parts: int, soak: int) -> str:
        """Two tables, and a sentence on memory."""
        rows = []
        for key, times in [*self.trips.items(), (("bare pika", ""), self.bare)]:
            p50, p99 = percentiles(times)
            theirs, _ = percentiles(self.trips["celery", key[1] or "rpc"])
            rows.append([" ".join(key).strip(), f"{p50:.2f} ms", f"{p99:.2f} ms", f"{p50 / theirs:.2f}"])
        text = table(["round trip", "p50", "p99", "p50, of Celery's with the same backend"], rows)
        theirs = statistics.median(self.chords["celery", "redis"])
        rows = []
        for key, times in self.chords.items():
            seconds = statistics.median(times)
            rows.append([" ".join(key), f"{seconds:.2f} s", f"{seconds / theirs:.2f}"])
        text += "\n\n" + table([f"chord of {parts:,}", "time", "of Celery's with Redis"], rows)
        if self.sizes is not None:
            first, last = self.sizes
            text += f"\n\n{soak:,} results over AMQP in one client: RSS {first:.1f} MB after 1,000, {last:.1f} MB then."
        return text


def measure(node: PrivateNode, redis: RedisServer, options: argparse.Namespace) -> Measured:
    """All systems in turn, round by round."""
    backends = {"rpc": "rpc://", "redis": redis.url}
    systems = {
        (name, kind): System(name, virtual_host(node, kind), url, options)
        for kind, url in backends.items()
        for name in ("amqptasks", "celery")
    }
    found = Measured()
    bare_host = virtual_host(node, "rpc")
    bare = subprocess.Popen([sys.executable, "-m", "benchmarks.bare_trips", bare_host], cwd=ROOT)
    try:
        for _ in range(options.rounds):
            found.bare += bare_trips.trips(bare_host, options.calls)
            for key, system in systems.items():
                found.trips.setdefault(key, []).extend(system.ask("trips"))
            for key, system in systems.items():
                if key != ("celery", "rpc"):  # Celery has no chords over AMQP
                    found.chords.setdefault(key, []).append(system.ask("chord"))
        if options.soak:
            sizes = [systems["amqptasks", "rpc"].ask("soak") for _ in range(max(2, options.soak // 500))]
            found.sizes = sizes[1], sizes[-1]
    finally:
        bare.terminate()
        bare.wait(10)
        for system in systems.values():
            system.end()
    return found


def main() -> None:
    """Parse flags, start the servers, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0, help="so many results, and then the client's memory")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/results.md")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.client, options.calls, options.parts)
        return
    with PrivateNode("bench", tune=False) as node, RedisServer() as redis:
        here = machine(node.url, None)
        text = f"{here}.\n\n{measure(node, redis, options).report(options.parts, options.soak)}"
    print(text)
    if options.docs:
        replace_block(ROOT / "docs" / "results.md", "results", text)


if __name__ == "__main__":
    main()
