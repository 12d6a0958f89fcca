"""Compositions on real workers: what follows a task follows it, whatever breaks."""

from __future__ import annotations

import time
from typing import Any

import pika
import pytest

from amqptasks import AsyncResult, ChordError, ResultTimeout, Signature, chain, chord, group
from amqptasks.message import Envelope
from amqptasks.protocol import jsontypes
from amqptasks.results import GroupResult
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.apps.canvas import (
    Declined,
    add,
    body,
    counted,
    failed_id,
    fails,
    grows,
    identity,
    ignored,
    killed,
    on_error,
    on_error_by_id,
    part,
    retries,
    seen,
    slow,
    spreads,
    total,
)
from integration.conftest import JOINS, CanvasBench
from integration.store_servers import server_of


@pytest.fixture
def running(desk: CanvasBench) -> CanvasBench:
    """A bench whose worker runs."""
    desk.caller()
    desk.worker("default", "-c", "2")
    return desk


def parts(count: int) -> list[Signature]:
    return [part.s(number) for number in range(count)]


COMPOSITIONS: dict[str, tuple[Signature, Any]] = {
    "chain": (add.s(1, 2) | add.s(3) | add.s(4), 10),
    "immutable in a chain": (add.s(1, 2) | add.si(3, 4), 7),
    "group": (group(add.s(number, 1) for number in range(5)), [1, 2, 3, 4, 5]),
    "chord": (chord(parts(10), total.s()), 45),
    "group, then a task": (group(parts(10)) | total.s() | add.s(5), 50),
    "chord in a chain": (add.s(1, 1) | chord([add.s(1), add.s(2)], total.s()) | add.s(10), 17),
    "chain of groups": (group(parts(3)) | group(total.s(), identity.s()), [3, [0, 1, 2]]),
    "chain in a chord": (chord([add.s(1, 1) | add.s(1), add.s(2, 2)], total.s()), 7),
    "chord of chords": (chord([chord(parts(3), total.s()), chord(parts(4), total.s())], total.s()), 9),
    "group at the end of a part": (
        chord([identity.s(42) | group(identity.s(), identity.s())], identity.s()),
        [[42, 42]],
    ),
    "groups in groups": (group(add.si(1, 10), group(add.si(1, 100), group(add.si(1, 1000)))), [11, 101, 1001]),
    "group in a chain in a group in a chain": (
        chain(
            add.si(1, 0),
            group(add.si(1, 100), chain(add.si(1, 200), group(add.si(1, 1000), add.si(1, 2000)))),
            add.si(1, 10),
        ),
        11,
    ),
    "body that is a chain": (chord(parts(4), total.s() | add.s(1) | add.s(1)), 8),
    "body that is a group": (chord(parts(4), group(total.s(), identity.s())), [6, [0, 1, 2, 3]]),
    "body that is a chord": (chord(parts(4), chord([total.s(), total.s()], total.s())), 12),
    "nobody in the header": (chord([], total.s()), 0),
    "map": (identity.map([1, 2]), [1, 2]),
    "starmap, then a task": (add.starmap([(1, 2), (3, 4)]) | total.s(), 10),
    "chunks": (add.chunks([(number, number) for number in range(5)], 2), [[0, 2], [4, 6], [8]]),
    "chunks, then a task": (add.chunks([(1, 1), (2, 2), (3, 3)], 2) | identity.s(), [[2, 4], [6]]),
    "replaced": (grows.s(5), 16),
    "replaced in a chain": (grows.s(5) | add.s(100), 116),
    "replaced in a chord": (chord([grows.s(5), grows.s(6)], total.s()), 33),
    "replaced by a group in a chain": (spreads.s(3) | total.s(), 3),
}


@pytest.mark.parametrize("backend", ["rpc", "redis", "sqlite"])
def test_every_kind_of_composition_gives_its_value(desk: CanvasBench, backend: str) -> None:
    stores = {"rpc": lambda: "rpc://", "redis": lambda: server_of("redis").url}
    desk.settings["result"] = {"backend": stores.get(backend, lambda: f"sqlite:///{desk.folder}/results.db")()}
    desk.caller()
    desk.worker("default", "-c", "2")
    sent = {name: (made.delay(), value) for name, (made, value) in COMPOSITIONS.items()}
    assert {name: handle.get(20) for name, (handle, _) in sent.items()} == {
        name: value for name, (_, value) in sent.items()
    }
    desk.wait_joined(19)


