"""The main job: tasks are published, routed, run, retried, and dead-lettered where an operator finds them."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import ROOT, Bench

TASKS = "integration.apps.jobs"


def events(bench: Bench, task_id: str) -> list[str]:
    return [entry.event for entry in bench.ledger.entries() if entry.task_id == task_id]


def test_tasks_run_once_and_nothing_is_left(bench: Bench) -> None:
    app = bench.client()
    ids = {bench.send(app, "note") for _ in range(20)}
    worker = bench.worker()
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")
    assert sorted(entry.task_id for entry in bench.ledger.entries("done")) == sorted(ids)
    assert worker.stop() == 0
    assert "received" in worker.log
    assert "succeeded in" in worker.log


def test_routes_choose_queue_and_priority_and_each_queue_has_its_own_processes(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {}, "high_priority": {"max_priority": 10}, "email": {}}
    bench.settings["routes"] = [
        {"match": "*.note", "queue": "high_priority", "priority": 9},
        {"regex": r"\.jobs\.recovers$", "queue": "email", "routing_key": "email.bulk"},
    ]
    app = bench.client()
    high, mail, other = (bench.send(app, "note"), bench.send(app, "recovers", 0), bench.send(app, "shared"))
    worker = bench.worker("high_priority,email,default", "-c", "1")
    bench.wait_done({high, mail, other})
    pids = {entry.task_id: entry.pid for entry in bench.ledger.entries("done")}
    assert len({pids[high], pids[mail], pids[other]}) == 3
    assert len(worker.leaders()) == 3
    assert worker.stop() == 0


def test_high_priority_overtakes_what_waits(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {"max_priority": 10}}
    app = bench.client()
    low = [bench.send(app, "note", 0.05, priority=1) for _ in range(60)]
    high = [bench.send(app, "note", 0.05, priority=9) for _ in range(5)]
    bench.worker("default", "-c", "1")
    bench.wait_done({*low, *high})
    order = [entry.task_id for entry in bench.ledger.entries("begin")]
    # Executor and leader may hold two low ones already when the high ones are seen.
    assert max(order.index(one) for one in high) < len(high) + 3


def test_annotated_arguments_arrive_with_their_types(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "charge", {"order": 7, "amount": "9.99"}, "thanks")
    bench.worker()
    wait_until(lambda: events(bench, task_id) == ["charged 7 Decimal('9.99') thanks"], 10, "charged")


def test_async_tasks_run_as_they_stand_in_every_pool(bench: Bench) -> None:
    app = bench.client()
    for pool in ("process", "asyncio", "solo"):
        ids = {bench.send(app, "asleep", 0.05), bench.send(app, "note")}
        worker = bench.worker("default", "-P", pool)
        bench.wait_done(ids)
        assert worker.stop() == 0


@pytest.mark.timing
def test_an_asyncio_pool_runs_hundreds_at_once(bench: Bench) -> None:
    app = bench.client()
    app.send_many([app.signature(f"{TASKS}.asleep", (1.0,)) for _ in range(300)])
    started = time.monotonic()
    bench.worker("default", "-P", "asyncio", "-c", "300")
    wait_until(lambda: len(bench.ledger.entries("done")) == 300, 15, "300 done")
    assert time.monotonic() - started < 8


def test_a_task_that_publishes_passes_on_parent_and_root(bench: Bench) -> None:
    app = bench.client()
    root = bench.send(app, "spawns", 2)
    bench.worker()
    wait_until(lambda: len(bench.ledger.entries()) == 3, 10, "three generations")
    first, second, third = bench.ledger.entries()
    assert first.event == f"depth=2 parent=None root={root}"
    assert second.event == f"depth=1 parent={root} root={root}"
    assert third.event == f"depth=0 parent={second.task_id} root={root}"


@pytest.mark.timing
def test_retries_come_back_after_their_delay_and_then_succeed(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "recovers", 10)
    bench.worker()
    bench.wait_done({task_id})
    tries = [entry for entry in bench.ledger.entries("try") if entry.task_id == task_id]
    assert [entry.attempt for entry in tries] == list(range(1, 12))
    gaps = [later.at - earlier.at for earlier, later in pairwise(tries)]
    assert min(gaps) >= 0.3, "a retry came early"
    assert max(gaps) < 1.3
    bench.vhost.wait_settled("default")


@pytest.mark.slow
def test_a_task_that_fails_ten_times_with_pauses_of_three_seconds_runs_eleven_times(bench: Bench) -> None:
    bench.settings["tasks"] = {f"{TASKS}.recovers": {"default_retry_delay": 3}}
    app = bench.client()
    task_id = bench.send(app, "recovers", 10)
    worker = bench.worker()
    bench.wait_done({task_id}, timeout=90)
    tries = bench.ledger.entries("try")
    assert [entry.attempt for entry in tries] == list(range(1, 12))
    gaps = [later.at - earlier.at for earlier, later in pairwise(tries)]
    assert min(gaps) >= 3.0, "a retry came early"
    assert max(gaps) < 5.0
    bench.vhost.wait_settled("default")
    levels = [queue.name for queue in app.topology.queues if ".delay." in queue.name]
    counts = bench.vhost.management.counts
    wait_until(lambda: sum(sum(counts(one)) for one in levels) == 0, 20, "nothing is left on the ladder", pause=0.2)
    assert worker.stop() == 0


def test_a_retry_may_change_its_arguments(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "retries_with_other_arguments", "first")
    bench.worker()
    wait_until(lambda: events(bench, task_id) == ["value=first", "value=second"], 10, "both values")


def test_after_its_last_retry_a_task_stands_in_the_dead_letter_queue_with_its_error(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "always_retries", 0.1)
    bench.worker("default", "-n", "node1@%h")
    letter = bench.vhost.dead_letters("default", 1)[0]
    headers = letter["properties"]["headers"]
    assert letter["properties"]["correlation_id"] == task_id
    assert headers["x-task-reason"] == "retries_exhausted"
    assert headers["x-task-exception"] == "ValueError"
    assert headers["x-task-exception-message"] == "still broken"
    assert 'raise self.retry(exc=ValueError("still broken")' in headers["x-task-traceback"]
    assert headers["x-task-attempts"] == 3
    assert headers["x-task-worker"].startswith("node1@")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(headers["x-task-failed-at"])).total_seconds()) < 30
    assert headers["task"] == f"{TASKS}.always_retries"
    assert not any(name.startswith("x-first-death") for name in headers)
    assert [entry.attempt for entry in bench.ledger.entries("try")] == [1, 2, 3]
    bench.vhost.wait_settled("default")


@pytest.mark.parametrize(
    ("task", "args", "reason", "message"),
    [
        ("fails", ("value",), "failed", "broken: ü"),
        ("fails", ("exit",), "failed", "3"),
        ("fails", ("unspeakable",), "failed", "whose repr raised"),
        ("fails", ("huge",), "failed", "xxx"),
        ("rejects", (), "rejected", "not for us"),
        ("no_such_task", (), "unknown_task", "no_such_task"),
        ("add", ("x", 1), "invalid_arguments", "x: Input should be a valid integer"),
        ("add", (1,), "invalid_arguments", "y: Missing required argument"),
        ("stops_when_asked", (), "time_limit", "0.5 s"),
        ("overruns", ("sleep",), "time_limit", "hard time limit of 1 s"),
        ("overruns", ("spin",), "time_limit", "hard time limit of 1 s"),
        ("overruns", ("stubborn",), "time_limit", "hard time limit of 1 s"),
        ("kills_itself", (), "poison", "was killed by SIGKILL; the task has cost 3 executors"),
    ],
)
def test_what_fails_for_good_is_dead_lettered_with_its_reason(
    bench: Bench, task: str, args: tuple[Any, ...], reason: str, message: str
) -> None:
    app = bench.client()
    bench.send(app, task, *args)
    healthy = {bench.send(app, "note") for _ in range(5)}
    worker = bench.worker()
    headers = bench.vhost.dead_letters("default", 1)[0]["properties"]["headers"]
    assert headers["x-task-reason"] == reason
    assert message in headers["x-task-exception-message"]
    bench.wait_done(healthy)
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


@pytest.mark.fault
@pytest.mark.parametrize("queue", [{}, {"max_priority": 5}], ids=["quorum", "classic"])
def test_a_poison_task_costs_three_executors_and_blames_nobody_else(bench: Bench, queue: dict[str, Any]) -> None:
    bench.settings["queues"] = {"default": queue}
    app = bench.client()
    ids: set[str] = set()
    for _ in range(25):
        ids |= {bench.send(app, "note") for _ in range(4)}
    poison = bench.send(app, "kills_itself")
    ids |= {bench.send(app, "note") for _ in range(20)}
    bench.worker("default", "-c", "2")
    letter = bench.vhost.dead_letters("default", 1)[0]
    assert letter["properties"]["correlation_id"] == poison
    assert events(bench, poison) == ["try"] * 3
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")


@pytest.mark.fault
def test_a_task_that_crashes_twice_and_then_works_is_done(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "kills_itself", 2, 11)
    bench.worker()
    bench.wait_done({task_id})
    assert events(bench, task_id) == ["try", "try", "try", "done"]


@pytest.mark.parametrize("pool", ["process", "thread"])
def test_what_its_time_limit_killed_runs_again_where_its_task_says_so(bench: Bench, pool: str) -> None:
    app = bench.client()
    bench.worker("default", "-c", "2", "-P", pool)
    third = bench.send(app, "overruns_until", 3)
    never = bench.send(app, "overruns_until", 9)
    bench.wait_done({third})
    (letter,) = bench.vhost.dead_letters("default", 1)
    headers = letter["properties"]["headers"]
    assert (letter["properties"]["correlation_id"], headers["x-task-reason"]) == (never, "time_limit")
    assert headers["x-task-attempts"] == 3
    tries = [(one.task_id, one.attempt) for one in bench.ledger.entries("try")]
    assert sorted(tries) == sorted((one, attempt) for one in (third, never) for attempt in (1, 2, 3))


def test_an_ignored_task_leaves_nothing_behind(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "ignores")
    bench.worker()
    bench.wait_done({task_id}, event="ignored")
    bench.vhost.wait_settled("default")
    assert bench.vhost.management.messages("default.dlq") == []


@pytest.mark.timing
def test_countdown_and_eta_wait_in_the_broker_and_are_never_early(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    due = {}
    for delay in (0.05, 0.4, 1.0, 2.3):
        sent = time.time()
        due[bench.send(app, "note", countdown=delay)] = sent + delay
    bench.worker()
    bench.wait_done(set(due))
    late = {entry.task_id: entry.at - due[entry.task_id] for entry in bench.ledger.entries("begin")}
    assert min(late.values()) >= 0, "a task ran early"
    # The first ones were due before the worker had started; the last one tells how late the ladder is.
    assert min(late.values()) < 1.0


def test_a_delayed_call_runs_though_its_queue_had_no_worker_when_it_was_due(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "note", countdown=0.3)
    wait_until(lambda: bench.vhost.ready("default") == 1, 10, "it is due and waits")
    bench.worker()
    bench.wait_done({task_id})


def test_expired_calls_are_dead_lettered_and_not_run(bench: Bench) -> None:
    app = bench.client()
    bench.send(app, "note", expires=0.2)
    delayed = bench.send(app, "note", countdown=0.6, expires=0.3)
    time.sleep(0.7)
    bench.worker()
    letters = bench.vhost.dead_letters("default", 2)
    reasons = {
        letter["properties"]["headers"].get("x-task-reason") or letter["properties"]["headers"]["x-death"][0]["reason"]
        for letter in letters
    }
    assert reasons == {"expired"}
    assert delayed in {letter["properties"]["correlation_id"] for letter in letters}
    assert bench.ledger.entries() == []


def test_a_fanout_exchange_gives_each_queue_its_copy_and_a_retry_stays_in_its_queue(bench: Bench) -> None:
    bench.settings["exchanges"] = {"news": {"type": "fanout"}}
    bench.settings["queues"] = {
        "default": {},
        "a": {"bindings": [{"exchange": "news"}]},
        "b": {"bindings": [{"exchange": "news"}]},
    }
    bench.settings["routes"] = [{"match": "*.recovers", "exchange": "news"}]
    app = bench.client()
    bench.send(app, "recovers", 1)
    bench.worker("a,b", "-c", "1")
    wait_until(lambda: len(bench.ledger.entries("done")) == 2, 10, "both copies are done")
    assert sorted(entry.attempt for entry in bench.ledger.entries("try")) == [1, 1, 2, 2]


@pytest.mark.timing
def test_a_long_task_holds_nothing_back(bench: Bench) -> None:
    app = bench.client()
    first = bench.worker("default", "-c", "1")
    bench.worker("default", "-c", "1")
    warm = {bench.send(app, "note") for _ in range(50)}  # both workers learn that tasks are short
    bench.wait_done(warm)
    slow = bench.send(app, "note", 8.0)
    bench.wait_done({slow}, event="begin")
    quick = {bench.send(app, "note", 0.05) for _ in range(20)}
    started = time.monotonic()
    bench.wait_done(quick, timeout=7)
    assert time.monotonic() - started < 6
    assert slow not in bench.ledger.ids("done")
    first.kill()


@pytest.mark.parametrize("queue", [{}, {"max_priority": 10}], ids=["quorum", "classic"])
def test_the_executors_of_a_queue_share_its_work(bench: Bench, queue: dict[str, Any]) -> None:
    bench.settings["queues"] = {"default": queue}
    app = bench.client()
    ids = {one.id for one in app.send_many([app.signature("integration.apps.jobs.note", (0.02,))] * 600)}
    bench.worker("default", "-c", "2")
    bench.wait_done(ids, timeout=60)
    shares = Counter(entry.pid for entry in bench.ledger.entries("done"))
    assert len(shares) == 2
    assert min(shares.values()) > 180, shares


def test_lines_of_a_task_carry_its_names_and_json_is_one_object_a_line(bench: Bench) -> None:
    import json

    bench.settings["logging"] = {"format": "json"}
    app = bench.client()
    task_id = bench.send(app, "logs")
    failing = bench.send(app, "fails")
    worker = bench.worker()
    bench.vhost.dead_letters("default", 1)
    wait_until(lambda: "a line of the task" in worker.log, 5, "the line")
    worker.stop()
    records = [json.loads(line) for line in worker.log.splitlines() if line.startswith("{")]
    own = next(record for record in records if record["event"] == "a line of the task's own")
    assert (own["task_id"], own["task"], own["colour"]) == (task_id, f"{TASKS}.logs", "green")
    done = next(record for record in records if "succeeded in" in record["event"])
    assert {"task", "task_id", "queue", "attempt", "runtime", "timestamp", "level"} <= set(done)
    failed = next(record for record in records if record.get("reason") == "failed")
    assert failed["task_id"] == failing
    assert "ValueError: broken" in failed["exception"]


def test_a_worker_uses_the_configuration_that_its_app_names(bench: Bench) -> None:
    (bench.folder / "ownapp.py").write_text(
        "from amqptasks import AmqpTasks\n"
        f"app = AmqpTasks('own', config={{'broker': {{'url': {bench.vhost.url!r}}}, 'queues': {{'email': {{}}}}}})\n"
        "@app.task(name='own.hello', queue='email')\n"
        "def hello() -> str:\n"
        "    return 'hello'\n"
    )
    environment = {"PYTHONPATH": f"{bench.folder}:{ROOT}"}
    with WorkerProcess("ownapp:app", "email", log=bench.folder / "own.log", environment=environment) as worker:
        worker.wait_ready()
        bench.settings["queues"] = {"email": {}}
        bench.client().send_task("own.hello", queue="email")
        wait_until(lambda: "succeeded in" in worker.log, 10, "it ran")
        assert worker.stop() == 0
