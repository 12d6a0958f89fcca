"""Chords whose workers are killed, whose parts end in every way, and whose bodies nobody takes."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from amqptasks import ChordError, Signature, Unroutable, chord
from amqptasks.protocol import jsontypes
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.apps.canvas import body, failed_id, fails, identity, on_error, part, retries
from integration.conftest import CanvasBench
from integration.seeds import VARIABLE, run_seed
from integration.store_servers import server_of

KILLS = 100
UNROUTABLE = "amqptasks.unroutable"


def seeded() -> random.Random:
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    return random.Random(seed)


@contextmanager
def killing(workers: list[WorkerProcess], dice: random.Random) -> Iterator[None]:
    """Executors and leaders of these workers die at random meanwhile."""
    stop = threading.Event()

    def havoc() -> None:
        for _ in range(KILLS):
            if stop.wait(dice.uniform(0.2, 0.6)):
                return
            worker = dice.choice(workers)
            victims = dice.choice([worker.executors, worker.leaders])()
            if victims:
                try:
                    dice.choice(victims).send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue

    killer = threading.Thread(target=havoc)
    killer.start()
    try:
        yield
    finally:
        stop.set()
        killer.join()


def replace_one(desk: CanvasBench, workers: list[WorkerProcess]) -> None:
    """A whole worker dies, and another begins."""
    workers[0].kill()
    workers[0] = desk.worker("default", "-c", "2")


@pytest.mark.fault
@pytest.mark.timeout(240)
def test_two_hundred_chords_complete_while_workers_are_killed(desk: CanvasBench) -> None:
    """Executors, leaders and whole workers die at random; each body gets each part exactly once."""
    dice = seeded()
    desk.caller()
    workers = [desk.worker("default", "-c", "2") for _ in range(2)]
    with killing(workers, dice):
        handles = [chord([part.s(number, 0.05) for number in range(20)], body.s()).delay() for _ in range(200)]
        replace_one(desk, workers)
        assert [handle.get(180) for handle in handles] == [20] * 200
    bodies = [entry for entry in desk.ledger.entries() if entry.event.startswith("body")]
    assert {entry.event for entry in bodies} == {"body " + ",".join(map(str, range(20)))}
    ran = Counter(entry.task_id for entry in bodies)
    assert set(ran) == {handle.id for handle in handles}
    desk.vhost.wait_settled("default", 30)
    desk.wait_joined(200, again=KILLS)
    print(f"bodies that ran more than once: {sum(count > 1 for count in ran.values())} of 200")


def moved(desk: CanvasBench) -> dict[str, Any]:
    """What the broker has counted of each queue: published, delivered, acknowledged, asked for."""
    return {
        name: {what: count for what, count in queue.get("message_stats", {}).items() if isinstance(count, int)}
        for name, queue in desk.vhost.management.queues().items()
    }


def wait_still(desk: CanvasBench) -> None:
    """Wait until no message moves for five seconds, though workers and a client run."""

    def still() -> bool:
        before = moved(desk)
        time.sleep(5.0)
        return moved(desk) == before

    wait_until(still, 30, lambda: f"nothing moves any more: {moved(desk)}")


@pytest.mark.fault
@pytest.mark.timeout(240)
def test_chords_of_500_parts_end_once_each_way_though_workers_are_killed_and_then_nothing_moves(
    desk: CanvasBench,
) -> None:
    """The last part of each runs when nobody is killed any more: until then, no part and no joiner is safe."""
    dice = seeded()
    desk.settings["queues"]["late"] = {}
    desk.caller()
    workers = [desk.worker("default", "-c", "2") for _ in range(2)]

    def sent(last: Signature) -> Any:
        header = [*(part.s(number, 0.02) for number in range(499)), last.set(queue="late")]
        return chord(header, body.s().on_error(on_error.s())).delay()

    ends = sent(part.s(499))
    broken = {sent(fails.s()): "Declined", sent(retries.s()): "twice", (revoked := sent(part.s(499))): "revoked"}
    with killing(workers, dice):
        replace_one(desk, workers)
        desk.vhost.wait_settled("default", 120)
    revoked.parent.results[-1].revoke()
    assert not [one for one in desk.ledger.entries() if one.event.startswith(("body", "on_error"))]
    desk.worker("late", "-c", "2")
    assert ends.get(60) == 500
    for handle, words in broken.items():
        with pytest.raises(ChordError, match=words):
            handle.get(60)
        assert handle.state == "FAILURE"

    def events(handle: Any) -> list[str]:
        return [one.event for one in desk.ledger.entries() if one.task_id == handle.id]

    wait_until(lambda: all(map(events, broken)), 20, "all errbacks ran")
    wait_still(desk)
    # Of a killed worker the last counts are missing.
    assert moved(desk)["default"]["ack"] >= 499, "what is looked at tells what moves"
    assert events(ends) == ["body " + ",".join(map(str, range(500)))]
    for handle, words in broken.items():
        (told,) = events(handle)
        assert told.startswith("on_error ChordError")
        assert words in told
    desk.wait_joined(4, again=KILLS)


@pytest.mark.parametrize("backend", ["rpc", "redis"])
def test_a_body_whose_queue_nobody_declares_fails_its_chord_and_is_kept_with_its_parts_results(
    desk: CanvasBench, backend: str
) -> None:
    desk.settings["result"] = {"backend": "rpc://" if backend == "rpc" else server_of("redis").url}
    app = desk.caller()
    worker = desk.worker("default", "-c", "2")
    lost = chord([part.s(number) for number in range(3)], body.s().set(queue="nowhere").on_error(failed_id.s())).delay()
    foreign = chord([part.s(7)], app.signature("of.another.app", queue="nowhere")).delay()
    failed = chord([fails.s(), part.s(1)], body.s().set(queue="nowhere")).delay()
    for handle, words in ((lost, "no queue takes .*nowhere"), (foreign, "nowhere"), (failed, "Declined")):
        with pytest.raises(ChordError, match=words):
            handle.get(40)
        assert handle.state == "FAILURE"
    wait_until(lambda: desk.ledger.ids("failed_id") == {lost.id}, 10, "the errback ran")
    assert "no queue takes" in worker.log
    desk.vhost.wait_settled("default")
    kept = {one["properties"]["correlation_id"]: one for one in desk.vhost.management.messages(UNROUTABLE)}
    assert set(kept) == {lost.id, foreign.id}
    headers = kept[lost.id]["properties"]["headers"]
    assert (headers["x-task-exception"], headers["x-task-reason"]) == ("Unroutable", "failed")
    assert jsontypes.loads(kept[lost.id]["payload"].encode())[0] == [[0, 1, 2]]
    assert len(desk.vhost.dead_letters("default", 1)) == 1, "of the part that failed, and of nothing else"
    desk.wait_joined(3)


def test_a_body_that_was_kept_runs_when_its_queue_is_there_and_it_is_replayed(desk: CanvasBench) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    handle = chord([part.s(number) for number in range(3)], body.s().set(queue="nowhere")).delay()
    with pytest.raises(ChordError):
        handle.get(40)
    desk.settings["queues"]["nowhere"] = {}
    operator = desk.client()
    operator.declare()
    assert operator.dead_letters.replay(queues=[UNROUTABLE]).moved == 1
    desk.worker("nowhere", "-c", "1")
    wait_until(lambda: desk.ledger.ids("body 0,1,2") == {handle.id}, 20, "it runs")


@pytest.mark.parametrize("bad", [{"x": "y" * 200_000}, {"x" * 300: "y"}], ids=["frame", "name"])
def test_a_body_that_amqp_cannot_carry_fails_its_chord(desk: CanvasBench, bad: dict[str, str]) -> None:
    desk.caller()
    desk.worker("default", "-c", "2")
    handle = chord([part.s(number) for number in range(3)], body.s().set(headers=bad)).delay()
    with pytest.raises(ChordError, match="its body cannot be sent"):
        handle.get(20)
    assert chord([part.s(number) for number in range(3)], body.s()).delay().get(20) == 3
    desk.wait_joined(2)


@pytest.mark.parametrize("backend", ["rpc", "redis"])
def test_what_follows_later_in_a_queue_that_is_not_there_fails_now(desk: CanvasBench, backend: str) -> None:
    """The delay ladder takes every message: nobody who waits would hear of it afterwards."""
    desk.settings["result"] = {"backend": "rpc://" if backend == "rpc" else server_of("redis").url}
    app = desk.caller()
    desk.worker("default", "-c", "2")
    away = {"queue": "nowhere", "countdown": 3600}
    lost = chord([part.s(number) for number in range(3)], body.s().set(**away).on_error(failed_id.s())).delay()
    following = (part.s(1) | identity.s().set(**away)).delay()
    for handle, error in ((lost, ChordError), (following, Unroutable)):
        with pytest.raises(error, match=r"no queue takes .*nowhere"):
            handle.get(40)
    wait_until(lambda: desk.ledger.ids("failed_id") == {lost.id}, 10, "the errback ran")
    desk.vhost.wait_settled("default")
    (kept,) = desk.vhost.management.messages(UNROUTABLE)
    assert kept["properties"]["correlation_id"] == lost.id
    assert jsontypes.loads(kept["payload"].encode())[0] == [[0, 1, 2]]
    assert len(desk.vhost.dead_letters("default", 1)) == 1, "the task whose following could not be sent"
    # And what is there, though this worker's settings do not name it, is sent.
    desk.settings["queues"]["elsewhere"] = {}
    desk.client().declare()
    before = time.monotonic()
    later = chord([part.s(0)], app.signature(identity.name).set(queue="elsewhere", countdown=2)).delay()
    wait_until(lambda: desk.vhost.ready("elsewhere") == 1, 20, "it has come")
    assert time.monotonic() - before >= 2
    assert later.state == "PENDING"
    desk.wait_joined(2)
