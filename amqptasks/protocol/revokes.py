"""The journal of revokes: one stream, that every worker reads from its beginning.

A message names what must not run any more: tasks by their ids, and all that have a stamp. Another kind, the marker,
says nothing: its writer knows, when it reads it back, that it has read everything before it.
"""

from __future__ import annotations

import signal
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from amqptasks.errors import DecodeError
from amqptasks.protocol import jsontypes

__all__ = [
    "IDS_IN_A_MESSAGE",
    "Revocable",
    "Revocation",
    "checked_ids",
    "checked_stamps",
    "decode_journal",
    "is_revoked",
    "marker",
    "signal_number",
]

IDS_IN_A_MESSAGE = 1_000
#: A task id, or a stamp: its name, and its value as text, since an operator's command line has nothing else.
Revocable = str | tuple[str, str]
#: An id is a message's correlation id, which has 255 bytes (AMQP 0-9-1, short string).
_LONGEST_ID = 255
#: Name and value together: what is remembered of stamps takes no more memory than ids do.
_LONGEST_STAMP = 255


@dataclass(frozen=True, slots=True)
class Revocation:
    """These tasks, and those with these stamps, are not run any more.

    Attributes:
        keys: ids and stamps.
        expires: when it is forgotten, in seconds of the epoch.
        signum: the signal that ends those that run; None lets them finish.
    """

    keys: tuple[Revocable, ...]
    expires: float
    signum: int | None = None

    def encode(self) -> bytes:
        """The journal's message."""
        return jsontypes.dumps(
            {
                "revoke": [one for one in self.keys if isinstance(one, str)],
                "stamps": [list(one) for one in self.keys if not isinstance(one, str)],
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
        stamps = table.get("stamps") or ()
        if len(stamps) > IDS_IN_A_MESSAGE:
            raise ValueError(f"{len(stamps)} stamps in one message; {IDS_IN_A_MESSAGE} are the most")
        keys = (*checked_ids(table["revoke"]), *(_stamp(*one) for one in stamps))
        return Revocation(keys, float(expires), signum)
    except (TypeError, ValueError) as error:
        raise DecodeError(str(error)) from None


def is_revoked(headers: Mapping[str, Any], revoked: Container[Revocable]) -> bool:
    """Whether a message with these headers is among `revoked`, by its id or by one of its stamps."""
    if str(headers.get("id")) in revoked:
        return True
    names, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if not isinstance(names, list) or not isinstance(stamps, Mapping):
        return False
    for name in [one for one in names if isinstance(one, str)]:
        value = stamps.get(name)
        if any((name, str(one)) in revoked for one in (value if isinstance(value, list) else [value])):
            return True
    return False


def checked_stamps(stamps: Any) -> tuple[Revocable, ...]:
    """Stamps by name, each with a value or a list of them, as Celery's command has them; or ``["name=value"]``.

    Raises `ValueError` for everything else.
    """
    if isinstance(stamps, list):
        pairs = [one.partition("=")[::2] if isinstance(one, str) and "=" in one else (one, None) for one in stamps]
    elif isinstance(stamps, Mapping):
        pairs = [(name, one) for name, values in stamps.items() for one in _listed(values)]
    else:
        pairs = []
    if not 0 < len(pairs) <= IDS_IN_A_MESSAGE:
        raise ValueError(f"{stamps!r:.80} is not 1 to {IDS_IN_A_MESSAGE} stamps: write name=value")
    return tuple(dict.fromkeys(_stamp(name, value) for name, value in pairs))


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else list(values) if isinstance(values, tuple) else [values]


def _stamp(name: Any, value: Any) -> Revocable:
    text = str(value) if isinstance(value, str | int | float) else ""
    if (
        not isinstance(name, str)
        or not name
        or not text
        or len(f"{name}{text}".encode("utf-8", "surrogatepass")) > _LONGEST_STAMP
    ):
        what = f"{name!r:.40}" if value is None else f"{name!r:.40}={value!r:.40}"
        raise ValueError(f"{what} is no stamp: write name=value, {_LONGEST_STAMP} bytes at most")
    return name, text


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
