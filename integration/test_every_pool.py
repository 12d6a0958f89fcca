"""What holds in each pool: time limits, revokes, rate limits, replacing executors. One worker per test and pool."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any

import pytest

from amqptasks import AmqpTasks
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import Bench

POOLS = ("process", "solo", "thread", "asyncio", "gevent")
every_pool = pytest.mark.parametrize("pool", POOLS)
JOBS = "integration.apps.jobs"


def _queue(bench: Bench, pool: str, at_once: int, **more: Any) -> None:
    """As many executors as tasks at once, so that what happens to one task happens to it alone."""
    bench.settings["queues"] = {"default": {"pool": pool, "concurrency": at_once, **more}}
    if pool in ("thread", "asyncio", "gevent"):
        bench.settings["queues"]["default"]["processes"] = at_once


def _warm(bench: Bench, app: AmqpTasks, at_once: int = 1) -> None:
    """Have all executors started: gevent's are programs of their own, which takes them a while."""
    bench.wait_done({bench.send(app, "note", 0.3) for _ in range(at_once)}, timeout=60)


def _letters(bench: Bench, count: int) -> dict[str, dict[str, Any]]:
    letters = [one["properties"] for one in bench.vhost.dead_letters("default", count, timeout=60)]
    return {one["correlation_id"]: one["headers"] for one in letters}


@pytest.mark.timing
@every_pool
def test_a_task_over_its_hard_limit_ends_whatever_it_does(bench: Bench, pool: str) -> None:
    ways = ["sleep", "spin", "gil", "no gil", "stubborn"]
    at_once = 1 if pool == "solo" else len(ways) + (2 if pool != "gevent" else 0)
    bench.settings["logging"] = {"format": "json"}
    _queue(bench, pool, at_once)
    app = bench.client()
    worker = bench.worker("default")
    _warm(bench, app, at_once)
    ids = {way: bench.send(app, "holds_on", way, time_limit=2.0) for way in ways}
    if pool != "gevent":  # which refuses coroutines
        ids["awaits"] = bench.send(app, "awaits", time_limit=2.0)
        ids["blocks"] = bench.send(app, "blocks", 30.0, time_limit=2.0)
    letters = _letters(bench, len(ids))
    assert {letters[one]["x-task-reason"] for one in ids.values()} == {"time_limit"}
    begun = {entry.task_id: entry.at for entry in bench.ledger.entries("begin")}
    ended = _ended(worker)
    needed = {way: ended[one] - begun[one] for way, one in ids.items()}
    # Two seconds of its own, and one more to end where it is asked first.
    assert all(1.9 < seconds <= 4 for seconds in needed.values()), str(needed)
    again = {bench.send(app, "note", 0.2) for _ in range(2 * len(ids))}
    bench.wait_done(again, timeout=60)
    assert not set(ids.values()) & bench.ledger.ids("done")
    if pool == "asyncio":
        assert ids["awaits"] in bench.ledger.ids("cleaned up")
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


def _ended(worker: WorkerProcess) -> dict[str, float]:
    """When each task that was ended had ended, by the log: its dead letter may wait for an executor that starts."""
    found: dict[str, float] = {}
    for line in worker.log.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if "task_id" in record and re.search(r"\] (failed: |terminated|revoked)", record["event"]):
            found.setdefault(record["task_id"], datetime.fromisoformat(record["timestamp"]).timestamp())
    return found


@every_pool
def test_a_soft_limit_lets_a_task_clean_up(bench: Bench, pool: str) -> None:
    _queue(bench, pool, 1)
    app = bench.client()
    worker = bench.worker("default")
    _warm(bench, app)
    task = "awaits" if pool == "asyncio" else "stops_briefly"
    task_id = bench.send(app, task, soft_time_limit=0.5)
    assert _letters(bench, 1)[task_id]["x-task-reason"] == "time_limit"
    assert task_id in bench.ledger.ids("cleaned up")
    pids = {entry.pid for entry in bench.ledger.entries("begin")}
    after = bench.send(app, "note")
    bench.wait_done({after})
    # Nobody was killed for it.
    assert {entry.pid for entry in bench.ledger.entries("done")} == pids
    assert worker.stop() == 0


@pytest.mark.timing
@every_pool
def test_what_is_revoked_does_not_run_or_is_ended(bench: Bench, pool: str) -> None:
    bench.settings["logging"] = {"format": "json"}
    _queue(bench, pool, 1, prefetch=10)
    app = bench.client()
    worker = bench.worker("default")
    _warm(bench, app)
    running = bench.send(app, "holds_on", "sleep")
    bench.wait_done({running}, event="begin")
    waiting = [bench.send(app, "note") for _ in range(3)]
    delayed = bench.send(app, "note", countdown=1.0)
    wait_until(lambda: bench.vhost.ready("default") == 0, 10, "the worker holds all")
    app.control.revoke([waiting[1], delayed])
    time.sleep(0.3)
    asked = time.time()
    app.control.revoke(running, terminate=True)
    letters = _letters(bench, 3)
    assert _ended(worker)[running] - asked < 5, "what runs is ended"
    assert {task_id: headers["x-task-reason"] for task_id, headers in letters.items()} == dict.fromkeys(
        (running, waiting[1], delayed), "revoked"
    )
    bench.wait_done({waiting[0], waiting[2]})
    assert not bench.ledger.ids("done") & {running, waiting[1], delayed}
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


@pytest.mark.timing
@every_pool
def test_a_rate_limit_holds_and_lets_others_run(bench: Bench, pool: str) -> None:
    _queue(bench, pool, 4 if pool != "solo" else 1)
    bench.settings["tasks"] = {f"{JOBS}.paced": {"rate_limit": "10/s"}}
    app = bench.client()
    worker = bench.worker("default")
    _warm(bench, app, 4)
    limited = {bench.send(app, "paced") for _ in range(40)}
    free = {bench.send(app, "note") for _ in range(20)}
    begun = time.monotonic()
    bench.wait_done(free)
    assert time.monotonic() - begun < 8
    bench.wait_done(limited)
    passes = sorted(
        int(entry.event.removeprefix("passed=")) / 1000
        for entry in bench.ledger.entries()
        if entry.event.startswith("passed=")
    )
    assert len(passes) == 40
    assert max(sum(1 for other in passes if one <= other < one + 1) for one in passes) <= 11
    assert 3 < passes[-1] - passes[0] < 8
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


@every_pool
def test_executors_are_replaced_after_so_many_tasks_or_so_much_memory(bench: Bench, pool: str) -> None:
    _queue(bench, pool, 1, max_tasks_per_child=20, max_memory_per_child="300MB")
    app = bench.client()
    worker = bench.worker("default")
    ids = {bench.send(app, "note") for _ in range(60)}
    bench.wait_done(ids, timeout=90)
    bench.vhost.wait_settled("default")
    runs: dict[int, int] = {}
    for entry in bench.ledger.entries("done"):
        runs[entry.pid] = runs.get(entry.pid, 0) + 1
    assert sum(runs.values()) == 60  # each once
    assert 3 <= len(runs) <= 6
    assert max(runs.values()) <= 20
    large = bench.send(app, "grows", 300)
    bench.wait_done({large}, timeout=60)
    (grown,) = [entry.pid for entry in bench.ledger.entries("done") if entry.task_id == large]
    wait_until(lambda: grown not in {one.pid for one in worker.executors()}, 30, "it is replaced")
    small = bench.send(app, "note")
    bench.wait_done({small}, timeout=60)
    assert worker.stop() == 0
