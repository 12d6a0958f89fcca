"""Pools as an operator sees them: flags, the banner, growing, recycling, limits, on a real broker."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench, VirtualHost


@pytest.mark.parametrize("pool", ["process", "thread", "asyncio"])
def test_a_pool_grows_with_a_backlog(bench: Bench, pool: str) -> None:
    app = bench.client()
    ids = {bench.send(app, "note", 1.0) for _ in range(24)}
    worker = bench.worker("default", "-P", pool, "--autoscale", "6,1")
    wait_until(lambda: len(bench.ledger.ids("begin")) - len(bench.ledger.ids("done")) == 6, 15, "six run at once")
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")
    assert "Autoscale" in worker.log
    assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["process", "thread", "asyncio"])
def test_limits_and_recycling_by_flag(bench: Bench, pool: str) -> None:
    app = bench.client()
    ids = {bench.send(app, "note") for _ in range(60)}
    limited = bench.send(app, "note", 60)
    flags = ["--time-limit", "1", "--max-tasks-per-child", "10", "--max-memory-per-child", "4000000"]
    worker = bench.worker("default", "-P", pool, "-c", "4", *flags)
    bench.wait_done(ids)
    letter = bench.vhost.dead_letters("default", 1)[0]
    assert letter["properties"]["correlation_id"] == limited
    assert letter["properties"]["headers"]["x-task-reason"] == "time_limit"
    pids = {entry.pid for entry in bench.ledger.entries("done")}
    assert len(pids) >= 6
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


def test_solo_runs_one_task_at_a_time_and_in_order_while_its_executor_is_replaced(bench: Bench) -> None:
    app = bench.client()
    # Every executor is larger than that, and leaves within a second, while its task runs.
    worker = bench.worker("default", "-P", "solo", "--prefetch", "4", "--max-memory-per-child", "1000")
    ids = [bench.send(app, "note", 2.5) for _ in range(4)]
    bench.wait_done(set(ids))
    assert worker.log.count("Executor leaves") >= 2
    entries = [entry for entry in bench.ledger.entries() if entry.event in ("begin", "done")]
    assert [(entry.task_id, entry.event) for entry in entries] == [
        (task_id, event) for task_id in ids for event in ("begin", "done")
    ]
    assert len({entry.pid for entry in entries}) >= 3
    assert worker.stop() == 0


def test_a_successor_takes_what_waits_here_at_once(bench: Bench) -> None:
    app = bench.client()
    bench.worker("default", "-c", "1", "--prefetch", "2", "--max-memory-per-child", "300000")
    jobs = "integration.apps.jobs"
    large = app.signature(f"{jobs}.grows", (400, 60.0))
    long, short = (one.id for one in app.send_many([large, app.signature(f"{jobs}.note")]))
    bench.wait_done({short}, timeout=15)
    assert long not in bench.ledger.ids("done")


@pytest.mark.fault
@pytest.mark.parametrize("pool", ["thread", "asyncio", "gevent"])
def test_a_poison_task_among_others_is_the_only_dead_letter(bench: Bench, pool: str) -> None:
    app = bench.client()
    ids = {bench.send(app, "note", 0.2) for _ in range(20)}
    poison = bench.send(app, "kills_itself")
    ids |= {bench.send(app, "note", 0.2) for _ in range(20)}
    worker = bench.worker("default", "-P", pool, "-c", "16")
    letter = bench.vhost.dead_letters("default", 1, timeout=60)[0]
    assert letter["properties"]["correlation_id"] == poison
    assert letter["properties"]["headers"]["x-task-reason"] == "poison"
    assert len([entry for entry in bench.ledger.entries("try") if entry.task_id == poison]) == 4, (
        "once among others, where nobody is blamed, and three times alone"
    )
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["thread", "asyncio"])
def test_heartbeats_go_on_while_tasks_hold_the_interpreter(bench: Bench, pool: str) -> None:
    bench.settings["broker"]["heartbeat"] = 2
    app = bench.client()
    worker = bench.worker("default", "-P", pool, "-c", "4")
    held = bench.send(app, "occupies", "gil", 7.0)
    bench.wait_done({held}, timeout=20)
    bench.vhost.wait_settled("default")
    assert "Connection lost" not in worker.log
    assert len([one for one in bench.ledger.entries("begin") if one.task_id == held]) == 1


def test_a_gevent_pool_runs_hundreds_at_once_limits_them_and_takes_no_async_task(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {"pool": "gevent", "concurrency": 300}, "other": {}}
    app = bench.client()
    worker = bench.worker("default,other")  # beside a pool that is not patched
    bench.wait_done({bench.send(app, "note")})
    started = time.monotonic()
    ids = {bench.send(app, "note", 1.0) for _ in range(300)}
    limited, soft, asynchronous = (
        bench.send(app, "overruns", "sleep"),
        bench.send(app, "stops_when_asked"),
        bench.send(app, "asleep", 0.1),
    )
    other = bench.send(app, "note", queue="other")
    bench.wait_done(ids | {other}, timeout=60)
    assert time.monotonic() - started < 60, "one after the other they take five minutes"
    letters = {
        letter["properties"]["correlation_id"]: letter["properties"]["headers"]
        for letter in bench.vhost.dead_letters("default", 3)
    }
    assert letters[limited]["x-task-reason"] == letters[soft]["x-task-reason"] == "time_limit"
    assert "async task cannot run in a gevent pool" in letters[asynchronous]["x-task-exception-message"]
    assert "cleaned up" in {entry.event for entry in bench.ledger.entries() if entry.task_id == soft}
    stuck, neighbours = bench.send(app, "overruns", "spin"), {bench.send(app, "note", 2.0) for _ in range(5)}
    wait_until(lambda: len(bench.vhost.dead_letters("default", 4)) == 4, 20, "what spins is ended")
    bench.wait_done(neighbours)
    assert stuck not in bench.ledger.ids("done")
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


def test_the_banner_says_what_runs_where(bench: Bench) -> None:
    bench.settings["queues"] = {
        "default": {"concurrency": 2},
        "api": {"pool": "threads", "concurrency": 16, "processes": 2},
        "hooks": {"pool": "asyncio", "autoscale": {"max": 500, "min": 50}},
    }
    worker = bench.worker("default,api,hooks")
    assert "process, 2 at once: 2 executors of one task" in worker.log
    assert "thread, 16 at once: 2 executors of 8 threads" in worker.log
    assert "asyncio, 50 at once, up to 500: 1 executor of 50 asyncio tasks" in worker.log
    started = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("pool", ["process", "solo", "thread", "asyncio"])
def test_each_async_task_sees_its_own_request(bench: Bench, pool: str) -> None:
    bench.worker("default", "-P", pool, "-c", "1")
    app = bench.client()
    ids = {bench.send(app, "asleep", 0.0) for _ in range(5)}
    bench.wait_done(ids)
    assert len([entry for entry in bench.ledger.entries() if entry.event == "done"]) == 5


@pytest.mark.parametrize("pool", ["process", "thread", "asyncio"])
def test_context_variables_of_an_async_task_are_its_own(bench: Bench, pool: str) -> None:
    bench.worker("default", "-P", pool, "-c", "10")
    app = bench.client()
    sent = {bench.send(app, "has_context", str(number)): str(number) for number in range(40)}
    wait_until(lambda: len(bench.ledger.entries()) == len(sent), 20, "all have run")
    assert {entry.task_id: entry.event for entry in bench.ledger.entries()} == {
        task_id: f"nobody's {value}" for task_id, value in sent.items()
    }


@pytest.mark.timing
def test_five_hundred_coroutines_wait_at_once(bench: Bench) -> None:
    app = bench.client()
    bench.worker("default", "-P", "asyncio", "-c", "500")
    bench.wait_done({bench.send(app, "asleep", 0.01) for _ in range(600)})  # the prefetch has grown
    ids = {one.id for one in app.send_many([app.signature("integration.apps.jobs.awaits", (1.0,))] * 500)}
    bench.wait_done(ids, event="cleaned up")
    begun = min(entry.at for entry in bench.ledger.entries("begin"))
    took = max(entry.at for entry in bench.ledger.entries("cleaned up")) - begun
    assert took < 3, "one after the other they need 500 s; an idle machine needs 1.2"


class OnLoop(Bench):
    """Workers whose asyncio pool runs on this loop, with a task that tells on which."""

    APP = "loops:app"

    def __init__(self, vhost: VirtualHost, folder: Path, loop: str) -> None:
        super().__init__(vhost, folder)
        (folder / "loops.py").write_text(
            "import asyncio\n"
            "from amqptasks.testing.ledger import record\n"
            "from integration.apps.jobs import app\n"
            "@app.task(bind=True, name='loops.which')\n"
            "async def which(self):\n"
            "    record(self.request.id, type(asyncio.get_running_loop()).__module__.partition('.')[0])\n"
        )
        if loop == "asyncio":
            # As where it is not installed.
            (folder / "uvloop.py").write_text("raise ImportError('not here')\n")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_two_thousand_coroutines_wait_at_once_on_either_loop(vhost: VirtualHost, tmp_path: Path, loop: str) -> None:
    bench = OnLoop(vhost, tmp_path, loop)
    try:
        app = bench.client()
        worker = bench.worker("default", "-P", "asyncio", "-c", "2000", path=tmp_path)
        told = app.send_task("loops.which").id
        bench.wait_done({told}, event=loop)
        awaits = app.signature("integration.apps.jobs.awaits", (20.0,))
        ids = {one.id for one in app.send_many([awaits] * 2000)}
        bench.wait_done(ids, timeout=80, event="cleaned up")
        begun = [entry.at for entry in bench.ledger.entries("begin")]
        assert len(begun) == 2000
        assert max(begun) < min(entry.at for entry in bench.ledger.entries("cleaned up")), "all at once"
        # Limits, plain functions and calls that block are looked after on either loop.
        limited = bench.send(app, "awaits", 30.0, time_limit=1.0)
        bench.wait_done({bench.send(app, "note", 1.0) for _ in range(3)})
        (letter,) = bench.vhost.dead_letters("default", 1)
        assert letter["properties"]["correlation_id"] == limited
        assert letter["properties"]["headers"]["x-task-reason"] == "time_limit"
        assert limited in bench.ledger.ids("cleaned up")
        bench.wait_done({bench.send(app, "blocks", 2.0)})
        assert "A blocking call holds up the event loop" in worker.log
        bench.vhost.wait_settled("default")
        assert worker.stop() == 0
    finally:
        bench.close()


@pytest.mark.timing
def test_what_has_ended_is_told_while_a_long_task_runs_behind_it(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "--prefetch", "50")
    app = bench.client()
    jobs = "integration.apps.jobs"
    for result in app.send_many([app.signature(f"{jobs}.add", (1, 2)) for _ in range(100)]):
        assert result.get(timeout=10) == 3
    for _ in range(5):  # so that the two are in one batch once
        quick, slow = app.send_many([app.signature(f"{jobs}.add", (1, 2)), app.signature(f"{jobs}.note", (2.0,))])
        assert quick.get(timeout=1.5) == 3
        slow.get(timeout=10)


@pytest.mark.timing
def test_a_blocking_call_in_an_async_task_is_told_with_its_place(bench: Bench) -> None:
    bench.settings["logging"] = {"format": "json"}
    app = bench.client()
    worker = bench.worker("default", "-P", "asyncio", "-c", "100")
    calm = {bench.send(app, "asleep", 1.5) for _ in range(10)} | {bench.send(app, "note", 1.5)}
    bench.wait_done(calm)
    assert "holds up the event loop" not in worker.log
    neighbours = {bench.send(app, "asleep", 1.0) for _ in range(10)}
    blocking = bench.send(app, "blocks", 2.5)
    bench.wait_done({blocking} | neighbours)
    (told,) = _lines(worker.log, "A blocking call holds up the event loop")
    assert told["level"] == "warning"
    assert (told["task"], told["task_id"]) == ("integration.apps.jobs.blocks", blocking)
    assert 1.0 <= told["seconds"] <= 2.5
    assert "integration/apps/jobs.py:" in told["at"]
    assert told["at"].endswith(" in blocks")
    assert "asyncio.to_thread" in told["advice"]
    wait_until(lambda: _lines(worker.log, "The event loop goes on"), 5, "its end is told")
    (end,) = _lines(worker.log, "The event loop goes on")
    assert end["seconds"] >= 2.5
    # One that a task has started shows with its place.
    bench.wait_done({bench.send(app, "has_a_child_that_blocks", 2.0)})
    told = _lines(worker.log, "A blocking call holds up the event loop")[-1]
    assert told["at"].endswith(" in child")
    assert worker.stop() == 0


def _lines(log: str, event: str) -> list[dict[str, Any]]:
    """The lines of a JSON log that tell this."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.fault
