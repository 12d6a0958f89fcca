"""Requests of remote control: what is one, and for whom it is."""

from __future__ import annotations

import fnmatch
import json
import re
import signal
from collections.abc import Mapping
from typing import Any

from amqptasks.broker.mailbox import REPLY_EXCHANGE

__all__ = ["addressed", "decoded", "parts"]

_MAX_REQUEST = 1 << 20
_MATCH_SECONDS = 0.05


class _TakesTooLong(ValueError):
    """A pattern was not matched in time."""


def decoded(body: bytes) -> dict[str, Any]:
    """The request in a body. Raises `ValueError` for what is none."""
    if len(body) > _MAX_REQUEST:
        raise ValueError(f"{len(body)} bytes")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError("not an object")
    return request


def parts(request: Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """Method, arguments, and the routing key of the answer."""
    method, arguments, reply_to = request.get("method"), request.get("arguments") or {}, request.get("reply_to")
    if not isinstance(method, str) or not isinstance(arguments, dict):
        raise ValueError("method must be a text and arguments an object")
    if not reply_to:
        return method, arguments, None
    if not isinstance(reply_to, dict) or reply_to.get("exchange") != REPLY_EXCHANGE:
        # Anywhere else, an answer would be this worker's message in a queue of the requester's choice.
        raise ValueError(f"reply_to must name the exchange {REPLY_EXCHANGE}")
    return method, arguments, str(reply_to.get("routing_key"))


def addressed(request: Mapping[str, Any], node: str) -> bool:
    """Whether the request is for this node: named, matched by the pattern, or for everybody."""
    destination, pattern, matcher = request.get("destination"), request.get("pattern"), request.get("matcher")
    if destination:
        return isinstance(destination, list) and node in destination
    if pattern and matcher:
        if not isinstance(pattern, str) or len(pattern) > 255:
            raise ValueError("pattern must be a text of at most 255 characters")
        if matcher == "glob":
            return fnmatch.fnmatchcase(node, pattern)
        return matcher == "pcre" and _matches(pattern, node)
    return True


def _matches(pattern: str, node: str) -> bool:
    """Whether a regular expression matches, as far as that can be said in time.

    Some take longer than the world is old, and hold the interpreter's lock meanwhile: no probe would be answered. The
    time is that of this process's work, so that a busy machine does not matter. Belongs to the main thread.
    """
    before = signal.signal(signal.SIGVTALRM, _give_up)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _MATCH_SECONDS)
        return re.match(pattern, node) is not None
    except (re.error, OverflowError, RecursionError, _TakesTooLong) as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _give_up(_signum: int, _frame: object) -> None:
    raise _TakesTooLong(f"takes longer than {_MATCH_SECONDS:g} s")
