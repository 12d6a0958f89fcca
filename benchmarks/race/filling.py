"""Bare pika that publishes with a window, and what the race does to queues."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pika
import pika.exceptions

__all__ = ["Windowed", "consumers", "empty", "publish"]

#: Body and properties of a message.
Message = tuple[bytes, pika.BasicProperties]


class Windowed:
    """Publishes with at most `window` messages on their way without a confirm; mandatory. `run` returns at the last.

    Messages are taken from `messages` as they are sent, so that making them counts.
    """

    def __init__(self, url: str, queue: str, messages: Iterable[Message], count: int, window: int) -> None:
        self._messages, self._count, self._queue, self._window = iter(messages), count, queue, window
        self._sent = self._confirmed = 0
        self._problem: str | None = None
        #: Seconds from the first message to the last confirm, without connecting.
        self.seconds = 0.0
        self._started = 0.0
        self._channel: Any = None
        self._connection = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_open_error_callback=lambda _connection, error: self._fail(str(error)),
            on_close_callback=lambda connection, _error: connection.ioloop.stop(),
        )

    def run(self) -> float:
        """Publish them all. Returns the seconds. Raises RuntimeError when one was returned or refused."""
        self._connection.ioloop.start()
        if self._problem or self._confirmed < self._count:
            raise RuntimeError(self._problem or f"{self._confirmed} of {self._count} confirmed")
        return self.seconds

    def _fail(self, problem: str) -> None:
        self._problem = problem
        self._connection.ioloop.stop()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_return_callback(lambda *_: self._fail(f"a message to {self._queue!r} was returned"))
        channel.confirm_delivery(self._on_confirm, callback=self._start)

    def _start(self, _frame: Any) -> None:
        self._started = time.perf_counter()
        self._pump()

    def _pump(self) -> None:
        publish = self._channel.basic_publish
        while self._sent < self._count and self._sent - self._confirmed < self._window:
            body, properties = next(self._messages)
            self._sent += 1
            publish("", self._queue, body, properties, mandatory=True)

    def _on_confirm(self, frame: Any) -> None:
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self._fail("a message was refused")
            return
        # A single confirm may come before an older one; counting tags is near enough to measure with.
        self._confirmed = max(self._confirmed, frame.method.delivery_tag)
        if self._confirmed >= self._count:
            self.seconds = time.perf_counter() - self._started
            self._connection.close()
        else:
            self._pump()


def publish(url: str, queue: str, messages: Iterable[Message], count: int, window: int = 1000) -> float:
    """Seconds that publishing took."""
    return Windowed(url, queue, messages, count, window).run()


def _declared(channel: Any, queue: str) -> Any:
    return channel.queue_declare(queue, passive=True).method


def consumers(url: str, queue: str) -> int:
    """How many consume from it; 0 while it is not there."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        try:
            found: int = _declared(connection.channel(), queue).consumer_count
            return found
        except pika.exceptions.ChannelClosedByBroker:
            return 0


def empty(url: str, queue: str, timeout: float = 30.0) -> None:
    """Purge the queue until it has no consumer and no message. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        while True:
            before = _declared(channel, queue)
            purged = channel.queue_purge(queue).method.message_count
            if before.consumer_count == 0 and purged == before.message_count == 0:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{queue} has {before.consumer_count} consumers and {before.message_count} messages")
            time.sleep(0.02)
