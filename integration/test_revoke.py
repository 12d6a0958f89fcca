"""Revoke: what is revoked does not run, wherever its message waits, and whoever was there to hear it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pika
import psutil
import pytest

from amqptasks import AmqpTasks, ChordError, TaskRevoked, chain, chord, group
from amqptasks.testing.waiting import wait_until
from integration.apps.canvas import add, body, identity, part, slow
from integration.conftest import Bench, CanvasBench

JOURNAL = "amqptasks.revoked"


def _reasons(bench: Bench, count: int) -> dict[str, str]:
    letters = [letter["properties"] for letter in bench.vhost.dead_letters("default", count)]
    return {one["correlation_id"]: one["headers"]["x-task-reason"] for one in letters}


def _ran(bench: Bench, *ids: str) -> set[str | None]:
    return {entry.task_id for entry in bench.ledger.entries()} & set(ids)


def test_what_is_revoked_while_no_worker_runs_never_runs(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    queued, kept = bench.send(app, "note"), bench.send(app, "note")
    delayed = bench.send(app, "note", countdown=2.0)
    future = "an-id-that-is-sent-later"
    app.control.revoke(queued)
    app.control.revoke([delayed, future])
    bench.worker()
    bench.wait_done({kept})
    bench.send(app, "note", task_id=future)
    assert _reasons(bench, 3) == {queued: "revoked", delayed: "revoked", future: "revoked"}
    assert _ran(bench, queued, delayed, future) == set()


def test_revokes_are_known_to_workers_that_start_later_and_to_those_that_run(bench: Bench) -> None:
    app = bench.client()
    first = bench.worker("default", "-c", "1")
    ids = [bench.send(app, "note", countdown=4.0) for _ in range(5)]
    app.control.revoke(ids)
    wait_until(lambda: bench.vhost.management.counts(JOURNAL) is not None, 5, "the journal")
    assert first.stop() == 0
    second = bench.worker("default", "-c", "1")
    os.kill(second.leaders()[0].pid, signal.SIGKILL)
    third = bench.worker("default", "-c", "1")
    other = bench.send(app, "note")
    bench.wait_done({other})
    # A leader that is killed between the dead letter's confirm and the acknowledgement leaves it twice.
    letters = bench.vhost.management.messages
    wait_until(lambda: {one["properties"]["correlation_id"] for one in letters("default.dlq")} == set(ids), 20, "all")
    assert {one["properties"]["headers"]["x-task-reason"] for one in letters("default.dlq")} == {"revoked"}
    assert _ran(bench, *ids) == set()
    assert third.stop() == 0


def test_what_waits_in_the_worker_is_revoked_and_what_runs_goes_on(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1", "--prefetch", "10")
    gate = bench.folder / "gate"
    running = bench.send(app, "waits_for", str(gate))
    bench.wait_done({running}, event="begin")
    waiting = [bench.send(app, "note") for _ in range(3)]
    wait_until(lambda: bench.vhost.ready("default") == 0, 10, "the worker holds all")
    app.control.revoke([running, waiting[1]])
    wait_until(lambda: f"[{waiting[1]}] revoked" in worker.log, 20, "the worker has heard of it")
    gate.touch()
    bench.wait_done({running, waiting[0], waiting[2]})
    assert _reasons(bench, 1) == {waiting[1]: "revoked"}
    assert _ran(bench, waiting[1]) == set()
    line = next(line for line in worker.log.splitlines() if f"[{waiting[1]}] revoked" in line)
    assert "warning" in line


def test_a_retry_and_what_a_dead_executor_leaves_are_revoked(bench: Bench) -> None:
    app = bench.client()
    bench.worker("default", "-c", "1")
    retried = bench.send(app, "always_retries", 8.0)
    bench.wait_done({retried}, event="try")
    app.control.revoke(retried)
    assert _reasons(bench, 1) == {retried: "revoked"}
    assert len([entry for entry in bench.ledger.entries("try") if entry.task_id == retried]) == 1


def test_the_caller_hears_that_its_task_was_revoked(desk: CanvasBench) -> None:
    desk.caller()
    handle = add.apply_async((1, 2), countdown=1.0)
    handle.revoke()
    desk.worker("default", "-c", "1")
    with pytest.raises(TaskRevoked):
        handle.get(15)
    assert handle.state == "REVOKED"
    assert isinstance(handle.get(1, propagate=False), TaskRevoked)


async def test_asyncio_callers_revoke_without_blocking(desk: CanvasBench) -> None:
    app = desk.caller()
    handle = await add.aapply_async((1, 2), countdown=1.0)
    await handle.arevoke()
    await app.control.arevoke(["one", "two"])
    desk.worker("default", "-c", "1")
    with pytest.raises(TaskRevoked):
        await handle.aget(15)
    await app.aclose()


def test_a_chord_with_a_revoked_part_fails_and_names_it_and_a_chain_ends(desk: CanvasBench) -> None:
    desk.caller()
    revoked = "the-part-that-is-revoked"
    joined = chord([part.s(1), part.s(2).set(task_id=revoked), part.s(3)], body.s()).delay()
    joined.parent[1].revoke()  # type: ignore[index]
    chained = (slow.s(0.1) | add.s(1) | identity.s()).delay()
    chained.parent.revoke()  # type: ignore[union-attr]
    several = group(add.si(number, 1) for number in range(3)).delay()
    several.revoke()
    desk.worker("default", "-c", "2")
    with pytest.raises(ChordError, match=r"part 1 .*Revoked"):
        joined.get(15)
    with pytest.raises(TaskRevoked):
        chained.get(15)
    assert chained.state == "REVOKED"
    assert [one.state for one in several.results if wait_until(one.ready, 10, "ready") or True] == ["REVOKED"] * 3
    assert not [entry for entry in desk.ledger.entries() if entry.event.startswith("body")]


@pytest.mark.timing
@pytest.mark.parametrize("pool", ["process", "thread", "asyncio"])
def test_terminate_ends_what_runs(desk: CanvasBench, pool: str) -> None:
    app = desk.caller()
    desk.worker("default", "-c", "1", "-P", pool)
    handle = slow.delay(60)
    wait_until(lambda: handle.state == "STARTED", 10, "it runs")
    started = time.monotonic()
    handle.revoke(terminate=True)
    with pytest.raises(TaskRevoked):
        handle.get(10)
    assert time.monotonic() - started < 5
    assert add.delay(1, 2).get(15) == 3
    assert desk.vhost.dead_letters("default", 1)[0]["properties"]["headers"]["x-task-reason"] == "revoked"
    assert app.control is not None


def test_all_with_a_stamp_are_revoked_wherever_they_are(desk: CanvasBench) -> None:
    """One runs, one waits in the worker, others in their queue, on the ladder, in a chain; those of others run."""
    app = desk.caller()
    desk.worker("default", "-c", "1", "--prefetch", "2")
    running = slow.s(60).stamp(customer="acme", batch=7).delay()
    wait_until(lambda: running.state == "STARTED", 10, "it runs")
    waiting = [add.s(1, one).stamp(customer="acme").delay() for one in range(3)]
    delayed = add.s(1, 2).stamp(customer="acme").apply_async(countdown=1.5)
    chained = chain(add.s(1, 2), add.s(3)).stamp(customer=["umbrella", "acme"]).delay()
    others = [add.s(1, one).stamp(customer="umbrella").delay() for one in range(3)]
    app.control.revoke_by_stamped_headers({"customer": "acme"}, terminate=True)
    for one in (running, *waiting, delayed, chained):
        with pytest.raises(TaskRevoked):
            one.get(15)
    assert [one.get(15) for one in others] == [1, 2, 3]
    later = desk.worker("default", "-c", "1")
    with pytest.raises(TaskRevoked):
        add.s(1, 2).stamp(customer="acme").delay().get(15)
    assert later.stop() == 0


@pytest.mark.parametrize(
    "command",
    [
        ["celery", "control", "revoke_by_stamped_headers", "customer=acme"],
        ["amqptasks", "control", "revoke_by_stamped_headers", "customer=acme"],
        ["amqptasks", "revoke", "--stamp", "customer=acme", "--expires", "1h"],
    ],
    ids=" ".join,
)
def test_commands_revoke_by_stamps(bench: Bench, command: list[str]) -> None:
    """Celery's own, and ours; two workers hear the broadcast, and the journal keeps it for those that come later."""
    bench.settings["queues"]["other"] = {}
    app = bench.client()
    app.declare()
    workers = [bench.worker("other", "-c", "1", "-n", f"{name}@test") for name in "ab"]
    note = app.signature("integration.apps.jobs.note")
    revoked = {note.clone().stamp(customer="acme").apply_async().id for _ in range(4)}
    kept = note.clone().stamp(customer="other").apply_async().id
    done = subprocess.run(
        [sys.executable, "-m", command[0], "-b", bench.vhost.url, *command[1:]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert "customer=acme" in done.stdout
    assert [one.stop() for one in workers] == [0, 0]
    bench.worker("default", "-c", "1")
    bench.wait_done({kept})
    assert _reasons(bench, 4) == dict.fromkeys(revoked, "revoked")
    assert _ran(bench, *revoked) == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name tasks by their ids, or by --stamp NAME=VALUE"),
        (["--stamp", "customer"], "'customer' is no stamp: write name=value"),
        (["x", "--expires", "1h"], "--expires is for --stamp"),
        (["--stamp", "a=b", "--expires", "soon"], "'soon' is not a duration"),
        (["--stamp", "a=b", "--expires", "99d"], "at most revoke.expires"),
    ],
)
def test_mistakes_with_stamps_are_told_in_one_line(bench: Bench, arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "revoke", *arguments]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert words in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_command_revokes_and_tells_mistakes_in_one_line(bench: Bench) -> None:
    app = bench.client()
    task_id = bench.send(app, "note", countdown=1.5)
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "revoke"]
    done = subprocess.run([*command, task_id], capture_output=True, text=True, check=True)
    assert task_id in done.stdout
    wrong = subprocess.run([*command, task_id, "--signal", "SIGNONSENSE"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "'SIGNONSENSE' is no signal" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    bench.worker()
    assert _reasons(bench, 1) == {task_id: "revoked"}


def _journal(bench: Bench) -> tuple[Any, Any]:
    connection = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    channel = connection.channel()
    channel.confirm_delivery()
    return connection, channel


def test_strange_entries_of_the_journal_are_passed_over(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    connection, channel = _journal(bench)
    strange = [b"", b"nonsense", b"[]", b"{}", b'{"revoke": 1, "expires": 1}', b'{"revoke": [1], "expires": 9e12}',
               b'{"revoke": ["a"], "expires": "x"}', 
               b'{"revoke": ["a"], "expires": 9e12, "terminate": true, "signal": 99}',
               b'{"marker": 7}', b"\xff\xfe", b"[" * 100_000]  # fmt: skip
    for entry in strange:
        channel.basic_publish("", JOURNAL, entry)
    revoked, kept = bench.send(app, "note"), bench.send(app, "note")
    app.control.revoke(revoked)
    for entry in strange:
        channel.basic_publish("", JOURNAL, entry)
    connection.close()
    bench.worker()
    bench.wait_done({kept})
    assert _reasons(bench, 1) == {revoked: "revoked"}


def test_a_worker_without_the_journal_says_so_and_works(
    bench: Bench, restricted_user: Callable[[str, str, str], str]
) -> None:
    app = bench.client()
    app.declare()
    url = restricted_user(r"^.+\.reply\..+$", ".*", r"^(?!amqptasks\.revoked).*$")
    worker = bench.worker("default", "-c", "1", url=url)
    task_id = bench.send(app, "note")
    bench.wait_done({task_id})
    assert worker.log.count("Revokes may be missed") == 1


@pytest.mark.fault
def test_revokes_of_the_time_without_a_connection_are_read_before_the_next_task(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    before, meanwhile = (bench.send(app, "note", countdown=5.0) for _ in range(2))
    app.control.revoke(before)
    time.sleep(0.5)
    for connection in bench.vhost.management.connections():
        if "/consume" in str(connection["client_properties"].get("connection_name")):
            bench.vhost.management.close_connection(connection["name"])
    app.control.revoke(meanwhile)
    assert _reasons(bench, 2) == dict.fromkeys((before, meanwhile), "revoked")
    assert _ran(bench, before, meanwhile) == set()
    assert "Revokes may be missed" not in worker.log


@pytest.mark.fault
def test_a_journal_that_was_deleted_comes_back(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    bench.vhost.management.delete_queue(JOURNAL)
    wait_until(lambda: "Declared the topology again" in worker.log, 20, "it stands again")
    task_id = bench.send(app, "note", countdown=6.0)
    app.control.revoke(task_id)
    other = bench.worker("default", "-c", "1")
    assert _reasons(bench, 1) == {task_id: "revoked"}
    assert worker.log.count("Revokes may be missed") == 1
    assert "Revokes may be missed" not in other.log


def test_a_revoke_is_forgotten_when_its_time_is_over_and_the_newest_win(bench: Bench) -> None:
    bench.settings["revoke"] = {"expires": 1, "limit": 3}
    app = bench.client()
    app.declare()
    over = bench.send(app, "note")
    app.control.revoke(over)
    time.sleep(1.2)
    bench.settings["revoke"] = {"expires": 60, "limit": 3}
    later = AmqpTasks("later", config=bench.config)
    ids = [bench.send(app, "note", task_id=f"number-{number}") for number in range(5)]
    for task_id in ids:
        later.control.revoke(task_id)
    later.close()
    bench.worker()
    bench.wait_done({over, *ids[:2]})
    assert set(_reasons(bench, 3)) == set(ids[2:])


def test_a_hundred_thousand_revokes_cost_little_memory_and_time(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    empty = bench.worker("default", "-c", "1")
    before = psutil.Process(empty.leaders()[0].pid).memory_info().rss
    assert empty.stop() == 0
    for start in range(0, 100_000, 20_000):
        app.control.revoke(f"00000000-0000-0000-0000-{number:012}" for number in range(start, start + 20_000))
    revoked = bench.send(app, "note", task_id="00000000-0000-0000-0000-000000000007")
    kept = bench.send(app, "note")
    started = time.monotonic()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({kept})
    took = time.monotonic() - started
    grown = psutil.Process(worker.leaders()[0].pid).memory_info().rss - before
    print(f"100 000 revokes: {grown / 1e6:.0f} MB more, running after {took:.1f} s")
    assert grown < 60e6
    assert took < 20
    assert _reasons(bench, 1) == {revoked: "revoked"}


@pytest.mark.timing
@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_whatever_was_revoked_whenever_never_runs_after_all_workers_were_replaced(desk: CanvasBench, kind: str) -> None:
    """While it runs, while it waits, on the delay ladder, and with no worker there to hear it."""
    desk.settings["queues"]["default"] = {"type": kind}
    app = desk.caller()
    first = desk.worker("default", "-c", "1", "--prefetch", "2")
    running = slow.delay(60)
    wait_until(lambda: running.state == "STARTED", 10, "it runs")
    held, delayed = body.delay([1]), body.apply_async(([2],), countdown=12)
    asked = time.monotonic()
    delayed.revoke()
    held.revoke()
    running.revoke(terminate=True)
    with pytest.raises(TaskRevoked):
        running.get(10)
    assert time.monotonic() - asked < 5
    assert first.stop() == 0
    queued, later = body.delay([3]), body.apply_async(([4],), countdown=3)
    app.control.revoke([queued.id, later.id])
    # All workers are new, and one more comes.
    for _ in range(2):
        desk.worker("default", "-c", "1")
    revoked = [running, held, queued, later, delayed]
    for one in revoked:
        with pytest.raises(TaskRevoked):
            one.get(30)
    assert [one.state for one in revoked] == ["REVOKED"] * 5
    assert add.delay(1, 2).get(15) == 3
    assert _reasons(desk, 5) == dict.fromkeys((one.id for one in revoked), "revoked")
    assert _ran(desk, *(one.id for one in revoked)) == set()
