"""Bodies of task messages: who signed them, what stands in them, and the same with other arguments."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from amqptasks.claims import CLAIM_TYPE, Claim, Claims, read_body
from amqptasks.config import Settings
from amqptasks.errors import StoreUnavailable
from amqptasks.execution.job import Job
from amqptasks.execution.reports import persist
from amqptasks.protocol.compression import compress
from amqptasks.protocol.serializers import accepted
from amqptasks.protocol.signing import Keyring
from amqptasks.protocol.task import Body, decode_body, encode_arguments

__all__ = ["Bodies"]

#: A task whose body cannot be had waits in the broker for as long as the store is away already, within these bounds.
_WAIT_FIRST, _WAIT_MAX = 10.0, 120.0
#: A store that is away is not asked for so long by this process, and told of in the log so often at most.
_REST_SECONDS, _SAY_SECONDS = 1.0, 10.0
_log = structlog.get_logger("amqptasks.worker")


class Bodies:
    """Reads and writes bodies by one app's settings.

    With `keys` a message that they did not sign has a `problem`. `claims` keeps large bodies.
    """

    def __init__(self, settings: Settings, keys: Keyring | None, claims: Claims | None) -> None:
        self._keys = keys
        self._claims = claims
        self._accept = accepted(settings.serialization.accept_content)
        self._limit = settings.serialization.max_body
        #: Since when the store is away, when it is asked again, and why it was away; when that was said.
        self._away: tuple[float, float, str] | None = None
        self._said = -_SAY_SECONDS

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
        plain, content_type, claim = job.body, job.content_type, None
        if content_type == CLAIM_TYPE:
            plain, content_type, claim = self._claimed(job)
        return decode_body(plain, content_type, job.headers.get("compression"), self._accept, self._limit), claim

    def _claimed(self, job: Job) -> tuple[bytes, str | None, Claim | None]:
        now = time.monotonic()
        if self._away is not None and now < self._away[1]:
            raise StoreUnavailable(self._away[2])
        try:
            found = read_body(self._claims, job.body, job.content_type)
        except StoreUnavailable as error:
            self._away = self._away[0] if self._away else now, time.monotonic() + _REST_SECONDS, str(error)
            if now - self._said >= _SAY_SECONDS:
                self._said = now
                _log.error("Tasks wait for their bodies", task_id=job.headers.get("id"), error=str(error))
            raise
        self._away = None
        return found

    @property
    def wait(self) -> float:
        """Seconds until a message whose body could not be had should come again."""
        away = 0.0 if self._away is None else time.monotonic() - self._away[0]
        return min(max(away, _WAIT_FIRST), _WAIT_MAX) * random.uniform(0.75, 1.25)

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