def test_handles_know_their_parents_and_children(running: CanvasBench) -> None:
    last = (add.s(1, 2) | add.s(3) | add.s(4)).delay()
    assert last.get(10) == 10
    assert last.parent is not None
    assert last.parent.parent is not None
    assert [last.parent.get(1), last.parent.parent.get(1), last.parent.parent.parent] == [6, 3, None]
    assert last.parent.children == [last]
    joined = (group(parts(3)) | total.s()).delay()
    assert joined.get(10) == 3
    assert isinstance(joined.parent, GroupResult)
    assert joined.parent.get(1) == [0, 1, 2]
    assert joined.parent.completed_count() == 3


def test_callbacks_get_the_result_and_errbacks_the_error(running: CanvasBench) -> None:
    linked = add.apply_async((1, 2), link=[seen.s(), add.s(10)])
    assert linked.get(10) == 3
    wait_until(lambda: any(e.event == "seen 3" for e in running.ledger.entries()), 10, "the callback ran")
    assert len(linked.children) == 2
    failed = fails.apply_async(link_error=[on_error.s(), on_error_by_id.s(), failed_id.s()])
    with pytest.raises(Declined):
        failed.get(10)

    def events() -> set[str]:
        return {entry.event for entry in running.ledger.entries() if entry.task_id == failed.id}

    error = "Declined('always', 7)"
    wait_until(lambda: len(events()) == 3, 10, lambda: f"all errbacks ran: {events()}")
    assert events() == {f"on_error {error}", f"on_error_by_id {error}", "failed_id"}
    retried = retries.s().on_error(on_error.s()).delay()
    with pytest.raises(Declined, match="twice"):
        retried.get(10)
    assert len([entry for entry in running.ledger.entries() if entry.task_id == retried.id]) == 1


def test_a_failure_ends_everything_that_waits_for_it(running: CanvasBench) -> None:
    last = chain(add.s(1, 2), fails.s(), add.s(1), add.s(2)).delay()
    with pytest.raises(Declined):
        last.get(10)
    assert (last.state, last.parent and last.parent.state) == ("FAILURE", "FAILURE")
    whole = chord([part.s(1), fails.s(), part.s(2)], total.s().on_error(on_error.s())) | add.s(1)
    handle = whole.delay()
    with pytest.raises(ChordError, match=r"part 1 of the chord, task .*Declined\('always', 7\)"):
        handle.get(10)
    wait_until(lambda: [e for e in running.ledger.entries() if e.event.startswith("on_error ChordError")], 10, "told")
    outer = chord([chord([fails.s(), part.s(1)], total.s()), part.s(2)], total.s()).delay()
    with pytest.raises(ChordError):
        outer.get(10)
    running.wait_joined(3)
    letters = running.vhost.dead_letters("default", 3)
    assert all(one["properties"]["headers"]["task"].endswith(".fails") for one in letters)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (retries.s(), "twice"),
        (killed.s(), "SIGKILL"),
        (part.s(1).set(expires=0.0001), "expired"),
        (ignored.s(), "raised Ignore"),
        (Signature("nobody"), "nobody"),
        (identity.s(1) | fails.s() | add.s(1), "Declined"),
    ],
    ids=["retries", "killed", "expired", "ignored", "unknown", "chain"],
)
def test_a_part_that_does_not_succeed_fails_its_chord_and_says_why(
    running: CanvasBench, member: Signature, words: str
) -> None:
    handle = chord([part.s(0), member, part.s(2)], body.s()).delay()
    with pytest.raises(ChordError, match=words):
        handle.get(20)
    running.wait_joined(1)
    assert not [entry for entry in running.ledger.entries() if entry.event.startswith("body")]


@pytest.mark.parametrize("count", [10, 100, 5000])
def test_chords_of_many_parts_complete(running: CanvasBench, count: int) -> None:
    handle = chord(parts(count), body.s()).delay()
    assert handle.get(60) == count
    (entry,) = [entry for entry in running.ledger.entries() if entry.event.startswith("body")]
    assert entry.event == "body " + ",".join(map(str, range(count)))
    running.wait_joined(1)


def test_a_duplicate_part_counts_once(running: CanvasBench) -> None:
    """A task may run again after its part was published: its process died before the ack."""
    handle = chord([part.s(0), part.s(1), slow.si(1.5)], body.s()).delay()
    app = running.client()
    group_id = handle.parent.id
    options = {"task_id": handle.id, "reply_to": canvas.app.client._publisher.reply_queue}
    table = {"task": body.name, "options": options, "chord_size": 3, "join": group_id}
    for index in (0, 1, 1, 0):
        again = {"group": group_id, "index": index, "task_id": "x", "state": "SUCCESS", "result": index, "chord": table}
        publisher = app.client._publisher
        publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(again)))
    assert handle.get(10) == 3
    for late in (0, 2):
        again = {"group": group_id, "index": late, "task_id": "x", "state": "SUCCESS", "result": 9, "chord": table}
        publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(again)))
    publisher.publish(Envelope("amqptasks", JOINS, b"nonsense"))
    running.wait_joined(1)
    bodies = [entry.event for entry in running.ledger.entries() if entry.event.startswith("body")]
    assert bodies == ["body 0,1,1.5"]


