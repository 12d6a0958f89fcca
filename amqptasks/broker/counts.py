"""Counting what waits, by AMQP alone."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pika
from pika.exceptions import ChannelClosedByBroker

from amqptasks.broker.visits import Channels, on_some_node
from amqptasks.config.models import BrokerSettings
from amqptasks.errors import AccessRefused, ConfigError

__all__ = ["queue_counts"]

#: RabbitMQ counts 0 for a quorum queue whose leader has not answered within this time.
_SILENT_SECONDS, _TRIES = 0.25, 4


def queue_counts(
    broker_settings: BrokerSettings, names: Iterable[str], *, name: str = "count"
) -> dict[str, tuple[int, int] | None]:
    """(messages ready, consumers) of each queue, None for a queue that does not exist.

    Messages that a consumer holds unacknowledged are not counted (AMQP 0-9-1, queue.declare-ok), and a quorum queue
    whose leader is slow to answer counts as 0. It is asked four times; this is no proof that a queue is empty.
    """
    wanted = list(names)

    def count(connection: pika.BlockingConnection, vhost: str) -> dict[str, tuple[int, int] | None]:
        channels = Channels(connection)
        counts: dict[str, tuple[int, int] | None] = {}
        for queue in wanted:
            try:
                counts[queue] = _counted(channels, queue)
            except ChannelClosedByBroker as closed:
                if closed.reply_code == 404:
                    counts[queue] = None
                elif closed.reply_code == 403:
                    raise AccessRefused(f"counting queue {queue!r}: {closed.reply_text}") from closed
                else:
                    raise ConfigError(f"counting queue {queue!r}: {closed.reply_text}") from closed
        return counts

    return on_some_node(broker_settings, name, count)


def _counted(channels: Channels, queue: str) -> tuple[int, int]:
    for _ in range(_TRIES):
        asked = time.monotonic()
        found = channels.get().queue_declare(queue, passive=True).method
        if found.message_count or time.monotonic() - asked < _SILENT_SECONDS:
            break
    return found.message_count, found.consumer_count
