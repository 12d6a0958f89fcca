#!/usr/bin/env python3
"""Round trips and chords with amqptasks and with Celery's prefork pool, in turn on one private node; prints ratios.

Both publish with confirms to quorum queues and acknowledge after the task. Round trips one after the other, from call
to value, and beside them bare pika's, whose worker does nothing else. Chords with Redis for both (Celery has none over
AMQP), and with amqptasks over AMQP alone. One client process per system, the same for all rounds; with --soak it asks
for so many results, and its memory is shown.

    python -m benchmarks.results [--calls 500] [--parts 1000] [--rounds 3] [--soak 100000]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0, help="so many results, and then the client's memory")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.client, options.calls, options.parts)
        return
    with PrivateNode("bench", tune=False) as node, RedisServer() as redis:
        backends = {"rpc": "rpc://", "redis": redis.url}
        systems = {
            (name, kind): System(name, virtual_host(node, kind), url, options)
            for kind, url in backends.items()
            for name in ("amqptasks", "celery")
        }
        trips: dict[Any, list[float]] = {key: [] for key in systems}
        chords: dict[Any, list[float]] = {key: [] for key in systems if key != ("celery", "rpc")}
        bare = subprocess.Popen([sys.executable, "-m", "benchmarks.bare_trips", virtual_host(node, "rpc")], cwd=ROOT)
        bare_times: list[float] = []
        for _ in range(options.rounds):
            bare_times += bare_trips.trips(virtual_host(node, "rpc"), options.calls)
            for key, system in systems.items():
                trips[key] += system.ask("trips")
            for key, seconds in chords.items():
                seconds.append(systems[key].ask("chord"))
        print(f"{'round trip':<24}{'p50 ms':>10}{'p99 ms':>10}")
        for key, times in trips.items():
            p50, p99 = percentiles(times)
            print(f"{' '.join(key):<24}{p50:>10.2f}{p99:>10.2f}")
        for kind in backends:
            ratio = percentiles(trips["amqptasks", kind])[0] / percentiles(trips["celery", kind])[0]
            print(f"p50 with {kind}: {ratio:.2f} of Celery's")
        bare.terminate()
        bare.wait(10)
        p50, p99 = percentiles(bare_times)
        print(f"{'bare pika':<24}{p50:>10.2f}{p99:>10.2f}")
        print(f"p50 of bare pika: {p50 / percentiles(trips['celery', 'rpc'])[0]:.2f} of Celery's with rpc")
        print(f"\n{f'chord of {options.parts}':<24}{'s':>10}")
        for key, times in chords.items():
            print(f"{' '.join(key):<24}{statistics.median(times):>10.2f}")
        theirs = statistics.median(chords["celery", "redis"])
        for kind in backends:
            print(f"with {kind}: {statistics.median(chords['amqptasks', kind]) / theirs:.2f} of Celery's with redis")
        if options.soak:
            ours = systems["amqptasks", "rpc"]
            sizes = [ours.ask("soak") for _ in range(max(2, options.soak // 500))]
            print(f"\n{options.soak} results over AMQP: client's RSS {sizes[1]:.1f} MB, then {sizes[-1]:.1f} MB")
        for system in systems.values():
            system.end()


if __name__ == "__main__":
    main()
