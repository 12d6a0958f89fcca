"""Results over AMQP: whoever called gets the answer, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
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
import redis

from amqptasks import AsyncResult, RemoteError, ResultTimeout, ResultUnavailable, TaskRevoked
from amqptasks.errors import InvalidArguments, SerializationError, TimeLimitExceeded, UnknownTask, WorkerLost
from amqptasks.message import Envelope
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.servers import RedisServer
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
    # On its way until then: what expires in a queue, nobody tells.
    expired = canvas.add.apply_async((1, 2), countdown=0.3, expires=0.1)
    with pytest.raises(TaskRevoked):
        expired.get(20)
    assert expired.state == "REVOKED"
    assert {letter["properties"]["headers"]["x-task-reason"] for letter in desk.vhost.dead_letters("default", 4)} == {
        "poison",
        "time_limit",
        "unknown_task",
        "expired",
    }


@pytest.mark.parametrize(
    ("kind", "expected", "name", "words"),
    [
        ("lock", SerializationError, "amqptasks.errors.SerializationError", "lock"),
        ("recursive", ValueError, "ValueError", "a"),
        ("big", ValueError, "ValueError", "xxx"),
        ("no repr", RemoteError, "NoRepr", "NoRepr"),
        ("keyword", RemoteError, "Keyword", "5"),
        ("argument", ValueError, "ValueError", "lock"),
    ],
)
def test_what_cannot_travel_fails_with_a_readable_error_and_the_process_lives_on(
    desk: CanvasBench, kind: str, expected: type[Exception], name: str, words: str
) -> None:
    desk.caller()
    worker = desk.worker("default", "-c", "1")
    before = worker.executors()[0].pid
    result = canvas.strange.delay(kind)
    with pytest.raises(expected) as caught:
        result.get(20)
    assert canvas.add.delay(1, 1).get(10) == 2
    assert worker.executors()[0].pid == before
    assert result.state == "FAILURE"
    assert name.rpartition(".")[2] in (type(caught.value).__name__, getattr(caught.value, "exc_type", ""))
    (letter,) = desk.vhost.dead_letters("default", 1)
    headers = letter["properties"]["headers"]
    assert headers["x-task-exception"].endswith(name)
    assert words in headers["x-task-exception-message"]
    if kind != "lock":  # it was returned, not raised
        assert "in strange" in (result.traceback or "")
        assert "in strange" in headers["x-task-traceback"]


def test_progress_is_seen_while_the_task_runs(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    result = canvas.progress.delay(5, 0.5)
    seen: list[dict[str, int]] = []
    while not result.ready():
        info = result.info
        if isinstance(info, dict) and info not in seen:
            seen.append(info)
        time.sleep(0.01)
    assert result.get(0) == "done"
    assert seen == sorted(seen, key=lambda one: one["done"])
    assert len(seen) >= 4
    gate = desk.folder / "gate"
    started = canvas.held.delay(str(gate))
    wait_until(lambda: started.state == "STARTED", 10, "it started")
    assert started.info["pid"] != os.getpid()
    gate.touch()
    assert started.get(10) == "done"


@pytest.mark.timing
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


@pytest.mark.timing
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


@pytest.mark.fault
def test_results_come_after_the_connection_was_cut(desk: CanvasBench, proxy: TcpProxy, through_proxy: str) -> None:
    desk.caller(through_proxy)
    desk.worker("default", "-c", "2")
    before = [canvas.slow.delay(1.0) for _ in range(4)]
    proxy.cut()
    assert [one.get(20) for one in before] == [1.0] * 4
    assert canvas.add.delay(1, 2).get(10) == 3
    assert len(reply_queues(desk)) == 1


@pytest.mark.fault
def test_a_reply_queue_that_somebody_deletes_is_told_to_those_who_wait(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    gate = desk.folder / "gate"
    waiting = canvas.held.delay(str(gate))
    for queue in reply_queues(desk):
        desk.vhost.management.delete_queue(queue)
    with pytest.raises(ResultUnavailable, match="reply queue"):
        waiting.get(20)
    gate.touch()
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
from amqptasks.broker import publisher
from integration.apps import canvas
publisher._EXIT_SECONDS = 15.0  # on a busy machine, too
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
    # Those of the five that were killed, until their time is over; nothing of the others.
    wait_until(lambda: len(reply_queues(desk)) == 5, 10, lambda: f"five queues: {reply_queues(desk)}", pause=0.1)
    left = desk.vhost.management.queues()
    replies = [left[name] for name in reply_queues(desk)]
    for queue in replies:
        assert queue["arguments"]["x-expires"] == 300_000
        assert queue["durable"]


def test_the_reply_queue_of_a_client_that_was_killed_is_gone_when_its_time_is_over(desk: CanvasBench) -> None:
    sooner = "from amqptasks.broker import replies\nreplies.EXPIRES_SECONDS = 2\n"
    (desk.folder / "client.py").write_text(sooner + textwrap.dedent(CLIENT))
    command = [sys.executable, str(desk.folder / "client.py"), str(desk.config), "10", "hang"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n"
        time.sleep(2.5)
        assert len(reply_queues(desk)) == 1, "while it is used it stays"
        client.kill()
    wait_until(lambda: reply_queues(desk) == [], 20, "it is gone")


@pytest.mark.timeout(180)
def test_a_client_that_runs_for_long_does_not_grow(desk: CanvasBench) -> None:
    """As many results as a test may take; with `-m slow` it is a hundred thousand."""
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


def test_a_task_that_waits_for_another_is_refused_unless_it_insists(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    with pytest.raises(RuntimeError, match="Use a chain"):
        canvas.waits_for_another.delay(5).get(20)
    assert canvas.waits_for_another.delay(5, insist=True).get(20) == 5


@pytest.mark.fault
def test_the_errback_of_what_never_ran_is_over_before_its_message_is_acknowledged(desk: CanvasBench) -> None:
    """On an event loop, too: when its process dies meanwhile, another one runs it."""
    gate = desk.folder / "gate"
    first = desk.worker("default", "-P", "asyncio", "-c", "4")
    errback = canvas.on_error_later.s(str(gate))
    task_id = desk.client().send_task("integration.apps.canvas.doubled", ("no number",), link_error=errback).id
    wait_until(lambda: desk.ledger.ids("errback begun"), 20, "the errback runs")
    time.sleep(1.0)
    assert desk.vhost.management.counts("default") == (0, 1)
    assert desk.vhost.management.counts("default.dlq") == (0, 0)
    first.kill()
    gate.touch()
    desk.worker("default", "-P", "asyncio", "-c", "4")
    desk.vhost.dead_letters("default", 1)
    assert desk.ledger.ids("errback done") == {task_id}
    desk.vhost.wait_settled("default")


#: Sends bursts of a thousand; of every second one all results are asked for and forgotten.
SOAK = """
import gc, json, sys
import psutil
from amqptasks import ResultSet
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas

