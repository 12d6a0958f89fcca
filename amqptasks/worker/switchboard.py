"""Questions from the desk: the supervisor asks every leader, and gathers what they answer in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from amqptasks.worker.children import Child
from amqptasks.worker.control import Command

__all__ = ["Switchboard"]

#: A leader answers within milliseconds; one that is stopped or dies is left out of the answer.
_PATIENCE = 0.6


@dataclass
class _Question:
    reply: Callable[[dict[str, Any]], None]
    missing: set[Child]
    deadline: float
    answers: dict[str, Any] = field(default_factory=dict)


class Switchboard:
    """Open questions. Belongs to the supervisor's loop."""

    def __init__(self) -> None:
        self._open: dict[int, _Question] = {}
        self._ticket = 0

    def ask(
        self,
        leaders: Sequence[Child],
        method: str,
        arguments: dict[str, Any],
        reply: Callable[[dict[str, Any]], None],
    ) -> None:
        """Ask `leaders`, all of which hear.

        `reply` gets their answers by queue, once, when all have answered or time is over.
        """
        if not leaders:
            reply({})
            return
        self._ticket += 1
        self._open[self._ticket] = _Question(reply, set(leaders), time.monotonic() + _PATIENCE)
        for leader in leaders:
            leader.send(Command.ASK, self._ticket, method, arguments)

    def answered(self, leader: Child, ticket: int, payload: Any) -> None:
        """A leader answered."""
        question = self._open.get(ticket)
        if question is None:
            return
        # A queue that was cancelled and added again has two.
        name = leader.name if leader.name not in question.answers else f"{leader.name} ({leader.pid})"
        question.answers[name] = payload
        question.missing.discard(leader)
        if not question.missing:
            self._close(ticket)

    def expire(self) -> None:
        """Answer what has waited long enough with what is there."""
        now = time.monotonic()
        for ticket in [ticket for ticket, question in self._open.items() if now >= question.deadline]:
            self._close(ticket)

    @property
    def next_deadline(self) -> float | None:
        """When `expire` has something to do."""
        return min((question.deadline for question in self._open.values()), default=None)

    def _close(self, ticket: int) -> None:
        question = self._open.pop(ticket)
        question.reply(question.answers)
