#!/usr/bin/env python3
"""Publishes to a quorum queue with amqptasks and with bare pika, in turn on one private node; prints the ratios.

The same envelopes everywhere: persistent, mandatory, each confirmed. Bare pika builds its properties as it sends them,
as its users do; envelopes are made beforehand on all sides.

- one by one: `Publisher.publish` beside `BlockingConnection` with confirms
- 8 threads: `Publisher.publish` from 8 threads beside `SelectConnection` with 8 messages on their way
- bulk: `Publisher.publish_many` beside `SelectConnection` with 1000 on their way
- asyncio: 100 callers of `AioPublisher.publish` beside 100 callers of aio-pika

    python -m benchmarks.publish [--messages 2000] [--rounds 3] [--url amqp://…]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import aio_pika
import pika

from amqptasks.broker.aio import AioPublisher
from amqptasks.broker.publisher import Publisher
from amqptasks.config import BrokerSettings
from amqptasks.message import Envelope
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.task import TaskHeaders, task_envelope
from amqptasks.testing.rabbitmq import PrivateNode

QUEUE, THREADS, WINDOW, CALLERS = "publish-bench", 8, 1000, 100
JSON = serializer("json")


def envelopes(count: int) -> list[Envelope]:
    """Task messages as `delay` makes them."""
    made = []
    for number in range(count):
        headers = TaskHeaders(task="bench.noop", id=str(uuid.uuid4()), ignore_result=True)
        made.append(task_envelope(headers, (number,), {}, serializer=JSON, exchange="", routing_key=QUEUE))
    return made


def rate(count: int, publish: Callable[[], Any]) -> float:
    started = time.perf_counter()
    publish()
    return count / (time.perf_counter() - started)


def properties(one: Envelope) -> pika.BasicProperties:
    """pika writes no floats and no tuples; a message without limits has neither."""
    return pika.BasicProperties(
        content_type=one.content_type,
        content_encoding=one.content_encoding,
        headers={name: list(value) if isinstance(value, tuple) else value for name, value in one.headers.items()},
        delivery_mode=one.delivery_mode,
        correlation_id=one.correlation_id,
        message_id=one.message_id,
        reply_to=one.reply_to,
    )


def pika_blocking(url: str, messages: list[Envelope]) -> float:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()

    def publish() -> None:
        for one in messages:
            channel.basic_publish(one.exchange, one.routing_key, one.body, properties(one), mandatory=True)

    found = rate(len(messages), publish)
    connection.close()
    return found


class Windowed:
    """Bare pika with a window: as many messages unconfirmed as it says."""

    def __init__(self, url: str, messages: list[Envelope], window: int) -> None:
        self.messages, self.window = messages, window
        self.sent = self.confirmed = 0
        self.started = self.ended = 0.0
        self.channel: Any = None
        self.connection = pika.SelectConnection(
            pika.URLParameters(url),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self.opened),
            on_close_callback=lambda connection, _error: connection.ioloop.stop(),
        )

    def opened(self, channel: Any) -> None:
        self.channel = channel
        channel.confirm_delivery(self.on_confirm, callback=self.start)

    def start(self, _frame: Any) -> None:
        self.started = time.perf_counter()
        self.pump()

    def pump(self) -> None:
        publish = self.channel.basic_publish
        while self.sent < len(self.messages) and self.sent - self.confirmed < self.window:
            one = self.messages[self.sent]
            self.sent += 1
            publish(one.exchange, one.routing_key, one.body, properties(one), mandatory=True)

    def on_confirm(self, frame: Any) -> None:
        # A single confirm may come out of order; counting tags is near enough for a benchmark.
        self.confirmed = max(self.confirmed, frame.method.delivery_tag)
        if self.confirmed >= len(self.messages):
            self.ended = time.perf_counter()
            self.connection.close()
        else:
            self.pump()


def pika_window(url: str, messages: list[Envelope], window: int) -> float:
    bare = Windowed(url, messages, window)
    bare.connection.ioloop.start()
    return len(messages) / (bare.ended - bare.started)


def ours_one_by_one(publisher: Publisher, messages: list[Envelope]) -> float:
    def publish() -> None:
        for one in messages:
            publisher.publish(one)

    return rate(len(messages), publish)


def ours_threads(publisher: Publisher, messages: list[Envelope]) -> float:
    def publish(part: list[Envelope]) -> None:
        for one in part:
            publisher.publish(one)

    with ThreadPoolExecutor(THREADS) as pool:
        parts = [messages[start::THREADS] for start in range(THREADS)]
        return rate(len(messages), lambda: list(pool.map(publish, parts)))


def ours_bulk(publisher: Publisher, messages: list[Envelope]) -> float:
    def publish() -> None:
        errors = [error for error in publisher.publish_many(messages) if error is not None]
        assert not errors, errors[0]

    return rate(len(messages), publish)


async def from_callers(messages: list[Envelope], publish: Callable[[Envelope], Awaitable[Any]]) -> float:
    await publish(messages[0])
    free = asyncio.Semaphore(CALLERS)

    async def call(one: Envelope) -> None:
        async with free:
            await publish(one)

    started = time.perf_counter()
    await asyncio.gather(*map(call, messages))
    return len(messages) / (time.perf_counter() - started)


async def ours_asyncio(settings: BrokerSettings, messages: list[Envelope]) -> float:
    publisher = AioPublisher(settings)
    found = await from_callers(messages, publisher.publish)
    await publisher.close()
    return found


async def aio_pika_bare(url: str, messages: list[Envelope]) -> float:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)

        async def publish(one: Envelope) -> None:
            made = aio_pika.Message(
                one.body,
                headers=one.headers,
                content_type=one.content_type,
                content_encoding=one.content_encoding,
                delivery_mode=one.delivery_mode,
                correlation_id=one.correlation_id,
                reply_to=one.reply_to,
            )
            await channel.default_exchange.publish(made, one.routing_key, mandatory=True)

        return await from_callers(messages, publish)


def purge(url: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_purge(QUEUE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000, help="one by one; the others take more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", help="a broker to use instead of a private node")
    options = parser.parse_args()
    with ExitStack() as stack:
        url = options.url or stack.enter_context(PrivateNode("bench", tune=False)).url
        settings = BrokerSettings.model_validate({"url": url})
        publisher = Publisher(settings)
        stack.callback(publisher.close)
        one_by_one, some, many = (envelopes(factor * options.messages) for factor in (1, 4, 15))
        cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "one by one": (lambda: ours_one_by_one(publisher, one_by_one), lambda: pika_blocking(url, one_by_one)),
            "8 threads": (lambda: ours_threads(publisher, some), lambda: pika_window(url, some, THREADS)),
            "bulk": (lambda: ours_bulk(publisher, many), lambda: pika_window(url, many, WINDOW)),
            "asyncio": (
                lambda: asyncio.run(ours_asyncio(settings, some)),
                lambda: asyncio.run(aio_pika_bare(url, some)),
            ),
        }
        purge(url)
        publisher.publish(one_by_one[0])
        ratios: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(options.rounds):
            for name, (ours, bare) in cases.items():
                # In turn first and second: whatever warms up serves both.
                order = (ours, bare) if number % 2 else (bare, ours)
                rates = {}
                for run in order:
                    rates[run] = run()
                    purge(url)
                ratios[name].append(rates[ours] / rates[bare])
                print(
                    f"{name:<11} amqptasks {rates[ours]:8,.0f}/s   bare {rates[bare]:8,.0f}/s   "
                    f"ratio {ratios[name][-1]:.2f}",
                    flush=True,
                )
        for name, found in ratios.items():
            print(f"{name:<11} median ratio {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
