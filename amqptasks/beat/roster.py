"""The entries of a beat: those of its settings and code, and those that were added by command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.beat.calls import TickCalls
from amqptasks.beat.signatures import entry_problem, entry_signature
from amqptasks.beat.state import State
from amqptasks.errors import ConfigError
from amqptasks.periodic import Entry, added_entry

__all__ = ["Roster"]

#: The state of the schedule is one message, written anew with each tick. What was added may take this much of it.
_MAX_ADDED_BYTES = 256 * 1024

_log = structlog.get_logger("amqptasks.beat")


class Roster:
    """Knows which entries there are, and which may be added.

    Args:
        own: the entries of the settings and of the code. They win over added ones of the same name.
    """

    def __init__(self, app: AmqpTasks, calls: TickCalls, own: Sequence[Entry]) -> None:
        self._app, self._calls = app, calls
        self.own = {entry.name: entry for entry in own}

    def entries(self, state: State) -> list[Entry]:
        """All of them. One that was added and cannot be sent by this beat is told of, and kept for the next."""
        found = dict(self.own)
        for name, added in state.added.items():
            if name in self.own:
                _log.warning("An entry of the settings hides the one that was added by command", schedule=name)
                continue
            try:
                found[name], state.added[name] = self._made(name, added)
            except ConfigError as error:
                _log.error("An entry that was added by command is not served", schedule=name, error=str(error))
        return [found[name] for name in sorted(found)]

    def add(self, state: State, name: str, added: Mapping[str, Any]) -> tuple[Entry, str | None]:
        """Note in the state that this entry is added, or changed. Returns it, and a warning if there is one.

        Raises `ConfigError` for one that cannot be sent, and for one that belongs to the settings.
        """
        if name in self.own:
            raise ConfigError(f"entry {name!r} stands in the settings or the code of the beat: change it there")
        entry, kept = self._made(name, added)
        both = {**state.added, name: kept}
        if (size := len(json.dumps(both))) > _MAX_ADDED_BYTES:
            raise ConfigError(
                f"schedule {name!r}: with it the added entries have {size} bytes, and {_MAX_ADDED_BYTES} is what is "
                "kept in the broker; remove some, or put their arguments elsewhere"
            )
        state.added = both
        unknown = entry.task not in self._app.tasks
        return entry, f"no task {entry.task!r} is known to the beat; it is sent all the same" if unknown else None

    def remove(self, state: State, name: str) -> None:
        """Note in the state that this entry, which was added, is gone. Raises `ConfigError` for one of the settings."""
        if name not in state.added:
            raise ConfigError(f"entry {name!r} stands in the settings or the code of the beat: remove it there")
        del state.added[name]
        if name not in self.own:
            state.paused.discard(name)

    def _made(self, name: str, added: Mapping[str, Any]) -> tuple[Entry, dict[str, Any]]:
        """The entry of what was added, and as it is to be kept: signed with the key of today."""
        table, signed = added.get("entry"), added.get("signed", {})
        if not isinstance(table, Mapping) or not isinstance(signed, Mapping):
            raise ConfigError(f"schedule {name!r}: not an entry: {added!r:.200}")
        keys = self._app.calls.keys
        problem = entry_problem(keys, name, table, signed)
        if problem is not None:
            raise ConfigError(f"schedule {name!r}: {problem}; add it with settings that have security.signing_key")
        entry = added_entry(name, table, self._app.settings)
        self._calls.check(entry)
        return entry, {"entry": dict(table), "signed": entry_signature(keys, name, table)}
