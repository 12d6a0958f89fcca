"""Signatures of messages: what they cover, and who checks them. `docs/security.md` tells the design.

Covered is all that decides what runs with which arguments, and who hears of it. Left out is what changes on a
message's legitimate way: its address, priority and TTL, when it is due and how often it was tried, and the notes of
brokers and workers. So a copy that a worker or the broker makes of a message keeps its signature.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from amqptasks.errors import ConfigError, SerializationError
from amqptasks.message import Envelope
from amqptasks.protocol.keys import SigningKey, VerificationKey, signing_key, verification_key

__all__ = ["KEY_HEADER", "SIGNATURE_HEADER", "Keyring"]

SIGNATURE_HEADER = "x-signature"
KEY_HEADER = "x-signature-key"

#: What it is a signature of: those of another scheme, or of another program with the same key, do not fit.
_SCHEME = b"amqptasks message 1\n"
#: Headers that change on the way. `timestamp_in_ms` is set by brokers that stamp what comes in.
_FREE = frozenset({"eta", "retries", SIGNATURE_HEADER, KEY_HEADER, "CC", "BCC", "timestamp_in_ms"})
#: Notes of workers about failures, crashes and rate limits; of brokers, federation and shovels about a way. Every other
#: header is covered, so that one that means something to a worker or a task cannot be put in.
_FREE_PREFIXES = (
    "x-task-",
    "x-amqptasks-crashes",
    "x-amqptasks-home",
    "x-amqptasks-turn",
    "x-amqptasks-passed",
    "x-amqptasks-published",
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
    "x-opt-",
    "x-received-from",
    "x-shovelled",
    "x-routed-by",
    "x-stream-",
)
_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME


def _covered(
    key_id: str,
    headers: Mapping[Any, Any],
    content_type: str | None,
    correlation_id: str | None,
    reply_to: str | None,
    body: bytes,
) -> bytes:
    """The bytes that are signed. Raises `TypeError` for a header that has no one form on both sides of the wire."""
    table = {
        name: value
        for name, value in headers.items()
        if name not in _FREE and (name[:2] != "x-" or not name.startswith(_FREE_PREFIXES))
    }
    # JSON has no line break outside of a string, and none inside: what follows the second one is the body.
    head = orjson.dumps([key_id, content_type, correlation_id, reply_to, table], option=_OPTIONS)
    return b"".join((_SCHEME, head, b"\n", body))


class Keyring:
    """The keys of this process.

    Args:
        signs: the key that signs; None in a process that only verifies.
        verify: further keys that verify.
        accept_unsigned: whether a message without any signature is taken.
    """

    def __init__(
        self, signs: SigningKey | None, verify: Iterable[VerificationKey] = (), *, accept_unsigned: bool = False
    ) -> None:
        self._signs = signs
        self._keys = {key.id: key for key in (*verify, *([signs] if signs is not None else []))}
        self._accept_unsigned = accept_unsigned

    @classmethod
    def read(cls, signs: str | None, verify: Iterable[str], *, accept_unsigned: bool) -> Keyring | None:
        """The keys in these texts; None where there are none. Raises `ValueError`, without the key."""
        made = cls(
            None if signs is None else signing_key(signs),
            [verification_key(one) for one in verify],
            accept_unsigned=accept_unsigned,
        )
        return made if made._keys else None

    def __str__(self) -> str:
        parts = [f"{self._signs.algorithm} key {self._signs.id} signs"] if self._signs else ["no key signs"]
        parts += [f"{one.algorithm} key {one.id} verifies" for one in self._keys.values() if one is not self._signs]
        if self._accept_unsigned:
            parts.append("unsigned messages are taken too")
        return ", ".join(parts)

    @property
    def can_sign(self) -> bool:
        """Whether this process has a key that signs."""
        return self._signs is not None

    def sign(self, envelope: Envelope) -> None:
        """Sign a message, in place. Raises what `signature` raises."""
        envelope.headers.update(
            self.signature(
                envelope.headers, envelope.content_type, envelope.correlation_id, envelope.reply_to, envelope.body
            )
        )

    def signature(
        self,
        headers: Mapping[Any, Any],
        content_type: str | None,
        correlation_id: str | None,
        reply_to: str | None,
        body: bytes,
    ) -> dict[str, str]:
        """The headers that sign a message.

        Raises:
            ConfigError: this process has no key that signs.
            SerializationError: a header cannot be signed; it is named.
        """
        key = self._signs
        if key is None:
            raise ConfigError(
                "this process has keys that verify messages and none that signs them, so what it sends would be "
                "refused: set security.signing_key"
            )
        try:
            data = _covered(key.id, headers, content_type, correlation_id, reply_to, body)
        except (TypeError, ValueError) as error:
            raise SerializationError(f"the message cannot be signed: {_unsignable(headers) or error}") from None
        return {SIGNATURE_HEADER: base64.b64encode(key.sign(data)).decode(), KEY_HEADER: key.id}

    def problem(
        self,
        headers: Mapping[Any, Any],
        content_type: str | None,
        correlation_id: str | None,
        reply_to: str | None,
        body: bytes,
    ) -> str | None:
        """Why a message is not to be believed; None for one that is. Never raises, whatever the message holds."""
        signature, key_id = headers.get(SIGNATURE_HEADER), headers.get(KEY_HEADER)
        if signature is None and key_id is None:
            if self._accept_unsigned:
                return None
            return f"the message is not signed (no header {SIGNATURE_HEADER}), and this worker takes only signed ones"
        key = self._keys.get(key_id) if isinstance(key_id, str) else None
        if key is None:
            return f"signed with key {key_id!r:.40}, which this worker does not have; it has {', '.join(self._keys)}"
        try:
            given = base64.b64decode(signature or "", validate=True)
            data = _covered(key.id, headers, content_type, correlation_id, reply_to, body)
        except (TypeError, ValueError):
            return f"the signature (key {key.id}), or a header that it covers, has a form that no signer writes"
        if key.verify(data, given):
            return None
        return f"the signature (key {key.id}) is not of this message: something in it is not what was signed"


def _unsignable(headers: Mapping[Any, Any]) -> str | None:
    """Which header it is."""
    for name, value in headers.items():
        try:
            orjson.dumps(value, option=_OPTIONS)
        except (TypeError, ValueError):
            return f"header {name!r:.80} is a {type(value).__name__}; write it as text, number, list or table"
    return None
