"""Moving what is in a queue to another one, while others consume and publish.

A message is acknowledged in its old queue when the broker has confirmed it in the new one. So a mover that is killed
loses nothing; at most `WINDOW` messages, those on their way, are then in both queues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from pika import spec
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError, ConnectionWrongStateError
from pika.spec import Basic, BasicProperties

from amqptasks.broker.consumer import cancel
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.wire import EncodedProperties, forwarded
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerError, BrokerUnreachable, PublishError

__all__ = ["WINDOW", "Mover"]

#: Messages on their way: what a mover that is killed leaves in both queues.
WINDOW = 500
#: Above the workers' consumers, which have 0 (RabbitMQ, "Consumer Priorities").
_PRIORITY = 10
#: For what comes while nothing waits: it must not end, or others get a message. It counts as ended long before.
_PREFERRED_WINDOW, _CROWDED = 5000, 1000
_REFUSED_SECONDS = 0.5
_START_SECONDS = 30.0
_CLOSE_SECONDS = 2.0


class _AsTheyCame(BasicProperties):  # type: ignore[misc]  # pika's modules are untyped here
    """Properties that are passed on as they came, whatever they are."""

    encoded = b""

    def decode(self, encoded: bytes, offset: int = 0) -> BasicProperties:
        self.encoded = encoded[offset:]
        return self


class Mover:
    """Moves messages from `source` to `target`, by the default exchange, as long as `turn` is called.

    While it is open, messages that this process receives on other connections have no properties.

    Raises, on entering and in `turn`:
        AccessRefused: the user may not read the source, or not write to the default exchange.
        BrokerUnreachable: the connection was lost. What was on its way is in the source, and may be in the target too.
        PublishError: the target is gone, or takes a message under no circumstances.
    """

    def __init__(self, settings: BrokerSettings, source: str, target: str) -> None:
        self._source, self._target = source, target
        self._loop = new_loop()
        self._link = Link(self._loop, connection_parameters(settings, f"amqptasks/move/{source}"))
        self._link.watch(self._up, self._down)
        self._channel: Any = None
        self._problem: Exception | None = None
        self._closing = False
        #: Number of the publish -> the message, until it is confirmed (both counted from 1 on the channel).
        self._unconfirmed: dict[int, tuple[int, EncodedProperties, bytes]] = {}
        self._published = 0
        self._resting = 0
        self._preferred_since: float | None = None
        self._consuming = False
        #: Messages that are in the target and no more in the source.
        self.moved = 0
        #: How often the target refused one, which was then tried again: a full queue.
        self.refused = 0
        #: `time.monotonic` of the last message that came.
        self.last_came = time.monotonic()
        #: Whether the source was deleted.
        self.source_gone = False

    # -- use ------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Messages on their way."""
        return len(self._unconfirmed) + self._resting

    @property
    def preferred_since(self) -> float | None:
        """Since when the broker gives this mover everything, and others nothing; None before `prefer`.

        A consumer of higher priority gets all messages, unless it holds as many as it may.
        """
        return self._preferred_since

    def __enter__(self) -> Self:
        self._replaced = spec.props[BasicProperties.INDEX]
        spec.props[BasicProperties.INDEX] = _AsTheyCame
        try:
            self._link.open()
            deadline = time.monotonic() + _START_SECONDS
            while not self._consuming:
                self.turn(0.05)
                if time.monotonic() > deadline:
                    raise BrokerUnreachable(f"{self._link.node}: no answer in time")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._link.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._link.is_open and time.monotonic() < deadline:
            self._run(0.01)
        self._link.abandon()
        self._loop.close()
        spec.props[BasicProperties.INDEX] = self._replaced

    def turn(self, seconds: float) -> None:
        """Move for so long."""
        if self._problem is None:
            self._run(seconds)
        if self._problem is not None:
            raise self._problem

    def prefer(self) -> None:
        """From now on take what comes before any other consumer does. For a queue in which little waits."""
        self._channel.basic_qos(prefetch_count=_PREFERRED_WINDOW)
        self._consume("preferred", {"x-priority": _PRIORITY}, self._is_preferred)

    def _is_preferred(self) -> None:
        self._preferred_since = time.monotonic()
        cancel(self._channel, "plain", lambda: None)

    def _run(self, seconds: float) -> None:
        timer = self._loop.call_later(seconds, self._loop.stop)
        self._loop.start()
        self._loop.remove_timeout(timer)

    # -- connection -----------------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._opened)

    def _down(self, error: BrokerError | None) -> None:
        tried_all = self._channel is None and self._link.round_over
        if error is not None and (self._channel is not None or tried_all or isinstance(error, AccessRefused)):
            self._fail(error)

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(self._cancelled)
        channel.add_on_return_callback(self._returned)
        channel.basic_qos(prefetch_count=WINDOW)

        def consuming() -> None:
            self._consuming = True

        channel.confirm_delivery(
            ack_nack_callback=self._confirmed, callback=lambda _frame: self._consume("plain", {}, consuming)
        )

    def _consume(self, tag: str, arguments: dict[str, Any], then: Callable[[], None]) -> None:
        self._channel.basic_consume(
            self._source, self._message, consumer_tag=tag, arguments=arguments, callback=lambda _frame: then()
        )

    def _cancelled(self, _frame: object) -> None:
        self.source_gone = True

    def _closed(self, _channel: Channel, reason: Exception) -> None:
        if isinstance(reason, ChannelClosedByBroker):
            text = f"moving from {self._source!r} to {self._target!r}: {reason.reply_text}"
            self._fail(AccessRefused(text) if reason.reply_code == 403 else PublishError(text, sent=True))

    def _fail(self, problem: Exception) -> None:
        if not self._closing:
            self._problem = self._problem or problem
            self._loop.stop()

    # -- messages -------------------------------------------------------------------------------------------------

    def _message(self, _channel: Channel, method: Basic.Deliver, properties: Any, body: bytes) -> None:
        self.last_came = time.monotonic()
        self._publish(method.delivery_tag, forwarded(properties.encoded), body)
        if self.held >= _CROWDED and self._preferred_since is not None:
            self._preferred_since = time.monotonic()

    def _publish(self, tag: int, properties: EncodedProperties, body: bytes) -> None:
        if self._problem is not None:
            return
        try:
            self._channel.basic_publish("", self._target, body, properties, mandatory=True)
        except (ChannelWrongStateError, ConnectionWrongStateError):
            return  # it closes at this moment, and the message goes back
        self._published += 1
        self._unconfirmed[self._published] = (tag, properties, body)

    def _returned(self, _channel: Channel, _method: object, _properties: object, _body: bytes) -> None:
        # The return comes before its confirm, and says not which message it is about: nothing is acknowledged any more.
        self._fail(PublishError(f"the queue {self._target!r} is gone", sent=True))

    def _confirmed(self, frame: Any) -> None:
        method, unconfirmed = frame.method, self._unconfirmed
        numbers = [method.delivery_tag]
        if method.multiple:
            numbers = [number for number in unconfirmed if number <= method.delivery_tag]
        done = [unconfirmed.pop(number) for number in numbers if number in unconfirmed]
        if self._problem is not None:
            return
        if method.NAME == "Basic.Nack":
            self.refused += len(done)
            self._resting += len(done)
            self._loop.call_later(_REFUSED_SECONDS, lambda: self._again(done))
            return
        for tag, _properties, _body in done:
            self._channel.basic_ack(tag)
        self.moved += len(done)

    def _again(self, refused: list[tuple[int, EncodedProperties, bytes]]) -> None:
        self._resting -= len(refused)
        for one in refused:
            self._publish(*one)
