"""The mailbox of a worker for remote control, as Celery's clients address it (kombu's pidbox).

Requests come by a fanout exchange to a queue that belongs to this connection alone and leaves with it; answers go to a
direct exchange, by the key that the request names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker
from pika.spec import Basic, BasicProperties

__all__ = ["REPLY_EXCHANGE", "REQUEST_EXCHANGE", "Mailbox"]

REQUEST_EXCHANGE, REPLY_EXCHANGE = "celery.pidbox", "reply.celery.pidbox"
_AGAIN_SECONDS, _REFUSED_SECONDS = 1.0, 60.0
_ACCESS_REFUSED, _RESOURCE_LOCKED = 403, 405

_log = structlog.get_logger("amqptasks.worker")


class Mailbox:
    """One node's mailbox, on a connection that may come and go. Belongs to the I/O loop's thread.

    Args:
        node: the worker's name, ``name@host``.
        on_request: called with a request's body and headers.
    """

    def __init__(
        self,
        node: str,
        *,
        on_request: Callable[[bytes, dict[str, Any]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
    ) -> None:
        self._node = node
        self._on_request = on_request
        self._call_later = call_later
        self._connection: Any = None
        self._channel: Any = None
        self._warned: set[int] = set()

    def up(self, connection: Any) -> None:
        """The connection is open: listen on it."""
        self._connection = connection
        connection.channel(on_open_callback=self._opened)

    def down(self) -> None:
        """The connection is lost."""
        self._connection = self._channel = None

    @property
    def listening(self) -> bool:
        """Whether requests arrive."""
        return self._channel is not None

    def _opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._closed)
        queue = f"{self._node}.{REQUEST_EXCHANGE}"

        def consume(_frame: object) -> None:
            channel.basic_consume(queue, self._message, auto_ack=True, exclusive=True, callback=listen)

        def listen(_frame: object) -> None:
            self._channel = channel
            self._warned.clear()

        channel.exchange_declare(REQUEST_EXCHANGE, "fanout", callback=lambda _frame: None)
        channel.exchange_declare(REPLY_EXCHANGE, "direct", callback=lambda _frame: None)
        channel.queue_declare(queue, exclusive=True, auto_delete=True, callback=lambda _frame: None)
        channel.queue_bind(queue, REQUEST_EXCHANGE, callback=consume)

    def _closed(self, channel: Channel, error: Exception) -> None:
        if self._channel is channel:
            self._channel = None
        if self._connection is None or not isinstance(error, ChannelClosedByBroker):
            return
        code, pause = error.reply_code, _AGAIN_SECONDS
        if code == _ACCESS_REFUSED:
            pause = _REFUSED_SECONDS
        if code not in self._warned:
            self._warned.add(code)
            if code == _RESOURCE_LOCKED:
                text = (
                    f"another worker is named {self._node}, or its connection still ends: give each its own -n NAME@%h"
                )
            else:
                text = error.reply_text
            _log.warning("No remote control for now", node=self._node, reason=text)
        self._call_later(pause, self._again)

    def _again(self) -> None:
        if self._connection is not None and self._connection.is_open and self._channel is None:
            self._connection.channel(on_open_callback=self._opened)

    def _message(self, _channel: Channel, _method: Basic.Deliver, properties: BasicProperties, body: bytes) -> None:
        self._on_request(body, properties.headers or {})

    def reply(self, routing_key: str, body: bytes, headers: dict[str, Any]) -> None:
        """Answer a request. Nobody waits for a confirm: who asked and has gone gets no answer."""
        if self._channel is not None:
            properties = BasicProperties(
                content_type="application/json", content_encoding="utf-8", delivery_mode=1, headers=headers
            )
            self._channel.basic_publish(REPLY_EXCHANGE, routing_key, body, properties)
