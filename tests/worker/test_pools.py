"""Executors as they are, forked from here, without a broker: how tasks run, end, and are blamed in each pool."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pika.spec import BasicProperties

from amqptasks import AmqpTasks
from amqptasks.broker.consumer import Incoming
from amqptasks.broker.link import new_loop
from amqptasks.events import Bus, TaskSucceeded
from amqptasks.outcome import Failed, Lost, Outcome, Reason, Succeeded
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.task import TaskHeaders, task_envelope
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.executor import ExecutorSetup
from amqptasks.worker.group import Recycling

app = AmqpTasks("pools", config={"queues": {"default": {}}})
inside: ContextVar[int] = ContextVar("inside", default=0)
ALL = ("process", "thread", "asyncio")
MANY = ("thread", "asyncio")


def note(path: str, line: str) -> None:
    with Path(path).open("a") as file:
        file.write(line + "\n")


@app.task
def nap(seconds: float) -> None:
    time.sleep(seconds)


@app.task
async def anap(seconds: float) -> None:
    inside.set(inside.get() + 1)
    await asyncio.sleep(seconds)
    if inside.get() != 1:
        raise RuntimeError("another task's context")


@app.task
def spin() -> None:
    while True:
        pass


@app.task
def hold_gil() -> None:
    ctypes.PyDLL(None).sleep(60)


@app.task
def release_gil() -> None:
    ctypes.CDLL(None).sleep(60)


@app.task
async def block_loop() -> None:
    time.sleep(60)  # noqa: ASYNC251 - it is what the test is about


@app.task
def stubborn() -> None:
    while True:
        try:
            time.sleep(0.05)
        except BaseException:
            continue


@app.task
async def astubborn() -> None:
    while True:
        try:
            await asyncio.sleep(0.05)
        except BaseException:
            continue


@app.task
def tidy(path: str) -> None:
    try:
        while True:
            time.sleep(0.01)
    finally:
        note(path, "tidied")


@app.task
async def atidy(path: str) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.01)
        note(path, "tidied")


@app.task
def crash(after: float = 0.2) -> None:
    time.sleep(after)
    ctypes.string_at(0)


@app.task
def grow(size: int, seconds: float) -> None:
    ballast = bytearray(os.urandom(1024)) * (size // 1024)
    time.sleep(seconds)
    del ballast


@app.task
def takes(payload: str) -> None:
    pass


@app.task
def pid_of(path: str) -> None:
    note(path, str(os.getpid()))


@app.task
async def apid_of(path: str) -> None:
    note(path, str(os.getpid()))


class Pool:
    """A dispatcher with real executors, on a loop that runs while a test waits."""

    def __init__(
        self,
        pool: str,
        concurrency: int = 4,
        processes: int | None = None,
        *,
        recycling: Recycling | None = None,
        bus: Bus | None = None,
    ) -> None:
        self.loop = new_loop()
        self.outcomes: dict[str, Outcome] = {}
        self.at: dict[str, float] = {}
        self.names: dict[str, str] = {}
        many = pool in MANY or pool == "gevent"
        self.dispatcher = Dispatcher(
            self.loop,
            ExecutorSetup(app, bus or Bus(), "default", "here", pool, concurrency, EventSwitch()),
            processes or (1 if many else concurrency),
            keep=frozenset({0, 1, 2}),
            on_outcome=lambda delivery, outcome, _runtime: self._ended(delivery, outcome),
            on_death=self._ended,
            hard_limit=lambda delivery: (delivery.headers.get("timelimit") or [None])[0],
            on_state=lambda _message: None,
            recycling=recycling or Recycling(),
        )
        self.dispatcher.start()

    def _ended(self, delivery: Delivery, outcome: Outcome) -> None:
        task_id = str(delivery.headers["id"])
        assert task_id not in self.outcomes, f"{self.names[task_id]} ended twice"
        self.outcomes[task_id] = outcome
        self.at[task_id] = time.monotonic()

    def send(
        self, task: Any, *args: Any, limits: tuple[float | None, float | None] = (None, None), crashes: int = 0
    ) -> str:
        task_id = str(uuid4())
        headers = TaskHeaders(task=task.name, id=task_id)
        envelope = task_envelope(headers, args, {}, serializer=serializer("json"), exchange="", routing_key="default")
        sent = {**envelope.headers, "timelimit": list(limits)}
        if crashes:
            sent["x-amqptasks-crashes"] = crashes
        properties = BasicProperties(headers=sent, content_type=envelope.content_type)
        incoming = Incoming(1, len(self.names) + 1, False, "", "default", properties, envelope.body)
        self.names[task_id] = task.name
        self.dispatcher.submit(Delivery(incoming, "default"))
        self.dispatcher.pump()
        return task_id

    def run_until(self, done: Callable[[], Any], timeout: float = 20.0) -> None:
        """Run the loop until something is true."""
        deadline = time.monotonic() + timeout

        def look() -> None:
            if done() or time.monotonic() > deadline:
                self.loop.stop()
            else:
                self.loop.call_later(0.01, look)

        self.loop.call_later(0, look)
        self.loop.start()
        assert done(), {self.names[one]: self.outcomes.get(one) for one in self.names}

    def wait(self, *ids: str, timeout: float = 20.0) -> list[Outcome]:
        """The outcomes of these tasks."""
        self.run_until(lambda: all(one in self.outcomes for one in ids), timeout)
        return [self.outcomes[one] for one in ids]

    def begun(self, task_id: str) -> None:
        """Run the loop until this task runs."""
        self.run_until(lambda: any(one.headers["id"] == task_id for one, _, _ in self.dispatcher.running()))

    def close(self) -> None:
        self.dispatcher.abandon()
        for executor in self.dispatcher.executors:
            executor.signal(signal.SIGCONT)
        self.run_until(lambda: not self.dispatcher.executors)
        self.loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def build(*args: Any, **options: Any) -> Pool:
        made.append(Pool(*args, **options))
        return made[-1]

    yield build
    for pool in made:
        pool.close()


REVOKED = Failed(Reason.REVOKED, "TaskRevoked", "revoked")


@pytest.mark.timing
@pytest.mark.parametrize("pool", ALL)
def test_a_running_task_is_terminated_and_its_neighbours_are_not(make: Any, pool: str) -> None:
    bench = make(pool, 3)
    victim, neighbour = bench.send(nap, 60), bench.send(nap, 3.0)
    bench.run_until(lambda: [ran > 0.3 for _, _, ran in bench.dispatcher.running()] == [True, True])
    started = time.monotonic()
    assert bench.dispatcher.terminate(victim, REVOKED, signal.SIGTERM)
    assert bench.wait(victim) == [REVOKED]
    assert time.monotonic() - started < 5
    assert bench.wait(neighbour) == [Succeeded()]
    assert bench.dispatcher.restarts == {"revoked": 1}
    assert bench.wait(*[bench.send(nap, 0) for _ in range(20)]) == [Succeeded()] * 20


@pytest.mark.parametrize("pool", ALL)
def test_what_waits_is_taken_out(make: Any, pool: str) -> None:
    bench = make(pool, 1)
    running, waiting = bench.send(nap, 1.0), bench.send(nap, 60)
    bench.begun(running)
    assert bench.dispatcher.terminate(waiting, REVOKED)
    assert bench.outcomes[waiting] == REVOKED
    assert not bench.dispatcher.terminate("no such task", REVOKED)
    assert bench.wait(running) == [Succeeded()]


@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2])
def test_an_executor_ignores_signals_for_the_group_and_dies_of_those_for_its_task(make: Any, number: int) -> None:
    bench = make("process", 1)
    task = bench.send(nap, 1.0)
    bench.begun(task)
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(bench.dispatcher.executors[0].pid, other)
    assert bench.wait(task) == [Succeeded()]
    task = bench.send(nap, 60)
    bench.begun(task)
    assert bench.dispatcher.terminate(task, REVOKED, number)
    assert bench.wait(task, timeout=1.5) == [REVOKED], "without waiting for SIGKILL"


@pytest.mark.timing
def test_more_and_fewer_executors(make: Any, tmp_path: Any) -> None:
    bench = make("process", 1)
    slow = bench.send(nap, 1.0)
    bench.begun(slow)
    bench.dispatcher.resize(4)
    assert bench.dispatcher.concurrency == 4
    rest = [bench.send(nap, 0.3) for _ in range(3)]
    started = time.monotonic()
    bench.wait(slow, *rest)
    assert time.monotonic() - started < 2.5
    bench.dispatcher.resize(2)
    bench.run_until(lambda: len(bench.dispatcher.executors) == 2)
    assert bench.dispatcher.restarts == {"resized": 2}


@pytest.mark.parametrize("pool", MANY)
def test_more_and_fewer_slots(make: Any, pool: str) -> None:
    bench = make(pool, 2)
    bench.dispatcher.resize(6)
    ids = [bench.send(nap, 3.0) for _ in range(6)]
    bench.run_until(lambda: len(bench.dispatcher.running()) == 6)
    bench.wait(*ids)
    bench.dispatcher.resize(1)
    ids = [bench.send(nap, 0.5) for _ in range(3)]
    bench.run_until(lambda: len(bench.dispatcher.running()) == 1)
    assert bench.dispatcher.busy == 1
    bench.wait(*ids)


@pytest.mark.parametrize("pool", ALL)
def test_all_executors_are_replaced_one_after_another_and_nothing_is_lost(make: Any, pool: str) -> None:
    bench = make(pool, 4, 2 if pool in MANY else None)
    before = {one.pid for one in bench.dispatcher.executors}
    ids = [bench.send(nap, 0.05) for _ in range(60)]
    bench.dispatcher.roll()
    bench.run_until(lambda: not before & {one.pid for one in bench.dispatcher.executors})
    bench.wait(*ids)
    assert bench.dispatcher.restarts == {"rolled": len(before)}
    assert len(bench.dispatcher.executors) == len(before)


# -- time limits ------------------------------------------------------------------------------------------------------

LIMITED = Failed(Reason.TIME_LIMIT, "TimeLimitExceeded", "the hard time limit of 0.5 s passed; the task was killed")
SYNC = [(nap, (60,)), (spin, ()), (hold_gil, ()), (release_gil, ()), (stubborn, ())]
ASYNC = [(anap, (60,)), (block_loop, ()), (astubborn, ())]


@pytest.mark.timing
@pytest.mark.parametrize("pool", ALL)
@pytest.mark.parametrize(("task", "args"), SYNC + ASYNC, ids=lambda one: getattr(one, "__name__", ""))
def test_what_does_not_stop_is_stopped_at_the_hard_limit_and_the_others_finish(
    make: Any, pool: str, task: Any, args: Any
) -> None:
    if pool == "thread" and task in (block_loop, astubborn):
        return  # a coroutine has a thread of its own there: the same as `nap` and `stubborn`
    bench = make(pool, 3)
    # A batch of short ones first, so that all executors are known to run.
    bench.wait(*[bench.send(nap, 0) for _ in range(6)])
    others = [bench.send(nap, 1.0), bench.send(anap, 1.0)]
    for one in others:
        bench.begun(one)
    started = time.monotonic()
    offender = bench.send(task, *args, limits=(0.5, None))
    assert bench.wait(offender, timeout=10) == [LIMITED]
    assert time.monotonic() - started < 0.5 + 3.5, "limit, question, kill, and a slow machine"
    assert bench.wait(*others) == [Succeeded()] * 2
    started = time.monotonic()
    again = [bench.send(nap, 0.5) for _ in range(3)]
    bench.run_until(lambda: len(bench.dispatcher.running()) == 3, 5)  # capacity is what it was
    assert bench.wait(*again) == [Succeeded()] * 3


@pytest.mark.parametrize("pool", ALL)
def test_a_stopped_executor_is_replaced_at_the_limit_of_its_task(make: Any, pool: str) -> None:
    bench = make(pool, 1)
    offender = bench.send(nap, 60, limits=(0.5, None))
    bench.begun(offender)
    os.kill(bench.dispatcher.executors[0].pid, signal.SIGSTOP)
    assert bench.wait(offender) == [LIMITED]
    assert bench.wait(bench.send(nap, 0)) == [Succeeded()]


def test_an_executor_that_was_stopped_before_it_reported_what_it_ran_is_replaced(make: Any, tmp_path: Any) -> None:
    first = tmp_path / "first"

    def stop(_event: TaskSucceeded) -> None:
        if not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    bus = Bus()
    bus.subscribe(TaskSucceeded, stop)
    bench = make("process", 1, bus=bus)
    assert bench.wait(bench.send(nap, 0), timeout=15) == [Succeeded()]
    assert first.exists()
    assert bench.dispatcher.restarts == {"silent": 1}


@pytest.mark.parametrize("pool", ALL)
@pytest.mark.parametrize("task", [pid_of, apid_of], ids=["sync", "async"])
def test_an_executor_that_stood_still_gives_back_what_another_ran_meanwhile(
    make: Any, pool: str, task: Any, tmp_path: Any
) -> None:
    """Its job came while it stood, and the lease ended before it went on."""
    file = tmp_path / "pids"
    bench = make(pool, 2, 2)
    bench.wait(*[bench.send(nap, 0.1) for _ in range(2)])
    still, other = bench.dispatcher.executors
    os.kill(still.pid, signal.SIGSTOP)
    ids = [bench.send(task, str(file)) for _ in range(2)]
    assert still.inflight
    assert bench.wait(*ids) == [Succeeded()] * 2
    os.kill(still.pid, signal.SIGCONT)
    bench.run_until(lambda: not still.silent)  # it was heard: it has read what came
    assert bench.wait(*[bench.send(nap, 0.1) for _ in range(4)]) == [Succeeded()] * 4
    assert file.read_text().split() == [str(other.pid)] * 2


@pytest.mark.parametrize("pool", MANY)
@pytest.mark.parametrize("task", [tidy, atidy], ids=["sync", "async"])
def test_a_task_that_shares_its_process_is_asked_first_and_cleans_up(
    make: Any, pool: str, task: Any, tmp_path: Any
) -> None:
    bench = make(pool, 2)
    pid = bench.dispatcher.executors[0].pid
    offender = bench.send(task, str(tmp_path / "notes"), limits=(0.3, None))
    assert isinstance(bench.wait(offender)[0], Failed)
    assert (tmp_path / "notes").read_text() == "tidied\n"
    assert [one.pid for one in bench.dispatcher.executors] == [pid], "the process lives on"


@pytest.mark.parametrize("pool", ALL)
@pytest.mark.parametrize("task", [tidy, atidy], ids=["sync", "async"])
def test_the_soft_limit_raises_inside_the_task(make: Any, pool: str, task: Any, tmp_path: Any) -> None:
    bench = make(pool, 2)
    outcome = bench.wait(bench.send(task, str(tmp_path / "notes"), limits=(None, 0.2)))[0]
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.message) == (Reason.TIME_LIMIT, "0.2 s")
    assert outcome.exception.endswith("SoftTimeLimitExceeded")
    assert (tmp_path / "notes").read_text() == "tidied\n"
    assert bench.wait(*[bench.send(nap, 0.01, limits=(None, 5.0)) for _ in range(20)]) == [Succeeded()] * 20


# -- blame ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", MANY)
def test_only_the_task_that_ends_the_process_is_blamed(make: Any, pool: str) -> None:
    bench = make(pool, 8)
    neighbours = [bench.send(nap, 2.0) for _ in range(3)] + [bench.send(anap, 2.0) for _ in range(3)]
    for one in neighbours:
        bench.begun(one)
    culprit = bench.send(crash)
    rest = [bench.send(nap, 0.05) for _ in range(20)]
    (outcome,) = bench.wait(culprit)
    assert isinstance(outcome, Lost)
    assert "SIGSEGV" in outcome.description
    assert bench.wait(*neighbours, *rest) == [Succeeded()] * 26
    bench.run_until(lambda: len(bench.dispatcher.executors) == 1)  # the wards have gone
    assert bench.dispatcher.restarts["died"] == 2


@pytest.mark.parametrize("pool", MANY)
def test_a_task_that_has_cost_an_executor_runs_alone(make: Any, pool: str) -> None:
    bench = make(pool, 8)
    neighbours = [bench.send(nap, 1.0) for _ in range(3)]
    for one in neighbours:
        bench.begun(one)
    pid = bench.dispatcher.executors[0].pid
    assert isinstance(bench.wait(bench.send(crash, crashes=1))[0], Lost)
    assert bench.wait(*neighbours) == [Succeeded()] * 3
    assert [one.pid for one in bench.dispatcher.executors if not one.ward] == [pid]


# -- asyncio ----------------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_hundreds_sleep_at_once_in_a_context_of_their_own(make: Any) -> None:
    bench = make("asyncio", 500)
    bench.wait(bench.send(anap, 0))
    started = time.monotonic()
    ids = [bench.send(anap, 1.0) for _ in range(500)]
    assert bench.wait(*ids) == [Succeeded()] * 500
    assert time.monotonic() - started < 3.0


def test_plain_functions_run_beside_the_loop_as_many_as_there_are_slots(make: Any) -> None:
    bench = make("asyncio", 40)
    ids = [bench.send(nap, 4.0) for _ in range(30)] + [bench.send(anap, 4.0) for _ in range(10)]
    bench.run_until(lambda: len(bench.dispatcher.running()) == 40, 5)
    assert bench.wait(*ids) == [Succeeded()] * 40


# -- recycling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ALL)
def test_an_executor_is_replaced_after_so_many_tasks(make: Any, pool: str, tmp_path: Any) -> None:
    file = tmp_path / "pids"
    bench = make(pool, 4, recycling=Recycling(tasks=10))
    ids = [bench.send(pid_of, str(file)) for _ in range(300)]
    assert bench.wait(*ids) == [Succeeded()] * 300
    runs = Counter(file.read_text().split())
    assert max(runs.values()) <= 10
    assert len(runs) >= 30
    assert bench.dispatcher.restarts.keys() == {"recycled_tasks"}


@pytest.mark.parametrize("pool", ALL)
def test_an_executor_that_has_grown_is_replaced_when_it_has_finished(make: Any, pool: str) -> None:
    bench = make(pool, 1)
    bench.wait(bench.send(nap, 0))
    size = bench.dispatcher.executors[0].resident()
    bench = make(pool, 1, recycling=Recycling(memory=size + 150_000_000, memory_hard=size + 400_000_000))
    assert bench.wait(bench.send(grow, 300_000_000, 4.0)) == [Succeeded()], "it is not killed with a task inside"
    bench.run_until(lambda: bench.dispatcher.restarts == {"recycled_memory": 1})
    assert isinstance(bench.wait(bench.send(grow, 500_000_000, 60))[0], Lost)
    assert bench.dispatcher.restarts["memory_hard"] == 1
    assert bench.wait(bench.send(nap, 0)) == [Succeeded()]


@pytest.mark.parametrize("pool", ALL)
def test_nothing_stalls_while_executors_are_recycled_killed_and_stopped(make: Any, pool: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    bench = make(pool, 4, 2 if pool in MANY else None, recycling=Recycling(tasks=10))
    sizes = [dice.choice([0, 10, 1000, 1_000_000 if number % 20 == 0 else 100]) for number in range(1000)]
    ids = [bench.send(takes, "x" * size, limits=(1.0, None)) for size in sizes]
    for done in range(100, 1001, 100):
        bench.run_until(lambda done=done: len(bench.outcomes) >= done, 15)
        dice.choice(bench.dispatcher.executors).signal(dice.choice([signal.SIGKILL, signal.SIGSTOP]))
    ends = Counter(type(bench.outcomes[one]) for one in ids)
    assert ends[Succeeded] > 900, ends
    assert all(one.reason is Reason.TIME_LIMIT for one in bench.outcomes.values() if isinstance(one, Failed))
