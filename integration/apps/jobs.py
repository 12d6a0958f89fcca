"""Tasks that do what tests need done to a worker."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from decimal import Decimal
from typing import Any

import structlog
from pydantic import BaseModel

from amqptasks import AmqpTasks, Ignore, Reject, shared_task
from amqptasks.testing.ledger import record

app = AmqpTasks("jobs")
log = structlog.get_logger("jobs")


class Receipt(BaseModel):
    order: int
    amount: Decimal


@app.task(bind=True)
def note(self: Any, pause: float = 0.0) -> None:
    """Record that it ran, after a pause."""
    record(self.request.id, "begin", self.request.retries + 1)
    time.sleep(pause)
    record(self.request.id, "done", self.request.retries + 1)


@app.task
def noop() -> None:
    """Nothing."""


@app.task
def add(x: int, y: int) -> int:
    record(None, f"add={x + y}")
    return x + y


@app.task(bind=True)
def charge(self: Any, receipt: Receipt, note: str = "") -> None:
    record(self.request.id, f"charged {receipt.order} {receipt.amount!r} {note}")


@app.task(bind=True, max_retries=2)
def always_retries(self: Any, countdown: float = 0.2) -> None:
    record(self.request.id, "try", self.request.retries + 1)
    raise self.retry(exc=ValueError("still broken"), countdown=countdown)


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=10, default_retry_delay=0.3)
def recovers(self: Any, after: int) -> None:
    record(self.request.id, "try", self.request.retries + 1)
    if self.request.retries < after:
        raise ConnectionError(f"try {self.request.retries}")
    record(self.request.id, "done", self.request.retries + 1)


@app.task(bind=True, max_retries=1)
def retries_with_other_arguments(self: Any, value: str) -> None:
    record(self.request.id, f"value={value}", self.request.retries + 1)
    if self.request.retries == 0:
        raise self.retry(args=("second",), countdown=0.1)


class Unspeakable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


@app.task(bind=True)
def fails(self: Any, how: str = "value") -> None:
    record(self.request.id, "try")
    if how == "unspeakable":
        raise Unspeakable
    if how == "exit":
        raise SystemExit(3)
    if how == "huge":
        raise ValueError("x" * 5_000_000)
    raise ValueError("broken: ü")


@app.task
def rejects(requeue: bool = False) -> None:
    raise Reject("not for us", requeue=requeue)


@app.task(bind=True)
def ignores(self: Any) -> None:
    record(self.request.id, "ignored")
    raise Ignore


@app.task(bind=True)
def kills_itself(self: Any, times: int = 1_000_000, number: int = signal.SIGKILL) -> None:
    record(self.request.id, "try")
    crashes = self.request.headers.get("x-amqptasks-crashes") or 0
    if crashes < times:
        os.kill(os.getpid(), number)
    record(self.request.id, "done")


@app.task(bind=True, time_limit=1.0)
def overruns(self: Any, how: str = "sleep") -> None:
    record(self.request.id, "try")
    if how == "spin":
        while True:
            pass
    if how == "stubborn":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue
    time.sleep(60)


@app.task(bind=True, soft_time_limit=0.5)
def stops_when_asked(self: Any) -> None:
    from amqptasks import SoftTimeLimitExceeded

    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        record(self.request.id, "cleaned up")
        raise


@app.task(bind=True)
def holds_the_gil(self: Any, seconds: int) -> None:
    record(self.request.id, "begin")
    ctypes.PyDLL(None).sleep(seconds)
    record(self.request.id, "done")


@app.task(bind=True)
async def asleep(self: Any, seconds: float) -> None:
    await asyncio.sleep(seconds)
    record(self.request.id, "done")


@app.task(bind=True)
def spawns(self: Any, depth: int) -> None:
    """Publishes from inside a task."""
    record(self.request.id, f"depth={depth} parent={self.request.parent_id} root={self.request.root_id}")
    if depth:
        spawns.delay(depth - 1)


@app.task
def logs() -> None:
    log.info("a line of the task's own", colour="green")


@shared_task(bind=True)
def shared(self: Any) -> None:
    record(self.request.id, "done")
