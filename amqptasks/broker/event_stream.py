"""Listening to events, for programs that show them: a queue of this connection's own, and every event as a mapping."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

from amqptasks.broker.mailbox import REQUEST_EXCHANGE
from amqptasks.broker.visits import on_some_node
from amqptasks.config import BrokerSettings
from amqptasks.protocol.events import EXCHANGE

__all__ = ["listen"]

#: As Celery's receivers have it, and a length: a listener that stops reading costs the broker no more than this.
_QUEUE_ARGUMENTS = {"x-message-ttl": 5_000, "x-expires": 60_000, "x-max-length": 2_000}
_ENABLE_SECONDS = 5.0


def listen(
    settings: BrokerSettings,
    on_event: Callable[[dict[str, Any]], None],
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_idle: Callable[[], None] = lambda: None,
    pause: float = 0.25,
    enable: bool = False,
) -> None:
    """Call `on_event` with every event, until the connection is lost or an exception leaves.

    Args:
        on_ready: called when nothing is missed any more.
        on_idle: called every `pause` seconds, or sooner.
        enable: have workers send events, also those that come later; they stay turned on.

    Raises:
        BrokerUnreachable, AccessRefused: the connection failed, or was lost.
    """

    def run(connection: pika.BlockingConnection, _vhost: str) -> None:
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.exchange_declare(REQUEST_EXCHANGE, "fanout")
        queue = f"{EXCHANGE}.{uuid.uuid4()}"
        channel.queue_declare(queue, exclusive=True, auto_delete=True, arguments=_QUEUE_ARGUMENTS)
        channel.queue_bind(queue, EXCHANGE, "#")
        channel.basic_consume(queue, lambda _c, _m, _p, body: _take(body, on_event), auto_ack=True)
        on_ready()
        # Whoever is there says so once, when somebody begins to listen.
        _tell_workers(channel, "heartbeat")
        due = 0.0
        while True:
            if enable and time.monotonic() >= due:
                due = time.monotonic() + _ENABLE_SECONDS
                _tell_workers(channel, "enable_events")
            connection.process_data_events(time_limit=pause)
            on_idle()

    on_some_node(settings, "amqptasks/events", run)


def _take(body: bytes, on_event: Callable[[dict[str, Any]], None]) -> None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return  # not an event
    for one in found if isinstance(found, list) else [found]:
        if isinstance(one, dict) and isinstance(one.get("type"), str) and isinstance(one.get("hostname"), str):
            on_event(one)


def _tell_workers(channel: BlockingChannel, method: str) -> None:
    request: dict[str, Any] = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None}
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=1,
        headers={"clock": 0, "expires": int(time.time()) + 10},
    )
    channel.basic_publish(REQUEST_EXCHANGE, "", json.dumps(request).encode(), properties)
