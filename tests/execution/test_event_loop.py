"""In the asyncio pool nothing that waits for a server holds up the event loop, nor do errbacks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from amqptasks import AmqpTasks
from amqptasks.errors import StoreUnavailable
from amqptasks.events import Bus
from amqptasks.execution.bodies import Bodies
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.job import Job
from amqptasks.execution.reports import Reporter
from amqptasks.execution.runner import Runner
from amqptasks.outcome import Failed
from amqptasks.protocol.results import decode_result
from amqptasks.results.store import ResultStore


class Away(ResultStore):
    """A store whose server cannot be reached at first; each try takes a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__("away://", expires=None)
        self.back = time.monotonic() + seconds
        self.kept: dict[str, bytes] = {}

    def _reach(self) -> None:
        if time.monotonic() < self.back:
            time.sleep(1.0)
            raise StoreUnavailable("away")

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        self._reach()
        if ready or task_id not in self.kept:
            self.kept[task_id] = encoded

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        self._reach()
        return {one: self.kept[one] for one in task_ids if one in self.kept}

    def delete(self, task_ids: Sequence[str]) -> None: ...

    def put_group(self, group_id: str, encoded: bytes) -> None: ...

    def get_group(self, group_id: str) -> bytes | None: ...

    def delete_group(self, group_id: str) -> None: ...

    def close(self) -> None: ...


loops: list[asyncio.AbstractEventLoop] = []
told: list[tuple[str, str]] = []


@pytest.fixture
def app() -> AmqpTasks:
    made = AmqpTasks("loop", config={})
    loops.clear()
    told.clear()

    @made.task(name="good", track_started=True)
    async def good() -> int:
        return 1

    @made.task(name="bad")
    async def bad() -> None:
        loops.append(asyncio.get_running_loop())
        raise KeyError("k")

    @made.task(name="progress", bind=True)
    async def progress(self: Any) -> int:
        for number in range(3):
            self.update_state(state="PROGRESS", meta=number)
        return 1

    @made.task(name="typed")
    async def typed(number: int) -> int:
        return number

    @made.task(name="unwritable")
    async def unwritable() -> Any:
        return object()

    @made.task(name="errback")
    async def errback(request: Any, exc: BaseException, traceback: str) -> None:
        await asyncio.sleep(0.05)
        loops.append(asyncio.get_running_loop())
        told.append((request.id, repr(exc)))

    return made


def runner_of(app: AmqpTasks, store: ResultStore | None) -> Runner:
    reporter = Reporter(replies=store is None, store=store)
    return Runner(
        app.tasks,
        app.settings,
        queue="q",
        hostname="h",
        bus=Bus(),
        bodies=Bodies(app.settings, None, None),
        soft_limit=lambda _seconds: nullcontext(),
        reporter=reporter,
        follow=FollowUps(app.calls, app.tasks.get, reporter, "amqptasks"),
        send_state=lambda *_: None,
        ran=lambda: None,
    )


def job_of(app: AmqpTasks, name: str, *args: Any, redelivered: bool = False, **options: Any) -> Job:
    made = app.calls.prepare(app.calls.callee("untyped"), args, {}, **options).envelope
    headers = {**made.headers, "task": name}
    return Job(
        *(1, headers, made.content_type, made.correlation_id, "replies", None),
        *(made.exchange, "q", redelivered, made.body, None),
    )


