"""Workers that come and go, as a rollout does it: nothing is lost, nothing is run twice that need not be."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pika
import pytest

from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("cycles", "each", "seconds"),
    [pytest.param(6, 40, 0.3, id="240 tasks"), pytest.param(10, 30, 3.0, id="300 tasks of 3 s", marks=SLOW)],
)
def test_workers_that_are_replaced_again_and_again_run_each_task_once_but_for_those_that_were_killed(
    bench: Bench, cycles: int, each: int, seconds: float
) -> None:
    app = bench.client()
    workers = [bench.worker("default", "-c", "2", "--grace-period", "20") for _ in range(2)]
    ids: set[str] = set()
    killed: set[str | None] = set()
    for cycle in range(cycles):
        ids |= {bench.send(app, "note", seconds) for _ in range(each)}
        done = len(bench.ledger.ids("done"))
        wait_until(lambda least=done + 8: len(bench.ledger.ids("done")) >= least, 60, "tasks go on", pause=0.05)
        old = workers.pop(0)
        if cycle % 5 == 4:
            family = {one.pid for one in old.executors()}
            if cycle > 5:  # as an orchestrator kills what does not end in time
                old.process.send_signal(signal.SIGTERM)
                time.sleep(1)
            old.kill()
            begun = {entry.task_id for entry in bench.ledger.entries("begin") if entry.pid in family}
            ended = {entry.task_id for entry in bench.ledger.entries("done") if entry.pid in family}
            killed |= begun - ended
        else:
            if cycle % 2:
                os.killpg(old.process.pid, signal.SIGTERM)
            else:
                old.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            assert old.wait(30) == 0
            assert time.monotonic() - asked < 15
        workers.append(bench.worker("default", "-c", "2", "--grace-period", "20"))
    bench.wait_done(ids, timeout=90 + len(ids) * seconds / 4)
    bench.vhost.wait_settled("default")
    runs = Counter(entry.task_id for entry in bench.ledger.entries("begin"))
    assert runs.keys() == ids
    # A task that had ended and was not acknowledged yet when its worker was killed runs again, too.
    assert {one for one, count in runs.items() if count > 1} - killed <= _just_ended(bench, runs)
    assert sum(runs.values()) <= len(ids) + len(killed) + 2
    assert [one.stop() for one in workers] == [0, 0]


def _just_ended(bench: Bench, runs: Counter[str | None]) -> set[str | None]:
    done = Counter(entry.task_id for entry in bench.ledger.entries("done"))
    return {one for one, count in done.items() if count > 1 and runs[one] > 1}


def test_a_worker_that_joins_takes_what_waits_though_others_were_there_first(bench: Bench) -> None:
    app = bench.client()
    for _ in range(2):
        bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "note") for _ in range(50)})  # so that they hold more than one
    gate = bench.folder / "gate"
    long = {bench.send(app, "waits_for", str(gate)) for _ in range(2)}
    bench.wait_done(long, event="begin")
    short = {bench.send(app, "note", 0.1) for _ in range(10)}
    time.sleep(1)
    assert not short & bench.ledger.ids("begin")
    bench.worker("default", "-c", "1")
    bench.wait_done(short)
    assert not long & bench.ledger.ids("done")
    gate.touch()
    bench.wait_done(long)


@pytest.fixture
def connection(bench: Bench) -> Iterator[pika.BlockingConnection]:
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as made:
        yield made


@pytest.mark.timing
@pytest.mark.fault
@pytest.mark.parametrize(
    ("pool", "queue", "group"),
    [
        pytest.param("process", {}, False, id="process"),
        pytest.param("process", {"type": "classic"}, True, id="process, classic queue"),
        pytest.param("solo", {}, False, id="solo"),
        pytest.param("thread", {}, True, id="thread"),
        pytest.param("asyncio", {}, False, id="asyncio"),
        pytest.param("gevent", {}, True, id="gevent"),
    ],
)
def test_a_worker_that_is_to_stop_consumes_no_more_and_gives_back_what_waits_within_a_second(
    bench: Bench, connection: pika.BlockingConnection, pool: str, queue: dict[str, Any], group: bool
) -> None:
    """As the broker sees it: no consumer, and nine messages that are ready again, while the tenth runs to its end.

    SIGTERM goes to the supervisor, or to the whole process group.
    """
    bench.settings["queues"] = {"default": {"pool": pool, "concurrency": 1, "prefetch": 10, **queue}}
    app = bench.client()
    worker = bench.worker("default")
    bench.wait_done({bench.send(app, "note")}, timeout=60)

    def consumers() -> int:
        # Not as the queue counts them: a quorum queue counts one that is cancelled until it has settled all.
        found = bench.vhost.management.request("GET", f"consumers/{bench.vhost.name}")
        return sum(one["queue"]["name"] == "default" for one in found)

    def waiting_there() -> int:
        return int(channel.queue_declare("default", passive=True).method.message_count)

    channel = connection.channel()
    # The list has it with the next statistics only, and not any more at once.
    wait_until(lambda: consumers() == 1, 20, "the consumer is seen", pause=0.1)
    running = bench.send(app, "note", 6.0)
    bench.wait_done({running}, event="begin")
    waiting = [bench.send(app, "note") for _ in range(9)]
    wait_until(lambda: bench.vhost.management.counts("default") == (0, 10), 10, "the worker holds all ten")

    if group:
        os.killpg(worker.process.pid, signal.SIGTERM)
    else:
        worker.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    wait_until(lambda: consumers() == 0, 10, "the consumer is cancelled")
    cancelled = time.monotonic() - asked
    wait_until(lambda: waiting_there() == 9, 10, "what waits is back")
    back = time.monotonic() - asked
    assert cancelled < 1.0
    assert back < 1.0
    assert worker.wait() == 0
    assert time.monotonic() - asked < 12
    assert running in bench.ledger.ids("done")
    assert not bench.ledger.ids("begin") & set(waiting)
    assert bench.vhost.ready("default") == 9
