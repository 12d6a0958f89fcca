"""Heartbeats go on whatever a task does, and whatever the leader has to do: no connection is lost."""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import Bench

HEARTBEAT = 2
#: The broker gives up after two of its intervals without a sign of life, at the latest.
SECONDS = 5.0 * HEARTBEAT
POOLS = ("process", "thread", "asyncio", "gevent", "solo")
WAYS = ("gil", "loop", "sleep", "blocks")


def connected(bench: Bench) -> dict[str, int]:
    """The connections of workers, and since when each stands."""
    return {
        one["name"]: one["connected_at"]
        for one in bench.vhost.management.connections()
        if one["client_properties"].get("connection_name", "").endswith("/consume")
    }


def start(
    bench: Bench, *options: str, queues: str = "default", connections: int = 1
) -> tuple[WorkerProcess, dict[str, int]]:
    bench.settings["broker"]["heartbeat"] = HEARTBEAT
    worker = bench.worker(queues, *options)
    wait_until(lambda: len(connected(bench)) == connections, 10, "the management API knows the connections")
    return worker, connected(bench)


@pytest.mark.fault
@pytest.mark.timeout(180)
def test_a_task_that_holds_its_process_for_many_heartbeats_loses_no_connection(bench: Bench) -> None:
    """In every pool: the interpreter's lock held in C, a loop in Python, a sleep, a blocking call in a coroutine.

    Each for five heartbeats of two seconds, one after the other: what five minutes are to those of a minute.
    What keeps the connection does not depend on how long: the process that owns it runs no task.
    """
    bench.settings["queues"] = {"default": {}, **{pool: {"pool": pool, "concurrency": 1} for pool in POOLS}}
    app = bench.client()
    worker, before = start(bench, queues=",".join(POOLS), connections=len(POOLS))
    ids = set()
    for pool in POOLS:
        for how in WAYS:
            if how != "blocks":
                ids.add(bench.send(app, "occupies", how, SECONDS, queue=pool))
            elif pool != "gevent":  # which takes no coroutines
                ids.add(bench.send(app, "blocks", SECONDS, queue=pool))
    bench.wait_done(ids, timeout=120)
    for pool in POOLS:
        bench.vhost.wait_settled(pool)
    assert connected(bench) == before
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin")) == dict.fromkeys(ids, 1)
    assert "lost" not in worker.log
    assert worker.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_task_that_holds_the_gil_for_five_minutes_loses_no_connection(bench: Bench) -> None:
    seconds = float(os.environ.get("AMQPTASKS_TEST_GIL_SECONDS", "300"))
    app = bench.client()
    worker, before = start(bench, "-c", "1")
    task_id = bench.send(app, "occupies", "gil", seconds)
    bench.wait_done({task_id}, timeout=seconds + 30)
    bench.vhost.wait_settled("default")
    assert connected(bench) == before
    assert len([one for one in bench.ledger.entries("begin") if one.task_id == task_id]) == 1
    assert "lost" not in worker.log
    assert worker.stop() == 0


@pytest.mark.fault
def test_a_leader_that_waits_for_confirms_answers_heartbeats(node: PrivateNode, bench: Bench) -> None:
    """The broker takes no messages for many heartbeats: dead letters wait, tasks go on, both connections stand."""
    bench.settings["broker"] |= {"url": node.url, "heartbeat": HEARTBEAT}
    management = Management(node.management_url)

    def connections() -> set[tuple[str, int]]:
        ours = [one for one in management.connections() if "/default/" in str(one["client_properties"])]
        return {(one["name"], one["connected_at"]) for one in ours}

    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    bench.send(app, "fails", ignore_result=True)
    wait_until(lambda: len(connections()) == 2, 10, "the worker consumes and publishes")
    before = connections()
    failing = {bench.send(app, "fails", ignore_result=True) for _ in range(20)}
    good = {bench.send(app, "note", 0.2, ignore_result=True) for _ in range(20)}
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
    bench.wait_done(failing, event="try")
    bench.wait_done(good)
    time.sleep(SECONDS)
    assert connections() == before
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: management.counts("default") == (0, 0), 20, "all is settled")
    assert failing <= {letter["properties"]["correlation_id"] for letter in management.messages("default.dlq")}
    assert connections() == before
    assert worker.stop() == 0


@pytest.mark.fault
def test_messages_of_ten_megabytes_do_not_keep_a_leader_from_its_heartbeats(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    worker, before = start(bench, "-c", "2")
    data = "x" * 10_000_000
    ids = {bench.send(app, "takes", data, 0.3, ignore_result=True) for _ in range(10)}
    bench.wait_done(ids, timeout=60)
    bench.vhost.wait_settled("default")
    assert connected(bench) == before
    assert worker.stop() == 0


@pytest.mark.fault
def test_ten_thousand_acks_do_not_keep_a_leader_from_its_heartbeats(bench: Bench) -> None:
    """A task that runs on holds the first tag, so that none of the others is acknowledged together with all before."""
    app = bench.client()
    app.declare()
    worker, before = start(bench, "-c", "2")
    release = bench.folder / "release"
    slow = bench.send(app, "waits_for", str(release))
    bench.wait_done({slow}, event="begin")
    since = time.monotonic()
    app.send_many([app.signature("integration.apps.jobs.noop", ignore_result=True) for _ in range(10_000)])
    counts = bench.vhost.management.counts
    wait_until(lambda: counts("default") == (0, 1), 60, lambda: f"all but one are acknowledged: {counts('default')}")
    time.sleep(max(0.0, since + SECONDS - time.monotonic()))
    assert counts("default") == (0, 1)
    release.touch()
    bench.wait_done({slow})
    bench.vhost.wait_settled("default")
    assert connected(bench) == before
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin")) == {slow: 1}
    assert "lost" not in worker.log
    assert worker.stop() == 0
