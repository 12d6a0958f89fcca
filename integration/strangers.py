"""A stranger's channel: for messages that this project did not write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pika
from pika.adapters.blocking_connection import BlockingChannel

__all__ = ["strange_channel"]


@contextmanager
def strange_channel(url: str) -> Iterator[BlockingChannel]:
    """A channel that returns from a publish when the broker has confirmed it.

    What is not confirmed a quorum queue may lose when the channel closes at once (seen on RabbitMQ 3.10).
    """
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