app, process = canvas.app, psutil.Process()
app.configure(config=sys.argv[1])

def told(calls):
    gc.collect()
    memory = process.memory_info().rss / 2**20
    return {"calls": calls, "rss": memory, "threads": process.num_threads(), "files": process.num_fds()}

for burst in range(1, int(sys.argv[2]) + 1):
    results = ResultSet(app.send_many([canvas.add.s(number, 1) for number in range(1000)]))
    if burst % 2 == 0:
        values = {handle.id: value for handle, value in results.iter(120)}
        assert [values[one.id] for one in results] == list(range(1, 1001))
        results.forget()
        del values
    del results
    if burst == 20:
        print(json.dumps(told(burst * 1000)), flush=True)
inbox = app.client._inbox
if inbox is not None:
    wait_until(lambda: not inbox._pending, 60, "all replies came")
    assert len(inbox._ready) <= 1000 and not inbox._held
else:
    news = app.result_store._news
    assert not news._listeners and not news._confirmed
print(json.dumps(told(burst * 1000)), flush=True)
app.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize("kind", ["rpc", "redis"])
def test_a_hundred_thousand_results_leave_no_queue_no_key_and_no_memory_behind(desk: CanvasBench, kind: str) -> None:
    with RedisServer() as server:
        desk.settings["result"] = {"backend": "rpc://"} if kind == "rpc" else {"backend": server.url, "expires": 60}
        desk.worker("default", "-c", "2")
        (desk.folder / "soak.py").write_text(textwrap.dedent(SOAK))
        command = [sys.executable, str(desk.folder / "soak.py"), str(desk.config), "100"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        first, last = (json.loads(line) for line in done.stdout.splitlines())
        print(first, last)
        assert (first["calls"], last["calls"]) == (20_000, 100_000)
        assert last["rss"] - first["rss"] < 5, (first, last)
        assert last["threads"] <= first["threads"]
        assert last["files"] <= first["files"]
        assert reply_queues(desk) == []
        desk.vhost.wait_settled("default")
        with redis.Redis.from_url(server.url) as keys:
            wait_until(lambda: keys.dbsize() == 0, 90, lambda: f"{keys.dbsize()} keys of results are left", pause=0.5)
            assert keys.pubsub_channels() == []
