"""The same two tasks for amqptasks and for Celery, with results."""

from __future__ import annotations

import os

import celery

from amqptasks import AmqpTasks

BROKER = os.environ.get("BENCH_BROKER", "amqp://guest:guest@localhost:5672/")
BACKEND = os.environ.get("BENCH_BACKEND", "rpc://")
QUEUE = "celery-results"

amqp_app = AmqpTasks("results", config={"broker": {"url": BROKER}, "result": {"backend": BACKEND}})

celery_app = celery.Celery("results", broker=BROKER, backend=BACKEND, set_as_current=False)
celery_app.conf.update(
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=32,
    task_default_queue=QUEUE,
    task_default_queue_type="quorum",
)


def add(x: int, y: int) -> int:
    """One task."""
    return x + y


def total(values: list[int]) -> int:
    """A chord's body."""
    return sum(values)


ours = {one.__name__: amqp_app.task(name=f"bench.{one.__name__}")(one) for one in (add, total)}
theirs = {one.__name__: celery_app.task(name=f"bench.{one.__name__}")(one) for one in (add, total)}
