"""Intake: what must not run gets its outcome before it reaches an executor. Pure: headers in, outcome out."""

from __future__ import annotations

from collections.abc import Container
from datetime import UTC, datetime
from typing import Any

from amqptasks.errors import DecodeError
from amqptasks.execution.job import header_limits, header_retries
from amqptasks.outcome import Failed, Outcome, Postponed, Reason
from amqptasks.protocol.signing import Keyring
from amqptasks.protocol.task import parse_time
from amqptasks.worker.delivery import VERDICT_HEADER, Delivery

__all__ = ["disbelieved", "examine"]

#: An `eta` that is nearer than this runs at once: a trip through the broker would take as long.
_ETA_TOLERANCE = 0.002


def examine(headers: dict[str, Any] | None, tasks: Container[str], *, now: datetime | None = None) -> Outcome | None:
    """The outcome of a message that must not run; None for one that may.

    Undecodable headers, unknown tasks, what has expired, and what came before its time.
    """
    if not headers or "task" not in headers:
        return _undecodable("no header 'task': not a task message of protocol 2")
    name, task_id = headers["task"], headers.get("id")
    if not isinstance(name, str) or not isinstance(task_id, str) or not task_id:
        return _undecodable(f"header task is {name!r:.80} and header id is {task_id!r:.80}; both must be strings")
    compression = headers.get("compression")
    if compression is not None and not isinstance(compression, str):
        return _undecodable(f"header compression is {compression!r:.80}, not a string")
    try:
        header_retries(headers)
        header_limits(headers)
        eta, expires = parse_time(headers.get("eta")), parse_time(headers.get("expires"))
    except DecodeError as error:
        return _undecodable(str(error))
    if eta is not None or expires is not None:
        now = now or datetime.now(UTC)
        if expires is not None and expires <= now:
            return Failed(Reason.EXPIRED, "Expired", f"expired at {expires.isoformat()}")
        if eta is not None and (wait := (eta - now).total_seconds()) > _ETA_TOLERANCE:
            return Postponed(wait)
    if name not in tasks and VERDICT_HEADER not in headers:  # what is decided runs nothing
        return Failed(
            Reason.UNKNOWN_TASK,
            "UnknownTask",
            f"no task is named {name!r:.200}: is its module in `include`, and is this worker's code new enough?",
        )
    return None


def disbelieved(keys: Keyring | None, delivery: Delivery) -> Outcome | None:
    """The outcome of a message whose signature is missing or wrong; None for others, and where nothing is signed.

    An executor checks every message before it reads the body. This is for those with which the leader itself does
    something: refuse, postpone, settle by what it remembers.
    """
    if keys is None:
        return None
    incoming, properties = delivery.incoming, delivery.incoming.properties
    problem = keys.problem(
        delivery.headers, properties.content_type, properties.correlation_id, properties.reply_to, incoming.body
    )
    return None if problem is None else Failed(Reason.REJECTED, "SignatureError", problem)


def _undecodable(message: str) -> Failed:
    return Failed(Reason.UNDECODABLE, "DecodeError", message)
