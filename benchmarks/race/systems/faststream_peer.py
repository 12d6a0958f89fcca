"""FastStream. It has consumers and no tasks: one consumer here looks up the function that a message names."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pika
import uvloop
from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

from benchmarks.race import work
from benchmarks.race.system import CALLERS, THREADS, WINDOW, System

broker = RabbitBroker(
    work.URL,
    # What a process has in hand is what it runs at a time.
    default_channel=Channel(prefetch_count=500 if work.WORK == "wait" else 200, on_return_raises=True),
    # By default it logs each message twice.
    logger=None,
)
app = FastStream(broker)
_QUEUE = RabbitQueue(work.QUEUE, queue_type=QueueType(work.TYPE), durable=True)


async def noop() -> None:
    """Nothing."""


async def mark() -> None:
    """Write the time."""
    work.mark()


async def cpu() -> None:
    """Compute."""
    work.spin()


async def wait() -> None:
    """Wait."""
    await asyncio.sleep(work.PAUSE)


async def add(number: int) -> int:
    """Add 1."""
    return number + 1


_TASKS: dict[str, Any] = {one.__name__: one for one in (noop, mark, cpu, wait, add)}


# Acknowledged after the function; its default for errors is to reject, which dead-letters.
@broker.subscriber(_QUEUE, ack_policy=AckPolicy.REJECT_ON_ERROR)
async def consume(task: str, args: list[int]) -> int | None:
    """One message."""
    result: int | None = await _TASKS[task](*args)
    return result


def wire(task: str, _queue: str) -> tuple[bytes, pika.BasicProperties]:
    """As `publish` makes it."""
    return json.dumps({"task": task, "args": []}).encode(), pika.BasicProperties(
        content_type="application/json", delivery_mode=2, correlation_id=str(uuid.uuid4())
    )


class Client:
    """`broker.publish` on one loop."""

    def __init__(self) -> None:
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._loop.run(broker.connect())

    async def _some(self, count: int) -> None:
        for _ in range(count):
            await broker.publish({"task": "noop", "args": []}, work.QUEUE, persist=True)

    async def _together(self, callers: int, count: int) -> None:
        await asyncio.gather(*(self._some(count // callers) for _ in range(callers)))

    def one_by_one(self, count: int) -> None:
        self._loop.run(self._some(count))

    def threads(self, count: int) -> None:
        self._loop.run(self._together(THREADS, count))

    def bulk(self, count: int) -> None:
        self._loop.run(self._together(WINDOW, count))

    def callers(self, count: int) -> None:
        self._loop.run(self._together(CALLERS, count))

    def trip(self, number: int) -> int:
        async def trip() -> int:
            reply = await broker.request({"task": "add", "args": [number]}, work.QUEUE, persist=True, timeout=30)
            value: int = await reply.decode()
            return value

        return self._loop.run(trip())


def client() -> Client:
    """The client."""
    return Client()


SYSTEMS = (
    System(
        "faststream",
        "faststream_peer",
        worker=lambda _what, _queue: ["faststream", "run", f"{__name__}:app", "--workers", "2"],
        wire=wire,
        help=["faststream", "run", "--help"],
        settings={
            "drain": "2 workers on uvloop, 200 in hand in each; waiting tasks: 500 in each. No logger: by default it "
            "logs each message twice. Acknowledged after the function.",
            "publish": "`await publish(persist=True)`; from 8 coroutines instead of threads; bulk: 1000 coroutines.",
            "trip": "`request`: direct reply-to, which the broker keeps in memory; not persistent, not confirmed.",
        },
    ),
)
