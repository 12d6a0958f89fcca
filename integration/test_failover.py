"""The broker takes a consumer's queue or node away and puts another in its place."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from amqptasks import PublishError
from amqptasks.errors import Unroutable
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

pytestmark = pytest.mark.fault


class Feed:
    """Publishes until it is stopped: ids that were confirmed, errors that callers were told."""

    def __init__(self, send: Callable[[], str]) -> None:
        self._send = send
        self._stop = threading.Event()
        self.sent: set[str] = set()
        self.told: list[PublishError] = []

    def run(self) -> None:
        while not self._stop.wait(0.01):
            try:
                self.sent.add(self._send())
            except PublishError as error:
                self.told.append(error)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def replace_queue(url: str, arguments: dict[str, Any], *, pause: float = 0.0) -> None:
    """Delete the queue and declare another of its name, before its worker does.

    After a `pause`, in which its consumers are told: docs/guarantees.md."""
    while True:
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            channel = connection.channel()
            with contextlib.suppress(ChannelClosedByBroker):
                channel.queue_delete("default")
                time.sleep(pause)
                channel.queue_declare("default", durable=True, arguments=arguments)
                return


@pytest.mark.timeout(120)
def test_a_queue_that_somebody_replaces_by_another_type_is_consumed_and_callers_are_told_until_it_is_bound(
    bench: Bench,
) -> None:
    """Its bindings went with it, and the worker makes none for a queue that is not as its settings say."""
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    feed = Feed(lambda: bench.send(app, "note", ignore_result=True))
    with feed.running():
        wait_until(lambda: len(bench.ledger.ids()) > 100, 20, "work goes on")
        replace_queue(bench.vhost.url, {"x-queue-type": "classic"})
        wait_until(lambda: worker.log.count("Consuming") == 2, 30, lambda: f"it consumes again\n{worker.log[-2000:]}")
        wait_until(lambda: feed.told, 10, "callers are told")
    assert {type(error) for error in feed.told} == {Unroutable}
    wait_until(lambda: "queue 'default' exists with x-queue-type" in worker.log, 10, lambda: worker.log[-2000:])
    direct = bench.client().send_task("integration.apps.jobs.note", exchange="", routing_key="default").id
    bench.wait_done({direct})
    bench.settings["queues"] = {"default": {"type": "classic", "dead_letter": {"enabled": False}}}
    bound = bench.client()
    bound.declare()
    bench.wait_done({bench.send(bound, "note") for _ in range(20)})
    bench.vhost.wait_settled("default")
    # What stood in the old queue is gone with it: at most what was sent in its last moments.
    assert len(feed.sent - bench.ledger.ids()) < 50
    assert worker.stop() == 0


def test_a_queue_that_somebody_declares_anew_is_bound_again(bench: Bench) -> None:
    """By the worker that consumed it, though nobody here publishes: what was delayed before and what strangers send."""
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "note")})
    management = bench.vhost.management

    def bindings() -> set[tuple[str, str]]:
        found = management.request("GET", f"queues/{bench.vhost.name}/default/bindings")
        return {(one["source"], one["routing_key"]) for one in found}

    before = bindings()
    later = bench.send(app, "note", countdown=8)
    replace_queue(bench.vhost.url, management.queue("default")["arguments"], pause=0.1)
    wait_until(lambda: bindings() == before, 7, lambda: f"{before} again, not {bindings()}\n{worker.log[-2000:]}")
    bench.wait_done({later}, timeout=20)
    assert worker.stop() == 0


def attempts(log: str, queue: str) -> list[float]:
    """When the leader of this queue tried to connect, and could not."""
    lines = re.findall(rf"^(\S+) warning +Connection lost or refused; trying again.*queue={queue}\b", log, re.MULTILINE)
    return [datetime.fromisoformat(one).timestamp() for one in lines]


@pytest.mark.timeout(180)
def test_the_live_node_is_followed_when_it_changes_and_attempts_are_spread(bench: Bench) -> None:
    """Of two nodes one lives, and which one changes under load; then none does for a while."""
    bench.settings["queues"] = {"default": {}, "email": {}}
    bench.client().declare()
    parts = urlsplit(bench.vhost.url)
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(TcpProxy(parts.hostname or "", parts.port or 5672)) for _ in range(2)]
        urls = [f"amqp://{parts.username}:{parts.password}@127.0.0.1:{one.port}{parts.path}" for one in nodes]
        bench.settings["broker"] |= {"url": urls, "publish_timeout": 20}
        nodes[1].refuse()
        app = bench.client()
        worker = bench.worker("default,email", "-c", "1")
        feed = Feed(lambda: bench.send(app, "note", ignore_result=True))
        with feed.running():
            for _ in range(4):
                done = len(bench.ledger.ids())
                wait_until(lambda done=done: len(bench.ledger.ids()) > done + 50, 30, "work goes on")
                nodes[1].accept()
                nodes[0].refuse()
                nodes.reverse()
            done = len(bench.ledger.ids())
            wait_until(lambda: len(bench.ledger.ids()) > done + 50, 30, "work goes on on the last one")
        nodes[0].refuse()
        since = time.time()

        def rounds(queue: str) -> list[float]:
            return [at for at in attempts(worker.log, queue) if at > since]

        wait_until(lambda: min(len(rounds("default")), len(rounds("email"))) >= 18, 60, lambda: worker.log[-3000:])
        nodes[0].accept()
        last = bench.send(app, "note", ignore_result=True)
        bench.wait_done(feed.sent | {last}, timeout=30)
        bench.vhost.wait_settled("default")
        assert feed.told == [], "a call waits for the node that lives"
        # Without jitter the pauses after the fifth round would all be five seconds, and those of all workers in step.
        pauses = []
        for queue in ("default", "email"):
            gaps = [later - sooner for sooner, later in pairwise(rounds(queue))]
            print([round(gap, 2) for gap in gaps])
            pauses += [gap for gap in gaps if gap > 0.09][5:8]
        assert min(pauses) < 4.0
        assert worker.stop() == 0
