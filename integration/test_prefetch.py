"""`prefetch: auto`: work in hand where tasks are short, none held back where they are long, few subscriptions."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench


def consumers(bench: Bench, queue: str) -> list[tuple[int, int]]:
    """Each consumer of a queue: its prefetch, and how often its worker had subscribed then."""
    return [
        (one["prefetch_count"], int(one["consumer_tag"].rpartition(".")[2]))
        for one in bench.vhost.management.request("GET", f"consumers/{bench.vhost.name}")
        if one["queue"]["name"] == queue
    ]


@pytest.mark.timing
def test_each_queue_has_in_hand_what_its_run_time_asks_for_and_keeps_its_subscription(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {}, "short": {}, "long": {}, "very_long": {}}
    bench.worker("short,long,very_long", "-c", "2")
    app = bench.client()
    short = {bench.send(app, "note", 0.01, queue="short") for _ in range(800)}
    long = {bench.send(app, "note", 0.3, queue="long") for _ in range(40)}
    very_long = {bench.send(app, "note", 1.2, queue="very_long") for _ in range(8)}
    bench.wait_done(short | long | very_long)
    ((in_short, often),) = consumers(bench, "short")
    assert 4 <= in_short <= 10, "50 ms of work for each of two slots; a busy machine stretches a task"
    assert often <= 4
    assert consumers(bench, "long") == [(3, 2)], "one more than what runs"
    ((in_very_long, often),) = consumers(bench, "very_long")
    assert in_very_long == 2, "what runs, and no more"
    assert often == 1


@pytest.mark.timing
def test_between_short_and_long_tasks_it_subscribes_seldom(bench: Bench) -> None:
    """Each long task finds short ones behind it, so that the worker stops consuming for a while; but not each time."""
    bench.worker("default", "-c", "1")
    app = bench.client()
    ids = set()
    for _ in range(25):
        ids |= {bench.send(app, "note", 0.001) for _ in range(30)}
        ids.add(bench.send(app, "note", 0.3))
    bench.wait_done(ids)
    wait_until(lambda: len(consumers(bench, "default")) == 1, 10, "one consumer is left")
    often = consumers(bench, "default")[0][1]
    assert often <= 12, "25 long tasks in eight seconds"
    assert len(bench.ledger.entries("done")) == len(ids), "none ran twice"


@pytest.mark.timing
@pytest.mark.parametrize(
    ("pool", "kind"),
    [("process", "quorum"), ("thread", "quorum"), ("asyncio", "quorum"), ("process", "classic")],
)
def test_tasks_behind_a_minute_long_one_run_elsewhere(bench: Bench, pool: str, kind: str) -> None:
    """Both workers have run short tasks, and have some in hand, when the long ones come."""
    bench.settings["queues"]["default"] = {"type": kind}
    app = bench.client()
    first = bench.worker("default", "-c", "1", "-P", pool)
    bench.worker("default", "-c", "1", "-P", pool)
    bench.wait_done({bench.send(app, "note") for _ in range(400)})
    slow = bench.send(app, "note", 60.0)
    quick = {bench.send(app, "note", 0.1) for _ in range(10)}
    started = time.monotonic()
    bench.wait_done({slow}, event="begin")
    bench.wait_done(quick, timeout=15)
    assert time.monotonic() - started < 5
    # Now both are busy: what comes waits in the broker, and a third worker has it at once.
    bench.wait_done({bench.send(app, "note", 60.0)}, event="begin")
    waiting = {bench.send(app, "note", 0.1) for _ in range(5)}
    wait_until(lambda: bench.vhost.ready("default") == 5, 5, "they wait in the broker", pause=0.1)
    bench.worker("default", "-c", "1", "-P", pool)
    started = time.monotonic()
    bench.wait_done(waiting, timeout=10)
    assert time.monotonic() - started < 3
    assert slow not in bench.ledger.ids("done")
    first.kill()


@pytest.mark.parametrize("pause", [0.05, 0.005], ids=["50 ms", "5 ms"])
def test_a_high_priority_overtakes_all_but_what_is_in_hand(bench: Bench, pause: float) -> None:
    """Two a slot, whatever the run time: so many low ones may begin before the last of the high ones, and no more."""
    bench.settings["queues"] = {"default": {"max_priority": 10}}
    app = bench.client()
    note = app.signature("integration.apps.jobs.note", (pause,))
    many = int(20 / pause)
    low = {one.id for one in app.send_many([note.clone().set(priority=1) for _ in range(many)])}
    bench.worker("default", "-c", "2")
    wait_until(lambda: [held for held, _ in consumers(bench, "default")] == [4], 10, "four are in hand", pause=0.1)
    high = app.send_many([note.clone().set(priority=9) for _ in range(20)])
    published = time.time()
    bench.wait_done({*low, *(one.id for one in high)}, timeout=60)
    begun = bench.ledger.entries("begin")
    # Of each executor: when one takes long to begin its last one, the other rightly goes on with what is left.
    last = {entry.pid: entry.at for entry in begun if entry.task_id not in low}
    assert begun[-1].at > max(last.values()), "there were low ones to overtake"
    between = [one for one in begun if one.task_id in low and published < one.at < last.get(one.pid, 0.0)]
    assert len(between) <= 4, f"{len(between)} low ones began after the high ones were published"


@pytest.mark.fault
def test_a_connection_lost_while_long_tasks_fill_every_slot_costs_what_waits_no_deliveries(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    """Taken and given back ten times a second, a message is dead-lettered in two seconds (RabbitMQ 4.0 to 4.2).

    From 4.0 on what comes back stands behind what waits. So the worker gets one of those first, gives it back, and
    takes nothing more: the message of its own long task stays in the broker, and is acknowledged when that has ended.
    """
    app = bench.client()
    version = bench.vhost.management.request("GET", "overview")["rabbitmq_version"]
    behind = int(version.split(".")[0]) >= 4
    release = bench.folder / "release"
    worker = bench.worker("default", "-c", "1", url=through_proxy)
    bench.wait_done({bench.send(app, "note") for _ in range(400)})
    slow = bench.send(app, "waits_for", str(release))
    bench.wait_done({slow}, event="begin")
    waiting = {bench.send(app, "note") for _ in range(5)}
    wait_until(lambda: bench.vhost.ready("default") == 5, 10, "they wait in the broker", pause=0.1)
    before = worker.log.count("Consuming")
    proxy.cut()
    wait_until(lambda: worker.log.count("Consuming") > before, 15, "it consumes again")
    time.sleep(3)  # for as long as it would take and give back
    wait_until(lambda: bench.vhost.ready("default") == 5 + behind, 10, "they wait in the broker", pause=0.1)
    found = {
        one["properties"]["correlation_id"]: one["properties"]["headers"].get("x-delivery-count", 0)
        for one in bench.vhost.management.messages("default")
    }
    assert set(found) == (waiting | {slow} if behind else waiting)
    assert max(found.values()) <= 4, found
    release.touch()
    bench.wait_done({slow, *waiting}, timeout=20)
    bench.vhost.wait_settled("default")
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin"))[slow] == 1
    assert worker.stop() == 0