def test_a_leader_that_stood_still_gives_out_what_waits_in_it(bench: Bench) -> None:
    """Nothing else comes that would make it look: it holds all messages that there are."""
    bench.settings["queues"] = {"default": {"concurrency": 1, "prefetch": 1000}}
    app = bench.client()
    worker = bench.worker()
    (leader,) = worker.leaders()
    calls = [app.signature("integration.apps.jobs.note", ignore_result=True) for _ in range(1000)]
    ids: set[str] = set()
    for _ in range(8):
        before = len(bench.ledger.ids())
        ids |= {one.id for one in app.send_many(calls)}
        wait_until(lambda before=before: len(bench.ledger.ids()) > before + 100, 10, "some have ended", pause=0.001)
        leader.suspend()
        time.sleep(1.0)
        leader.resume()
        bench.wait_done(ids, timeout=20)
    assert worker.stop() == 0


def _suspend_between_tasks(bench: Bench, executor: psutil.Process) -> None:
    def events(kind: str) -> Counter[str]:
        return Counter(one.task_id for one in bench.ledger.entries(kind) if one.pid == executor.pid)

    executor.suspend()
    while events("begin") != events("done"):
        executor.resume()
        time.sleep(0.05)
        executor.suspend()


@pytest.mark.fault
def test_an_executor_that_stood_still_between_two_tasks_begins_none_that_another_has(bench: Bench) -> None:
    """Its leader stands still, and it waits in the middle of its batch to report; then it stands still itself.

    Meanwhile its lease ends, and the leader gives to the other executor what it had not begun.
    """
    bench.settings["queues"] = {"default": {"concurrency": 2, "prefetch": 400}}
    app = bench.client()
    worker = bench.worker()
    bench.wait_done({bench.send(app, "note", ignore_result=True) for _ in range(100)})
    (leader,) = worker.leaders()
    executor = worker.executors()[0]
    calls = [app.signature("integration.apps.jobs.gives", (200_000,)) for _ in range(100)]
    ids: set[str] = set()
    for _ in range(5):
        before = len(bench.ledger.ids())
        ids |= {one.id for one in app.send_many(calls)}
        wait_until(lambda before=before: len(bench.ledger.ids()) > before, 10, "some have ended", pause=0.001)
        leader.suspend()
        time.sleep(0.3)
        _suspend_between_tasks(bench, executor)
        time.sleep(0.7)
        leader.resume()
        bench.wait_done(ids, timeout=30)
        executor.resume()
    bench.vhost.wait_settled("default", 30)
    runs = Counter(entry.task_id for entry in bench.ledger.entries("begin"))
    assert not {one for one in ids if runs[one] > 1}
    assert worker.stop() == 0


