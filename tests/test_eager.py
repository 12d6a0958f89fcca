"""Eager mode: an application's own tests, without a broker, on the real path."""

from __future__ import annotations

import asyncio
import threading
from decimal import Decimal
from typing import Any

import pytest

from amqptasks import (
    AmqpTasks,
    ChordError,
    InvalidArguments,
    ResultUnavailable,
    SerializationError,
    chain,
    chord,
    group,
)
from amqptasks.errors import UnknownTask

tries: list[int] = []


@pytest.fixture
def app() -> AmqpTasks:
    return AmqpTasks("eager", config={"testing": {"always_eager": True}})


@pytest.fixture
def tasks(app: AmqpTasks) -> Any:
    class Tasks:
        """The application's tasks."""

        @staticmethod
        @app.task(name="add")
        def add(x: int, y: int) -> int:
            return x + y

        @staticmethod
        @app.task(name="price")
        def price(amount: Decimal) -> Decimal:
            return amount * 2

        @staticmethod
        @app.task(name="total")
        def total(values: list[int]) -> int:
            return sum(values)

        @staticmethod
        @app.task(name="fails")
        def fails(*_args: Any) -> None:
            raise KeyError("k")

        @staticmethod
        @app.task(name="lock")
        def lock() -> Any:
            return threading.Lock()

        @staticmethod
        @app.task(name="again", bind=True, max_retries=2, default_retry_delay=100)
        def again(task: Any) -> int:
            tries.append(task.request.retries)
            if task.request.retries < 2:
                raise task.retry(exc=ValueError("not yet"))
            return 7

        @staticmethod
        @app.task(name="later")
        async def later(x: int) -> int:
            await asyncio.sleep(0)
            return x

    return Tasks


def test_a_call_runs_at_once_with_validation_and_serialization(tasks: Any) -> None:
    assert tasks.add.delay("1", 2).get() == 3
    assert tasks.price.delay("1.10").get() == Decimal("2.20")
    assert tasks.later.delay(5).get() == 5
    with pytest.raises(InvalidArguments):
        tasks.add.delay("one", 2)
    with pytest.raises(SerializationError):
        tasks.lock.delay().get()


def test_retries_run_at_once(tasks: Any) -> None:
    tries.clear()
    assert tasks.again.delay().get() == 7
    assert tries == [0, 1, 2]
    with pytest.raises(ValueError, match="not yet"):
        tasks.again()


def test_a_failure_is_the_results_or_the_callers(app: AmqpTasks, tasks: Any) -> None:
    result = tasks.fails.delay()
    with pytest.raises(KeyError):
        result.get()
    assert (result.state, result.traceback is not None) == ("FAILURE", True)
    with pytest.raises(UnknownTask):
        app.send_task("nobody").get()
    with pytest.raises(ResultUnavailable):
        tasks.add.apply_async((1, 2), ignore_result=True).get()
    raising = AmqpTasks("raising", config={"testing": {"always_eager": True, "eager_propagates": True}})
    fails = raising.task(name="fails")(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fails.delay()


def test_compositions_run_too(tasks: Any) -> None:
    add, total, fails = tasks.add, tasks.total, tasks.fails
    assert chain(add.s(1, 2), add.s(3)).delay().get() == 6
    assert group(add.s(n, 1) for n in range(3)).delay().get() == [1, 2, 3]
    assert (group(add.s(n, 1) for n in range(3)) | total.s() | add.s(10)).delay().get() == 16
    assert chord([chord([add.s(1, 1)], total.s()), add.s(2, 2)], total.s()).delay().get() == 6
    assert add.starmap([(1, 2), (3, 4)]).delay().get() == [3, 7]
    with pytest.raises(ChordError, match="part 1 of the chord"):
        chord([add.s(1, 1), fails.s(), add.s(2, 2)], total.s()).delay().get()
    with pytest.raises(KeyError):
        chain(fails.s(), add.s(1)).delay().get()


async def test_asyncio_callers_may_be_eager(tasks: Any) -> None:
    assert await (await tasks.add.adelay(1, 2)).aget(1) == 3
    assert await (await tasks.later.adelay(1)).aget(1) == 1
    assert await (await (tasks.add.s(1, 2) | tasks.add.s(3)).adelay()).aget(1) == 6
