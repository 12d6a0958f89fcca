"""Handles in Celery's tuple form."""

from __future__ import annotations

import json
from typing import Any

from amqptasks.results import from_handle
from amqptasks.results.access import NoResults


def test_the_handle_of_a_long_chain_is_made_whole_and_written_short() -> None:
    handle: Any = None
    for number in range(5000):
        handle = (f"task {number}", handle), None
    made = from_handle(handle, NoResults())
    line = []
    one: Any = made
    while one is not None:
        line.append(one.id)
        one = one.parent
    assert line == [f"task {number}" for number in reversed(range(5000))]
    text = json.dumps(made.as_tuple())
    assert "task 4900" in text
    assert "task 4000" not in text


def test_parents_and_children_come_back() -> None:
    handle = (("last", (("group", (("first", None), None)), [(("a", None), None), (("b", None), None)])), None)
    made = from_handle(handle, NoResults())
    assert made.parent is not None
    assert [one.id for one in made.parent.results] == ["a", "b"]
    assert made.parent.parent.id == "first"
    assert made.as_tuple() == handle
