"""Events in Celery's format: JSON objects on the topic exchange ``celeryev``, as Celery 5.7's dispatcher sends them.

The routing key is the type with dots for dashes; the events of a worker's tasks travel as lists of up to 24 with the
key ``task.multi``. Where Celery's documents and code differ, the code is followed: ``task-succeeded`` has ``result``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from amqptasks.message import Envelope

__all__ = [
    "EXCHANGE",
    "MOST",
    "TASKS",
    "custom_event",
    "described",
    "encode_events",
    "event",
    "routing_key",
    "utcoffset",
]

EXCHANGE = "celeryev"
#: The routing key of lists of task events, and how many events such a list has at most.
TASKS, MOST = "task.multi", 24
#: An event of the application's own: its type, and its size in bytes.
_KIND = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_MOST_BYTES = 1 << 16
#: Arguments come with the message, from whoever sent it.
_SHOWN = 1024


def routing_key(kind: str) -> str:
    """The routing key of one event of this type."""
    return kind.replace("-", ".")


def utcoffset() -> float:
    """Hours from local time to UTC, positive in the west: receivers take off the difference to their own."""
    return (time.altzone if time.localtime().tm_isdst else time.timezone) / 3600


def event(
    kind: str, node: str, pid: int, clock: int | None, fields: Mapping[str, Any], timestamp: float | None = None
) -> dict[str, Any]:
    """An event. `clock` is the sender's logical clock, by which receivers sort; publishers have none."""
    made = {
        "type": kind,
        "hostname": node,
        "timestamp": time.time() if timestamp is None else timestamp,
        "utcoffset": utcoffset(),
        "pid": pid,
        "clock": clock,
    }
    made.update(fields)
    return made


def described(headers: Mapping[str, Any]) -> dict[str, Any]:
    """What ``task-sent`` and ``task-received`` tell of a task message, by its headers."""
    return {
        "uuid": headers.get("id"),
        "name": headers.get("task"),
        "args": _cut(headers.get("argsrepr")),
        "kwargs": _cut(headers.get("kwargsrepr")),
        "root_id": headers.get("root_id"),
        "parent_id": headers.get("parent_id"),
        "retries": headers.get("retries") or 0,
        "eta": headers.get("eta"),
        "expires": headers.get("expires"),
    }


def custom_event(kind: str, node: str, pid: int, clock: int, uuid: str | None, fields: Mapping[str, Any]) -> Envelope:
    """An event of the application's own about a task, as a message. Raises `ValueError`."""
    if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
        raise ValueError(
            f"{kind!r:.100} is no type of an event: write letters, digits and dashes, such as task-progress"
        )
    taken = sorted({"type", "hostname", "timestamp", "utcoffset", "pid", "clock", "uuid"} & fields.keys())
    if taken:
        raise ValueError(f"event {kind}: {', '.join(taken)} cannot be a field: every event has one")
    body = encode_events(event(kind, node, pid, clock, {"uuid": uuid, **fields}))
    if len(body) > _MOST_BYTES:
        raise ValueError(f"event {kind} has {len(body)} bytes; {_MOST_BYTES} is the most")
    return Envelope(EXCHANGE, routing_key(kind), body, delivery_mode=1, mandatory=False)


def encode_events(events: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> bytes:
    """The body of an event, or of a list of them. What JSON does not know is shown as text."""
    try:
        return orjson.dumps(events, default=str)
    except TypeError:  # a text that is no Unicode (lone surrogates), an integer of more than 64 bits
        return json.dumps(events, default=str).encode()


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
