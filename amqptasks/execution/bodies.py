"""Bodies of task messages: who signed them, what stands in them, and the same with other arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amqptasks.claims import Claim, Claims, read_body
from amqptasks.config import Settings
from amqptasks.execution.job import Job
from amqptasks.execution.reports import persist
from amqptasks.protocol.compression import compress
from amqptasks.protocol.serializers import accepted
from amqptasks.protocol.signing import Keyring
from amqptasks.protocol.task import Body, decode_body, encode_arguments

__all__ = ["Bodies"]


class Bodies:
    """Reads and writes bodies by one app's settings.

    With `keys` a message that they did not sign has a `problem`. `claims` keeps large bodies.
    """

    def __init__(self, settings: Settings, keys: Keyring | None, claims: Claims | None) -> None:
        self._keys = keys
        self._claims = claims
        self._accept = accepted(settings.serialization.accept_content)
        self._limit = settings.serialization.max_body

    @property
    def blocks(self) -> bool:
        """Whether reading one may wait for a server or a disk."""
        return self._claims is not None

    def problem(self, job: Job) -> str | None:
        """What is wrong with a message's signature, before anything of its body is read."""
        if self._keys is None:
            return None
        return self._keys.problem(job.headers, job.content_type, job.correlation_id, job.reply_to, job.body)

    def read(self, job: Job) -> tuple[Body, Claim | None]:
        """The decoded body, and the claim that came in its place. Raises `DecodeError`, `StoreUnavailable`."""
        plain, content_type, claim = read_body(self._claims, job.body, job.content_type)
        return decode_body(plain, content_type, job.headers.get("compression"), self._accept, self._limit), claim

    def changed(
        self, job: Job, body: Body, claim: Claim | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, dict[str, str] | None]:
        """The body with other arguments, and its signature. Raises `SerializationError`, `MessageTooLarge`."""
        content_type = job.content_type or "" if claim is None else claim.content_type
        made = encode_arguments(job.headers["task"], args, kwargs, body.embed, self._accept[content_type])
        compression = job.headers.get("compression")
        if compression:
            made = compress(made, compression)
        claims = self._claims
        if claim is not None and claims is not None:
            kept: list[bytes] = []
            persist("A large body", lambda: kept.append(claims.written(made, content_type)), job.correlation_id)
            made = kept[0]
        if self._keys is None:
            return made, None
        return made, self._keys.signature(job.headers, job.content_type, job.correlation_id, job.reply_to, made)