async def longest_pause(work: Coroutine[Any, Any, Any]) -> tuple[float, Any]:
    """How long the loop stood still at most while this ran, and what it gave."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            worst = max(worst, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    result = await work
    await asyncio.sleep(0.02)
    ticking.cancel()
    return worst, result


@pytest.mark.timing
@pytest.mark.parametrize(
    ("name", "args", "status"),
    [
        ("good", (), "SUCCESS"),
        ("bad", (), "FAILURE"),
        ("progress", (), "SUCCESS"),
        ("typed", ("no number",), "FAILURE"),
    ],
)
def test_while_the_store_is_away_the_event_loop_goes_on(app: AmqpTasks, name: str, args: Any, status: str) -> None:
    store = Away(0.5)
    job = job_of(app, name, *args)
    worst, _ = asyncio.run(longest_pause(runner_of(app, store).run_async(job)))
    assert worst < 0.8  # one try takes 1 s
    assert decode_result(store.kept[job.correlation_id or ""]).status == status


@pytest.mark.parametrize("with_store", [False, True])
def test_an_async_errback_runs_on_the_loop_of_its_pool(app: AmqpTasks, with_store: bool) -> None:
    runner = runner_of(app, Away(0) if with_store else None)
    failed, invalid, unwritable = jobs = [
        job_of(app, name, *args, link_error=app.signature("errback"))
        for name, args in (("bad", ()), ("typed", ("no number",)), ("unwritable", ()))
    ]

    async def all_of_them() -> list[Any]:
        loops.append(asyncio.get_running_loop())
        ended = []
        for one in jobs:
            ended.append((await runner.run_async(one))[0])
            assert len(told) == len(ended), "an outcome that is reported is acknowledged: its errback has run before"
        return ended

    assert all(isinstance(one, Failed) for one in asyncio.run(all_of_them()))
    assert [one for one, _ in told] == [failed.correlation_id, invalid.correlation_id, unwritable.correlation_id]
    assert told[0][1] == "KeyError('k')"
    assert len(set(loops)) == 1


@pytest.mark.timing
@pytest.mark.parametrize(
    ("name", "args", "verdict"),
    [
        ("bad", (), None),
        ("typed", ("no number",), None),
        ("good", (), ("expired", "TaskRevoked", "expired at noon")),
        ("unwritable", (), None),
    ],
)
def test_a_plain_errback_does_not_hold_up_the_event_loop(
    app: AmqpTasks, name: str, args: Any, verdict: tuple[str, str, str] | None
) -> None:
    """Also of a message that never ran."""

    @app.task(name="plain")
    def plain(request: Any, exc: BaseException, traceback: str) -> None:
        time.sleep(1.0)
        told.append((request.id, type(exc).__name__))

    job = job_of(app, name, *args, link_error=[app.signature("plain"), app.signature("errback")])
    job = job._replace(verdict=verdict)
    worst, (outcome, _) = asyncio.run(longest_pause(runner_of(app, None).run_async(job)))
    assert isinstance(outcome, Failed)
    assert worst < 0.8
    assert [one for one, _ in told] == [job.correlation_id] * 2, "both, before the outcome is reported"


def test_an_async_errback_runs_in_the_pools_of_threads_and_processes_too(app: AmqpTasks) -> None:
    job = job_of(app, "bad", link_error=app.signature("errback"))
    outcome, _ = runner_of(app, None).run(job)
    assert isinstance(outcome, Failed)
    assert told == [(job.correlation_id, "KeyError('k')")]
    assert len(set(loops)) == 1


def test_what_is_stored_and_no_result_does_not_end_the_runner(app: AmqpTasks) -> None:
    """As of another program, or of a version to come."""
    store = Away(0)
    job = job_of(app, "good", redelivered=True)
    store.kept[job.correlation_id or ""] = b"no result"
    asyncio.run(runner_of(app, store).run_async(job))
    assert decode_result(store.kept[job.correlation_id or ""]).status == "SUCCESS"


def test_an_errback_that_raises_changes_no_outcome_and_is_logged(
    app: AmqpTasks, capsys: pytest.CaptureFixture[str]
) -> None:
    @app.task(name="clumsy")
    async def clumsy(request: Any, exc: BaseException, traceback: str) -> None:
        raise RuntimeError("the errback itself")

    job = job_of(app, "typed", "no number", link_error=[app.signature("clumsy"), app.signature("errback")])
    outcome, _ = asyncio.run(runner_of(app, None).run_async(job))
    assert isinstance(outcome, Failed)
    assert [one for one, _ in told] == [job.correlation_id]
    assert "the errback itself" in "".join(capsys.readouterr())
