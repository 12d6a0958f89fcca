"""Events as values: what is written, the clock that processes share, and what the events command shows of them."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from typing import Any

import pytest
from rich.console import Console

from amqptasks.cli.event_board import Board, line
from amqptasks.protocol.events import described, encode_events
from amqptasks.worker.event_switch import EventSwitch

NODE = "shop@test"


@pytest.mark.parametrize("value", ["\ud800", 2**70, b"\xff", {1, 2}, float("inf"), object()])
def test_whatever_a_header_holds_is_written_as_json(value: Any) -> None:
    (found,) = json.loads(encode_events([{"type": "task-received", "eta": value, **described({"root_id": value})}]))
    assert found["type"] == "task-received"


def test_arguments_of_strangers_are_cut() -> None:
    assert len(described({"argsrepr": "x" * 100_000})["args"]) == 1024
    assert described({"argsrepr": ["no", "text"]})["args"] == "['no', 'text']"


def test_the_switch_and_the_clock_are_shared_with_processes_that_run_already() -> None:
    switch = EventSwitch(False)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        switch.set(True)
        switch.adjust(41)
        os.write(write, b"%d" % switch.tick())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        assert told.read() == "43"
    os.waitpid(pid, 0)
    assert switch.on
    assert switch.tick() == 44


def test_a_clock_that_leaves_no_room_to_count_is_not_followed() -> None:
    switch = EventSwitch(False)
    switch.adjust(2**63 - 1)
    switch.adjust(-5)
    assert switch.tick() < 10


def _shown(board: Board) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(board.render(40))
    return console.export_text()


def _event(kind: str, moment: float, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "hostname": NODE, "timestamp": moment, **fields}


def test_characters_that_steer_a_terminal_are_not_printed() -> None:
    nasty = _event("task-received", 1e9, uuid="1", name="x\x1b[2Jy", args="\x07\r\n", kwargs="\x9b31m")
    text = line(nasty, OrderedDict())
    board = Board()
    board.take(nasty)
    assert "x [2Jy" in text
    assert not {"\x1b", "\x07", "\r", "\n", "\x9b"} & set(text)
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(_shown(board))


def test_an_event_that_comes_late_does_not_turn_a_state_back() -> None:
    board = Board()
    board.take(_event("task-succeeded", 1e9 + 2, uuid="1", result="5", runtime=1.0))
    board.take(_event("task-started", 1e9 + 1, uuid="1"))
    board.take(_event("task-received", 1e9, uuid="1", name="shop.add", args="(2, 3)", kwargs="{}"))
    shown = _shown(board)
    assert "succeeded" in shown
    assert "shop.add" in shown
    board.take(_event("task-retried", 1e9 + 3, uuid="1", exception="E()"))
    board.take(_event("task-received", 1e9 + 4, uuid="1"))
    assert "received" in _shown(board)


def test_tasks_and_workers_are_forgotten_rather_than_remembered_without_bound() -> None:
    board, names = Board(), OrderedDict[str, str]()
    for number in range(5000):
        event = {
            **_event("task-received", 1e9, uuid=str(number), name="n", args="", kwargs=""),
            "hostname": f"w{number}",
        }
        board.take(event)
        line(event, names)
    assert len(board._tasks) == len(names) == 1000
    assert len(board._workers) == 200


@pytest.mark.parametrize(
    "event",
    [
        {"type": "task-received", "hostname": NODE},
        {"type": "task-", "hostname": NODE, "uuid": "1", "timestamp": "soon", "runtime": "x"},
        {"type": "worker-heartbeat", "hostname": NODE, "freq": "often", "loadavg": 7, "active": {}},
        {"type": "worker-heartbeat", "hostname": NODE, "freq": -1e300, "timestamp": 1e300},
        {"type": "", "hostname": "", "timestamp": None},
    ],
)
def test_events_with_wrong_fields_harm_nothing(event: dict[str, Any]) -> None:
    board = Board()
    board.take(event)
    assert _shown(board)
    assert line(event, OrderedDict())
