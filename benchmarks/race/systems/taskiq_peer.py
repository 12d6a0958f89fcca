"""Taskiq with taskiq-aio-pika."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pika
import uvloop
from taskiq import TaskiqMessage
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend

from benchmarks.race import work
from benchmarks.race.system import CALLERS, THREADS, WINDOW, System

#: Coroutines at a time in a process, and messages in hand.
_AT_A_TIME, _IN_HAND = (500, 500) if work.WORK == "wait" else (100, 200)

# Persistent, confirmed and acknowledged after the task without a setting; its queues are durable.
broker = AioPikaBroker(
    work.URL,
    qos=_IN_HAND,
    exchange=Exchange(name=f"{work.QUEUE}-exchange"),
    task_queues=[Queue(name=work.QUEUE, type=QueueType(work.TYPE))],
    dead_letter_queue=Queue(name=f"{work.QUEUE}-dead"),
)
if work.WORK == "trip":
    # It has no results over AMQP.
    broker = broker.with_result_backend(RedisAsyncResultBackend(work.REDIS, result_ex_time=60))


@broker.task(task_name="race:noop")
async def noop() -> None:
    """Nothing."""


@broker.task(task_name="race:mark")
async def mark() -> None:
    """Write the time."""
    work.mark()


@broker.task(task_name="race:cpu")
async def cpu() -> None:
    """Compute, on the loop: a thread would cost more than it gives."""
    work.spin()


@broker.task(task_name="race:wait")
async def wait() -> None:
    """Wait."""
    await asyncio.sleep(work.PAUSE)


@broker.task(task_name="race:add")
async def add(number: int) -> int:
    """Add 1."""
    return number + 1


def wire(task: str, queue: str) -> tuple[bytes, pika.BasicProperties]:
    """As `kiq` makes it."""
    name = f"race:{task}"
    message = TaskiqMessage(task_id=uuid.uuid4().hex, task_name=name, labels={}, labels_types={}, args=[], kwargs={})
    made = broker.formatter.dumps(message)
    headers: dict[str, Any] = {"task_id": made.task_id, "task_name": made.task_name}
    return made.message, pika.BasicProperties(headers=headers, delivery_mode=2)


class Client:
    """`kiq` on one loop."""

    def __init__(self) -> None:
        self._loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._loop.run(broker.startup())

    async def _some(self, count: int) -> None:
        for _ in range(count):
            await noop.kiq()

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
            task = await add.kiq(number)
            # It asks Redis again and again. The default asks five times a second.
            found = await task.wait_result(check_interval=0.001, timeout=30)
            value: int = found.return_value
            return value

        return self._loop.run(trip())


def client() -> Client:
    """The client."""
    return Client()


def _worker(what: str, _queue: str) -> list[str]:
    many = "500" if what == "wait" else "100"
    options = ["--workers", "2", "--max-async-tasks", many, "--max-prefetch", "100", "--log-level", "WARNING"]
    return ["taskiq", "worker", f"{__name__}:broker", *options]


SYSTEMS = (
    System(
        "taskiq",
        "taskiq_peer",
        worker=_worker,
        wire=wire,
        help=["taskiq", "worker", "--help"],
        settings={
            "drain": "2 workers on uvloop, tasks as coroutines (its threads are slower), 100 at a time in each, 200 "
            "in hand; waiting tasks: 500 at a time in each. `--log-level WARNING`: by default it logs each task.",
            "publish": "`await kiq()`; from 8 coroutines instead of threads; bulk: 1000 coroutines.",
            "trip": "results in Redis, asked every millisecond: it has none over AMQP.",
        },
    ),
)
