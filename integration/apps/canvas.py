"""Tasks for results and compositions."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from amqptasks import AmqpTasks, Ignore, group
from amqptasks.testing.ledger import record
from amqptasks.testing.waiting import wait_until

app = AmqpTasks("canvas")


class Declined(Exception):
    """An exception of the application."""


@dataclass
class Receipt:
    """A value with a type of its own."""

    order: int
    amount: Decimal


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def identity(value: Any) -> Any:
    return value


@app.task
def total(values: list[int]) -> int:
    return sum(values)


@app.task(bind=True)
def body(self: Any, values: list[Any]) -> int:
    """Record what a chord's body got."""
    record(self.request.id, "body " + ",".join(map(str, values)))
    return len(values)


@app.task
def part(number: int, pause: float = 0.0) -> int:
    time.sleep(random.uniform(0, pause))
    return number


@app.task
def charge(order: int, amount: Decimal) -> Receipt:
    if amount <= 0:
        raise Declined(order, "nothing to charge")
    return Receipt(order, amount)


@app.task
def fails(*args: Any) -> None:
    raise Declined("always", 7)


@app.task(bind=True, max_retries=1)
def retries(self: Any) -> None:
    self.retry(exc=Declined("twice"), countdown=0.1)


@app.task(bind=True)
def progress(self: Any, steps: int, pause: float = 0.05) -> str:
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"done": step + 1, "of": steps})
        time.sleep(pause)
    return "done"


@app.task(track_started=True)
def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _wait_for(gate: str) -> None:
    while not Path(gate).exists():
        time.sleep(0.02)


@app.task(bind=True)
def halfway(self: Any, gate: str) -> str:
    """Report progress, and stay there until there is such a file."""
    self.update_state(state="PROGRESS", meta={"done": 5, "of": 10})
    _wait_for(gate)
    return "done"


@app.task(track_started=True)
def held(gate: str) -> str:
    """Run until there is such a file."""
    _wait_for(gate)
    return "done"


@app.task
def strange(kind: str) -> Any:
    """Values and exceptions that cannot travel."""
    if kind == "lock":
        return threading.Lock()
    if kind == "recursive":
        error = ValueError("a")
        error.__cause__ = ValueError("b")
        error.__cause__.__cause__ = error
        raise error
    if kind == "big":
        raise ValueError("x" * 5_000_000)
    if kind == "no repr":
        raise type("NoRepr", (Exception,), {"__str__": lambda self: 1 / 0, "__repr__": lambda self: 1 / 0})()
    if kind == "keyword":
        raise type("Keyword", (Exception,), {"__init__": lambda self, *, code: Exception.__init__(self, code)})(code=5)
    raise ValueError(threading.Lock())


@app.task
def sized(size: int) -> str:
    return "x" * size


@app.task
def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(time_limit=0.5)
def endless() -> None:
    time.sleep(60)


@app.task
def ignored() -> None:
    raise Ignore


@app.task(bind=True)
def grows(self: Any, number: int) -> None:
    """Put another composition in this task's place."""
    self.replace(add.s(number, 1) | add.s(10))


@app.task(bind=True)
def spreads(self: Any, count: int) -> None:
    self.replace(group(identity.s(number) for number in range(count)))


@app.task(bind=True)
def counted(self: Any, pause: float = 0.0) -> int:
    time.sleep(pause)
    record(self.request.id, "counted")
    return 1


@app.task
def on_error(request: Any, exc: BaseException, traceback: str) -> None:
    record(request.id, f"on_error {exc!r}")


@app.task
def on_error_by_id(task_id: str, exc: BaseException, traceback: str) -> None:
    record(task_id, f"on_error_by_id {exc!r}")


@app.task
async def doubled(number: int) -> int:
    return 2 * number


@app.task
async def on_error_later(request: Any, exc: BaseException, traceback: str, gate: str) -> None:
    """An errback that goes on until a file is there."""
    record(request.id, "errback begun")
    await asyncio.to_thread(wait_until, Path(gate).exists, 60)
    record(request.id, "errback done")


@app.task
def failed_id(identifier: str) -> None:
    record(identifier, "failed_id")


@app.task
def waits_for_another(value: int, insist: bool = False) -> int:
    return identity.delay(value).get(5, disable_sync_subtasks=not insist)


@app.task
def seen(value: Any) -> None:
    record(None, f"seen {value!r}")
