"""Task messages: Celery's message protocol, version 2.

Headers, properties and body as Celery's code sends them (Celery 5.6 and 5.7). The header ``task`` marks version 2; a
message without it is version 1, whose fields stand in the body. Where Celery's documents and code differ, the code is
followed: ``timelimit`` is ``[hard, soft]``, and the third element of the body is always an object.
"""

from __future__ import annotations

import os
import reprlib
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from amqptasks.errors import DecodeError, SerializationError
from amqptasks.message import Envelope
from amqptasks.protocol.compression import compress, decompress
from amqptasks.protocol.serializers import Serializer

__all__ = [
    "EMPTY_EMBED",
    "PUBLISHED_HEADER",
    "REPLAYS_HEADER",
    "Body",
    "TaskHeaders",
    "decode_body",
    "encode_arguments",
    "parse_time",
    "shown",
    "task_envelope",
]

#: Milliseconds since the epoch at which the message was made. AMQP's own `timestamp` has whole seconds.
PUBLISHED_HEADER = "x-amqptasks-published"
#: How often a dead letter was sent again.
REPLAYS_HEADER = "x-task-replays"
EMPTY_EMBED: Mapping[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}

# Arguments are shown in logs and monitors through these two headers, so they are cut, as Celery cuts them.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 256
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 20
_repr.maxlevel = 4
#: What is in a body of so many bytes, and plain, is short enough to be shown whole.
_SHORT_BODY, _PLAIN = 200, frozenset({int, str, float, bool, type(None)})


class _Origin:
    """``gen<pid>@<host>``, built once a process."""

    text = ""

    @classmethod
    def get(cls) -> str:
        if not cls.text:
            cls.text = f"gen{os.getpid()}@{socket.gethostname()}"
        return cls.text

    @classmethod
    def forget(cls) -> None:
        cls.text = ""


os.register_at_fork(after_in_child=_Origin.forget)


@dataclass(slots=True)
class TaskHeaders:
    """The headers of one call, before they are written. Times are aware datetimes, limits are seconds."""

    task: str
    id: str
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    shadow: str | None = None
    eta: datetime | None = None
    expires: datetime | None = None
    retries: int = 0
    time_limit: float | None = None
    soft_time_limit: float | None = None
    ignore_result: bool = False
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    stamps: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def encode_arguments(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    embed: Mapping[str, Any],
    serializer: Serializer,
) -> bytes:
    """The body of a version 2 message. Raises `SerializationError` naming the argument that cannot be written."""
    try:
        return serializer.dumps((args, kwargs, embed))
    except Exception as error:
        where = _unserializable(args, kwargs, serializer)
        raise SerializationError(
            f"task {task}: {where} cannot be serialized as {serializer.name}: {error}. "
            "Pass an id or a plain value, annotate the argument with a pydantic model, or choose another serializer."
        ) from error


def _unserializable(args: Sequence[Any], kwargs: Mapping[str, Any], serializer: Serializer) -> str:
    named = [(f"positional argument {index}", value) for index, value in enumerate(args)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for name, value in named:
        try:
            serializer.dumps(value)
        except Exception:
            return f"{name} ({type(value).__module__}.{type(value).__qualname__})"
    return "the message"


def task_envelope(
    headers: TaskHeaders,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    serializer: Serializer,
    exchange: str,
    routing_key: str,
    embed: Mapping[str, Any] = EMPTY_EMBED,
    compression: str | None = None,
    priority: int | None = None,
    reply_to: str | None = None,
    mandatory: bool = True,
) -> Envelope:
    """The envelope of one call. `compression` is a MIME type. Raises `SerializationError`."""
    body = encode_arguments(headers.task, args, kwargs, embed, serializer)
    table: dict[str, Any] = {
        "lang": "py",
        "task": headers.task,
        "id": headers.id,
        "shadow": headers.shadow,
        "eta": None if headers.eta is None else headers.eta.isoformat(),
        "expires": None if headers.expires is None else headers.expires.isoformat(),
        "group": headers.group,
        "group_index": headers.group_index,
        "retries": headers.retries,
        "timelimit": [headers.time_limit, headers.soft_time_limit],
        "root_id": headers.root_id or headers.id,
        "parent_id": headers.parent_id,
        "argsrepr": shown(tuple(args), args, body) if headers.argsrepr is None else headers.argsrepr,
        "kwargsrepr": shown(dict(kwargs), kwargs.values(), body) if headers.kwargsrepr is None else headers.kwargsrepr,
        "origin": _Origin.get(),
        "ignore_result": headers.ignore_result,
        "replaced_task_nesting": 0,
        "stamped_headers": list(headers.stamps) if headers.stamps else None,
        "stamps": headers.stamps,
        PUBLISHED_HEADER: time.time_ns() // 1_000_000,
    }
    if headers.extra:
        table.update(headers.extra)
    if compression is not None:
        body = compress(body, compression)
        table["compression"] = compression
    return Envelope(
        exchange=exchange,
        routing_key=routing_key,
        body=body,
        content_type=serializer.content_type,
        content_encoding=serializer.content_encoding,
        headers=table,
        message_id=headers.id,
        correlation_id=headers.id,
        reply_to=reply_to,
        priority=priority,
        mandatory=mandatory,
    )


def shown(what: object, values: Iterable[Any], body: bytes) -> str:
    """What monitors show of arguments, not too long: headers travel in one frame. `body`: what they are written as."""
    if len(body) < _SHORT_BODY and _PLAIN.issuperset(map(type, values)):
        return repr(what)
    return _repr.repr(what)


@dataclass(frozen=True, slots=True)
class Body:
    """The decoded body of a task message."""

    args: list[Any]
    kwargs: dict[str, Any]
    embed: dict[str, Any]


def decode_body(
    body: bytes,
    content_type: str | None,
    compression: str | None,
    accept: Mapping[str, Serializer],
    limit: int,
) -> Body:
    """Decode a version 2 body. `limit` bounds its decompressed size, in bytes.

    Raises `DecodeError` with a sentence that says what is wrong: a content type outside the accept list, a damaged or
    too large body, another shape than ``[args, kwargs, embed]``.
    """
    serializer = accept.get(content_type or "")
    if serializer is None:
        names = ", ".join(accept)
        raise DecodeError(f"content type {content_type!r} is not on the accept list ({names})")
    if len(body) > limit:
        raise DecodeError(f"the body has {len(body)} bytes; the limit is {limit}")
    if compression:
        body = decompress(body, compression, limit)
    value = serializer.loads(body)
    if not (isinstance(value, list | tuple) and len(value) == 3):
        raise DecodeError("the body is not [args, kwargs, embed] of message protocol 2")
    args, kwargs, embed = value
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise DecodeError("the body's args are no list, or its kwargs no object")
    if not all(isinstance(name, str) for name in kwargs):
        raise DecodeError("the body's kwargs have a name that is no string")
    return Body(list(args), kwargs, embed if isinstance(embed, dict) else {})


def parse_time(value: object) -> datetime | None:
    """An ``eta`` or ``expires`` header: ISO 8601, UTC where it names no zone. Raises `DecodeError`."""
    if value is None or value == "":
        return None
    if isinstance(value, datetime):
        parsed = value
    elif isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            raise DecodeError(f"{value[:64]!r} is not a time in ISO 8601") from None
    else:
        raise DecodeError(f"a time of type {type(value).__name__} is not ISO 8601")
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed
