"""One delivery as an executor gets it, and the request a task sees."""

from __future__ import annotations

from typing import Any, NamedTuple

from amqptasks.errors import DecodeError
from amqptasks.protocol.task import Body, parse_time
from amqptasks.request import Request

__all__ = ["Job", "build_request", "header_limits", "header_retries"]

#: One more must fit a header of 64 bits.
_MOST_RETRIES = 2**63 - 1
_INF = float("inf")


class Job(NamedTuple):
    """A delivery, in types that `marshal` can carry."""

    tag: int
    headers: dict[str, Any]
    content_type: str | None
    correlation_id: str | None
    reply_to: str | None
    priority: int | None
    exchange: str
    routing_key: str
    redelivered: bool
    body: bytes
    #: Decided already (expired, poison, a failed chord …): (reason, exception, message). It does not run.
    verdict: tuple[str, str, str] | None = None
    #: The signal that ended it, when it was revoked while it ran.
    signum: int | None = None
    #: (hard, soft) seconds that were set for its task while the worker runs; None leaves it to the message.
    limits: tuple[float | None, float | None] | None = None


def header_retries(headers: dict[str, Any]) -> int:
    """The ``retries`` header. Raises `DecodeError` for what is no count."""
    value = headers.get("retries") or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_RETRIES:
        raise DecodeError(f"header retries is {value!r:.40}, not a count")
    return value


def header_limits(headers: dict[str, Any]) -> tuple[float | None, float | None]:
    """The ``timelimit`` header: (hard, soft) seconds, None where not set. Raises `DecodeError`."""
    value = headers.get("timelimit")
    if value is None:
        return None, None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise DecodeError(f"header timelimit is {value!r:.60}, not [hard, soft]")
    for limit in value:
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < _INF
        ):
            raise DecodeError(f"header timelimit is {value!r:.60}, not [hard, soft] in seconds")
    return value[0] or None, value[1] or None


def build_request(job: Job, body: Body, hostname: str) -> Request:
    """The request of one execution. Raises `DecodeError`."""
    headers = job.headers
    return Request(
        id=headers.get("id"),
        task=headers["task"],
        args=body.args,
        kwargs=body.kwargs,
        retries=header_retries(headers),
        eta=parse_time(headers.get("eta")),
        expires=parse_time(headers.get("expires")),
        root_id=headers.get("root_id"),
        parent_id=headers.get("parent_id"),
        group=headers.get("group"),
        group_index=headers.get("group_index"),
        correlation_id=job.correlation_id,
        reply_to=job.reply_to,
        origin=headers.get("origin"),
        hostname=hostname,
        delivery_info={
            "exchange": job.exchange,
            "routing_key": job.routing_key,
            "priority": job.priority,
            "redelivered": job.redelivered,
        },
        headers=headers,
        timelimit=job.limits or header_limits(headers),
        ignore_result=bool(headers.get("ignore_result")),
        called_directly=False,
    )