def test_a_part_that_comes_again_after_its_chord_was_done_is_dropped_by_the_next_joiner(desk: CanvasBench) -> None:
    """The joiner that knew the chord is gone; what it knew is in the queue."""
    app = desk.caller()
    first = desk.worker("default", "-c", "1")
    table = {"task": body.name, "options": {"task_id": "the-body"}, "chord_size": 2, "join": "g"}

    def send(index: int) -> None:
        one = {"group": "g", "index": index, "task_id": "t", "state": "SUCCESS", "result": index, "chord": table}
        app.client._publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(one)))

    send(0)
    send(1)
    wait_until(desk.ledger.entries, 10, "the body ran")
    time.sleep(1)  # figures of queues are half a second old
    wait_until(lambda: sum(desk.vhost.management.counts(JOINS)) == 1, 10, "only the marker is left", pause=0.1)
    first.kill()
    send(0)
    desk.worker("default", "-c", "1")
    desk.wait_joined(1)
    assert [entry.task_id for entry in desk.ledger.entries()] == ["the-body"]


def test_parts_are_bundled_before_a_consumer_holds_too_many(running: CanvasBench) -> None:
    """25 000 parts: more than the worker keeps as single messages. The bound is AMQP's, 65 535 unacknowledged."""
    management = running.vhost.management
    most = 0
    handle = chord([part.s(0).set(countdown=12), *parts(24_999)], body.s()).delay()
    until = time.monotonic() + 11
    while time.monotonic() < until:
        most = max(most, management.counts(JOINS)[1])
        time.sleep(0.2)
    assert most <= 21_500
    assert handle.get(60) == 25_000
    running.wait_joined(1)


def test_a_chord_that_never_completes_fails_when_its_time_is_over(desk: CanvasBench) -> None:
    desk.settings["result"] = {"expires": 3}
    desk.settings["queues"]["nobody"] = {}
    desk.caller()
    desk.worker("default", "-c", "2")
    handle = chord([part.s(0), part.s(1).set(queue="nobody")], body.s()).delay()
    with pytest.raises(ChordError, match="1 of 2 parts came within 3 s"):
        handle.get(20)
    desk.vhost.wait_settled(JOINS)


def join_messages(desk: CanvasBench, messages: int) -> list[dict[str, Any]]:
    """What is in the queue of parts, while nobody consumes it."""
    found: list[dict[str, Any]] = []
    with pika.BlockingConnection(pika.URLParameters(desk.vhost.url)) as connection:
        channel = connection.channel()
        for _, _, content in channel.consume(JOINS, inactivity_timeout=10):
            assert content is not None, f"{len(found)} of {messages} messages"
            found.append(jsontypes.loads(content))
            if len(found) == messages:
                break
        channel.cancel()
    return found


def test_the_age_of_a_chord_is_that_of_its_oldest_part_whoever_joins_it(desk: CanvasBench) -> None:
    """A joiner that starts anew, or another one, does not begin to count anew."""
    desk.settings["result"] = {"expires": 600}
    desk.settings["queues"]["nobody"] = {}
    app = desk.caller()
    worker = desk.worker("default", "-c", "1")
    before = time.time()
    handle = chord([part.s(0), part.s(1).set(queue="nobody")], body.s()).delay()
    wait_until(lambda: desk.vhost.unacked(JOINS) == 1, 20, "the joiner has a part")
    worker.kill()
    (table,) = join_messages(desk, 1)
    assert before - 1 < table["time"] < time.time() + 1

    old = time.time() - 601
    options = {"task_id": "x", "link_error": [on_error.s().to_dict()]}
    chord_of_two = {"task": body.name, "options": options, "chord_size": 2, "join": "g"}
    bundle = {"chord": chord_of_two, "failure": None, "parts": [[0, 1]], "time": old}
    publisher = app.client._publisher
    for one in ({**table, "time": old}, {"chords": {"g": bundle}}, {**table, "time": "nonsense"}):
        publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(one)))
    desk.worker("default", "-c", "1")
    with pytest.raises(ChordError, match="1 of 2 parts came within 600 s"):
        handle.get(30)
    wait_until(lambda: "x" in {one.task_id for one in desk.ledger.entries()}, 20, "the bundled one has failed too")


