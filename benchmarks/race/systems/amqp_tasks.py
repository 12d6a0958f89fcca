"""amqptasks, as it comes: everything that its defaults turn on is on, logging included."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pika

from amqptasks import AmqpTasks
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.task import TaskHeaders, task_envelope
from benchmarks.race import work
from benchmarks.race.system import CALLERS, THREADS, System

#: The pool by what is drained. Waiting tasks are coroutines: 1000 at a time in two processes, one for each core.
_POOLS: Mapping[str, Mapping[str, Any]] = {"wait": {"pool": "asyncio", "concurrency": 1000, "processes": 2}}

app = AmqpTasks(
    "race",
    config={
        "broker": {"url": work.URL},
        "queues": {
            work.QUEUE: {
                "type": work.TYPE,
                **_POOLS.get(work.WORK, {"concurrency": 2}),
            }
        },
        "routes": [{"match": "*", "queue": work.QUEUE}],
    },
)


@app.task(name="race.noop", ignore_result=True)
def noop() -> None:
    """Nothing."""


@app.task(name="race.mark", ignore_result=True)
def mark() -> None:
    """Write the time."""
    work.mark()


@app.task(name="race.cpu", ignore_result=True)
def cpu() -> None:
    """Compute."""
    work.spin()


@app.task(name="race.wait", ignore_result=True)
async def wait() -> None:
    """Wait."""
    await asyncio.sleep(work.PAUSE)


@app.task(name="race.add")
def add(number: int) -> int:
    """Add 1."""
    return number + 1


_JSON = serializer("json")


def wire(task: str, queue: str) -> tuple[bytes, pika.BasicProperties]:
    """As `delay` makes it."""
    headers = TaskHeaders(task=f"race.{task}", id=str(uuid.uuid4()), ignore_result=True)
    made = task_envelope(headers, (), {}, serializer=_JSON, exchange="", routing_key=queue)
    return made.body, pika.BasicProperties(
        content_type=made.content_type,
        content_encoding=made.content_encoding,
        # pika writes no tuples
        headers={name: list(value) if isinstance(value, tuple) else value for name, value in made.headers.items()},
        delivery_mode=made.delivery_mode,
        correlation_id=made.correlation_id,
        message_id=made.message_id,
        reply_to=made.reply_to,
    )


class Client:
    """`delay`, `send_many`, `adelay`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        self._loop = asyncio.Runner()

    def one_by_one(self, count: int) -> None:
        for _ in range(count):
            noop.delay()

    def threads(self, count: int) -> None:
        for done in [self._pool.submit(self.one_by_one, count // THREADS) for _ in range(THREADS)]:
            done.result()

    def bulk(self, count: int) -> None:
        app.send_many([noop.s() for _ in range(count)])

    def callers(self, count: int) -> None:
        async def call(many: int) -> None:
            for _ in range(many):
                await noop.adelay()

        async def calls() -> None:
            await asyncio.gather(*(call(count // CALLERS) for _ in range(CALLERS)))

        self._loop.run(calls())

    def trip(self, number: int) -> int:
        return add.delay(number).get(timeout=30)


def client() -> Client:
    """The client."""
    return Client()


SYSTEMS = (
    System(
        "amqptasks",
        "amqp_tasks",
        worker=lambda _work, queue: ["amqptasks", "-A", f"{__name__}:app", "worker", "-Q", queue],
        wire=wire,
        help=["amqptasks", "--help"],
        settings={
            "drain": "its defaults with 2 executors: `prefetch: auto`, logging on. Waiting tasks: `pool: asyncio`, "
            "`concurrency: 1000`, `processes: 2`, uvloop, as its guide says for coroutines.",
            "publish": "`delay`, `send_many`, `adelay`: confirmed and mandatory without a setting.",
            "trip": "`rpc://`, its default: the result is published persistent and confirmed before the ack.",
        },
    ),
)