@pytest.mark.fault
@pytest.mark.parametrize("pool", ["process", "thread"])
def test_an_executor_that_stands_still_costs_no_task_but_the_one_it_runs(bench: Bench, pool: str) -> None:
    bench.settings["queues"] = {"default": {"pool": pool, "concurrency": 2, "processes": 2}}
    if pool == "process":
        del bench.settings["queues"]["default"]["processes"]
    app = bench.client()
    worker = bench.worker("default", "--time-limit", "3")
    bench.wait_done({bench.send(app, "note", 0.3) for _ in range(4)})
    idle = worker.executors()[0]
    idle.suspend()
    ids = {bench.send(app, "note", 0.1) for _ in range(20)}
    bench.wait_done(ids)  # what it was given goes to the other
    wait_until(lambda: idle.pid not in {one.pid for one in worker.executors()}, 20, "it is replaced")
    busy = bench.send(app, "note", 30.0)
    bench.wait_done({busy}, event="begin")
    (pid,) = [entry.pid for entry in bench.ledger.entries("begin") if entry.task_id == busy]
    (running,) = [one for one in worker.executors() if one.pid == pid]
    running.suspend()
    letter = bench.vhost.dead_letters("default", 1)[0]["properties"]
    assert (letter["correlation_id"], letter["headers"]["x-task-reason"]) == (busy, "time_limit")
    again = {bench.send(app, "note", 0.1) for _ in range(20)}
    bench.wait_done(again)
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


