"""Asking somebody behind a queue, and waiting for the one answer: a short visit, for commands."""

from __future__ import annotations

import os
import secrets
import socket
import time

import pika

from amqptasks.broker.visits import on_some_node
from amqptasks.broker.wire import encode_properties
from amqptasks.config.models import BrokerSettings
from amqptasks.message import Envelope

__all__ = ["ask"]


def ask(broker_settings: BrokerSettings, envelope: Envelope, *, prefix: str, seconds: float) -> bytes | None:
    """Publish, and return the body of what comes back with the same correlation id; None when nothing comes in time.

    Raises `BrokerUnreachable`, `AccessRefused`.
    """

    def visit(connection: pika.BlockingConnection, _vhost: str) -> bytes | None:
        channel = connection.channel()
        # Named as those of callers are, for the permissions of those who may call.
        name = f"{prefix}.reply.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        channel.queue_declare(name, exclusive=True, auto_delete=True)
        answers: list[bytes] = []

        def received(_channel: object, _method: object, properties: pika.BasicProperties, body: bytes) -> None:
            if properties.correlation_id == envelope.correlation_id:
                answers.append(body)

        channel.basic_consume(name, received, auto_ack=True)
        envelope.reply_to = name
        channel.basic_publish(
            envelope.exchange, envelope.routing_key, envelope.body, encode_properties(envelope), mandatory=False
        )
        until = time.monotonic() + seconds
        while not answers and time.monotonic() < until:
            connection.process_data_events(time_limit=max(0.0, until - time.monotonic()))
        return answers[0] if answers else None

    return on_some_node(broker_settings, f"amqptasks/ask/{socket.gethostname()}/{os.getpid()}", visit)
