"""What beats remember: one message in the broker, held by the beat that leads. Pure."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from amqptasks.errors import DecodeError

__all__ = ["Mark", "State", "UnknownVersion"]

_VERSION = 1


class UnknownVersion(DecodeError):
    """The state was written by another version of this program."""


@dataclass(slots=True)
class Mark:
    """How far one entry is.

    `done` is the moment up to which its ticks are dealt with, `schedule` what it was then; `ran` is when it was last
    sent, and `task_id` under which id.
    """

    done: datetime
    schedule: str
    ran: datetime | None = None
    task_id: str | None = None


@dataclass(slots=True)
class State:
    """Everything that the next leader has to know.

    `lineage` is the namespace of task ids: other brokers' beats have another one. `through` is the moment up to which
    all entries were served. `added` has the entries that were added by command, each as ``schedule:`` in YAML has it,
    with its signature.
    """

    lineage: uuid.UUID
    through: datetime
    serial: int = 0
    paused: set[str] = field(default_factory=set)
    marks: dict[str, Mark] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def new(cls, now: datetime) -> State:
        """The first state in a broker."""
        return cls(uuid.uuid4(), now)

    def task_id(self, entry: str, due: datetime | str) -> str:
        """The id of an entry's tick: the same wherever and whenever it is worked out."""
        moment = due if isinstance(due, str) else due.astimezone(UTC).isoformat()
        return str(uuid.uuid5(self.lineage, f"{entry}@{moment}"))

    def to_bytes(self, **extra: Any) -> bytes:
        """As JSON. `extra` is for people who look at the message."""
        table = {
            "version": _VERSION,
            "lineage": str(self.lineage),
            "serial": self.serial,
            "through": self.through.isoformat(),
            "paused": sorted(self.paused),
            "entries": {
                name: {
                    "done": mark.done.isoformat(),
                    "schedule": mark.schedule,
                    "ran": None if mark.ran is None else mark.ran.isoformat(),
                    "task_id": mark.task_id,
                }
                for name, mark in self.marks.items()
            },
            "added": self.added,
        }
        return json.dumps({"state": table, **extra}).encode()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> State:
        """Of what `to_bytes` wrote under ``state``. Raises `DecodeError`, `UnknownVersion`."""
        try:
            if table["version"] != _VERSION:
                raise UnknownVersion(
                    f"the state in the broker has version {table['version']}, and this beat knows {_VERSION}; "
                    "run the version that wrote it, or purge the queue to begin anew"
                )
            return cls(
                uuid.UUID(table["lineage"]),
                _moment(table["through"]),
                int(table["serial"]),
                {str(name) for name in table["paused"]},
                {
                    str(name): Mark(
                        _moment(one["done"]),
                        str(one["schedule"]),
                        None if one["ran"] is None else _moment(one["ran"]),
                        one["task_id"],
                    )
                    for name, one in table["entries"].items()
                },
                {str(name): dict(one) for name, one in table.get("added", {}).items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DecodeError(f"not a state of the schedule: {error!r}") from None


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
