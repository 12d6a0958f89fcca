"""Replies to a process: each finds who waits, and what nobody waits for does not pile up."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

import pytest

from amqptasks import (
    AmqpTasks,
    AsyncResult,
    GroupResult,
    ResultSet,
    ResultTimeout,
    ResultUnavailable,
    chord,
    group,
)
from amqptasks.protocol.results import ResultMeta
from amqptasks.request import Request, reset_current, set_current
from amqptasks.results.inbox import ReplyInbox


@pytest.fixture
def inbox() -> ReplyInbox:
    return ReplyInbox()


@pytest.fixture
def eager() -> AmqpTasks:
    app = AmqpTasks("inbox", config={"testing": {"always_eager": True}})

    @app.task(name="twice")
    def twice(number: int) -> int:
        return 2 * number

    @app.task(name="count")
    def count(values: list[int]) -> int:
        return len(values)

    return app


def sent(inbox: ReplyInbox, task_id: str = "a") -> AsyncResult[int]:
    inbox.expect(task_id)
    return AsyncResult(task_id, inbox)


def later(seconds: float, what) -> None:
    threading.Timer(seconds, what).start()


def done(task_id: str = "a", value: object = 1, status: str = "SUCCESS") -> ResultMeta:
    return ResultMeta(task_id, status, value)


def test_a_result_is_read_as_often_as_one_likes_in_any_order(inbox):
    first, second = sent(inbox, "a"), sent(inbox, "b")
    inbox.receive(done("b", 2), 9)
    later(0.05, lambda: inbox.receive(done("a", 1), 9))
    assert (second.get(1), first.get(1), second.get(0), first.get(0)) == (2, 1, 2, 1)
    assert (first.state, first.ready(), first.successful(), first.failed()) == ("SUCCESS", True, True, False)


@pytest.mark.timing
def test_waiting_ends_in_time(inbox):
    waiting = sent(inbox)
    started = time.monotonic()
    with pytest.raises(ResultTimeout, match=r"task a has no result after 0.1 s") as caught:
        waiting.get(timeout=0.1)
    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - started < 0.5
    with pytest.raises(ResultTimeout):
        asyncio.run(waiting.aget(timeout=0.05))


def test_a_state_on_the_way_is_seen_and_a_final_one_stays(inbox):
    waiting = sent(inbox)
    assert (waiting.state, waiting.info) == ("PENDING", None)
    inbox.receive(done(status="PROGRESS", value={"done": 3}), 9)
    assert (waiting.state, waiting.info) == ("PROGRESS", {"done": 3})
    inbox.receive(done(value=7), 9)
    inbox.receive(done(status="FAILURE", value=ValueError("a duplicate")), 9)
    inbox.receive(done(status="PROGRESS", value=None), 9)
    assert waiting.get(0) == 7


def test_a_failure_is_raised_with_the_remote_traceback(inbox):
    failed = sent(inbox)
    inbox.receive(ResultMeta("a", "FAILURE", KeyError("k"), "Traceback of the task"), 9)
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            failed.get(1)
        assert "Traceback of the task" in str(caught.value.__cause__)
    assert isinstance(failed.get(propagate=False), KeyError)
    assert failed.traceback == "Traceback of the task"


def test_get_takes_its_arguments_by_position_as_celerys(inbox):
    failed = sent(inbox)
    inbox.receive(ResultMeta("a", "FAILURE", KeyError("k")), 9)
    assert isinstance(failed.get(1, False), KeyError)
    assert isinstance(failed.get(1, False, 0.1), KeyError)
    for several in (ResultSet([failed]), GroupResult("g", [failed])):
        (error,) = several.get(1, False, 0.1)
        assert isinstance(error, KeyError)


def test_a_group_that_is_late_says_it_as_a_task_does(inbox):
    inbox.receive(done(), 9)
    group_of_two = GroupResult("g", [sent(inbox, "a"), sent(inbox, "b")])
    inbox.receive(done("a"), 9)
    for timeout in (0, 0.05):
        with pytest.raises(ResultTimeout, match="task b has no result"):
            asyncio.run(group_of_two.aget(timeout))
    inbox.receive(done("b"), 9)
    assert asyncio.run(group_of_two.aget(0)) == [1, 1]


def test_who_no_longer_waits_leaves_no_listener(inbox):
    waiting = sent(inbox)

    async def impatient() -> None:
        for number in range(50):
            asking = asyncio.create_task(waiting.aget(5))
            for _ in range(number % 5):  # before the thread has begun to listen, meanwhile, and after
                await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(impatient())
    assert inbox._find("a").listeners == []


@pytest.mark.timing
def test_the_time_of_aget_holds_while_the_store_is_asked():
    class Slow(ReplyInbox):
        """It takes a second to listen, as a store that is away does."""

        def listen(self, task_ids, listener):
            time.sleep(1)
            return super().listen(task_ids, listener)

    slow = Slow()
    waiting = sent(slow)

    async def ask() -> float:
        started = time.monotonic()
        with pytest.raises(ResultTimeout):
            await waiting.aget(0.1)
        return time.monotonic() - started

    assert asyncio.run(ask()) < 0.8
    assert slow._find("a").listeners == []


def test_an_id_that_was_not_sent_from_here_is_told_at_once(inbox):
    for ask in (lambda r: r.get(), lambda r: r.state, lambda r: r.ready()):
        with pytest.raises(ResultUnavailable, match="sends results to the process that called"):
            ask(AsyncResult("stranger", inbox))


def test_a_handle_made_from_an_id_finds_what_was_sent_from_here(inbox):
    inbox.expect("a")
    inbox.receive(done(), 9)
    gc.collect()
    assert AsyncResult("a", inbox).get(0) == 1


def test_what_nobody_holds_does_not_pile_up(inbox):
    held = sent(inbox, "held")
    for number in range(30_000):
        inbox.expect(str(number))
        if number % 2:
            inbox.receive(done(str(number)), 9)
    inbox.receive(done("held", 5), 9)
    gc.collect()
    assert len(inbox._pending) <= 10_000
    assert len(inbox._ready) <= 1_000
    assert len(inbox._held) <= 1
    assert held.get(0) == 5


def test_results_that_nobody_holds_are_bounded_in_bytes_too(inbox):
    mebibyte = 1024 * 1024
    held = sent(inbox, "held")
    inbox.receive(done("held", 5), 40 * mebibyte)
    for number in range(100):
        inbox.expect(str(number))
        inbox.receive(done(str(number)), 10 * mebibyte)
        inbox.receive(done(str(number)), 10 * mebibyte)
    assert list(inbox._ready) == [str(number) for number in range(94, 100)]
    assert held.get(0) == 5
    inbox.expect("huge")
    inbox.receive(done("huge", 6), 100 * mebibyte)
    assert list(inbox._ready) == ["huge"]
    assert AsyncResult("huge", inbox).get(0) == 6
    inbox.forget(["huge"])
    for task_id in "abc":
        inbox.expect(task_id)
        inbox.receive(done(task_id), 30 * mebibyte)
    assert list(inbox._ready) == ["b", "c"], "what was forgotten does not count"


def test_states_that_nobody_holds_are_bounded_in_bytes_and_their_results_still_come(inbox):
    mebibyte = 1024 * 1024
    held = sent(inbox, "held")
    inbox.receive(done("held", 5, "PROGRESS"), 40 * mebibyte)
    inbox.expect("silent")
    for number in range(100):
        inbox.expect(str(number))
        for value in (1, 2):
            inbox.receive(done(str(number), value, "PROGRESS"), 10 * mebibyte)
    with_state = [one for one in inbox._pending if AsyncResult(one, inbox).state == "PROGRESS"]
    assert with_state == [str(number) for number in range(94, 100)]
    assert held.info == 5
    assert inbox._stated_bytes == 60 * mebibyte
    for task_id in ("silent", "3", "held", *with_state):
        inbox.receive(done(task_id, 7), 9)
        assert AsyncResult(task_id, inbox).get(0) == 7
    assert (inbox._stated_bytes, len(inbox._stated)) == (0, 0)


def test_a_state_that_was_forgotten_still_says_that_its_result_cannot_come(inbox):
    inbox.expect("old")
    inbox.receive(done("old", 1, "PROGRESS"), 40 * 1024 * 1024)
    inbox.gone("the reply queue was deleted", for_ever=False)
    inbox.expect("new")
    inbox.receive(done("new", 1, "PROGRESS"), 40 * 1024 * 1024)
    assert list(inbox._stated) == ["new"]
    with pytest.raises(ResultUnavailable, match="the reply queue was deleted"):
        AsyncResult("old", inbox).get(0)


def test_more_calls_at_once_than_are_kept_each_have_their_result(eager):
    """Ids are given, and slots made, before the first handle is."""
    count = 10_100
    for handles in (
        eager.send_many([eager.signature("twice", (number,)) for number in range(count)]),
        group(eager.signature("twice", (number,)) for number in range(count)).delay().results,
        chord([eager.signature("twice", (number,)) for number in range(count)], eager.signature("count"))
        .delay()
        .parent,
    ):
        assert [one.get(0) for one in handles] == [2 * number for number in range(count)]


def test_who_waits_is_told_when_nothing_can_come(inbox):
    waiting = sent(inbox)
    later(0.05, lambda: inbox.gone("the queue expired", False))
    with pytest.raises(ResultUnavailable, match="the queue expired"):
        waiting.get(5)
    with pytest.raises(ResultUnavailable, match="the queue expired"):
        asyncio.run(waiting.aget(5))
    assert sent(inbox, "next").state == "PENDING"
    inbox.gone("access refused", True)
    with pytest.raises(ResultUnavailable, match="access refused"):
        sent(inbox, "third").get(5)


def test_when_the_reply_queue_has_moved_only_what_was_confirmed_before_is_lost(inbox):
    early, late = sent(inbox, "early"), sent(inbox, "late")
    inbox.give_up("its node is down", {"late"})
    with pytest.raises(ResultUnavailable, match="its node is down"):
        early.get(5)
    inbox.receive(done("late", 7), 9)
    assert late.get(1) == 7


def test_a_forked_child_is_told_that_the_parent_gets_the_replies(inbox):
    waiting = sent(inbox)
    child = os.fork()
    if child == 0:
        try:
            waiting.get(5)
        except ResultUnavailable as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    inbox.receive(done(), 9)
    assert waiting.get(0) == 1


def test_groups_give_values_in_order_and_as_they_come(inbox):
    results = [sent(inbox, name) for name in "abc"]
    group = GroupResult("g", results)
    inbox.receive(done("c", 3), 9)
    assert (group.completed_count(), group.ready(), group.waiting(), len(group)) == (1, False, True, 3)
    coming = group.iter(timeout=5)
    assert next(coming) == (results[2], 3)
    later(0.05, lambda: [inbox.receive(done("b", 2), 9), inbox.receive(done("a", 1), 9)])
    assert [value for _, value in coming] == [2, 1]
    assert group.get(1) == group.join(1) == asyncio.run(group.aget(1)) == [1, 2, 3]
    assert group.successful()
    with pytest.raises(ResultTimeout, match="task d has"):
        list(ResultSet([sent(inbox, "d")]).iter(timeout=0.05))
    with pytest.raises(ResultUnavailable, match="keeps no groups"):
        group.save()


def test_forgetting_drops_it(inbox):
    waiting = sent(inbox)
    inbox.receive(done(), 9)
    waiting.forget()
    assert len(inbox._ready) == 0


def test_a_task_does_not_wait_for_another(inbox):
    waiting = sent(inbox)
    inbox.receive(done(), 9)
    token = set_current(Request(id="running", called_directly=False))
    try:
        with pytest.raises(RuntimeError, match="Use a chain"):
            waiting.get(1)
        assert waiting.get(1, disable_sync_subtasks=False) == 1
    finally:
        reset_current(token)
