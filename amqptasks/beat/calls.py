"""Ticks become messages here."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.beat.agenda import Tick
from amqptasks.broker.wire import encode_properties
from amqptasks.config import Settings
from amqptasks.errors import AmqpTasksError, ConfigError
from amqptasks.message import Envelope
from amqptasks.periodic import Entry, entries_of
from amqptasks.topology.build import beat_queue
from amqptasks.topology.delays import delay_key, deliver_exchange, queue_target, unroutable_exchange

__all__ = ["TickCalls", "checked_entries"]

#: Celery's header with the name of the entry; and ours, with the moment that the tick is for.
NAME_HEADER, DUE_HEADER = "periodic_task_name", "x-amqptasks-due"
_log = structlog.get_logger("amqptasks.beat")


def checked_entries(app: AmqpTasks, settings: Settings | None = None) -> list[Entry]:
    """The app's periodic calls, each of which can be sent. Raises `ConfigError` that names the entry.

    `settings`: newer ones, for their schedule; the app's by default.
    """
    entries, calls = entries_of(app, settings or app.settings), TickCalls(app)
    for entry in entries:
        if entry.task not in app.tasks:
            _log.warning("No such task here; it is sent all the same", schedule=entry.name, task=entry.task)
        calls.check(entry)
    return entries


class TickCalls:
    """Makes the messages that a beat sends."""

    def __init__(self, app: AmqpTasks) -> None:
        self._app = app
        self._prefix = app.settings.topology.prefix

    def check(self, entry: Entry) -> None:
        """Raises `ConfigError` for an entry that cannot be sent."""
        queue, declared = entry.options.get("queue"), self._app.settings.queues
        if queue is not None and queue not in declared:
            raise ConfigError(
                f"schedule {entry.name!r}: queue {queue!r} is not declared; queues: {', '.join(sorted(declared))}"
            )
        try:
            encode_properties(self.tick(Tick(entry, datetime.now(UTC), entry.name)))
        except (AmqpTasksError, TypeError, ValueError) as error:
            raise ConfigError(f"schedule {entry.name!r}: {error}") from None

    def tick(self, tick: Tick) -> Envelope:
        """The message of a tick. Raises what `Calls.prepare` raises."""
        entry = tick.entry
        headers = {
            **entry.options.get("headers", {}),
            NAME_HEADER: entry.name,
            DUE_HEADER: tick.due.isoformat(),
        }
        options = {**entry.options, "headers": headers, "task_id": tick.task_id}
        callee = self._app._callee(entry.task)
        envelope = self._app.calls.prepare(callee, entry.args, entry.kwargs, **options).envelope
        if envelope.exchange == self._prefix:
            # By the foot of the delay ladder. A queue that is full refuses nothing there, and what no queue takes is
            # kept: nobody stands at a beat's side to be told.
            envelope.exchange = deliver_exchange(self._prefix)
            envelope.routing_key = delay_key(0, queue_target(envelope.routing_key))
        return self._app.calls.signed(envelope)

    def to_own_queue(self, body: bytes) -> Envelope:
        """A message to the beats' own queue."""
        queue = beat_queue(self._prefix)
        return Envelope(self._prefix, queue, body, correlation_id=str(uuid.uuid4()))

    def unroutable(self, envelope: Envelope) -> Envelope:
        """The same message, to where what no queue takes is kept."""
        envelope.exchange, envelope.routing_key = unroutable_exchange(self._prefix), envelope.routing_key
        return envelope

    @staticmethod
    def reply(to: str, correlation_id: str, table: dict[str, Any] | Sequence[Any]) -> Envelope:
        """The answer to a command. Who asked may be gone."""
        body = json.dumps(table).encode()
        return Envelope("", to, body, correlation_id=correlation_id, delivery_mode=1, mandatory=False)
