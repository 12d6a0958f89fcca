"""Eager mode: an application's own tests, without a broker, on the real path."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
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
from amqptasks.protocol.results import decode_result

tries: list[int] = []


@dataclass
class Receipt:
    """A value with a type of its own."""

    order: int
    amount: Decimal


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
        @app.task(name="receipt")
        def receipt(order: int) -> Receipt:
            return Receipt(order, Decimal("9.99"))

        @staticmethod
        @app.task(name="silent", ignore_result=True)
        def silent(*_args: Any) -> int:
            return 1

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


def test_eager_results_are_stored_where_the_settings_say_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/results.db"
    for stored in (True, False):
        app = AmqpTasks(
            "storing",
            config={
                "result": {"backend": url},
                "testing": {"always_eager": True, "store_eager_result": stored},
            },
        )
        double = app.task(name="double")(lambda number: 2 * number)
        result = double.delay(4)
        assert result.get(0) == 8
        store = app.result_store
        assert store is not None
        found = store.get([result.id])
        assert [decode_result(one).result for one in found.values()] == ([8] if stored else [])
        store.close()


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


def test_values_in_compositions_have_their_types(tasks: Any) -> None:
    one, two = Receipt(1, Decimal("9.99")), Receipt(2, Decimal("9.99"))
    grouped = group(tasks.receipt.s(1), tasks.receipt.s(2)).delay()
    assert grouped.get() == [one, two]
    assert [value for _, value in grouped.iter(1)] == [one, two]
    last = (tasks.receipt.s(1) | tasks.add.si(1, 2)).delay()
    assert last.parent.get() == one
    joined = chord([tasks.receipt.s(1), tasks.receipt.s(2)], tasks.add.si(1, 2)).delay()
    assert joined.parent.get() == [one, two]


def test_a_composition_that_keeps_no_result_says_so_at_once(app: AmqpTasks, tasks: Any) -> None:
    add, silent = tasks.add, tasks.silent
    for sent in (
        group(silent.s(), add.s(1, 1)).delay,
        (add.s(1, 1) | silent.s()).delay,
        lambda: (add.s(1, 1) | add.s(2)).apply_async(ignore_result=True),
        lambda: (silent.s() | add.si(1, 1)).delay().parent,
        chord([add.s(1, 1)], silent.s()).delay,
        (add.s(1, 1) | app.signature("add", (1,), ignore_result=True)).delay,
    ):
        for ask in (lambda one: one.get(10), lambda one: one.ready(), lambda one: asyncio.run(one.aget(10))):
            with pytest.raises(ResultUnavailable, match="ignore_result"):
                ask(sent())
    with pytest.raises(ResultUnavailable, match="ignore_result"):
        list(group(silent.s(), add.s(1, 1)).delay().iter(10))
    assert (silent.s() | add.si(1, 1)).delay().get(0) == 2
    assert silent.map([1, 2]).delay().get(0) == [1, 1]


async def test_asyncio_callers_may_be_eager(tasks: Any) -> None:
    assert await (await tasks.add.adelay(1, 2)).aget(1) == 3
    assert await (await tasks.later.adelay(1)).aget(1) == 1
    assert await (await (tasks.add.s(1, 2) | tasks.add.s(3)).adelay()).aget(1) == 6
