"""The table of `amqptasks queues` on terminals of any width."""

from __future__ import annotations

import pytest
from rich.console import Console

from amqptasks.broker.queue_figures import Age, QueueFigures
from amqptasks.cli.queue_board import table

NAME = "amqptasks.rate.shop.payments.charge"
QUEUES = [
    QueueFigures(NAME, "quorum", 123_456, 123_456, 1000, 12, 812.0, 30.5, Age(90061.0, "at least")),
    QueueFigures("gone"),
]


def shown(width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table(QUEUES, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_figures_are_whole_and_names_are_folded_where_there_is_no_room(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]
    text = "\n".join(lines)
    for word in ("consumers", "empty in", "123456", "1000", "812", "30.5", "> 1d01h", "grows", "not in the broker"):
        assert word in text, text
    assert ("quorum" in text) == (width > 100)
    assert "".join(line.split()[0] for line in lines[1:-1]) == NAME
