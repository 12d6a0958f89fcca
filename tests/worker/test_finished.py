"""What is remembered of chords that are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from amqptasks.errors import PublishError
from amqptasks.worker import finished
from amqptasks.worker.finished import Finished

Confirm = Callable[[PublishError | None], None]


class Queue:
    """Keeps what is published, until it is confirmed and acknowledged."""

    def __init__(self, lifetime: float = 60.0) -> None:
        self.published: list[tuple[Mapping[str, Any], Confirm]] = []
        self.later: list[Callable[[], None]] = []
        self.messages: list[Mapping[str, Any]] = []
        self.finished = Finished(
            lambda table, done: self.published.append((table, done)),
            lambda _, call: self.later.append(call),
            lifetime=lifetime,
        )

    def confirm(self, error: PublishError | None = None) -> None:
        table, done = self.published.pop(0)
        done(error)
        if error is None:
            self.messages.append(table)
            self.finished.message(table["done"], lambda: self.messages.remove(table))


def test_a_chord_is_known_when_its_marker_is_confirmed() -> None:
    queue = Queue()
    told: list[str] = []
    for name in "abc":
        queue.finished.add(name, lambda name=name: told.append(name))
    assert len(queue.published) == 1  # what comes while one is on its way goes together
    assert "a" not in queue.finished
    queue.confirm()
    assert told == ["a"]
    assert "a" in queue.finished
    assert "b" not in queue.finished
    queue.confirm()
    assert told == ["a", "b", "c"]
    assert [list(table["done"]) for table in queue.messages] == [["a"], ["b", "c"]]


def test_a_marker_that_is_refused_is_sent_again() -> None:
    queue = Queue()
    told: list[str] = []
    queue.finished.add("a", lambda: told.append("a"))
    queue.confirm(PublishError("no"))
    assert not told
    queue.later.pop()()
    queue.confirm()
    assert told == ["a"]


def test_the_next_process_learns_from_the_markers() -> None:
    queue, other = Queue(), Queue()
    queue.finished.add("a", lambda: None)
    queue.confirm()
    other.finished.message(queue.messages[0]["done"], lambda: None)
    assert "a" in other.finished


def test_what_is_old_is_forgotten_and_its_message_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(lifetime=10)
    now = 1000.0
    monkeypatch.setattr(finished.time, "time", lambda: now)
    queue.finished.add("a", lambda: None)
    queue.confirm()
    now += 9
    queue.finished.tick()
    assert "a" in queue.finished
    assert len(queue.messages) == 1
    now += 2
    queue.finished.tick()
    assert "a" not in queue.finished
    assert not queue.messages


def test_many_markers_become_few_and_none_is_forgotten() -> None:
    queue = Queue()
    for number in range(5_000):
        queue.finished.add(str(number), lambda: None)
        while queue.published:
            queue.confirm()
    assert len(queue.messages) <= 1_010
    assert {name for table in queue.messages for name in table["done"]} == set(map(str, range(5_000)))


def test_the_number_that_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "_REMEMBERED", 100)
    queue = Queue()
    for number in range(150):
        queue.finished.add(str(number), lambda: None)
        queue.confirm()
    queue.finished.tick()
    assert ["49" in queue.finished, "50" in queue.finished] == [False, True]
    assert len(queue.messages) == 100
