"""The public names, and what a task is to its user."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import amqptasks
from amqptasks import (
    AmqpTasks,
    AsyncResult,
    ConfigError,
    InvalidArguments,
    ResultUnavailable,
    Retry,
    Signature,
    shared_task,
    states,
)


@pytest.fixture
def app() -> AmqpTasks:
    return AmqpTasks("shop", config={"queues": {"email": {}}, "tasks": {"shop.*": {"time_limit": "5m"}}})


def test_the_public_names_are_these() -> None:
    assert set(amqptasks.__all__) == {
        *("AccessRefused", "AmqpTasks", "AmqpTasksError", "AsyncResult", "BrokerBlocked", "BrokerError"),
        *("BrokerUnreachable", "ChordError", "ConfigError", "GroupResult", "Ignore", "InvalidArguments"),
        *("MaxRetriesExceeded", "Nacked", "PublishError", "PublishTimeout", "Reject", "RemoteError", "ResultSet"),
        *("ResultTimeout", "ResultUnavailable", "Retry", "SerializationError", "Signature", "SoftTimeLimitExceeded"),
        *("StoreUnavailable", "Task", "TaskRevoked", "TimeLimitExceeded", "TopologyConflict", "Unroutable"),
        *("__version__", "chain", "chord", "chunks", "current_app", "group", "shared_task", "signals", "signature"),
        "states",
    }
    for name in amqptasks.__all__:
        assert getattr(amqptasks, name) is not None


def test_states_have_celerys_names() -> None:
    assert states.SUCCESS == "SUCCESS"
    assert states.FAILURE in states.READY_STATES


def test_a_plain_call_runs_here(app: AmqpTasks) -> None:
    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    assert add(2, 3) == 5
    assert add.name == "shop.add"
    assert app.tasks["shop.add"] is add


def test_a_bound_task_gets_itself_and_an_empty_request_outside_of_a_worker(app: AmqpTasks) -> None:
    @app.task(bind=True)
    def who(self: object) -> object:
        return self

    assert who() is who
    assert who.request.called_directly
    with pytest.raises(ValueError, match="broken"):
        who.retry(exc=ValueError("broken"))
    with pytest.raises(Retry):
        who.retry()


def test_settings_of_the_file_win_over_the_code(app: AmqpTasks) -> None:
    @app.task(name="shop.slow", time_limit=10)
    def slow() -> None:
        pass

    assert slow.options.time_limit == 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retry_backof": True}, "did you mean 'retry_backoff'"),
        ({"autoretry_for": OSError}, "autoretry_for must be a tuple of exception classes"),
        ({"time_limit": -1}, "time_limit must be a number of at least 0"),
        ({"time_limit": 5, "soft_time_limit": 6}, r"soft_time_limit \(6\) must be below time_limit \(5\)"),
        ({"priority": 300}, "priority must be from 0 to 255"),
        ({"rate_limit": "fast"}, "is not a rate"),
        ({"serializer": "xml"}, "serializer 'xml' is not known"),
        ({"acks_late": False}, "acknowledged when its outcome is durable"),
    ],
)
def test_a_wrong_option_is_told_when_the_task_is_defined(
    app: AmqpTasks, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        app.task(**options)(lambda: None)  # type: ignore[call-overload]


def test_two_tasks_of_one_name_are_refused(app: AmqpTasks) -> None:
    def first() -> None: ...
    def second() -> None: ...

    app.task(name="shop.twice")(first)
    app.task(name="shop.twice")(first)
    with pytest.raises(ConfigError, match="defined twice"):
        app.task(name="shop.twice")(second)


def test_a_task_whose_queue_is_not_declared_is_told_before_the_worker_starts(app: AmqpTasks) -> None:
    app.task(name="shop.lost", queue="emial")(lambda: None)
    with pytest.raises(ConfigError, match="queue 'emial' is not declared"):
        app.import_tasks()


def test_a_module_of_include_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"module 'no\.such' does not exist"):
        AmqpTasks("x", config={}, include=["no.such"]).import_tasks()


def test_a_shared_task_belongs_to_every_app(app: AmqpTasks) -> None:
    @shared_task(name="library.clean")
    def clean() -> str:
        return "clean"

    assert app.tasks["library.clean"] is clean
    assert clean() == "clean"


def test_annotated_arguments_are_checked_and_named() -> None:
    app = AmqpTasks("x", config={})

    @app.task(name="t")
    def charge(order: int, amount: float = 1.0, *, note: str = "") -> None: ...

    assert charge.validate(("7",), {"note": "n"}) == ((7,), {"note": "n"})
    with pytest.raises(InvalidArguments, match="order: Input should be a valid integer"):
        charge.validate(("seven",), {})
    with pytest.raises(InvalidArguments, match="order: Missing required argument"):
        charge.validate((), {})
    with pytest.raises(InvalidArguments, match="nope: Unexpected keyword argument"):
        charge.validate((1,), {"nope": 1})


def test_a_signature_is_a_value_in_celerys_form(app: AmqpTasks) -> None:
    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    one = add.s(2)
    other = one.clone()
    assert other.set(queue="email") is other
    assert (one.options, other.options) == ({}, {"queue": "email"})
    assert one.clone((1,)).args == (1, 2)
    assert add.si(2).clone((1,)).args == (2,)
    assert one == Signature("shop.add", (2,))
    assert one.to_dict() == {
        "task": "shop.add",
        "args": [2],
        "kwargs": {},
        "options": {},
        "subtask_type": None,
        "immutable": False,
    }


def test_what_cannot_be_revoked_says_so_at_once(app: AmqpTasks) -> None:
    for wrong in ("", "x" * 256, 7, None):
        with pytest.raises((ValueError, TypeError)):
            app.control.revoke([wrong])
    with pytest.raises(ValueError, match="'SIGNONSENSE' is no signal"):
        AsyncResult("abc", app.results).revoke(terminate=True, signal="SIGNONSENSE")


def test_a_limit_in_the_code_may_be_lifted_in_the_file_and_its_scope_set() -> None:
    app = AmqpTasks("rates", config={"tasks": {"shop.x": {"rate_limit": 0}, "shop.y": {"rate_limit_scope": "worker"}}})
    for name in ("shop.x", "shop.y", "shop.z"):
        app.task(name=name, rate_limit="60/m")(lambda: None)
    app.task(name="shop.free")(lambda: None)
    assert app.rate_limits() == {"shop.x": (0.0, "cluster"), "shop.y": (1.0, "worker"), "shop.z": (1.0, "cluster")}
    assert {"amqptasks.rate.shop.x", "amqptasks.rate.@worker.shop.y", "amqptasks.rate.shop.z"} <= {
        queue.name for queue in app.topology.queues
    }


def test_limits_of_code_and_file_must_fit_together() -> None:
    app = AmqpTasks("limits", config={"tasks": {"shop.*": {"time_limit": 10}}})
    task = app.task(name="shop.x", soft_time_limit=20)(lambda: None)
    with pytest.raises(ConfigError, match=r"soft_time_limit \(20\) must be below time_limit \(10.0\)"):
        assert task.options


def test_a_result_that_cannot_be_there_is_told_at_once() -> None:
    nowhere = AmqpTasks("nowhere", config={"result": {"backend": "none"}})
    for ask in (lambda r: r.get(), lambda r: r.state, lambda r: r.ready()):
        with pytest.raises(ResultUnavailable, match="backend is none"):
            ask(nowhere.AsyncResult("abc"))
    over_amqp = AmqpTasks("over-amqp", config={})
    with pytest.raises(ResultUnavailable, match="to the process that called"):
        over_amqp.AsyncResult("abc").get()
    assert AsyncResult("abc") == over_amqp.AsyncResult("abc")


def test_type_checkers_know_the_arguments_of_delay(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        textwrap.dedent("""
        from typing import Any
        from amqptasks import AmqpTasks

        app = AmqpTasks("x")

        @app.task
        def plain(x: int) -> str:
            return str(x)

        @app.task(bind=True, queue="email")
        def bound(self: Any, x: int, *, y: str = "") -> None: ...

        plain.delay(1)
        bound.delay(1, y="a")
        reveal_type(plain(1))
        plain.delay("one")
        bound.delay(1, y=2)
        bound.delay()
        """)
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--cache-dir", str(tmp_path), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(lines) == 3, done.stdout
    assert 'Revealed type is "' in done.stdout
    assert "str" in done.stdout.partition("Revealed type is")[2].splitlines()[0]
