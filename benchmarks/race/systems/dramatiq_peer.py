"""Dramatiq."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pika
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware.asyncio import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends.redis import RedisBackend

from benchmarks.race import work
from benchmarks.race.system import THREADS, System


class Broker(RabbitmqBroker):
    """It has no setting for the type of a queue, so this overrides the method that makes a queue's arguments."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_queue_arguments(queue_name)
        return {**arguments, "x-queue-type": work.TYPE} if queue_name == work.QUEUE else arguments


# Acknowledged after the task and persistent without a setting; confirmed with this one.
broker = Broker(url=work.URL, confirm_delivery=True)
if work.WORK == "wait":
    broker.add_middleware(AsyncIO())
if work.WORK == "trip":
    # It has no results over AMQP; Redis is the faster of its two stores.
    broker.add_middleware(Results(backend=RedisBackend(url=work.REDIS), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=work.QUEUE)
def noop() -> None:
    """Nothing."""


@dramatiq.actor(queue_name=work.QUEUE)
def mark() -> None:
    """Write the time."""
    work.mark()


@dramatiq.actor(queue_name=work.QUEUE)
def cpu() -> None:
    """Compute."""
    work.spin()


async def _wait() -> None:
    await asyncio.sleep(work.PAUSE)


if work.WORK == "wait":
    # Without the middleware it takes no coroutine.
    wait = dramatiq.actor(_wait, actor_name="wait", queue_name=work.QUEUE)


@dramatiq.actor(queue_name=work.QUEUE)
def add(number: int) -> int:
    """Add 1."""
    return number + 1


def wire(task: str, queue: str) -> tuple[bytes, pika.BasicProperties]:
    """As `send` makes it."""
    made = dramatiq.Message(queue_name=queue, actor_name=task, args=(), kwargs={}, options={})
    return made.encode(), pika.BasicProperties(delivery_mode=2, priority=None)


class Client:
    """`send`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)

    def one_by_one(self, count: int) -> None:
        for _ in range(count):
            noop.send()

    def threads(self, count: int) -> None:
        for done in [self._pool.submit(self.one_by_one, count // THREADS) for _ in range(THREADS)]:
            done.result()

    #: It has no call for many. Threads are the most that confirms let it do.
    bulk = threads

    def trip(self, number: int) -> int:
        value: int = add.send(number).get_result(block=True, timeout=30_000)
        return value


def client() -> Client:
    """The client."""
    return Client()


def _worker(what: str, queue: str) -> list[str]:
    threads = "64" if what == "wait" else "8"
    return ["dramatiq", f"{__name__}:broker", "--processes", "2", "--threads", threads, "--queues", queue]


SYSTEMS = (
    System(
        "dramatiq",
        "dramatiq_peer",
        worker=_worker,
        wire=wire,
        help=["dramatiq", "--help"],
        # More than twice its threads, which is its default, made it slower or no faster.
        environment=lambda _what: {"dramatiq_queue_prefetch": "64"},
        settings={
            "drain": "2 processes × 8 threads, its default on two cores, prefetch 64; waiting tasks: 2 × 64 threads "
            "and its `AsyncIO` middleware (a thread waits for each coroutine).",
            "publish": "`send` with `confirm_delivery`. It has no bulk publish: bulk is from 8 threads too.",
            "trip": "results in Redis: it has none over AMQP.",
        },
    ),
)
