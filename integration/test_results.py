"""Results over AMQP: whoever called gets the answer, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from decimal import Decimal

import psutil
import pytest

from amqptasks import AsyncResult, RemoteError, ResultTimeout, ResultUnavailable, TaskRevoked
from amqptasks.errors import InvalidArguments, SerializationError, TimeLimitExceeded, UnknownTask, WorkerLost
from amqptasks.message import Envelope
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.conftest import ROOT, Bench, CanvasBench


def reply_queues(bench: Bench) -> list[str]:
    return [name for name in bench.vhost.management.queues() if ".reply." in name]


def test_a_caller_gets_the_value_with_its_type(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    result = canvas.charge.delay(1, Decimal("9.99"))
    assert result.get(10) == canvas.Receipt(1, Decimal("9.99"))
    assert (result.state, result.ready(), result.successful()) == ("SUCCESS", True, True)
    assert canvas.add.delay(1, 2).get(10) == 3
    assert canvas.app.send_task("integration.apps.canvas.add", (3, 4)).get(10) == 7


def test_an_exception_comes_back_as_its_own_class(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker()
    result = canvas.charge.delay(1, Decimal(0))
    with pytest.raises(canvas.Declined) as caught:
        result.get(10)
    assert caught.value.args == (1, "nothing to charge")
    assert 'raise Declined(order, "nothing to charge")' in str(caught.value.__cause__)
    assert (result.state, result.failed()) == ("FAILURE", True)
    retried = canvas.retries.delay()
    with pytest.raises(canvas.Declined, match="twice"):
        retried.get(10)
    with pytest.raises(InvalidArguments):
        desk.client().send_task("integration.apps.canvas.add", ("x", 1)).get(10)
    assert len(desk.vhost.dead_letters("default", 3)) == 3


def test_what_ends_without_running_to_its_end_ends_for_the_caller_too(desk: CanvasBench) -> None:
    app = desk.caller()
    desk.worker("default", "-c", "2")
    with pytest.raises(WorkerLost, match="SIGKILL"):
        canvas.killed.delay().get(20)
    with pytest.raises(TimeLimitExceeded, match=r"0\.5 s"):
        canvas.endless.delay().get(20)
    with pytest.raises(UnknownTask, match="nobody"):
        app.send_task("nobody").get(20)
    expired = canvas.add.apply_async((1, 2), expires=0.0001)
    with pytest.raises(TaskRevoked):
        expired.get(20)
    assert expired.state == "REVOKED"
    assert {letter["properties"]["headers"]["x-task-reason"] for letter in desk.vhost.dead_letters("default", 4)} == {
        "poison",
        "time_limit",
        "unknown_task",
        "expired",
    }


@pytest.mark.parametrize("kind", ["lock", "recursive", "big", "no repr", "keyword", "argument"])
def test_what_cannot_travel_fails_with_a_readable_error_and_the_process_lives_on(desk: CanvasBench, kind: str) -> None:
    desk.caller()
    worker = desk.worker("default", "-c", "1")
    before = worker.executors()[0].pid
    expected: type[Exception] = {"lock": SerializationError, "no repr": RemoteError, "keyword": RemoteError}.get(
        kind, ValueError
    )
    result = canvas.strange.delay(kind)
    with pytest.raises(expected):
        result.get(20)
    assert canvas.add.delay(1, 1).get(10) == 2
    assert worker.executors()[0].pid == before
    assert result.traceback is None or "strange" in result.traceback


def test_progress_is_seen_while_the_task_runs(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    result = canvas.progress.delay(5)
    seen = []
    while not result.ready():
        if result.info and result.info not in seen:
            seen.append(result.info)
        time.sleep(0.01)
    assert result.get(0) == "done"
    assert seen == sorted(seen, key=lambda one: one["done"])
    assert len(seen) >= 4
    started = canvas.slow.delay(0.5)
    wait_until(lambda: started.state == "STARTED", 5, "it started")
    assert started.info["pid"] != os.getpid()
    assert started.get(5) == 0.5


def test_a_call_without_a_result_is_told_at_once(desk: CanvasBench) -> None:
    app = desk.caller()
    desk.worker()
    with pytest.raises(ResultUnavailable, match="ignore_result"):
        canvas.add.apply_async((1, 2), ignore_result=True).get()
    with pytest.raises(ResultUnavailable, match="sends results to the process that called"):
        AsyncResult("stranger").get()
    started = time.monotonic()
    with pytest.raises(ResultTimeout):
        app.send_task("integration.apps.canvas.slow", (3,)).get(timeout=1)
    assert time.monotonic() - started < 1.2


async def test_asyncio_callers_wait_without_blocking_the_loop(desk: CanvasBench) -> None:
    desk.caller()
    await asyncio.to_thread(desk.worker, "default", "-c", "2")
    pauses = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - before)

    task = asyncio.create_task(tick())
    results = await asyncio.gather(*(canvas.add.adelay(number, 1) for number in range(50)))
    assert await asyncio.gather(*(one.aget(10) for one in results)) == list(range(1, 51))
    with pytest.raises(canvas.Declined):
        await (await canvas.fails.adelay()).aget(10)
    chained = await (canvas.add.s(1, 2) | canvas.add.s(3)).adelay()
    assert await chained.aget(10) == 6
    task.cancel()
    assert max(pauses) < 0.3
    await canvas.app.aclose()


def test_results_come_after_the_connection_was_cut(desk: CanvasBench, proxy: TcpProxy, through_proxy: str) -> None:
    desk.caller(through_proxy)
    desk.worker("default", "-c", "2")
    before = [canvas.slow.delay(1.0) for _ in range(4)]
    proxy.cut()
    assert [one.get(20) for one in before] == [1.0] * 4
    assert canvas.add.delay(1, 2).get(10) == 3
    assert len(reply_queues(desk)) == 1


def test_a_reply_queue_that_somebody_deletes_is_told_to_those_who_wait(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    waiting = canvas.slow.delay(1.0)
    for queue in reply_queues(desk):
        desk.vhost.management.delete_queue(queue)
    with pytest.raises(ResultUnavailable, match="reply queue"):
        waiting.get(20)
    wait_until(lambda: reply_queues(desk), 10, "the queue is declared again")
    assert canvas.add.delay(1, 2).get(10) == 3


def test_a_user_who_may_not_have_a_reply_queue_is_told_when_asking(
    desk: CanvasBench, restricted_user: Callable[[str, str, str], str]
) -> None:
    desk.caller().declare()
    canvas.app.close()
    desk.worker("default", "-c", "2")
    desk.caller(restricted_user("^amqptasks", "^amqptasks", "^amqptasks"))
    result = canvas.counted.delay()
    wait_until(lambda: result.id in desk.ledger.ids("counted"), 10, "the task runs all the same")
    with pytest.raises(ResultUnavailable, match=r"the reply queue cannot be used: ACCESS_REFUSED.*reply"):
        result.get(5)


def test_a_stray_message_in_the_reply_queue_harms_nobody(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    assert canvas.add.delay(1, 2).get(10) == 3
    (queue,) = reply_queues(desk)
    for body in (b"", b"nonsense", b"[]", b'{"status": "SUCCESS"}'):
        canvas.app.client._publisher.publish(Envelope("", queue, body))
    assert canvas.add.delay(3, 4).get(10) == 7


CLIENT = """
import sys, time
from integration.apps import canvas
canvas.app.configure(config=sys.argv[1])
results = [canvas.add.delay(number, 1) for number in range(int(sys.argv[2]))]
if sys.argv[3] == "get":
    assert [one.get(60) for one in results] == [number + 1 for number in range(len(results))]