class SlowStart(Bench):
    APP = "slow_start:app"


@pytest.mark.parametrize("seconds", [7, pytest.param(20, marks=pytest.mark.slow)])
def test_an_initializer_may_take_its_time(vhost: VirtualHost, tmp_path: Path, seconds: int) -> None:
    (tmp_path / "slow_start.py").write_text(
        "import time\n"
        "from amqptasks.signals import worker_process_init\n"
        "from integration.apps.jobs import app\n"
        f"worker_process_init.connect(lambda **_: time.sleep({seconds}), weak=False)\n"
    )
    bench = SlowStart(vhost, tmp_path)
    try:
        worker = bench.worker("default", "-c", "2", path=tmp_path)
        app = bench.client()
        bench.wait_done({bench.send(app, "note") for _ in range(10)})
        assert len({entry.pid for entry in bench.ledger.entries("done")}) <= 2
        assert "died" not in worker.log
        assert worker.stop() == 0
    finally:
        bench.close()


class Threaded(Bench):
    APP = "threaded:app"


_THREADED = '''
import logging
import threading
import time

from amqptasks.signals import worker_init, worker_process_init
from integration.apps.jobs import app, noop

own = threading.Lock()


def chatter():
    """Holds a lock of the application for ever, those of logging nearly always, and publishes in between."""
    own.acquire()
    while True:
        handlers = list(logging.getLogger().handlers)
        for one in handlers:
            one.acquire()
        time.sleep(0.02)
        for one in handlers:
            one.release()
        noop.delay()


@worker_init.connect
def start(**kwargs):
    threading.Thread(target=chatter, name="chatter", daemon=True).start()
    time.sleep(0.2)


@worker_process_init.connect
def forked(**kwargs):
    global own
    own = threading.Lock()


@app.task(bind=True, name="threaded.locks")
def locks(self):
    from amqptasks.testing.ledger import record
    with own:
        logging.getLogger("locks").warning("with the lock of logging")
        noop.delay()
        record(self.request.id, "done")
'''


