"""The same tasks for both systems: one that does nothing, and one that writes down when it ran."""

from __future__ import annotations

import os
import time

import celery

from amqptasks import AmqpTasks


def _mark() -> None:
    with open(os.environ["BENCH_MARKS"], "a") as file:  # noqa: PTH123
        file.write(f"{time.time():.6f}\n")


amqp_app = AmqpTasks("bench")


@amqp_app.task(name="bench.noop")
def noop() -> None:
    """Nothing."""


@amqp_app.task(name="bench.fails")
def fails() -> None:
    """Always."""
    raise ValueError("as it must")


@amqp_app.task(name="bench.mark")
def mark() -> None:
    """Write the time."""
    _mark()


celery_app = celery.Celery("bench", broker=os.environ.get("BENCH_BROKER"))
celery_app.conf.update(
    # The guarantees of the other side: acknowledged after the task, given back when a process dies, durable.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue="celery-bench",
    task_default_queue_type="quorum",
    # Its best settings for short tasks: a deep prefetch.
    worker_prefetch_multiplier=64,
)


@celery_app.task(name="bench.noop")
def celery_noop() -> None:
    """Nothing."""


@celery_app.task(name="bench.mark")
def celery_mark() -> None:
    """Write the time."""
    _mark()
