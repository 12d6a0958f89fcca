"""Rate limits of the cluster and of a worker, measured; what waits for its turn is in the broker, and not lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import pika
import pytest

from amqptasks import AmqpTasks
from amqptasks.broker.confirms import ConfirmChannel
from amqptasks.broker.consumer import Incoming
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.making import make_queue
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope
from amqptasks.outcome import Outcome, RateLimited
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until
from amqptasks.topology.build import rate_entities
from amqptasks.worker import rates
from amqptasks.worker.attendants import Attendants
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.group import plan_groups
from integration.conftest import Bench
from integration.strangers import strange_channel

NODE, PACED = "shop@test", "integration.apps.jobs.paced"
WAITING = f"amqptasks.rate.{PACED}"


def _limit(bench: Bench, rate: Any, task: str = PACED, **more: Any) -> None:
    bench.settings["tasks"] = {task: {"rate_limit": rate, **more}}


def _turn(event: str) -> float:
    """When a turn was given, by the clock of the leader that gave it, if this line of the ledger tells it; else 0."""
    return int(event.removeprefix("passed=")) / 1000 if event.startswith("passed=") else 0.0


def _passes(bench: Bench) -> list[float]:
    """When each turn was given."""
    return sorted(filter(None, (_turn(entry.event) for entry in bench.ledger.entries())))


def _starts(bench: Bench) -> list[float]:
    return sorted(entry.at for entry in bench.ledger.entries("begin"))


def _most_in(times: list[float], seconds: float) -> int:
    return max(sum(1 for other in times if time <= other < time + seconds) for time in times)


def _rate(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


@pytest.mark.timing
def test_three_workers_share_one_limit_and_others_run_free(bench: Bench) -> None:
    _limit(bench, "10/s")
    app = bench.client()
    for _ in range(3):
        bench.worker("default", "-c", "1")
    ids = {bench.send(app, "paced") for _ in range(200)}
    free = {bench.send(app, "note") for _ in range(50)}
    started = time.monotonic()
    bench.wait_done(free, timeout=8)
    assert time.monotonic() - started < 8
    assert bench.vhost.management.counts(WAITING)[1] <= 10
    bench.wait_done(ids, timeout=60)
    passes, starts = _passes(bench), _starts(bench)
    print(f"passes {_rate(passes):.2f}/s, at most {_most_in(passes, 1.0)} in a second")
    assert len(passes) == 200
    assert _most_in(passes, 1.0) <= 11
    assert _rate(passes) >= 9.5
    assert len(starts) == 250
    turns = {entry.task_id: _turn(entry.event) for entry in bench.ledger.entries() if _turn(entry.event)}
    begun = {entry.at: entry.task_id for entry in bench.ledger.entries("begin") if entry.task_id in ids}
    limited = sorted(begun)
    # Of those that come within 50 ms of their turn. Where the machine is too busy for that, one more may catch up.
    soon = [at for at in limited if at - turns[begun[at]] < 0.05]
    most = _most_in(soon, 1.0)
    print(f"starts {_rate(limited):.2f}/s, at most {_most_in(limited, 1.0)} in a second; {len(soon)} in time, {most}")
    assert most <= 11
    assert _rate(limited) >= 9.5
    bench.vhost.wait_settled("default")
    bench.vhost.wait_settled(WAITING)


@pytest.mark.slow
@pytest.mark.timeout(360)
def test_a_hundred_a_minute_over_three_workers_for_three_minutes(bench: Bench) -> None:
    """Within 5 % of the rate, and never more than a window has, but for one at each of its ends."""
    _limit(bench, "100/m")
    app = bench.client()
    for _ in range(3):
        bench.worker("default", "-c", "2")
    ids = {bench.send(app, "paced") for _ in range(300)}
    bench.wait_done(ids, timeout=240)
    passes = _passes(bench)
    print(f"{60 * _rate(passes):.2f}/min, at most {_most_in(passes, 6.0)} in six seconds")
    assert len(passes) == 300
    assert 95 <= 60 * _rate(passes) <= 105
    for seconds in (6.0, 30.0, 60.0):
        assert _most_in(passes, seconds) <= 100 * seconds / 60 + 1


@pytest.mark.fault
@pytest.mark.timing
def test_the_holder_is_killed_and_nothing_is_lost_or_early(bench: Bench) -> None:
    _limit(bench, "10/s")
    app = bench.client()
    workers = [bench.worker("default", "-c", "1") for _ in range(3)]
    ids = {bench.send(app, "paced") for _ in range(120)}
    wait_until(lambda: len(_passes(bench)) > 20, 20, "it goes")
    # The first to consume is the active one; killed with all that it held.
    workers[0].kill()
    bench.wait_done(ids, timeout=60)
    passes = _passes(bench)
    # Eleven in a second with both its ends. One may be late, by a connection that opens; those after it are in time.
    assert _most_in(passes, 1.0) <= 12
    # The broker activates the next one as soon as it sees that the connection is gone.
    assert _rate(passes) > 8
    assert bench.vhost.management.messages("default.dlq") == []
    bench.vhost.wait_settled("default")
    bench.vhost.wait_settled(WAITING)


def test_what_waits_for_its_turn_waits_in_the_broker_and_survives_all_workers(bench: Bench) -> None:
    _limit(bench, "2/s")
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    ids = [bench.send(app, "paced") for _ in range(24)]
    waiting, held = wait_until(
        lambda: counts if sum(counts := bench.vhost.management.counts(WAITING)) >= 12 else None, 10, "they wait there"
    )
    assert waiting > held <= 2
    # What is on its way there is held, and in none of the broker's figures, which are half a second old.
    wait_until(lambda: bench.vhost.unacked("default") <= 2, 5, "the worker holds none")
    assert worker.stop() == 0
    wait_until(lambda: bench.vhost.unacked(WAITING) == 0, 10, "given back")
    bench.worker("default", "-c", "1")
    bench.wait_done(set(ids))
    # In order, each once.
    assert [entry.task_id for entry in bench.ledger.entries("done")] == ids


def test_every_execution_counts_and_delays_come_first(bench: Bench) -> None:
    _limit(bench, "2/s", "integration.apps.jobs.recovers", default_retry_delay=0.125)
    app = bench.client()
    bench.worker("default", "-c", "1")
    sent = time.time()
    later = bench.send(app, "recovers", 0, countdown=1.0)
    task_id = bench.send(app, "recovers", 4)
    bench.wait_done({task_id, later})
    tries = [entry.at for entry in bench.ledger.entries("try")]
    assert len(tries) == 6
    assert _most_in(tries, 0.9) <= 3
    assert tries[-1] - tries[0] > 2.0
    assert next(entry.at for entry in bench.ledger.entries("done") if entry.task_id == later) - sent > 1.0
    bench.vhost.wait_settled(WAITING.replace("paced", "recovers"))


@pytest.mark.fault
def test_a_limited_task_that_costs_executors_is_poison_as_any_other(bench: Bench) -> None:
    _limit(bench, "5/s", "integration.apps.jobs.kills_itself")
    app = bench.client()
    bench.worker("default", "-c", "1")
    task_id = bench.send(app, "kills_itself")
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "poison"
    assert not [name for name in letter["properties"]["headers"] if name in ("x-amqptasks-passed", "x-amqptasks-home")]
    assert len([entry for entry in bench.ledger.entries("try") if entry.task_id == task_id]) == 3


def test_what_is_revoked_or_over_while_it_waits_for_its_turn_does_not_run(bench: Bench) -> None:
    _limit(bench, "10/m")
    app = bench.client()
    bench.worker("default", "-c", "1")
    first = bench.send(app, "paced")
    bench.wait_done({first})
    revoked = [bench.send(app, "paced") for _ in range(20)]
    over = bench.send(app, "paced", expires=4.0)
    last = bench.send(app, "paced")
    wait_until(lambda: sum(bench.vhost.management.counts(WAITING)) >= 20, 10, "they wait")
    app.control.revoke(revoked)
    # Twenty that will not run take no turns.
    bench.wait_done({last}, timeout=40)
    letters = [one["properties"] for one in bench.vhost.dead_letters("default", 21)]
    reasons = {one["correlation_id"]: one["headers"]["x-task-reason"] for one in letters}
    assert reasons == {**dict.fromkeys(revoked, "revoked"), over: "expired"}
    assert bench.ledger.ids("done") == {first, last}


@pytest.mark.timing
def test_high_rates_are_reached(bench: Bench) -> None:
    _limit(bench, 200)
    app = bench.client()
    app.declare()
    app.send_many([app.signature(PACED) for _ in range(600)])
    bench.worker("default", "-c", "2")
    wait_until(lambda: len(_passes(bench)) == 600, 30, "all ran")
    passes = _passes(bench)
    print(f"passes {_rate(passes):.1f}/s")
    assert _most_in(passes, 1.0) <= 222
    assert _rate(passes) > 150


@pytest.mark.parametrize("rate", [0, "0", None])
def test_no_rate_is_no_limit(bench: Bench, rate: Any) -> None:
    _limit(bench, rate)
    app = bench.client()
    bench.worker("default", "-c", "1")
    ids = {bench.send(app, "paced") for _ in range(20)}
    bench.wait_done(ids, timeout=10)
    assert {entry.event for entry in bench.ledger.entries() if "passed" in entry.event} == {"passed=None"}


def test_a_limit_that_is_lifted_lets_go_what_waits(bench: Bench) -> None:
    _limit(bench, "1/h")
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    ids = {bench.send(app, "paced") for _ in range(30)}
    wait_until(lambda: sum(bench.vhost.management.counts(WAITING)) >= 28, 10, "they wait")
    assert worker.stop() == 0
    _limit(bench, 0)
    bench.worker("default", "-c", "1")
    bench.wait_done(ids, timeout=10)


def test_a_worker_may_disable_limits(bench: Bench) -> None:
    _limit(bench, "1/h")
    bench.settings["worker"] = {"disable_rate_limits": True}
    app = bench.client()
    bench.worker("default", "-c", "1")
    ids = {bench.send(app, "paced") for _ in range(10)}
    bench.wait_done(ids, timeout=10)


@pytest.mark.timing
def test_each_worker_may_have_a_limit_of_its_own(bench: Bench) -> None:
    _limit(bench, "5/s", rate_limit_scope="worker")
    app = bench.client()
    for _ in range(2):
        bench.worker("default", "-c", "1")
    ids = {bench.send(app, "paced") for _ in range(60)}
    bench.wait_done(ids, timeout=30)
    passes = _passes(bench)
    print(f"passes {_rate(passes):.2f}/s by two workers")
    assert 8 < _rate(passes) < 11
    assert _most_in(passes, 1.0) <= 13


def _ask(bench: Bench, *command: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "-b", bench.vhost.url, *command, "--json", "--timeout", "10", "-d", NODE],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout)[NODE]


def _wait_limited(bench: Bench) -> None:
    """Wait until the worker consumes from the queue of those that wait, which is after it has begun to limit."""
    wait_until(lambda: WAITING in bench.vhost.management.queues(), 10, "its queue")
    wait_until(lambda: bench.vhost.consumers(WAITING) == 1, 10, "its consumer")


def test_rates_change_while_workers_run(bench: Bench) -> None:
    """Also that of a task which had none, when its worker may make the queue."""
    app = bench.client()
    bench.worker("default", "-c", "1", "-n", NODE)
    assert _ask(bench, "control", "rate_limit", "no.such.task", "1/m", code=1) == {"error": "unknown task"}
    assert "is not a rate" in _ask(bench, "control", "rate_limit", PACED, "fast", code=1)["error"]
    assert _ask(bench, "control", "rate_limit", PACED, "10/s") == {"ok": "new rate limit set successfully"}
    _wait_limited(bench)
    ids = {bench.send(app, "paced") for _ in range(30)}
    bench.wait_done(ids)
    assert 2 < _rate(_passes(bench)) <= 11
    _ask(bench, "control", "rate_limit", PACED, "1/h")
    more = {bench.send(app, "paced") for _ in range(30)}
    wait_until(lambda: sum(bench.vhost.management.counts(WAITING)) >= 28, 10, "they wait")
    assert _ask(bench, "control", "rate_limit", PACED, "0") == {"ok": "rate limit disabled successfully"}
    bench.wait_done(more, timeout=10)


def test_a_limit_is_set_for_a_task_whose_limit_was_lifted_before_it_had_one(bench: Bench) -> None:
    app = bench.client()
    bench.worker("default", "-c", "1", "-n", NODE)
    assert _ask(bench, "control", "rate_limit", PACED, "0") == {"ok": "rate limit disabled successfully"}
    assert _ask(bench, "control", "rate_limit", PACED, "1/h") == {"ok": "new rate limit set successfully"}
    _wait_limited(bench)
    ids = {bench.send(app, "paced") for _ in range(10)}
    wait_until(lambda: sum(bench.vhost.management.counts(WAITING)) >= 8, 10, "they wait")
    assert _ask(bench, "control", "rate_limit", PACED, "0") == {"ok": "rate limit disabled successfully"}
    bench.wait_done(ids, timeout=10)


@pytest.mark.parametrize("when", ["while disconnected", "as the connection dies"])
def test_a_limit_that_is_set_without_a_connection_holds_with_the_next(
    bench: Bench, proxy: TcpProxy, through_proxy: str, when: str
) -> None:
    app = bench.client()
    app.task(name=PACED)(lambda: None)
    app.declare()
    bench.settings["broker"]["url"] = through_proxy
    slow = AmqpTasks("through the proxy", config=bench.config)
    loop = new_loop()
    links = [Link(loop, connection_parameters(one.settings.broker, "test")) for one in (app, slow)]
    confirms = ConfirmChannel(links[0], window=10)

    def publish(envelope: Envelope, done: Callable[[Any], None]) -> None:
        confirms.publish(envelope, encode_properties(envelope), done)

    (plan,) = plan_groups(app.settings, ["default"])
    no_executors = cast("Dispatcher", None)
    attendants = Attendants(
        app, plan, no_executors, links[0], app.topology.routes, publish=publish, refuse=lambda *_: None
    )
    ups = 0

    def up(connection: Any) -> None:
        nonlocal ups
        ups += 1
        attendants.up(connection, lambda: None)
        if ups == 1 and when == "as the connection dies":
            proxy.stall()
            attendants.set_rate(PACED, "1/h")
            proxy.cut()
            proxy.resume()

    links[1].watch(up, lambda error: attendants.down(str(error)))
    if when == "while disconnected":
        attendants.set_rate(PACED, "1/h")
    for link in links:
        link.open()
    delivery = Delivery(
        Incoming(0, 1, False, "", "default", pika.BasicProperties(headers={"id": "a", "task": PACED}), b""), "default"
    )
    outcomes: list[Outcome] = []

    def look() -> None:
        outcome = attendants.judge(delivery)
        if outcome is None:
            loop.call_later(0.05, look)
        else:
            outcomes.append(outcome)
            loop.stop()

    look()
    loop.call_later(12.0, loop.stop)
    loop.start()
    for link in links:
        link.abandon()
    loop.close()
    slow.close()
    assert outcomes == [RateLimited(WAITING)]
    assert WAITING in bench.vhost.management.queues()


def test_revokes_by_remote_control_are_durable_too(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    task_id = bench.send(app, "note", countdown=8.0)
    assert "flagged as revoked" in _ask(bench, "control", "revoke", task_id)["ok"]
    assert _ask(bench, "inspect", "revoked") == [task_id]
    time.sleep(0.5)
    worker.kill()
    bench.worker("default", "-c", "1")
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "revoked"


def test_a_queue_that_was_deleted_comes_back(bench: Bench) -> None:
    _limit(bench, "20/s")
    app = bench.client()
    bench.worker("default", "-c", "1")
    first = bench.send(app, "paced")
    bench.wait_done({first})
    bench.vhost.management.delete_queue(WAITING)
    ids = {bench.send(app, "paced") for _ in range(10)}
    bench.wait_done(ids, timeout=30)


def test_strangers_cannot_jam_a_rate_queue(bench: Bench) -> None:
    _limit(bench, "20/s")
    app = bench.client()
    bench.worker("default", "-c", "1")
    strange: list[dict[str, Any]] = [
        {}, {"task": PACED, "id": ["a", "list"]}, {"task": PACED, "id": "x", "x-amqptasks-turn": {"a": [1]}},
        {"task": PACED, "id": "y", "x-amqptasks-home": 7}, {"task": PACED, "id": "z", "x-amqptasks-home": "x" * 300},
        {"task": PACED, "id": "nowhere", "x-amqptasks-home": "no-such-queue"},
    ]  # fmt: skip
    with strange_channel(bench.vhost.url) as channel:
        for headers in strange * 10:
            properties = pika.BasicProperties(headers=headers, content_type="application/json")
            channel.basic_publish("amqptasks", WAITING, b"[[], {}, {}]", properties)
    ids = {bench.send(app, "paced") for _ in range(5)}
    bench.wait_done({*ids, "x", "y", "z", "nowhere"}, timeout=40)
    bench.vhost.wait_settled(WAITING)


@pytest.mark.timeout(60)
def test_what_is_held_for_long_is_given_back_and_keeps_its_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that holds a message for half an hour is closed by the broker; a turn may take longer."""
    monkeypatch.setattr(rates, "_HOLD_SECONDS", 0.5)
    app = bench.client()
    app.declare()
    queue, binding = rate_entities("amqptasks", PACED, "cluster")
    loop = new_loop()
    links = [Link(loop, connection_parameters(app.settings.broker, "test")) for _ in range(2)]
    confirms = ConfirmChannel(links[0], window=10)
    passes: list[float] = []
    moved = []
    ends: list[Any] = []

    def publish(envelope: Envelope, done: Callable[[Any], None]) -> None:
        passes.append(time.monotonic())
        moved.append(envelope.routing_key)
        confirms.publish(envelope, encode_properties(envelope), lambda error: confirmed(done, error))

    def confirmed(done: Callable[[Any], None], error: Any) -> None:
        done(error)
        ends.append(error)
        if len(ends) == 3:
            loop.call_later(0.5, loop.stop)

    turns = rates.RateQueue(
        queue.name, "amqptasks", "default", 0.5, revoked=(), publish=publish, call_later=loop.call_later,
        missing=lambda then: make_queue(links[1].connection, queue, binding, lambda _problem: then()),
    )  # fmt: skip
    given_back: list[int] = []
    give_back = turns._consumer.send_requeue

    def requeue(tag: int, epoch: int) -> None:
        given_back.append(tag)
        give_back(tag, epoch)

    monkeypatch.setattr(turns._consumer, "send_requeue", requeue)
    links[1].watch(turns.up, lambda _error: None)
    for link in links:
        link.open()
    envelope = Envelope("amqptasks", queue.name, b"[[], {}, {}]", headers={"task": PACED, "id": "a"})
    loop.call_later(
        1.0, lambda: [confirms.publish(envelope, encode_properties(envelope), lambda _error: None) for _ in range(3)]
    )
    loop.start()
    assert moved == ["default"] * 3
    assert given_back
    assert [1.9 <= second - first < 3.5 for first, second in pairwise(passes)] == [True, True]
    bench.vhost.wait_settled(WAITING)
    assert bench.vhost.ready("default") == 3
    for link in links:
        link.abandon()
    loop.close()


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ({"a.*": {"rate_limit": "10/y"}}, "'10/y' is not a rate"),
        ({"a.*": {"rate_limit": -1}}, "-1 is not a rate"),
        ({"a.*": {"rate_limit": "1/s", "rate_limit_scope": "planet"}}, "rate_limit_scope"),
    ],
)
def test_a_bad_limit_is_one_line(bench: Bench, tasks: dict[str, Any], text: str) -> None:
    bench.settings["tasks"] = tasks
    worker = bench.worker("default", ready=False)
    assert worker.wait(20) == 2
    assert text in worker.log
    assert "Traceback" not in worker.log
