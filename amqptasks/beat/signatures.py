"""Signatures of entries that are added by command.

Whoever may publish to the beats' queue may add entries, and a beat signs what it sends. So an entry is believed only
when somebody who has a key vouches for it, wherever it comes from: a command, or a state in the broker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from amqptasks.protocol.signing import Keyring

__all__ = ["entry_problem", "entry_signature"]

#: Part of what is signed, so that the signature of a task's message fits no entry.
_KIND = "amqptasks.schedule"


def entry_signature(keys: Keyring | None, name: str, table: Mapping[str, Any]) -> dict[str, str]:
    """The signature of an entry; empty where nothing is signed. Raises `ConfigError` without a key that signs."""
    return {} if keys is None else keys.signature(_headers(name), None, _KIND, None, _body(table))


def entry_problem(keys: Keyring | None, name: str, table: Mapping[str, Any], signed: Mapping[str, Any]) -> str | None:
    """Why an entry is not to be believed; None for one that is."""
    if keys is None:
        return None
    return keys.problem({**_headers(name), **signed}, None, _KIND, None, _body(table))


def _headers(name: str) -> dict[str, str]:
    return {"entry": name}


def _body(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
