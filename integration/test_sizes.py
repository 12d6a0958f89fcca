"""Large messages and results, long chains, and calls that nobody takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from amqptasks import AmqpTasks, PublishError, chain, chord
from amqptasks.errors import ChordError, MessageTooLarge, ResultTimeout
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.conftest import Bench, Broker, CanvasBench

MB = 1_000_000


LIMIT = 16 * 1024 * 1024  # the default from RabbitMQ 4.0 on


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """A node whose largest message is that of RabbitMQ 4, whatever its version."""
    with PrivateNode("sizes", config={"max_message_size": str(LIMIT)}) as node:
        yield Broker("private node", node.url, node.management_url)


@pytest.mark.fault
def test_fifteen_megabytes_pass_and_what_is_too_large_is_told_while_other_threads_publish(desk: CanvasBench) -> None:
    desk.settings["broker"]["publish_timeout"] = 60
    app = desk.caller()
    desk.worker("default", "-c", "1")
    assert app.send_task("integration.apps.canvas.identity", ("x" * 15 * MB,)).get(timeout=60) == "x" * 15 * MB
    stop = threading.Event()
    sent: list[str] = []
    problems: list[Exception] = []

    def publish() -> None:
        while not stop.is_set():
            try:
                sent.append(app.send_task("integration.apps.canvas.counted", ignore_result=True).id)
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for one in threads:
        one.start()
    try:
        wait_until(lambda: len(sent) > 20, 20, "others publish")
        with pytest.raises(PublishError, match=f"the broker's limit is {LIMIT}"):
            app.send_task("integration.apps.canvas.identity", ("x" * (LIMIT + MB),))
        count = len(sent)
        wait_until(lambda: len(sent) > count + 20, 20, "others still publish")
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert problems == []
    names = {one["client_properties"]["connection_name"] for one in desk.vhost.management.connections()}
    assert len([name for name in names if name.endswith("/publisher")]) <= 1
    desk.wait_done(set(sent), 60, event="counted")


@pytest.mark.fault
def test_a_result_that_is_too_large_fails_its_task_and_holds_up_nobody(desk: CanvasBench) -> None:
    """Published again and again, it would never be acknowledged."""
    app = desk.caller()
    desk.worker("default", "-c", "1")
    big = canvas.sized.delay(LIMIT + MB)
    with pytest.raises(Exception, match=f"the broker's limit is {LIMIT}"):
        big.get(timeout=60)
    letter = desk.vhost.dead_letters("default", 1)[0]["properties"]
    assert letter["correlation_id"] == big.id
    assert letter["headers"]["x-task-exception"] == "MessageTooLarge"
    assert f"the broker's limit is {LIMIT}" in letter["headers"]["x-task-exception-message"]
    follows = canvas.sized.s(LIMIT + MB) | canvas.identity.s()
    with pytest.raises(MessageTooLarge):
        follows.delay().get(timeout=60)
    parts = [canvas.sized.s(LIMIT // 2 + MB) for _ in range(2)]
    with pytest.raises(ChordError, match="its body cannot be sent"):
        chord(parts)(canvas.body.s()).get(timeout=60)
    assert app.send_task("integration.apps.canvas.add", (1, 2)).get(timeout=20) == 3
    desk.vhost.wait_settled("default")


def test_a_chain_of_a_thousand_grows_no_message(desk: CanvasBench) -> None:
    desk.settings["queues"] |= {"first": {}, "last": {}}
    app = desk.caller()
    app.declare()
    steps = [canvas.add.si(0, 0).set(queue="first"), *(canvas.add.s(1) for _ in range(998)), canvas.add.s(1)]
    handle = chain(*steps[:-1], steps[-1].set(queue="last")).delay()
    first = desk.vhost.management.messages("first")[0]["payload_bytes"]
    desk.worker("first,default", "-c", "1")
    wait_until(lambda: desk.vhost.ready("last") == 1, 90, "the last one was sent", pause=0.2)
    last = desk.vhost.management.messages("last")[0]["payload_bytes"]
    assert last <= first * 10
    desk.worker("last", "-c", "1")
    assert handle.get(timeout=20) == 999
    print(f"the first of 1000 has {first} bytes, the last {last}")


def test_calls_that_expire_leave_the_queue_though_nobody_takes_them(bench: Bench) -> None:
    app: AmqpTasks = bench.client()
    started = time.monotonic()
    for _ in range(200):
        bench.send(app, "note", expires=2, ignore_result=True)
    asked = app.send_task("integration.apps.jobs.note", expires=2)
    wait_until(lambda: bench.vhost.ready("default") == 0, 20, "the queue drains by itself", pause=0.2)
    assert time.monotonic() - started > 1.5
    letters = bench.vhost.dead_letters("default", 201)
    assert {one["properties"]["headers"]["x-death"][0]["reason"] for one in letters} == {"expired"}
    with pytest.raises(ResultTimeout):  # docs/results.md: the broker tells nobody
        asked.get(timeout=1)
