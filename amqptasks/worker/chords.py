"""What a joiner knows of a chord that is not done, and of the messages that its parts came in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from amqptasks.broker.consumer import Incoming
from amqptasks.canvas import from_dict
from amqptasks.execution.reports import reply
from amqptasks.message import Envelope
from amqptasks.protocol.results import ResultMeta, encode_result
from amqptasks.states import FAILURE

__all__ = ["Chord", "Held", "replies"]


class Held:
    """One unacknowledged message, and how many chords' parts in it still wait."""

    __slots__ = ("acknowledged", "epoch", "part", "size", "tag", "waiting")

    def __init__(self, incoming: Incoming) -> None:
        self.tag, self.epoch, self.size = incoming.tag, incoming.epoch, len(incoming.body)
        self.waiting = 0
        self.acknowledged = False
        #: (chord, part) of a message that holds one part.
        self.part: tuple[str, int] | None = None


class Chord:
    """The parts of one chord that came so far."""

    __slots__ = (
        "body",
        "failure",
        "group_id",
        "held",
        "missing",
        "parts",
        "refused",
        "sent",
        "settled",
        "since",
        "size",
        "unconfirmed",
    )

    def __init__(self, group_id: str, body: Mapping[str, Any]) -> None:
        self.group_id = group_id
        self.body = body
        self.size = int(body.get("chord_size") or 0)
        self.parts: dict[int, Any] = {}
        self.held: list[Held] = []
        #: Why it fails; None while it does not.
        self.failure: str | None = None
        #: When its first part was sent, in seconds of the epoch: other joiners, before and after this one, count on.
        self.since = time.time()
        #: Whether body, or failure, is on its way.
        self.sent = self.settled = False
        self.unconfirmed = 0
        #: Why its body was not taken, and will not be; and where there was no queue for it.
        self.refused: str | None = None
        self.missing: set[tuple[str, str]] = set()


def replies(body: Mapping[str, Any], error: Exception) -> list[Envelope]:
    """The replies that a body of which no message can be made fails with this error."""
    try:
        never = [one.options for one in from_dict(body).walk() if one.options.get("reply_to")]
    except (ValueError, TypeError, AttributeError):
        return []
    made = []
    for options in never:
        task_id = str(options.get("task_id"))
        made.append(reply(task_id, encode_result(ResultMeta(task_id, FAILURE, error)), str(options["reply_to"])))
    return made