@pytest.mark.fault
def test_locks_that_a_thread_holds_when_the_worker_forks_stop_nobody(vhost: VirtualHost, tmp_path: Path) -> None:
    """A thread of the application in the supervisor; executors are replaced all the time, leaders are killed."""
    (tmp_path / "threaded.py").write_text(_THREADED)
    bench = Threaded(vhost, tmp_path)
    try:
        worker = bench.worker("default", "-c", "4", "--max-tasks-per-child", "10", path=tmp_path)
        app = bench.client()
        ids: set[str] = set()
        for _ in range(4):
            ids |= {app.send_task("threaded.locks").id for _ in range(60)}
            bench.wait_done(ids, timeout=30)
            (leader,) = worker.leaders()
            leader.kill()
            wait_until(lambda gone=leader.pid: [one for one in worker.leaders() if one.pid != gone], 20, "another")
        bench.wait_done({app.send_task("threaded.locks").id for _ in range(60)}, timeout=30)
        assert len({entry.pid for entry in bench.ledger.entries("done")}) > 24
        assert "Executor killed" not in worker.log
        assert worker.log.count("Threads of the application run in the supervisor") == 1
        assert "chatter" in worker.log
        assert worker.stop() == 0
    finally:
        bench.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_thousand_tasks_through_executors_that_are_replaced_killed_and_stopped(bench: Bench) -> None:
    """Two thousand executors, arguments of up to 8 MB, and every few seconds one that is killed or stands still."""
    tasks, rng = 20_000, random.Random(4)
    app = bench.client()
    worker = bench.worker("default", "-c", "4", "--max-tasks-per-child", "10", "--time-limit", "5")
    done, stalled = 0, 0.0
    ids: set[str] = set()
    for start in range(0, tasks, 500):
        sizes = [rng.choice((0, 100, 10_000)) for _ in range(499)] + [rng.choice((1_000_000, 8_000_000))]
        signatures = [app.signature("integration.apps.jobs.takes", ("x" * size,)) for size in sizes]
        ids |= {one.id for one in app.send_many(signatures)}
        moved = time.monotonic()
        while len(ids) - done > 1_000 or (start + 500 == tasks and done < tasks - 40):
            time.sleep(0.5)
            now = len(bench.ledger.ids("done"))
            if now > done:
                stalled, moved, done = max(stalled, time.monotonic() - moved), time.monotonic(), now
            assert time.monotonic() - moved < 60, f"nothing has ended for a minute: {done} of {len(ids)}"
        victims = worker.executors()
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(victims).send_signal(rng.choice((signal.SIGKILL, signal.SIGSTOP)))
    bench.vhost.wait_settled("default", 90)
    letters = {one["properties"]["correlation_id"] for one in bench.vhost.management.messages("default.dlq")}
    ended = bench.ledger.ids("done")
    assert ids <= ended | letters
    # A task that stood still with its executor was over its limit; a killed one has run again.
    assert len(letters) <= 20
    pids = {entry.pid for entry in bench.ledger.entries("done")}
    print(
        f"{len(ended)} tasks in {len(pids)} executors, {len(letters)} over their limit, longest pause {stalled:.1f} s"
    )
    assert len(pids) > 1_900
    assert worker.stop() == 0
