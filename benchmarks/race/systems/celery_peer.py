"""Celery, its pools prefork, threads and solo."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import celery
import pika

from benchmarks.race import work
from benchmarks.race.system import THREADS, System

app = celery.Celery("race", broker=work.URL, backend="rpc://" if work.WORK == "trip" else None, set_as_current=False)
app.conf.update(
    # The guarantees of the others: acknowledged after the task, given back when a process dies, confirmed, persistent.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_transport_options={"confirm_publish": True},
    result_persistent=True,
    task_default_queue=work.QUEUE,
    task_default_queue_type=work.TYPE,
    # Its best for short tasks: many messages in hand. From here on, more made none of its pools faster.
    worker_prefetch_multiplier=64,
    # It would look at each message for a limit that no task has.
    worker_disable_rate_limits=True,
    # Nothing else on the connection.
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    # A pool of connections that all threads find one in.
    broker_pool_limit=THREADS + 2,
    broker_connection_retry_on_startup=True,
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
def wait() -> None:
    """Wait: it has no asyncio, so its threads and processes do."""
    time.sleep(work.PAUSE)


@app.task(name="race.add")
def add(number: int) -> int:
    """Add 1."""
    return number + 1


def wire(task: str, queue: str) -> tuple[bytes, pika.BasicProperties]:
    """As `delay` makes it."""
    made = app.amqp.as_task_v2(str(uuid.uuid4()), f"race.{task}", (), {}, ignore_result=True)
    headers = {name: list(value) if isinstance(value, tuple) else value for name, value in made.headers.items()}
    return json.dumps(made.body).encode(), pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        headers=headers,
        delivery_mode=2,
        correlation_id=made.properties["correlation_id"],
        reply_to=made.properties["reply_to"] or None,
    )


class Client:
    """`delay`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)

    def one_by_one(self, count: int) -> None:
        for _ in range(count):
            noop.delay()

    def threads(self, count: int) -> None:
        for done in [self._pool.submit(self.one_by_one, count // THREADS) for _ in range(THREADS)]:
            done.result()

    #: It has no call for many. Threads are the most that confirms let it do.
    bulk = threads

    def trip(self, number: int) -> int:
        value: int = add.delay(number).get(timeout=30)
        return value


def client() -> Client:
    """The client."""
    return Client()


#: Tasks at a time, by pool and by what is drained. Waiting tasks want many; more than these made it slower.
_AT_A_TIME: Mapping[str, Mapping[str, int]] = {
    "prefork": {"wait": 16},
    "threads": {"wait": 100, "noop": 8, "trip": 8},
    "solo": {"wait": 1, "noop": 1, "cpu": 1, "trip": 1},
}
_WHY = {
    "prefork": "`-c 2`, a process for each core; waiting tasks: `-c 16`.",
    "threads": "`-c 8` (`-c 2` for tasks that compute); waiting tasks: `-c 100`. One process: it cannot have more.",
    "solo": "one process, one task at a time: for waiting tasks that is 100 a second at most.",
}


def _worker(pool: str, what: str, queue: str) -> list[str]:
    many = str(_AT_A_TIME[pool].get(what, 2))
    # Its messages between workers are left out: amqptasks has none.
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return ["celery", "-A", f"{__name__}:app", "worker", "-P", pool, "-c", many, "-Q", queue, *quiet]


def _system(pool: str) -> System:
    return System(
        f"celery {pool}",
        "celery_peer",
        worker=lambda what, queue: _worker(pool, what, queue),
        wire=wire,
        help=["celery", "--help"] if pool == "prefork" else None,
        publishes=pool == "prefork",
        settings={
            "drain": f"{_WHY[pool]} `acks_late`, `reject_on_worker_lost`, `prefetch_multiplier` 64; no gossip, mingle, "
            "heartbeat, remote control, events or rate limits.",
            **(
                {
                    "publish": "`delay` with `confirm_publish`. It has no bulk publish: bulk is from 8 threads too.",
                }
                if pool == "prefork"
                else {}
            ),
            "trip": "`rpc://` with `result_persistent`. Its results are not confirmed.",
        },
    )


SYSTEMS = tuple(_system(pool) for pool in ("prefork", "threads", "solo"))
