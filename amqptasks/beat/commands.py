"""What an operator may ask of the beat that leads: small JSON messages to the beats' queue, each with an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from amqptasks.beat.agenda import Agenda, Tick
from amqptasks.beat.roster import Roster
from amqptasks.broker.consumer import Incoming
from amqptasks.errors import ConfigError, DecodeError
from amqptasks.message import Envelope
from amqptasks.topology.build import beat_queue

__all__ = ["Answer", "Command", "answer", "command_envelope", "read_command"]

_VERBS = ("list", "pause", "resume", "run", "add", "remove")


@dataclass(frozen=True, slots=True)
class Command:
    """A wish, and where the answer goes. `request` is the same when it is delivered again; `added` is what to add."""

    verb: str
    name: str | None
    reply_to: str | None
    request: str
    added: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is replied, the tick that is to be sent with it, and whether the state has changed."""

    table: dict[str, Any]
    tick: Tick | None = None
    changed: bool = False


def command_envelope(
    prefix: str, verb: str, name: str | None, *, seconds: float, added: Mapping[str, Any] | None = None
) -> Envelope:
    """A command for whichever beat leads, worth something for so many seconds only. `added`: ``entry``, ``signed``."""
    table = {"command": verb, "name": name} | ({"added": added} if added is not None else {})
    return Envelope(
        prefix,
        beat_queue(prefix),
        json.dumps(table).encode(),
        correlation_id=str(uuid.uuid4()),
        # A run that nobody waits for any more would be a surprise.
        expiration=str(int(seconds * 1000)),
    )


def read_command(table: Mapping[str, Any], incoming: Incoming) -> Command:
    """The command in a message. Raises `DecodeError`."""
    verb, name, entry = table.get("command"), table.get("name"), table.get("added", {})
    properties = incoming.properties
    named = isinstance(name, str) or (name is None and verb == "list")
    if verb not in _VERBS or not named or not isinstance(entry, Mapping):
        raise DecodeError(f"neither a state nor a command: {table!r:.200}")
    request = properties.correlation_id or ""
    return Command(verb, name, properties.reply_to, request, entry)


def answer(command: Command, agenda: Agenda, roster: Roster, now: datetime, me: Mapping[str, Any]) -> Answer:
    """Do it. What cannot be done is said in the reply."""
    name, verb = command.name, command.verb
    if verb == "list" or name is None:
        return Answer({"leader": dict(me), "through": now.isoformat(), "entries": agenda.table(now)})
    if verb == "add":
        return _add(command, name, agenda, roster, now)
    state = agenda.state
    known = name in agenda.entries or {"resume": name in state.paused, "remove": name in state.added}.get(verb, False)
    if not known:
        near = get_close_matches(name, agenda.entries, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"entries: {', '.join(agenda.entries) or 'none'}"
        return Answer({"error": f"there is no entry {name!r}; {hint}"})
    if verb == "remove":
        return _remove(name, agenda, roster, now)
    if verb == "run":
        tick = agenda.run(name, now, command.request)
        return Answer({"task": tick.entry.task, "task_id": tick.task_id}, tick, changed=True)
    was = name in state.paused
    if verb == "pause":
        agenda.pause(name)
    else:
        agenda.resume(name, now)
    return Answer({"was_paused": was, "paused": verb == "pause"}, changed=True)


def _add(command: Command, name: str, agenda: Agenda, roster: Roster, now: datetime) -> Answer:
    before = agenda.entries.get(name)
    try:
        entry, warning = roster.add(agenda.state, name, command.added)
    except ConfigError as error:
        return Answer({"error": str(error)})
    agenda.arrange(roster.entries(agenda.state), now)
    was = None if before is None else repr(before.schedule)
    row = next(one for one in agenda.table(now) if one["name"] == entry.name)
    return Answer({"was": was, "warning": warning, "entry": row}, changed=True)


def _remove(name: str, agenda: Agenda, roster: Roster, now: datetime) -> Answer:
    try:
        roster.remove(agenda.state, name)
    except ConfigError as error:
        return Answer({"error": str(error)})
    agenda.arrange(roster.entries(agenda.state), now)
    return Answer({"removed": name, "still": name in agenda.entries}, changed=True)
