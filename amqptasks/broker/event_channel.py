"""A channel for events: no confirms, nothing kept. What cannot be sent now is not sent.

Events tell monitors what happens; no task waits for them. They are published to Celery's topic exchange, where they
vanish when nobody listens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pika.channel import Channel
from pika.exceptions import AMQPError, ChannelClosedByBroker

from amqptasks.broker.link import Link
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope
from amqptasks.protocol.events import EXCHANGE, encode_events

__all__ = ["EventChannel"]

_AGAIN_SECONDS, _REFUSED_SECONDS = 1.0, 60.0
_ACCESS_REFUSED = 403
#: Bytes that the broker has not taken yet. Beyond, events are dropped, for what else is published on the connection.
_MOST_UNSENT = 1 << 18

logger = logging.getLogger(__name__)


class EventChannel:
    """Publishes events on a link that may come and go. Belongs to the loop's thread.

    Args:
        node: whose events they are (the message header ``hostname``).
        on_open: called when events can be sent, after each connecting.
    """

    def __init__(self, link: Link, node: str, on_open: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._on_open = on_open
        self._properties = encode_properties(Envelope("", "", b"", headers={"hostname": node}, delivery_mode=1))
        self._channel: Channel | None = None
        self._wanted = False
        self._warned: set[int] = set()
        #: Whether the channel opens for the first time: who asks then may wait for it.
        self.opening = False
        link.watch(self._up, lambda _error: self._down())

    def open(self) -> None:
        """Have a channel, now and after each reconnecting."""
        if self._wanted:
            return
        self._wanted = self.opening = True
        connection = self._link.connection
        if connection is not None and connection.is_open:
            self._up(connection)
        else:
            self._link.open()

    def send(self, key: str, events: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> bool:
        """Publish an event or a list of them, if the broker takes it now. Returns whether it was published."""
        return self.send_encoded(key, encode_events(events))

    def send_encoded(self, key: str, body: bytes) -> bool:
        """`send` for what is encoded already."""
        channel = self._channel
        if channel is None or not channel.is_open or self._link.blocked_since is not None:
            return False
        if self._link.unsent > _MOST_UNSENT:
            return False
        try:
            channel.basic_publish(EXCHANGE, key, body, self._properties)
        except AMQPError:
            return False
        return True

    # -- coming and going -----------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        if self._wanted:
            connection.channel(on_open_callback=self._opened)

    def _down(self) -> None:
        self._channel = None
        self.opening = False

    def _opened(self, channel: Channel) -> None:
        def declared(_frame: object) -> None:
            self._channel = channel
            self.opening = False
            self._warned.clear()
            self._on_open()

        channel.add_on_close_callback(self._closed)
        channel.exchange_declare(EXCHANGE, "topic", durable=True, callback=declared)

    def _closed(self, _channel: Channel, error: Exception) -> None:
        self._channel = None
        self.opening = False
        if not isinstance(error, ChannelClosedByBroker):
            return
        code = error.reply_code
        if code not in self._warned:
            self._warned.add(code)
            logger.warning("No events for now: %s", error.reply_text)
        self._link.loop.call_later(_REFUSED_SECONDS if code == _ACCESS_REFUSED else _AGAIN_SECONDS, self._again)

    def _again(self) -> None:
        connection = self._link.connection
        if connection is not None and connection.is_open and self._channel is None:
            self._up(connection)
