"""The consumer itself: stopped, paused and changed at each moment of its subscription."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pika
import pytest

from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.config import BrokerSettings
from amqptasks.testing.proxy import TcpProxy
from integration.conftest import VirtualHost

QUEUE = "consumed"


class Stage:
    """A consumer on a loop of the test's own."""

    def __init__(self, url: str) -> None:
        self.loop = new_loop()
        self.link = Link(self.loop, connection_parameters(BrokerSettings.model_validate({"url": url}), "test"))
        self.link.watch(self._up, lambda error: self.consumer.connection_lost(str(error)))
        self.messages: list[Incoming] = []
        self.ready = 0
        self.lost: list[str] = []
        self.ended = 0
        self.stopped = False
        self.consumer = Consumer(
            QUEUE,
            5,
            on_message=self.messages.append,
            on_ready=self._ready,
            on_lost=lambda reason, _missing: self.lost.append(reason),
        )
        self.at_open: Callable[[], None] = lambda: None

    def _up(self, connection: pika.connection.Connection) -> None:
        self.consumer.open(connection)
        self.at_open()

    def _ready(self) -> None:
        self.ready += 1

    def end(self) -> None:
        self.ended += 1

    def stop(self) -> None:
        """Stop it, once."""
        if not self.stopped:
            self.stopped = True
            self.consumer.stop(self.end)

    def run(self, until: Callable[[], object], timeout: float = 10.0) -> None:
        """Turn the loop until this is true."""
        deadline = time.monotonic() + timeout

        def look() -> None:
            if until() or time.monotonic() > deadline:
                self.loop.stop()
            else:
                self.loop.call_later(0.005, look)

        look_at = self.loop.call_later(0, look)
        self.loop.start()
        self.loop.remove_timeout(look_at)
        assert until()

    def settle(self) -> None:
        """Turn it until the broker has answered everything that was asked of it."""
        answered: list[object] = []
        assert self.link.connection is not None
        self.link.connection.channel(on_open_callback=answered.append)
        self.run(lambda: answered)
        # What other channels asked for has an answer of its own.
        until = time.monotonic() + 1.0
        self.run(lambda: time.monotonic() > until)

    def close(self) -> None:
        """Close connection and loop."""
        self.link.close()
        self.run(lambda: not self.link.is_open)
        self.loop.close()

    def connected(self) -> Stage:
        self.link.open()
        self.run(lambda: self.ready)
        return self


@pytest.fixture
def publisher(vhost: VirtualHost) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    """A channel that has declared the queue."""
    connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
    channel = connection.channel()
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    yield channel
    connection.close()


def consumers(publisher: pika.adapters.blocking_connection.BlockingChannel) -> int:
    """How many there are. RabbitMQ says 0 for a quorum queue whose leader has not answered within 250 ms."""
    until = time.monotonic() + 10
    while True:
        asked = time.monotonic()
        found = int(publisher.queue_declare(QUEUE, passive=True).method.consumer_count)
        if found or time.monotonic() - asked < 0.25 or time.monotonic() > until:
            return found


@pytest.fixture
def stage(vhost: VirtualHost, publisher: object) -> Iterator[Stage]:
    made = Stage(vhost.url)
    yield made
    made.close()


def test_stopped_while_its_channel_opens_it_never_consumes(stage: Stage, publisher: pika.channel.Channel) -> None:
    stage.at_open = lambda: stage.consumer.stop(stage.end)
    stage.link.open()
    stage.run(lambda: stage.ended)
    publisher.basic_publish("", QUEUE, b"")
    stage.settle()
    assert (stage.messages, stage.ready, consumers(publisher)) == ([], 0, 0)


@pytest.mark.parametrize("turns", range(6))
def test_stopped_while_it_subscribes_it_does_not_go_on(
    stage: Stage, publisher: pika.channel.Channel, turns: int
) -> None:
    """After no answer of the broker, after one …: open-ok, qos-ok, consume-ok."""
    heard = 0

    def count() -> None:
        nonlocal heard
        connection = stage.link.connection
        read = connection.inflow.feed

        def feed(data: bytes) -> int:
            nonlocal heard
            done: int = read(data)
            if heard == turns:
                stage.stop()
            heard += 1
            return done

        connection.inflow.feed = feed

    stage.at_open = count
    stage.link.open()
    stage.run(lambda: stage.ended or heard > 3 or stage.ready)
    stage.stop()
    stage.run(lambda: stage.ended)
    publisher.basic_publish("", QUEUE, b"")
    stage.settle()
    assert (stage.messages, consumers(publisher), stage.ended) == ([], 0, 1)


def test_stopped_while_its_prefetch_changes_it_does_not_go_on(stage: Stage, publisher: pika.channel.Channel) -> None:
    stage.connected().consumer.set_prefetch(7)
    stage.consumer.stop(stage.end)
    stage.run(lambda: stage.ended)
    publisher.basic_publish("", QUEUE, b"")
    stage.settle()
    assert (stage.messages, consumers(publisher), stage.ended) == ([], 0, 1)


def test_paused_while_its_prefetch_changes_it_waits_and_goes_on_once(
    stage: Stage, publisher: pika.channel.Channel
) -> None:
    stage.connected().consumer.set_prefetch(7)
    stage.consumer.pause(stage.end)
    stage.run(lambda: stage.ended)
    stage.settle()
    assert (stage.consumer.consuming, stage.consumer.paused, consumers(publisher)) == (False, True, 0)
    stage.consumer.resume()
    stage.consumer.resume()
    stage.run(lambda: stage.consumer.consuming)
    publisher.basic_publish("", QUEUE, b"")
    stage.run(lambda: stage.messages)
    stage.settle()
    assert (consumers(publisher), stage.consumer.paused) == (1, False)


def test_a_prefetch_that_changes_while_it_changes_leaves_one_consumer_with_the_last(
    stage: Stage, publisher: pika.channel.Channel
) -> None:
    stage.connected()
    for prefetch in (1, 2, 3):
        stage.consumer.set_prefetch(prefetch)
    stage.settle()
    assert consumers(publisher) == 1
    for _ in range(6):
        publisher.basic_publish("", QUEUE, b"")
    stage.run(lambda: len(stage.messages) >= 3)
    stage.settle()
    assert len(stage.messages) == 3


def test_a_prefetch_of_a_channel_that_closes_changes_nothing(stage: Stage) -> None:
    stage.connected()
    stage.consumer._channel.close()
    stage.consumer.set_prefetch(7)
    stage.run(lambda: stage.lost)


def test_a_connection_lost_while_it_stops_does_not_keep_it_from_ending(
    vhost: VirtualHost, proxy: TcpProxy, through_proxy: str, publisher: object
) -> None:
    stage = Stage(through_proxy).connected()
    proxy.stall()
    stage.consumer.stop(stage.end)
    proxy.cut()
    stage.run(lambda: stage.ended)
    assert stage.ended == 1
    stage.close()
