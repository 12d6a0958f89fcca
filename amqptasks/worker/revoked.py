"""Revoked tasks: which ones must not run, as every leader reads it from the journal in the broker.

The journal is a stream: a revoke is durable when it is published, needs no worker, and is read by all of them, also by
those that start later. A leader reads all of it before it takes its first task, and goes on reading. To know where the
end is it publishes a marker and waits for that: how many messages a stream holds, the broker says seconds late.

What is read is acknowledged at once: a stream keeps its messages, an acknowledgement only asks for more (RabbitMQ,
"Streams").
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from itertools import islice
from typing import Any

import structlog

from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.config.sections import RevokeSettings
from amqptasks.errors import DecodeError, PublishError
from amqptasks.message import Envelope
from amqptasks.protocol.revokes import Revocable, Revocation, decode_journal, marker, signal_number
from amqptasks.topology.build import revoked_queue

__all__ = ["RevokeBook"]

_PREFETCH = 500
_REOPEN_FIRST, _REOPEN_MAX = 1.0, 15.0
#: A leader that reads nothing for so long does not wait for the end any longer; less when it cannot publish its marker.
_PATIENCE, _PATIENCE_BLOCKED = 10.0, 1.0
_TICK_SECONDS = 60.0
#: A revoke that was broadcast reaches all leaders at once: one of them writes it into the journal.
_JOURNAL_WITHIN = 0.2
_log = structlog.get_logger("amqptasks.worker")


class RevokeBook:
    """The revoked tasks that one leader knows. Belongs to its loop.

    Args:
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        blocked: whether the broker takes no messages at the moment.
        act: called with ids and stamps that were revoked just now and the signal for those that run, None to let them
            finish.
    """

    def __init__(
        self,
        prefix: str,
        settings: RevokeSettings,
        *,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        blocked: Callable[[], bool],
        act: Callable[[tuple[Revocable, ...], int | None], None],
    ) -> None:
        self._prefix = prefix
        self._settings = settings
        self._publish = publish
        self._call_later = call_later
        self._blocked = blocked
        self._act = act
        #: Id or stamp -> when it is forgotten, in seconds of the epoch. The oldest first.
        self.known: dict[Revocable, float] = {}
        self._connection: Any = None
        self._stopped = False
        #: The stream's offset to go on with; None for its beginning.
        self._next: int | None = None
        self._marker = ""
        #: What to do when the end is reached.
        self._then: Callable[[], None] | None = None
        self._heard = 0.0
        self._complaint = ""
        self._pause = _REOPEN_FIRST
        #: The last tag that was read and not acknowledged.
        self._unacknowledged: tuple[int, int] | None = None
        #: Revokes that came another way, and are not seen in the journal yet.
        self._to_journal: dict[Revocable, Revocation] = {}
        self._consumer = Consumer(
            revoked_queue(prefix),
            _PREFETCH,
            on_message=self._message,
            on_ready=self._mark_end,
            on_lost=self._lost,
            arguments=lambda: {"x-stream-offset": "first" if self._next is None else self._next},
        )
        call_later(_TICK_SECONDS, self._tick)

    # -- life -----------------------------------------------------------------------------------------------------

    def up(self, connection: Any, then: Callable[[], None]) -> None:
        """Read on this connection, and call `then` when the end is reached, or cannot be."""
        self._connection = connection
        self._then = then
        self._heard = time.monotonic()
        self._consumer.open(connection)
        self._call_later(_PATIENCE_BLOCKED, self._lose_patience)

    def down(self, reason: str) -> None:
        """The connection is gone."""
        self._connection = self._then = None
        self._consumer.connection_lost(reason)

    def stop(self) -> None:
        """Read no more."""
        self._stopped = True
        self._then = None
        self._consumer.stop(lambda: None)

    def _reached_end(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()

    def _lose_patience(self) -> None:
        if self._then is None:
            return
        blocked = self._blocked()
        if time.monotonic() - self._heard < (_PATIENCE_BLOCKED if blocked else _PATIENCE):
            self._call_later(_PATIENCE_BLOCKED, self._lose_patience)
            return
        why = "the broker takes no messages" if blocked else f"nothing came for {_PATIENCE:g} s"
        self._go_without(f"the end of the journal of revokes was not found: {why}")

    def _go_without(self, why: str) -> None:
        if why != self._complaint:
            self._complaint = why
            _log.warning(
                "Revokes may be missed: working without the journal until it can be read",
                queue=self._consumer.queue,
                reason=why,
            )
        self._reached_end()

    def _lost(self, reason: str, missing: bool) -> None:
        if self._connection is None:
            return
        if missing:
            self._next = None
            # Nobody routes it, and so the supervisor hears that something of the topology is missing.
            self._publish(Envelope(self._prefix, self._consumer.queue, marker("")), lambda _error: None)
            self._go_without("its queue does not exist")
        elif "ACCESS_REFUSED" in reason:
            self._go_without(reason)
        self._call_later(self._pause, self._reopen)
        self._pause = min(self._pause * 2, _REOPEN_MAX)

    def _reopen(self) -> None:
        if self._connection is not None and not self._stopped:
            self._consumer.open(self._connection)

    def _tick(self) -> None:
        if self._stopped:
            return
        self._call_later(_TICK_SECONDS, self._tick)
        now = time.time()
        for key in [key for key, expires in self.known.items() if expires <= now]:
            del self.known[key]

    # -- reading --------------------------------------------------------------------------------------------------

    def _mark_end(self) -> None:
        """Consuming: find the end."""
        self._pause = _REOPEN_FIRST
        self._marker = str(uuid.uuid4())

        def done(error: PublishError | None) -> None:
            if error is not None:
                self._go_without(str(error))

        self._publish(Envelope(self._prefix, self._consumer.queue, marker(self._marker)), done)

    def _message(self, incoming: Incoming) -> None:
        self._heard = time.monotonic()
        offset = (incoming.properties.headers or {}).get("x-stream-offset")
        if isinstance(offset, int):
            self._next = offset + 1
        if self._unacknowledged is None:
            # Once a turn of the loop.
            self._call_later(0, self._acknowledge)
        self._unacknowledged = incoming.tag, incoming.epoch
        try:
            entry = decode_journal(incoming.body)
        except DecodeError as error:
            _log.error("Not an entry of the journal of revokes; passed over", error=str(error)[:200])
            return
        if isinstance(entry, Revocation):
            # What a broadcast brought before is not acted on twice.
            news = tuple([key for key in entry.keys if self._to_journal.pop(key, None) is None])
            self._enter(entry, news)
        elif entry == self._marker:
            self._complaint = ""
            self._reached_end()

    def _acknowledge(self) -> None:
        if self._unacknowledged is not None:
            tag, epoch = self._unacknowledged
            self._unacknowledged = None
            self._consumer.send_ack(tag, epoch, multiple=True)

    def _enter(self, entry: Revocation, news: tuple[Revocable, ...]) -> None:
        if entry.expires <= time.time():
            return
        known = self.known
        for key in entry.keys:
            known.pop(key, None)
            known[key] = entry.expires
        _shorten(known, self._settings.limit)
        if news:
            self._act(news, entry.signum)

    @property
    def idle(self) -> bool:
        """Whether everything that was broadcast stands in the journal."""
        return not self._to_journal

    # -- for remote control ---------------------------------------------------------------------------------------

    def revoked_ids(self) -> list[str]:
        """The ids that are remembered, the oldest first; stamps as ``name=value``."""
        return [key if isinstance(key, str) else "=".join(key) for key in self.known]

    def revoke(self, keys: tuple[Revocable, ...], terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """Revoke at once, for a command that was broadcast to all workers; one of them writes it into the journal.

        Raises `ValueError` for what is no signal.
        """
        signum = signal_number(signal)
        entry = Revocation(keys, time.time() + self._settings.expires, signum if terminate else None)
        for key in keys:
            self._to_journal[key] = entry
        _shorten(self._to_journal, self._settings.limit)
        self._enter(entry, keys)
        self._call_later(random.uniform(0, _JOURNAL_WITHIN), lambda: self._write(entry))

    def _write(self, entry: Revocation) -> None:
        """Into the journal, unless another leader was first."""
        if any(self._to_journal.get(key) is entry for key in entry.keys):
            self._publish(
                Envelope(self._prefix, self._consumer.queue, entry.encode()), lambda error: self._written(entry, error)
            )

    def _written(self, entry: Revocation, error: PublishError | None) -> None:
        if error is None:
            for key in entry.keys:
                self._to_journal.pop(key, None)
            return
        _log.error("A revoke cannot be kept; trying again", ids=len(entry.keys), error=str(error))
        self._call_later(_REOPEN_FIRST, lambda: self._write(entry))


def _shorten(table: dict[Revocable, Any], limit: int) -> None:
    """Forget the oldest beyond the limit. All at once: a look for the first key passes all that went before."""
    for key in list(islice(table, max(0, len(table) - limit))):
        del table[key]
