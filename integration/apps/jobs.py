"""Tasks that do what tests need done to a worker."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from contextvars import ContextVar
from decimal import Decimal
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel

from amqptasks import AmqpTasks, Ignore, Reject, TimeLimitExceeded, shared_task
from amqptasks.testing.ledger import record
from amqptasks.testing.work import processor_time

app = AmqpTasks("jobs")
log = structlog.get_logger("jobs")


_kept: list[bytearray] = []
_own: ContextVar[str] = ContextVar("own", default="nobody's")


@app.task(bind=True)
async def has_context(self: Any, value: str) -> None:
    """Record what the context variable held before, and what it holds after others ran meanwhile."""
    before = _own.get()
    _own.set(value)
    await asyncio.sleep(0.05)
    record(self.request.id, f"{before} {_own.get()}")


@app.task(bind=True)
def tick(self: Any, *args: Any) -> None:
    """Record which tick it is: the entry's name and the moment that it was due."""
    headers = self.request.headers
    record(self.request.id, f"{headers['periodic_task_name']}@{headers['x-amqptasks-due']}")


class Receipt(BaseModel):
    order: int
    amount: Decimal


@app.task(bind=True)
def note(self: Any, pause: float = 0.0) -> None:
    """Record that it ran, after a pause."""
    record(self.request.id, "begin", self.request.retries + 1)
    time.sleep(pause)
    record(self.request.id, "done", self.request.retries + 1)


@app.task(bind=True)
def clocked(self: Any, processes: list[int]) -> None:
    """Record when it began, and how much processor time these processes had used then."""
    used = processor_time(processes)
    record(self.request.id, "begin")
    record(self.request.id, f"used={used}")
    record(self.request.id, "done")


@app.task(bind=True)
def noted(self: Any, pause: float = 0.0) -> None:
    """Record that it has run."""
    time.sleep(pause)
    record(self.request.id, "done", self.request.retries + 1)


@app.task(bind=True)
def paced(self: Any, pause: float = 0.0) -> None:
    """Record when it ran, and when its rate limit let it pass."""
    record(self.request.id, "begin", self.request.retries + 1)
    record(self.request.id, f"passed={self.request.headers.get('x-amqptasks-passed')}")
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


@app.task(bind=True)
def asks_for(self: Any, **options: Any) -> None:
    """A retry with these options; "inf" and "nan" as numbers."""
    raise self.retry(**{name: float(one) if one in ("inf", "nan") else one for name, one in options.items()})


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


@app.task(
    bind=True, time_limit=0.5, max_retries=2, default_retry_delay=0.1, autoretry_for=(ValueError, TimeLimitExceeded)
)
def overruns_until(self: Any, attempt: int) -> None:
    """Too long each time before this attempt."""
    record(self.request.id, "try", self.request.retries + 1)
    if self.request.retries + 1 < attempt:
        time.sleep(60)
    record(self.request.id, "done", self.request.retries + 1)


@app.task(bind=True)
def holds_on(self: Any, how: str, seconds: float = 30.0) -> None:
    """Goes on for very long, in one of the ways in which tasks do."""
    record(self.request.id, "begin")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        try:
            if how == "spin":
                while time.monotonic() < until:
                    pass
            elif how == "gil":
                ctypes.PyDLL(None).usleep(int(left * 1_000_000))
            elif how == "no gil":
                ctypes.CDLL(None).usleep(int(left * 1_000_000))
            else:
                time.sleep(left)
        except BaseException:
            if how != "stubborn":
                raise
    record(self.request.id, "done")


@app.task(bind=True)
async def awaits(self: Any, seconds: float = 30.0) -> None:
    record(self.request.id, "begin")
    try:
        await asyncio.sleep(seconds)
    finally:
        record(self.request.id, "cleaned up")


@app.task(bind=True)
def grows(self: Any, megabytes: int, seconds: float = 0.0) -> None:
    """Keeps memory, as a task that leaks does."""
    _kept.append(bytearray(os.urandom(1 << 10) * (megabytes << 10)))
    time.sleep(seconds)
    record(self.request.id, "done")


@app.task(bind=True)
def swells(self: Any) -> None:
    """Takes memory until somebody ends it."""
    record(self.request.id, "try")
    while True:
        _kept.append(bytearray(os.urandom(1 << 10) * (10 << 10)))
        time.sleep(0.02)


@app.task(bind=True)
def chatters(self: Any, seconds: float, size: int) -> None:
    """Tells how far it is, all the time and at length."""
    record(self.request.id, "begin")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        self.update_state(state="PROGRESS", meta="x" * size)
        time.sleep(0.001)
    record(self.request.id, "done")


@app.task(bind=True)
def stops_briefly(self: Any) -> None:
    """Python code that waits in short steps: every pool can interrupt it."""
    record(self.request.id, "begin")
    try:
        for _ in range(3000):
            time.sleep(0.01)
    finally:
        record(self.request.id, "cleaned up")


@app.task(bind=True, soft_time_limit=0.5)
def stops_when_asked(self: Any) -> None:
    from amqptasks import SoftTimeLimitExceeded

    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        record(self.request.id, "cleaned up")
        raise


@app.task(bind=True)
def occupies(self: Any, how: str, seconds: float) -> None:
    """Holds its process in one of the ways in which tasks do."""
    record(self.request.id, "begin")
    if how == "gil":
        ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    elif how == "loop":
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
    else:
        time.sleep(seconds)
    record(self.request.id, "done")


@app.task(bind=True)
def waits_for(self: Any, path: str) -> None:
    """Holds on until there is a file of this name."""
    record(self.request.id, "begin")
    while not Path(path).exists():
        time.sleep(0.02)
    record(self.request.id, "done")


@app.task(bind=True)
async def blocks(self: Any, seconds: float) -> None:
    """Blocks the event loop, as one forgotten call does."""
    record(self.request.id, "begin")
    time.sleep(seconds)  # noqa: ASYNC251 - as it must
    record(self.request.id, "done")


@app.task(bind=True)
def tells(self: Any, kind: str, **fields: Any) -> None:
    """An event of the application's own."""
    self.send_event(kind, **fields)
    record(self.request.id, "done")


@app.task(bind=True, max_retries=1, default_retry_delay=0.1)
def is_stamped(self: Any, *args: Any) -> str:
    """Record its stamps, in the first run and in the second."""
    record(self.request.id, f"{self.request.retries} {sorted(self.request.stamps.items())}")
    if self.request.retries == 0:
        self.retry()
    return "x"


@app.task(bind=True)
async def has_a_child_that_blocks(self: Any, seconds: float) -> None:
    async def child() -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - as it must

    await asyncio.create_task(child())
    record(self.request.id, "done")


@app.task(bind=True)
def takes(self: Any, data: str, pause: float = 0.0) -> None:
    """An argument of any size."""
    time.sleep(pause)
    record(self.request.id, "done")


@app.task(bind=True)
def gives(self: Any, size: int) -> str:
    """A result of any size."""
    record(self.request.id, "begin")
    record(self.request.id, "done")
    return "x" * size


@app.task(bind=True)
def says_whether_it_came_again(self: Any, pause: float) -> None:
    record(self.request.id, f"redelivered={self.request.delivery_info['redelivered']}")
    time.sleep(pause)
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
