"""A dead letter as a value: what it was, why it is dead, and how it lives again. Pure: no broker here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from amqptasks.broker.consumer import Incoming
from amqptasks.broker.reader import WholeProperties
from amqptasks.deadletters.written import plain, unplain
from amqptasks.errors import DecodeError
from amqptasks.message import Envelope, Provenance
from amqptasks.protocol.task import REPLAYS_HEADER, parse_time
from amqptasks.topology.build import dead_letter_queue

__all__ = ["EDITED_HEADER", "Letter"]

#: When somebody changed its arguments. That, and how often it was replayed, stay with it.
EDITED_HEADER = "x-task-edited-at"
_KEPT = (REPLAYS_HEADER, EDITED_HEADER)
#: What the broker and the worker wrote on it: a new life starts without.
_NOTES = ("x-task-", "x-death", "x-first-death-", "x-last-death-")
_NOTED = frozenset({"x-delivery-count", "x-acquired-count", "x-amqptasks-crashes", "CC", "BCC", "eta"})
#: Why the broker itself dead-lettered, in this project's words.
_BROKER_REASONS = {
    "expired": "expired",
    "maxlen": "max_length",
    "delivery_limit": "delivery_limit",
    "rejected": "rejected",
}


def _moment(value: Any) -> datetime | None:
    """A time that somebody wrote into a header; None for what is none."""
    try:
        return parse_time(value)
    except DecodeError:
        return None


def _words(value: Any) -> str:
    """A property or header as text; what is not UTF-8 is escaped."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class Letter:
    """One dead letter. `queue` is the work queue's name.

    Properties and names of headers are bytes where they are not UTF-8.
    """

    queue: str
    headers: Mapping[Any, Any]
    body: bytes
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    correlation_id: str | bytes | None = None
    reply_to: str | bytes | None = None
    priority: int | None = None
    message_id: str | bytes | None = None
    expiration: str | bytes | None = None
    provenance: Provenance | None = None
    #: The queue in which it stands, where that is not the work queue's own dead-letter queue.
    kept_in: str = ""
    #: The exchange that it was meant for, with `queue` as the key; empty for the task exchange.
    exchange: str = ""
    #: Whether its headers cannot be read: no copy can be made.
    unreadable: bool = False

    @classmethod
    def of(cls, queue: str, incoming: Incoming, *, kept_in: str = "", exchange: str = "") -> Letter:
        """A message of a dead-letter queue."""
        properties = incoming.properties
        whole = properties if isinstance(properties, WholeProperties) else WholeProperties()
        return cls(
            queue,
            properties.headers or {},
            incoming.body,
            _words(properties.content_type),
            _words(properties.content_encoding),
            properties.correlation_id,
            properties.reply_to,
            properties.priority,
            properties.message_id,
            properties.expiration,
            whole.provenance if any(one is not None for one in whole.provenance or ()) else None,
            kept_in,
            exchange,
            whole.unreadable,
        )

    def _text(self, name: str) -> str:
        return _words(self.headers.get(name))

    @property
    def stands_in(self) -> str:
        """The name of the queue in which it stands."""
        return self.kept_in or dead_letter_queue(self.queue)

    @property
    def id(self) -> str:
        """The task's id; of a message without one, a digest of its body."""
        own = self._text("id") or _words(self.correlation_id)
        return own or "body-" + hashlib.sha256(self.body).hexdigest()[:12]

    @property
    def task(self) -> str:
        """The task's name; empty for a message that names none."""
        return self._text("task")

    @property
    def reason(self) -> str:
        """Why it is here: the worker's word, or the broker's."""
        own = self._text("x-task-reason")
        if own:
            return own
        if self.kept_in and ".delay." in str(self._death.get("queue")):
            return "unroutable"  # it was due, and its queue was gone
        reason = str(self._death.get("reason", "unknown"))
        return _BROKER_REASONS.get(reason, reason)

    @property
    def _death(self) -> Mapping[str, Any]:
        deaths = self.headers.get("x-death")
        newest = deaths[0] if isinstance(deaths, list) and deaths else None
        return newest if isinstance(newest, dict) else {}

    @property
    def deaths(self) -> list[str]:
        """What the broker wrote on it each time it dead-lettered it, the latest first (RabbitMQ, "Dead-Lettered
        Messages"): one line for each queue and reason."""
        written = self.headers.get("x-death")
        found = []
        for one in written if isinstance(written, list) else ():
            if isinstance(one, dict):
                reason = str(one.get("reason", "unknown"))
                moment, count = _moment(one.get("time")), one.get("count")
                when = moment.isoformat() if moment is not None else "?"
                times = f", {count} times" if isinstance(count, int) and count > 1 else ""
                found.append(f"{when}  left queue {one.get('queue')!r}: {_BROKER_REASONS.get(reason, reason)}{times}")
        return found

    @property
    def exception(self) -> str:
        """The exception's class; empty where none was raised."""
        return self._text("x-task-exception")

    @property
    def message(self) -> str:
        """The exception's text."""
        return self._text("x-task-exception-message")

    @property
    def traceback(self) -> str:
        """The traceback; the last 8 KiB of it."""
        return self._text("x-task-traceback")

    @property
    def top_frame(self) -> str:
        """The line in which it went wrong: ``file:line in function``."""
        frames = [line.strip() for line in self.traceback.splitlines() if line.strip().startswith("File ")]
        if not frames:
            return ""
        file, _, rest = frames[-1].removeprefix("File ").partition(", line ")
        number, _, function = rest.partition(", in ")
        return f"{file.strip(chr(34))}:{number} in {function}" if function else f"{file.strip(chr(34))}:{number}"

    @property
    def died_at(self) -> datetime | None:
        """When it was dead-lettered, in UTC."""
        return _moment(self.headers.get("x-task-failed-at")) or _moment(self._death.get("time"))

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """What letters that died of the same have in common."""
        return self.queue, self.task, self.reason, self.exception, self.top_frame

    def revived(self, exchange: str, routing_key: str) -> Envelope:
        """The message for a new life: its id, arguments and reply stay; attempts, eta and notes of its death go, and
        `expiration`, which counts from now on and would kill it while it waits for a worker."""
        headers = {
            name: value
            for name, value in self.headers.items()
            if name in _KEPT or not (name in _NOTED or (isinstance(name, str) and name.startswith(_NOTES)))
        }
        replays = headers.get(REPLAYS_HEADER)
        headers[REPLAYS_HEADER] = (replays if isinstance(replays, int) else 0) + 1
        if "retries" in headers:
            headers["retries"] = 0
        expires = _moment(headers.get("expires"))
        if expires is not None and expires <= datetime.now(UTC):
            headers["expires"] = None  # or it would be dead again at once
        return replace(self, headers=headers, expiration=None).envelope(exchange, routing_key)

    def envelope(self, exchange: str, routing_key: str) -> Envelope:
        """The message, as it is."""
        return Envelope(
            exchange=exchange,
            routing_key=routing_key,
            body=self.body,
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            headers=dict(self.headers),
            # They go on as they came, bytes too.
            message_id=self.message_id or self.correlation_id,  # type: ignore[arg-type]  # bytes too
            correlation_id=self.correlation_id,  # type: ignore[arg-type]  # bytes too
            reply_to=self.reply_to,  # type: ignore[arg-type]  # bytes too
            priority=self.priority,
            expiration=self.expiration,  # type: ignore[arg-type]  # bytes too
            provenance=self.provenance,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values; the body in base64."""
        seldom = {
            "message_id": plain(self.message_id),
            "expiration": plain(self.expiration),
            "kept_in": self.kept_in,
            "exchange": self.exchange,
            **(plain(self.provenance._asdict()) if self.provenance is not None else {}),
        }
        return {
            "queue": self.queue,
            "headers": plain(self.headers),
            "body": base64.b64encode(self.body).decode(),
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "correlation_id": plain(self.correlation_id),
            "reply_to": plain(self.reply_to),
            "priority": self.priority,
            **{name: value for name, value in seldom.items() if value not in (None, "")},
        }

    @classmethod
    def from_json(cls, data: Any) -> Letter:
        """What `to_json` gave. Raises `ValueError` for anything else."""
        if not isinstance(data, dict):
            raise ValueError(f"not a dead letter: a {type(data).__name__} instead of an object")
        missing = [name for name in _NEEDED if name not in data]
        if missing:
            raise ValueError(f"not a dead letter: no {missing[0]!r}")
        values = {name: unplain(data.get(name)) for name in _FORMS}
        for name, forms in _FORMS.items():
            if not isinstance(values[name], forms) or isinstance(values[name], bool):
                raise ValueError(f"not a dead letter: {name} is {data[name]!r:.80}")
        for name, most in (("priority", 255), ("timestamp", 2**64 - 1)):
            if not 0 <= (values[name] or 0) <= most:
                raise ValueError(f"not a dead letter: {name} is {values[name]}; it may be 0 to {most}")
        provenance = Provenance(*(values.pop(name) for name in Provenance._fields))
        values["body"] = base64.b64decode(values["body"], validate=True)
        for name in ("kept_in", "exchange"):
            values[name] = values[name] or ""
        return cls(**values, provenance=provenance if any(one is not None for one in provenance) else None)


_NEEDED = ("queue", "headers", "body", "content_type", "content_encoding")
_SHORT = (str, bytes, type(None))
#: What the parts of an exported letter may be.
_FORMS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("queue", "body", "content_type", "content_encoding"), str),
    "headers": dict,
    **dict.fromkeys(("correlation_id", "reply_to", "message_id", "expiration", "type", "app_id"), _SHORT),
    **dict.fromkeys(("priority", "timestamp"), (int, type(None))),
    **dict.fromkeys(("kept_in", "exchange"), (str, type(None))),
}
