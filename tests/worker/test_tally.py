"""Counters on a board: what is counted as what, and that no process takes a count with it. No broker."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pika
import pytest

from amqptasks.broker.consumer import Incoming
from amqptasks.outcome import Discarded, Failed, GivenBack, Lost, Outcome, Postponed, Reason, Retrying, Succeeded
from amqptasks.protocol.task import PUBLISHED_HEADER
from amqptasks.worker.board import Board, Boards, Counts
from amqptasks.worker.delivery import CRASHES_HEADER, Delivery
from amqptasks.worker.tally import BUCKETS, Tally

TASK = "shop.mail"


def incoming(*, redelivered: bool = False, **headers: Any) -> Incoming:
    known = {"task": TASK, "id": "1", "retries": 0, **headers}
    return Incoming(1, 1, redelivered, "amqptasks", "email", pika.BasicProperties(headers=known), b"")


def delivery(**headers: Any) -> Delivery:
    return Delivery(incoming(**headers), "email")


def made(*settled: tuple[dict[str, Any], Outcome, float]) -> Counts:
    board = Board()
    tally = Tally(board, {TASK})
    for headers, outcome, runtime in settled:
        tally.settled(delivery(**headers), outcome, runtime)
    return {key: values for key, values in board.counts().items() if any(values)}


@pytest.mark.parametrize(
    ("outcome", "word", "reason", "sent"),
    [
        (Succeeded(), "succeeded", "", 1),
        (Discarded(), "ignored", "", 1),
        (Retrying(1.0), "retried", "", 1),
        (Failed(Reason.FAILED, "ValueError"), "failed", "failed", 1),
        (GivenBack(), "given_back", "", 0),
        (Postponed(1.0), "postponed", "", 0),
        (Lost("died"), "lost", "", 1),
    ],
)
def test_each_outcome_has_its_word(outcome: Outcome, word: str, reason: str, sent: int) -> None:
    found = made(({}, outcome, 0.0))
    exception = "ValueError" if reason else ""
    assert found[("outcome", TASK, word, reason, exception)] == [1.0]
    assert found.get(("sent", TASK), [0.0]) == [sent]


@pytest.mark.parametrize("headers", [{"retries": 2}, {CRASHES_HEADER: 1}])
def test_a_call_is_sent_once_however_often_it_is_tried(headers: dict[str, Any]) -> None:
    assert ("sent", TASK) not in made((headers, Succeeded(), 0.1))


def test_run_times_and_waits_go_to_their_buckets() -> None:
    ago = int((time.time() - 3.0) * 1000)
    found = made(({PUBLISHED_HEADER: ago}, Succeeded(), 0.2), ({}, Succeeded(), 7200.0))
    runtime, wait = found[("runtime", TASK)], found[("wait", TASK)]
    assert (runtime[BUCKETS.index(0.5)], runtime[len(BUCKETS)], sum(runtime[:-1])) == (1.0, 1.0, 2.0)
    assert runtime[-1] == pytest.approx(7200.2)
    assert (wait[BUCKETS.index(5.0)], sum(wait[:-1])) == (1.0, 1.0)
    assert wait[-1] == pytest.approx(2.8, abs=0.5)


def test_a_delayed_call_waits_from_when_it_was_due() -> None:
    published, due = time.time() - 3600, datetime.now(UTC) - timedelta(seconds=2)
    headers = {PUBLISHED_HEADER: int(published * 1000), "eta": due.isoformat()}
    assert made((headers, Succeeded(), 0.001))[("wait", TASK)][-1] == pytest.approx(2.0, abs=0.5)


@pytest.mark.parametrize("headers", [{PUBLISHED_HEADER: "soon"}, {PUBLISHED_HEADER: 2**62}, {"eta": "soon"}])
def test_times_that_a_stranger_makes_up_harm_nothing(headers: dict[str, Any]) -> None:
    found = made(({PUBLISHED_HEADER: int(time.time() * 1000), **headers}, Succeeded(), 0.1))
    assert found.get(("wait", TASK), [0.0])[-1] == pytest.approx(0.0, abs=0.5)


def test_what_only_tells_of_a_failure_is_no_run() -> None:
    board = Board()
    tally = Tally(board, {TASK})
    told = delivery()
    told.verdict = Failed(Reason.TIME_LIMIT, "TimeLimitExceeded")
    tally.settled(told, told.verdict, 0.5)
    found = board.counts()
    assert not any(found[("runtime", TASK)])
    assert found[("killed", TASK)] == [1.0]


@pytest.mark.parametrize("name", ["no.such.task", None, ["a"], {"b": 1}, 7])
def test_names_that_strangers_send_make_one_row(name: Any) -> None:
    board = Board()
    tally = Tally(board, {TASK})
    for number in range(5):
        one = f"{name}.{number}" if isinstance(name, str) else name
        tally.received(incoming(task=one))
        tally.settled(delivery(task=one), Failed(Reason.UNKNOWN_TASK, "UnknownTask"), 0.0)
    assert {key[1] for key in board.counts() if key[0] in ("received", "outcome")} == {""}
    assert board.counts()[("received", "")] == [5.0]


def test_exceptions_beyond_a_bound_are_others() -> None:
    found = made(*(({}, Failed(Reason.FAILED, f"Error{number}"), 0.1) for number in range(300)))
    names = {key[4]: values[0] for key, values in found.items() if key[0] == "outcome"}
    assert len(names) == 201
    assert names["other"] == 100.0


def test_a_process_that_is_killed_takes_no_count_with_it_and_its_successor_counts_on() -> None:
    board = Board()
    for _ in range(3):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            tally = Tally(board, {TASK})
            for number in range(100):
                tally.settled(delivery(), Failed(Reason.FAILED, f"Error{number}"), 0.1)
            os.write(write, b".")
            signal.pause()
        os.read(read, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    found = board.counts()
    assert [found[("outcome", TASK, "failed", "failed", f"Error{number}")] for number in range(100)] == [[3.0]] * 100
    assert sum(found[("runtime", TASK)][:-1]) == 300


def test_executors_that_were_replaced_count_on_under_another_leader() -> None:
    board = Board()
    tally = Tally(board, {TASK})
    tally.restarted({"tasks": 1})
    tally.restarted({"tasks": 2})
    successor = Tally(board, {TASK})
    successor.restarted({"tasks": 1, "memory": 4})
    found = board.counts()
    assert (found[("restarts", "tasks")], found[("restarts", "memory")]) == ([3.0], [4.0])


def test_a_board_that_is_full_counts_what_is_new_nowhere() -> None:
    board = Board()
    for number in range(5000):
        board.values[board.slot("histogram", str(number), width=15)] += 1
    known = board.counts()
    assert 4000 < len(known) < 5000
    assert all(values == [1.0, *[0.0] * 14] for values in known.values())


def test_boards_add_up_by_queue_and_outlive_their_leaders_and_their_program() -> None:
    boards = Boards()
    first, second, other = boards.open("email"), boards.open("email"), boards.open("media")
    for board, count in ((first, 1.0), (second, 10.0), (other, 100.0)):
        board.values[board.slot("received", TASK)] += count
    boards.free(first)
    assert boards.open("email") is first, "a queue that is added again goes on counting"
    boards.free(first)
    left = [(queue, os.dup(descriptor)) for queue, descriptor in boards.hand_over()]
    adopted = Boards(left)
    running = adopted.adopt("email", os.dup(second.descriptor))
    second.values[second.slot("received", TASK)] += 5.0  # its leader still counts
    assert running.counts() == {("received", TASK): [15.0]}
    assert adopted.counts() == {"email": {("received", TASK): [16.0]}}