print("sent", flush=True)
if sys.argv[3] == "hang":
    time.sleep(100)
"""


@pytest.mark.timeout(180)
def test_client_processes_leave_no_queue_behind(desk: CanvasBench) -> None:
    """Pains of others: queues that stay. Half of the clients never ask, some are killed."""
    desk.worker("default", "-c", "2")
    (desk.folder / "client.py").write_text(textwrap.dedent(CLIENT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(desk.folder / "client.py"), str(desk.config), "500", how]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    for batch in range(5):
        clients = [start(how) for how in ("get", "get", "leave", "hang")]
        for client, how in zip(clients, ("get", "get", "leave", "hang"), strict=True):
            assert client.stdout is not None
            assert client.stdout.readline() == "sent\n", batch
            if how == "hang":
                client.send_signal(signal.SIGKILL)
            client.wait(30)
            client.stdout.close()
    left = desk.vhost.management.queues()
    replies = [left[name] for name in reply_queues(desk)]
    # Those of the five that were killed, until their time is over; nothing of the others.
    assert len(replies) == 5
    for queue in replies:
        assert queue["arguments"]["x-expires"] == 300_000
        assert queue["durable"]


@pytest.mark.timeout(180)
def test_a_client_that_runs_for_long_does_not_grow(desk: CanvasBench) -> None:
    """As many results as a test may take; `benchmarks/results.py` takes as many as one likes."""
    app = desk.caller()
    desk.worker("default", "-c", "2")
    process = psutil.Process()

    def burst(count: int, *, ask: bool) -> None:
        results = app.send_many([canvas.add.s(number, 1) for number in range(count)])
        if ask:
            assert [one.get(60) for one in results] == [number + 1 for number in range(count)]
        del results
        wait_until(lambda: desk.vhost.ready("default") == 0, 60, "all ran")

    for _ in range(3):
        burst(2000, ask=True)
        burst(2000, ask=False)
    gc.collect()
    before = process.memory_info().rss
    for _ in range(4):
        burst(2000, ask=True)
        burst(2000, ask=False)
    gc.collect()
    assert process.memory_info().rss - before < 10 * 1024 * 1024
    assert len(reply_queues(desk)) == 1
    (queue,) = reply_queues(desk)
    wait_until(lambda: desk.vhost.ready(queue) == 0, 10, "every reply was taken")


def test_a_task_that_waits_for_another_is_refused(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    with pytest.raises(RuntimeError, match="Use a chain"):
        canvas.waits_for_another.delay(5).get(20)
