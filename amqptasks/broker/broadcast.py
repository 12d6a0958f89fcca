"""Asking workers by remote control, from a program that is none: one request out, the answers in (kombu's pidbox)."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

from amqptasks.broker.mailbox import REPLY_EXCHANGE, REQUEST_EXCHANGE
from amqptasks.broker.visits import on_some_node
from amqptasks.config import BrokerSettings

__all__ = ["broadcast"]


def broadcast(
    settings: BrokerSettings,
    method: str,
    arguments: Mapping[str, Any],
    *,
    destination: Sequence[str] | None = None,
    timeout: float = 1.0,
    reply: bool = True,
    on_answer: Callable[[str, Any], None] = lambda _node, _payload: None,
) -> dict[str, Any]:
    """Send a request to all workers, or to those in `destination`. Returns what each node answered.

    Args:
        timeout: seconds to wait for answers. With a destination it ends when all of it has answered.
        reply: False sends the request and returns at once.
        on_answer: called with each node's answer as it comes.

    Raises:
        BrokerUnreachable, AccessRefused: the request could not be sent.
    """
    exchange = _Exchange(method, arguments, destination, timeout, reply, on_answer)
    return on_some_node(settings, f"amqptasks/control/{method}", lambda connection, _vhost: exchange.run(connection))


class _Exchange:
    """One request and its answers."""

    def __init__(
        self,
        method: str,
        arguments: Mapping[str, Any],
        destination: Sequence[str] | None,
        timeout: float,
        reply: bool,
        on_answer: Callable[[str, Any], None],
    ) -> None:
        self._ticket, self._key = str(uuid.uuid4()), str(uuid.uuid4())
        self._wanted = set(destination) if destination is not None else None
        self._timeout = timeout
        self._reply = reply
        self._on_answer = on_answer
        self._answers: dict[str, Any] = {}
        self._request: dict[str, Any] = {
            "method": method,
            "arguments": dict(arguments),
            "destination": list(destination) if destination is not None else None,
            "pattern": None,
            "matcher": None,
        }
        if reply:
            self._request["ticket"] = self._ticket
            self._request["reply_to"] = {"exchange": REPLY_EXCHANGE, "routing_key": self._key}

    def run(self, connection: pika.BlockingConnection) -> dict[str, Any]:
        channel = connection.channel()
        channel.exchange_declare(REQUEST_EXCHANGE, "fanout")
        if self._reply:
            channel.exchange_declare(REPLY_EXCHANGE, "direct")
            queue = f"{self._key}.{REPLY_EXCHANGE}"
            channel.queue_declare(queue, exclusive=True, auto_delete=True)
            channel.queue_bind(queue, REPLY_EXCHANGE, self._key)
            channel.basic_consume(queue, self._answer, auto_ack=True)
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=1,
            # Whole seconds: pika writes no floating point in a header table.
            headers={"clock": 0, "expires": math.ceil(time.time() + self._timeout)},
        )
        channel.basic_publish(REQUEST_EXCHANGE, "", json.dumps(self._request).encode(), properties)
        deadline = time.monotonic() + self._timeout
        while self._reply and (left := deadline - time.monotonic()) > 0:
            connection.process_data_events(time_limit=left)
            if self._wanted is not None and self._wanted <= self._answers.keys():
                break
        return self._answers

    def _answer(
        self, _channel: BlockingChannel, _method: object, properties: pika.BasicProperties, body: bytes
    ) -> None:
        if (properties.headers or {}).get("ticket") != self._ticket:
            return
        try:
            answer = json.loads(body)
        except ValueError:
            return  # no answer of a worker's
        if isinstance(answer, dict):
            for node, payload in answer.items():
                self._answers[node] = payload
                self._on_answer(node, payload)