def test_a_failed_chords_errback_runs_once_whoever_joins_it_next(desk: CanvasBench) -> None:
    """Its other parts are outstanding, for long."""
    desk.settings["queues"]["nobody"] = {}
    desk.caller()
    first = desk.worker("default", "-c", "1")
    header = [fails.s(), part.s(1).set(queue="nobody")]
    handle = chord(header, body.s().on_error(on_error.s())).delay()
    with pytest.raises(ChordError):
        handle.get(20)
    time.sleep(1)  # figures of queues are half a second old
    wait_until(lambda: desk.vhost.management.counts(JOINS) == (0, 1), 20, "a marker is left", pause=0.1)
    first.kill()
    for number in range(2):
        joiner = desk.worker("default", "-c", "1")
        assert chord([part.s(0)], body.s()).delay().get(20) == 1
        if number == 0:
            joiner.kill()
    desk.worker("nobody", "-c", "1")
    desk.vhost.wait_settled("nobody")
    assert len([one for one in desk.ledger.entries() if one.event.startswith("on_error ChordError")]) == 1
    # One that was killed as it acknowledged leaves its marker twice.
    desk.wait_joined(3, again=1)


def test_a_body_goes_where_its_callers_settings_say_whoever_joins_it(desk: CanvasBench) -> None:
    """The active joiner may be a worker of another application, with other settings."""
    desk.settings["queues"]["bodies"] = {}
    desk.settings["routes"] = [{"match": "*.body", "queue": "bodies", "priority": 3}]
    desk.caller()
    (handle, chained) = (chord(parts(3), body.s()).delay(), (add.si(1, 1) | chord(parts(2), body.s())).delay())
    desk.settings.update(queues={"default": {}}, routes=[])
    desk.worker("default", "-c", "1")
    wait_until(lambda: desk.vhost.ready("bodies") == 2, 20, "both bodies are in their queue")
    desk.settings.update(queues={"bodies": {}})
    desk.worker("bodies", "-c", "1")
    assert (handle.get(20), chained.get(20)) == (3, 2)


def test_who_waits_for_a_body_that_cannot_be_made_is_told_when_its_time_is_over(desk: CanvasBench) -> None:
    desk.settings["result"] = {"expires": 3}
    app = desk.caller()
    assert add.delay(1, 1) is not None  # the reply queue is there
    task_id = "never-made"
    slot = app.client._inbox.expect(task_id)
    options = {"task_id": task_id, "reply_to": app.client._publisher.reply_queue, "serializer": "of-another-version"}
    table = {"task": body.name, "options": options, "chord_size": 1}
    one = {"group": "g", "index": 0, "task_id": "t", "state": "SUCCESS", "result": 1, "chord": table}
    app.client._publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(one)))
    desk.worker("default", "-c", "1")
    with pytest.raises(ChordError, match="of-another-version"):
        AsyncResult(task_id, app.results).get(30)
    assert slot is not None
    desk.vhost.wait_settled(JOINS, 30)


def test_a_body_that_is_no_signature_is_told_and_dropped_when_its_time_is_over(desk: CanvasBench) -> None:
    desk.settings["result"] = {"expires": 3}
    app = desk.caller()
    worker = desk.worker("default", "-c", "2")
    for number, table in enumerate(({"task": 5, "chord_size": 1}, {"task": "x", "args": 7, "chord_size": 1}, "text")):
        one = {"group": f"g{number}", "index": 0, "task_id": "t", "state": "SUCCESS", "result": 1, "chord": table}
        app.client._publisher.publish(Envelope("amqptasks", JOINS, jsontypes.dumps(one)))
    assert chord(parts(3), body.s()).delay().get(10) == 3
    wait_until(lambda: "cannot be sent; its parts wait" in worker.log, 10, "the worker says so")
    desk.vhost.wait_settled(JOINS, 30)


def test_a_redelivered_task_sends_what_follows_under_the_same_ids(desk: CanvasBench) -> None:
    """A follow-up that is published twice has one id, so that whoever counts can tell."""
    desk.caller()
    first = desk.worker("default", "-c", "1")
    handle = (slow.si(1.0) | counted.si()).delay()
    wait_until(lambda: desk.vhost.ready("default") == 0, 5, "it runs")
    first.kill()
    desk.worker("default", "-c", "1")
    assert handle.get(20) == 1
    assert {entry.task_id for entry in desk.ledger.entries() if entry.event == "counted"} == {handle.id}


async def test_asyncio_callers_compose_too(running: CanvasBench) -> None:
    handle = await (group(parts(5)) | total.s()).adelay()
    assert await handle.aget(10) == 10
    with pytest.raises(ResultTimeout):
        await (await slow.s(5.0).adelay()).aget(0.1)
