"""What became of one delivery: a closed set of frozen values.

An executor builds one for each task it ran; intake builds one for what must not run. `worker/settlement.py` turns it
into effects (publish, confirm) and then settles the delivery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from amqptasks.message import Envelope

__all__ = [
    "Discarded",
    "Failed",
    "GivenBack",
    "Lost",
    "Outcome",
    "Postponed",
    "RateLimited",
    "Reason",
    "Retrying",
    "Succeeded",
]


class Reason(StrEnum):
    """Why a message stands in a dead-letter queue (header ``x-task-reason``)."""

    FAILED = "failed"
    RETRIES_EXHAUSTED = "retries_exhausted"
    TIME_LIMIT = "time_limit"
    POISON = "poison"
    UNKNOWN_TASK = "unknown_task"
    INVALID_ARGUMENTS = "invalid_arguments"
    UNDECODABLE = "undecodable"
    EXPIRED = "expired"
    REVOKED = "revoked"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The task returned. `messages` are its result and what follows it: durable before it is acknowledged."""

    messages: tuple[Envelope, ...] = ()
    #: What it returned as monitors show it, while events are on.
    shown: str | None = None


@dataclass(frozen=True, slots=True)
class Retrying:
    """The task asked to run again `delay` seconds from now. `body` replaces the message's when arguments changed, and
    `headers` replace those of its signature then."""

    delay: float
    exception: str = ""
    message: str = ""
    body: bytes | None = None
    queue: str | None = None
    priority: int | None = None
    headers: Mapping[str, str] | None = None
    #: For monitors, while events are on.
    traceback: str = ""
    messages: tuple[Envelope, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The message goes to the dead-letter exchange, with the error in its headers."""

    reason: Reason
    exception: str = ""
    message: str = ""
    traceback: str = ""
    messages: tuple[Envelope, ...] = ()
    #: The signal that ended a task that was revoked while it ran.
    signum: int | None = None


@dataclass(frozen=True, slots=True)
class Discarded:
    """The task raised `Ignore`, or it must not run any more: acknowledged, and no dead letter."""

    messages: tuple[Envelope, ...] = ()


@dataclass(frozen=True, slots=True)
class Postponed:
    """The message came before its time (`eta`), or its body cannot be had: it waits `delay` seconds in the broker."""

    delay: float


@dataclass(frozen=True, slots=True)
class RateLimited:
    """The task has a rate limit, and this message has not had its turn: it waits for it in `queue`."""

    queue: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The process that ran the task died: run again, and counted in the message."""

    description: str


@dataclass(frozen=True, slots=True)
class GivenBack:
    """Not run, or not to its end (shutdown, `Reject(requeue=True)`): requeued by the broker."""


Outcome = Succeeded | Retrying | Failed | Discarded | Postponed | RateLimited | Lost | GivenBack
