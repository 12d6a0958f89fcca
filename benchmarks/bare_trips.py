"""Round trips with nothing but pika: what the broker itself takes, with the guarantees of the others.

The call is confirmed by a quorum queue, the answer is confirmed by a durable classic queue, and then the call is
acknowledged.
"""

from __future__ import annotations

import sys
import time
import uuid

import pika
from pika.adapters.blocking_connection import BlockingChannel

__all__ = ["QUEUE", "trips", "worker"]

QUEUE = "bare"
_PERSISTENT = pika.DeliveryMode.Persistent


def _channel(url: str) -> BlockingChannel:
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.confirm_delivery()
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    return channel


def worker(url: str) -> None:
    """Answer each message with its own body, until the connection is closed."""
    channel = _channel(url)
    channel.basic_qos(prefetch_count=64)
    for method, properties, body in channel.consume(QUEUE):
        answer = pika.BasicProperties(correlation_id=properties.correlation_id, delivery_mode=_PERSISTENT)
        channel.basic_publish("", properties.reply_to, body, answer)
        channel.basic_ack(method.delivery_tag)


def trips(url: str, calls: int) -> list[float]:
    """Seconds from each call to its answer."""
    channel = _channel(url)
    replies = f"bare.reply.{uuid.uuid4()}"
    channel.queue_declare(replies, durable=True, arguments={"x-expires": 60_000})
    arrived: list[str] = []
    channel.basic_consume(replies, lambda _c, _m, got, _b: arrived.append(got.correlation_id), auto_ack=True)
    times = []
    for number in range(calls + 1):
        name = str(number)
        ask = pika.BasicProperties(correlation_id=name, reply_to=replies, delivery_mode=_PERSISTENT)
        started = time.perf_counter()
        channel.basic_publish("", QUEUE, b"x" * 200, ask, mandatory=True)
        while not arrived or arrived[-1] != name:
            channel.connection.process_data_events(time_limit=10)
        times.append(time.perf_counter() - started)
    channel.connection.close()
    return times[1:]


if __name__ == "__main__":
    worker(sys.argv[1])
