"""The journal of revokes: one stream, that every worker reads from its beginning.

A message names tasks that must not run any more. Another kind, the marker, says nothing: its writer knows, when it
reads it back, that it has read everything before it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from amqptasks.errors import DecodeError
from amqptasks.protocol import jsontypes

__all__ = ["IDS_IN_A_MESSAGE", "Revocation", "checked_ids", "decode_journal", "marker", "signal_number"]

IDS_IN_A_MESSAGE = 1_000
#: An id is a message's correlation id, which has 255 bytes (AMQP 0-9-1, short string).
_LONGEST_ID = 255


@dataclass(frozen=True, slots=True)
class Revocation:
    """These tasks are not run any more.

    Attributes:
        expires: when it is forgotten, in seconds of the epoch.
        signum: the signal that ends those that run; None lets them finish.
    """

    ids: tuple[str, ...]
    expires: float
    signum: int | None = None

    def encode(self) -> bytes:
        """The journal's message."""
        return jsontypes.dumps(
            {
                "revoke": list(self.ids),
                "terminate": self.signum is not None,
                "signal": None if self.signum is None else signal.Signals(self.signum).name,
                "expires": self.expires,
            }
        )


def marker(name: str) -> bytes:
    """A message that its writer looks for."""
    return jsontypes.dumps({"marker": name})


def decode_journal(body: bytes) -> Revocation | str:
    """A revocation, or the name of a marker. Raises `DecodeError` for everything else."""
    table = jsontypes.loads(body)
    if isinstance(table, dict) and isinstance(table.get("marker"), str):
        return str(table["marker"])
    if not isinstance(table, dict) or not isinstance(table.get("revoke"), list):
        raise DecodeError(f"not an entry of the journal of revokes: {body[:80]!r}")
    expires = table.get("expires")
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        raise DecodeError(f"expires is {expires!r:.40}, not a time")
    try:
        signum = signal_number(table.get("signal") or "SIGTERM") if table.get("terminate") is True else None
        return Revocation(checked_ids(table["revoke"]), float(expires), signum)
    except ValueError as error:
        raise DecodeError(str(error)) from None


def checked_ids(ids: Iterable[Any]) -> tuple[str, ...]:
    """Task ids, in order, each once. Raises `ValueError` for what is none."""
    found = tuple(dict.fromkeys(one if isinstance(one, str) else _refuse(one) for one in ids))
    for one in found:
        if not one or len(one.encode("utf-8", "surrogatepass")) > _LONGEST_ID:
            _refuse(one)
    if len(found) > IDS_IN_A_MESSAGE:
        raise ValueError(f"{len(found)} ids in one message; {IDS_IN_A_MESSAGE} are the most")
    return found


def _refuse(value: object) -> str:
    raise ValueError(f"{value!r:.80} is no task id: an id is a string of 1 to {_LONGEST_ID} bytes")


def signal_number(value: object) -> int:
    """A signal by name (``SIGTERM``, ``TERM``) or number. Raises `ValueError` for what is no signal here."""
    try:
        if isinstance(value, str) and not value.isdigit():
            name = value.upper()
            return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
        if isinstance(value, int | str) and not isinstance(value, bool):
            return int(signal.Signals(int(value)))
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{value!r:.40} is no signal; write SIGTERM, SIGKILL, SIGINT or their numbers")
