"""Nothing but pika: consume, run, acknowledge. What the broker and its client allow; no task system does less."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import aio_pika
import pika
import uvloop
from pika.adapters.asyncio_connection import AsyncioConnection

from benchmarks.race import work
from benchmarks.race.filling import Windowed
from benchmarks.race.system import CALLERS, THREADS, WINDOW, System

_PERSISTENT = pika.DeliveryMode.Persistent
#: In hand.
_PREFETCH = 1000


def noop() -> None:
    """Nothing."""


_TASKS: dict[str, Callable[[], None]] = {"race.noop": noop, "race.cpu": work.spin, "race.mark": work.mark}


def wire(task: str, queue: str) -> tuple[bytes, pika.BasicProperties]:
    """The same message as amqptasks and Celery have, header for header."""
    # Not at the top: a worker needs nothing of it.
    from benchmarks.race.systems import amqp_tasks

    return amqp_tasks.wire(task, queue)


# -- workers ----------------------------------------------------------------------------------------------------------


def _consume(connection: Any, on_message: Callable[..., None], prefetch: int) -> None:
    """Declare the queue and consume from it; a channel that closes ends the process, whose queue then stays full."""

    def opened(channel: Any) -> None:
        def declared(_frame: Any) -> None:
            channel.basic_qos(prefetch_count=prefetch)
            channel.basic_consume(work.QUEUE, on_message)

        channel.queue_declare(work.QUEUE, durable=True, arguments={"x-queue-type": work.TYPE}, callback=declared)

    connection.channel(on_open_callback=opened)


def _run_sync(prefetch: int) -> None:
    """Each message runs where it is read, and is acknowledged then."""

    def on_message(channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        _TASKS[properties.headers["task"]]()
        channel.basic_ack(method.delivery_tag)

    connection = pika.SelectConnection(
        pika.URLParameters(work.URL), on_open_callback=lambda opened: _consume(opened, on_message, prefetch)
    )
    connection.ioloop.start()


def _run_asyncio(prefetch: int) -> None:
    """A task of asyncio for each message."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    running: set[asyncio.Task[None]] = set()

    async def run(channel: Any, tag: int, name: str) -> None:
        if name == "race.wait":
            await asyncio.sleep(work.PAUSE)
        else:
            _TASKS[name]()
        channel.basic_ack(tag)

    def on_message(channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        task = loop.create_task(run(channel, method.delivery_tag, properties.headers["task"]))
        running.add(task)
        task.add_done_callback(running.discard)

    AsyncioConnection(
        pika.URLParameters(work.URL),
        on_open_callback=lambda opened: _consume(opened, on_message, prefetch),
        custom_ioloop=loop,
    )
    loop.run_forever()


def _run_replies() -> None:
    """Answer each message, confirmed, and then acknowledge it."""
    channel = pika.BlockingConnection(pika.URLParameters(work.URL)).channel()
    channel.confirm_delivery()
    channel.queue_declare(work.QUEUE, durable=True, arguments={"x-queue-type": work.TYPE})
    channel.basic_qos(prefetch_count=64)
    for method, properties, body in channel.consume(work.QUEUE):
        answer = pika.BasicProperties(correlation_id=properties.correlation_id, delivery_mode=_PERSISTENT)
        channel.basic_publish("", properties.reply_to, str(int(body) + 1).encode(), answer)
        channel.basic_ack(method.delivery_tag)


def main() -> None:
    """Run a worker."""
    if work.WORK == "trip":
        _run_replies()
    elif work.WORK == "wait":
        _run_asyncio(_PREFETCH)
    else:
        # Tasks that compute get both cores, as they do in the other systems.
        if work.WORK == "cpu":
            os.fork()
        _run_sync(64 if work.WORK == "cpu" else _PREFETCH)


# -- client -----------------------------------------------------------------------------------------------------------


class Client:
    """`BlockingConnection` one by one; `SelectConnection` with as many on their way as there are callers."""

    def __init__(self) -> None:
        self._channel = pika.BlockingConnection(pika.URLParameters(work.URL)).channel()
        self._channel.confirm_delivery()
        self._replies = f"race-replies-{uuid.uuid4()}"
        self._channel.queue_declare(self._replies, durable=True, arguments={"x-expires": 60_000})
        self._arrived: list[tuple[str, bytes]] = []
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._aio: Any = None
        self._body, made = wire("noop", work.QUEUE)
        self._headers: dict[str, Any] = made.headers
        if work.WORK == "trip":
            self._channel.basic_consume(
                self._replies, lambda _c, _m, got, body: self._arrived.append((got.correlation_id, body)), auto_ack=True
            )

    def _messages(self) -> Iterator[tuple[bytes, pika.BasicProperties]]:
        """One after the other, each with an id of its own."""
        while True:
            name = str(uuid.uuid4())
            yield (
                self._body,
                pika.BasicProperties(
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers={**self._headers, "id": name, "root_id": name},
                    delivery_mode=_PERSISTENT,
                    correlation_id=name,
                ),
            )

    def one_by_one(self, count: int) -> None:
        for body, properties in islice(self._messages(), count):
            self._channel.basic_publish("", work.QUEUE, body, properties, mandatory=True)

    def threads(self, count: int) -> None:
        Windowed(work.URL, work.QUEUE, self._messages(), count, THREADS).run()

    def bulk(self, count: int) -> None:
        Windowed(work.URL, work.QUEUE, self._messages(), count, WINDOW).run()

    def callers(self, count: int) -> None:
        """aio-pika, bare: pika's own asyncio adapter has no confirms to await."""

        async def call(exchange: Any, many: int) -> None:
            for _ in range(many):
                name = str(uuid.uuid4())
                message = aio_pika.Message(
                    self._body,
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers={**self._headers, "id": name, "root_id": name},
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                    correlation_id=name,
                )
                await exchange.publish(message, work.QUEUE, mandatory=True)

        async def calls() -> None:
            if self._aio is None:
                connection = await aio_pika.connect(work.URL)
                self._aio = await connection.channel(publisher_confirms=True, on_return_raises=True)
            await asyncio.gather(*(call(self._aio.default_exchange, count // CALLERS) for _ in range(CALLERS)))

        self._loop.run(calls())

    def trip(self, number: int) -> int:
        name = str(number)
        ask = pika.BasicProperties(correlation_id=name, reply_to=self._replies, delivery_mode=_PERSISTENT)
        self._channel.basic_publish("", work.QUEUE, name.encode(), ask, mandatory=True)
        while not self._arrived or self._arrived[-1][0] != name:
            self._channel.connection.process_data_events(time_limit=10)
        return int(self._arrived[-1][1])


def client() -> Client:
    """The client."""
    return Client()


SYSTEMS = (
    System(
        "bare pika",
        "bare_pika",
        worker=lambda _what, _queue: ["benchmarks.race.systems.bare_pika"],
        wire=wire,
        ceiling=True,
        settings={
            "drain": "one process, `SelectConnection`, prefetch 1000, an ack for each message; waiting tasks: "
            "`AsyncioConnection` on uvloop; computing tasks: two processes. It "
            "decodes nothing, logs nothing, loses what fails.",
            "publish": "`BlockingConnection` one by one; `SelectConnection` with 8 and with 1000 on their way; "
            "asyncio: bare aio-pika on uvloop. The same messages as amqptasks'.",
            "trip": "the answer to a durable queue, confirmed; then the ack.",
        },
    ),
)

if __name__ == "__main__":
    sys.exit(main())
