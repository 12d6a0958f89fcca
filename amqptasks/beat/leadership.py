"""One beat's place among all: whether it leads, and what a leader does.

The state is one message in a queue of which one consumer at a time is active (RabbitMQ, "Single Active Consumer"). Who
is given it leads, and holds it unacknowledged. A tick, the state that says so and the ack of the state before are one
transaction on the channel that holds it (`broker/transactions.py`): a leader that is killed has sent the tick and said
so, or neither; one that the broker has given up cannot send any more, however long it believes to lead.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from amqptasks.beat.agenda import Agenda, Tick
from amqptasks.beat.calls import TickCalls
from amqptasks.beat.commands import Command, answer, read_command
from amqptasks.beat.roster import Roster
from amqptasks.beat.state import State, UnknownVersion
from amqptasks.broker.consumer import Incoming
from amqptasks.broker.transactions import TransactionalConsumer
from amqptasks.errors import AmqpTasksError, DecodeError
from amqptasks.events import BeatTick, Bus
from amqptasks.message import Envelope
from amqptasks.periodic import Entry
from amqptasks.topology.build import beat_queue

__all__ = ["Leadership"]

_PREFETCH = 1000
#: So many ticks go into one transaction.
_BATCH = 200
#: The state is written anew so often at least: a broker takes a message back that is held for too long
#: (``consumer_timeout``), and it says up to when the schedule was served.
_REFRESH = timedelta(seconds=20)
_LONGEST_SLEEP = 1.0
#: How long an entry waits whose tick the broker has refused.
_REFUSED = timedelta(minutes=1)
_NOTHING: Mapping[str, tuple[Tick, Envelope]] = {}

_log = structlog.get_logger("amqptasks.beat")


class Leadership:
    """Belongs to the loop of one beat.

    Args:
        call_later: the loop's timer; returns what `cancel` takes.
        on_lost: the channel is gone, with whether the queue is missing.
        on_unknown: the state was written by a newer version, and this beat cannot lead.
    """

    def __init__(
        self,
        roster: Roster,
        calls: TickCalls,
        prefix: str,
        bus: Bus,
        *,
        call_later: Callable[[float, Callable[[], None]], Any],
        cancel: Callable[[Any], None],
        on_ready: Callable[[], None],
        on_lost: Callable[[str, bool], None],
        on_unknown: Callable[[str], None],
    ) -> None:
        self._roster = roster
        #: The settings' entries have changed, and the agenda has not.
        self._edited = False
        self._calls = calls
        self._bus = bus
        self._call_later, self._cancel = call_later, cancel
        self._on_ready, self._on_lost, self._on_unknown = on_ready, on_lost, on_unknown
        self.consumer = TransactionalConsumer(
            beat_queue(prefix), _PREFETCH, on_message=self._message, on_ready=self._ready, on_lost=self._lost
        )
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self.last_tick: datetime | None = None
        self._timer: Any = None
        #: What to call when the last state is written.
        self._stopping: Callable[[], None] | None = None
        self._said_last = False
        #: Entries of which was said that they wait for a clock that was put back.
        self._told_ahead: frozenset[str] = frozenset()
        #: Entries with which the broker has refused a commit, and until when they wait; they do not hold up the others.
        self._held_back: dict[str, datetime] = {}
        self._forget()

    def _forget(self) -> None:
        self._agenda: Agenda | None = None
        #: The newest state that has come before this beat leads.
        self._found: State | None = None
        #: The state's message. None while it is on its way, and before there is one.
        self._held: Incoming | None = None
        self._first = False
        self._written: datetime | None = None
        #: Whether a commit is on its way, and the entries whose ticks are in it.
        self._committing = False
        self._sending: set[str] = set()
        #: Whether the active consumer is this one, and what it has sent to itself since.
        self._active, self._probe = False, ""
        #: To be acknowledged with the next commit, to be published with it, and commands to be answered.
        self._acks: list[Incoming] = []
        self._parked: list[Envelope] = []
        self._commands: list[tuple[Incoming, Command]] = []

    @property
    def leads(self) -> bool:
        """Whether this beat was given the state."""
        return self._agenda is not None

    @property
    def next_due(self) -> datetime | None:
        """When the next tick is due that this beat is to send; in the past while one is late."""
        return None if self._agenda is None else self._agenda.next_due

    def stop(self, then: Callable[[], None]) -> None:
        """Write down up to when the schedule was served, if there is something to write; then call `then`."""
        self._stopping = then
        self._plan(0.0)

    def edit(self, entries: Sequence[Entry]) -> None:
        """Go on with these entries of the settings and the code."""
        self._roster.own = {entry.name: entry for entry in entries}
        self._edited = True
        self._plan(0.0)

    @property
    def entries(self) -> int:
        """How many entries this beat serves, or would serve as far as it knows."""
        return len(self._roster.own if self._agenda is None else self._agenda.entries)

    # -- taking over ----------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        self._on_ready()
        # Nobody is told that the queue is empty, nor who is active. A message of one's own tells both.
        self._commit([self._probe_message("")])

    def _probe_message(self, probe: str) -> Envelope:
        return self._calls.to_own_queue(json.dumps({"probe": probe}).encode())

    def _message(self, incoming: Incoming) -> None:
        self._active = True
        try:
            table = json.loads(incoming.body)
            if "state" in table:
                self._take(incoming, State.from_table(table["state"]))
            elif "probe" in table:
                self._acks.append(incoming)
                if self._agenda is None and self._probe and table["probe"] == self._probe:
                    # Everything that was in the queue when this beat became the active one has come before it.
                    self._begin(self._found)
            else:
                self._commands.append((incoming, read_command(table, incoming)))
        except UnknownVersion as error:
            self._on_unknown(str(error))
            return
        except (DecodeError, ValueError, TypeError, AttributeError) as error:
            _log.error("Not a message for a beat; dropped", error=str(error)[:300])
            self._acks.append(incoming)
        self._plan(0.0)

    def _take(self, incoming: Incoming, state: State) -> None:
        """There is one state, unless the broker has failed in the middle of a commit. Then the newest counts."""
        if self._agenda is None:
            if self._found is not None and state.serial <= self._found.serial:
                self._acks.append(incoming)
                return
            self._found = state
        elif (state.lineage, state.serial) != (self._agenda.state.lineage, self._agenda.state.serial):
            self._acks.append(incoming)
            return
        if self._held is not None:
            self._acks.append(self._held)
        self._held = incoming

    def _begin(self, state: State | None) -> None:
        if state is None:
            _log.info("The broker holds no state: the schedule begins now")
            state, self._first = State.new(datetime.now(UTC)), True
        entries, self._edited = self._roster.entries(state), False
        self._agenda = Agenda(entries, state, datetime.now(UTC))
        self._agenda.held_back = self._held_back
        self._written = None
        _log.info("Leading", entries=len(entries), serial=state.serial, through=state.through.isoformat())

    def _lost(self, reason: str, missing: bool) -> None:
        if self._agenda is not None:
            log = _log.info if self._stopping is not None else _log.warning
            log("Leading no more", reason=reason)
        if self.consumer.refused and self._sending:
            # The broker does not say with which: each waits for a while of its own, and then goes alone.
            _log.error("The broker refuses a tick", schedules=sorted(self._sending), reason=reason)
            now, alone = datetime.now(UTC), len(self._sending) == 1
            for place, name in enumerate(sorted(self._sending)):
                self._held_back[name] = now + (_REFUSED if alone else timedelta(seconds=1 + place))
        self._forget()
        self._on_lost(reason, missing)

    # -- leading --------------------------------------------------------------------------------------------------

    def _plan(self, seconds: float) -> None:
        if self._timer is not None:
            self._cancel(self._timer)
        self._timer = self._call_later(max(0.0, min(seconds, _LONGEST_SLEEP)), self._work)

    def _work(self) -> None:
        """Whatever is to be done now, in one commit. Called again when that is done, or something comes."""
        self._timer = None
        if self._committing:
            return
        if self._agenda is not None and (self._held is not None or self._first):
            self._lead(self._agenda)
            return
        if self._active and self._agenda is None and not self._probe:
            self._probe = str(uuid.uuid4())
            self._commit([self._probe_message(self._probe)])
        elif self._stopping is not None and self._agenda is None:
            self._stopping()

    def _lead(self, agenda: Agenda) -> None:
        now = datetime.now(UTC)
        if self._stopping is not None and self._said_last:
            self._stopping()
            return
        self._tell_ahead(agenda.ahead(now))
        ticks = agenda.due(now, _BATCH)
        full = len(ticks) >= _BATCH
        changed, replies = bool(ticks) or self._edited, []
        if self._edited:
            # Only now: what was due of the entries as they were is among the ticks.
            self._edited = False
            agenda.arrange(self._roster.entries(agenda.state), now)
        for incoming, command in self._commands:
            self._acks.append(incoming)
            found = answer(command, agenda, self._roster, now, self._me)
            changed = changed or found.changed
            ticks += [found.tick] if found.tick is not None else []
            if command.reply_to:
                replies.append(self._calls.reply(command.reply_to, command.request, found.table))
        self._commands.clear()
        envelopes, self._parked = self._parked, []
        sent = {one.task_id: (one, message) for one in ticks if (message := self._message_of(one)) is not None}
        envelopes += [message for _, message in sent.values()]
        self._said_last = self._stopping is not None
        if changed or self._said_last or self._written is None or now - self._written >= _REFRESH:
            envelopes.append(self._state(agenda, now, through=not full))
        envelopes += replies
        if envelopes or self._acks:
            self._commit(envelopes, sent)
        else:
            due = agenda.next_due
            self._plan(_LONGEST_SLEEP if due is None else (due - now).total_seconds())

    def _tell_ahead(self, ahead: Mapping[str, datetime]) -> None:
        news = ahead.keys() - self._told_ahead
        if news:
            _log.warning(
                "Served up to a moment that is to come, as after a clock that was wrong: no tick until then. Begin now "
                "with `amqptasks schedule resume`",
                schedules=sorted(news),
                until=max(ahead[name] for name in news).isoformat(),
            )
        self._told_ahead = frozenset(ahead)

    def _state(self, agenda: Agenda, now: datetime, *, through: bool) -> Envelope:
        """The state that is to take the place of the one that is held."""
        state = agenda.state
        state.serial += 1
        if through:
            state.through = now
        if self._held is not None:
            self._acks.append(self._held)
        self._held, self._first, self._written = None, False, now
        return self._calls.to_own_queue(state.to_bytes(leader=self._me))

    def _message_of(self, tick: Tick) -> Envelope | None:
        try:
            return self._calls.tick(tick)
        except (AmqpTasksError, TypeError, ValueError) as error:
            _log.error("Cannot be sent", schedule=tick.entry.name, task=tick.entry.task, error=str(error))
            return None

    def _commit(self, envelopes: list[Envelope], sent: Mapping[str, tuple[Tick, Envelope]] = _NOTHING) -> None:
        acks, self._acks = self._acks, []
        self._committing, self._sending = True, {tick.entry.name for tick, _ in sent.values()}

        def done(returned: list[str]) -> None:
            self._committing, self._sending = False, set()
            for task_id, (tick, envelope) in sent.items():
                if task_id in returned:
                    _log.error("No queue takes it; kept as unroutable", schedule=tick.entry.name, task_id=task_id)
                    self._parked.append(self._calls.unroutable(envelope))
                else:
                    self._held_back.pop(tick.entry.name, None)
                    self._tell(tick)
            self._plan(0.0)

        self.consumer.commit(envelopes, acks, done)

    def _tell(self, tick: Tick) -> None:
        entry, now = tick.entry, datetime.now(UTC)
        self.last_tick = now
        _log.info("Sent", schedule=entry.name, task=entry.task, task_id=tick.task_id, due=tick.due.isoformat())
        self._bus.emit(BeatTick(entry.name, entry.task, tick.task_id, tick.due, now))
