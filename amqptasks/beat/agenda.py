"""Which ticks are due. Pure: entries, state and a moment in, ticks out.

A tick that is late by up to `LATE` is sent whatever happens: leadership passes within that time. One that is later was
*missed*, because no beat ran, and the entry's `catch_up` says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from amqptasks.beat.state import Mark, State
from amqptasks.errors import ConfigError
from amqptasks.periodic import Entry

__all__ = ["LATE", "Agenda", "Tick"]

LATE = timedelta(seconds=10)
_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Tick:
    """One call that is to be sent now. `due` is when it was to be."""

    entry: Entry
    due: datetime
    task_id: str


class Agenda:
    """The entries of one beat, on the state that it has taken over. Changes the state as it goes.

    An entry that is new, or whose schedule has changed, begins where the state ends: nothing of the past is made up
    for, and nothing that was due while leadership passed is left out.
    """

    def __init__(self, entries: Sequence[Entry], state: State, now: datetime) -> None:
        self.state = state
        #: Entries that have to wait, whatever is due, and until when. Then their ticks go alone.
        self.held_back: dict[str, datetime] = {}
        self.arrange(entries, now if state.through > now + LATE else max(state.through, now - LATE))

    def arrange(self, entries: Sequence[Entry], begin: datetime) -> None:
        """Go on with these entries. Those that are new or have another schedule have no tick up to `begin`; nothing
        happens to the others.
        """
        state = self.state
        self.entries = {entry.name: entry for entry in entries}
        self._next: dict[str, datetime | None] = {}
        marks: dict[str, Mark] = {}
        for entry in entries:
            mark, schedule = state.marks.get(entry.name), _described(entry)
            if mark is None:
                mark = Mark(begin, schedule)
            elif mark.schedule != schedule:
                mark.done, mark.schedule = max(begin, mark.done), schedule
            marks[entry.name] = mark
            self._plan(entry, mark)
        # Of entries that are gone nothing is kept but that they were paused.
        state.marks = marks

    @property
    def next_due(self) -> datetime | None:
        """When the next tick is due."""
        held = self.held_back
        return min(
            (max(due, held[name]) if name in held else due for name, due in self._next.items() if due is not None),
            default=None,
        )

    def ahead(self, now: datetime) -> dict[str, datetime]:
        """Entries that were served up to a moment to come, and have no tick until then: a clock was put back."""
        late = now + LATE
        return {name: mark.done for name, mark in self.state.marks.items() if mark.done > late}

    def due(self, now: datetime, limit: int) -> list[Tick]:
        """The ticks that are to be sent now, `limit` or a few more; the state then says that they were."""
        found: list[Tick] = []
        for name, upcoming in self._next.items():
            if upcoming is None or upcoming > now or len(found) >= limit:
                continue
            if name not in self.held_back:
                found += self._due(self.entries[name], upcoming, now, limit)
            elif not found and self.held_back[name] <= now:
                found = self._due(self.entries[name], upcoming, now, limit)
                break
        if found:
            self.state.through = now
        return found

    def _due(self, entry: Entry, upcoming: datetime, now: datetime, limit: int) -> list[Tick]:
        mark = self.state.marks[entry.name]
        if entry.catch_up == "all":
            times = list(self._walk(entry, upcoming, now, limit))
            mark.done = times[-1]
        else:
            horizon = max(now - LATE, mark.done)
            times = list(self._walk(entry, self._after(entry, horizon), now))
            if not times and entry.catch_up == "one":
                times = self._last(entry, mark.done, horizon)
            mark.done = max([horizon, *times])
        ticks = [Tick(entry, due, self.state.task_id(entry.name, due)) for due in times]
        if ticks:
            mark.ran, mark.task_id = ticks[-1].due, ticks[-1].task_id
        self._plan(entry, mark)
        return ticks

    def _walk(self, entry: Entry, due: datetime | None, now: datetime, limit: int | None = None) -> Iterator[datetime]:
        count = 0
        while due is not None and due <= now and (limit is None or count < limit):
            yield due
            count += 1
            due = self._after(entry, due)

    def _last(self, entry: Entry, after: datetime, until: datetime) -> list[datetime]:
        """The last due moment of a time that may be long: looked for from its end."""
        span = _MINUTE
        while True:
            begin = max(after, until - span)
            times = list(self._walk(entry, self._after(entry, begin), until))
            if times or begin == after:
                return times[-1:]
            span *= 4

    def _plan(self, entry: Entry, mark: Mark) -> None:
        waits = not entry.enabled or entry.name in self.state.paused
        self._next[entry.name] = None if waits else self._after(entry, mark.done)

    @staticmethod
    def _after(entry: Entry, moment: datetime) -> datetime | None:
        try:
            return entry.schedule.next_after(moment)
        except (ConfigError, OverflowError):
            return None

    # -- commands -------------------------------------------------------------------------------------------------

    def pause(self, name: str) -> None:
        """No ticks of this entry until `resume`."""
        self.state.paused.add(name)
        self._next[name] = None

    def resume(self, name: str, now: datetime) -> None:
        """Ticks of this entry again, those from now on; also of one that is `ahead`."""
        self.state.paused.discard(name)
        if name in self.entries:
            mark = self.state.marks[name]
            mark.done = now if mark.done > now + LATE else max(mark.done, now)
            self._plan(self.entries[name], mark)
        else:
            self._next.pop(name, None)

    def run(self, name: str, now: datetime, request: str) -> Tick:
        """A tick besides the schedule. The same request gives the same task id."""
        mark = self.state.marks[name]
        mark.ran, mark.task_id = now, self.state.task_id(name, f"run {request}")
        return Tick(self.entries[name], now, mark.task_id)

    def table(self, now: datetime, count: int = 5) -> list[dict[str, Any]]:
        """What there is to know of each entry, with its next `count` ticks; for JSON."""
        return [self._row(entry, now, count) for entry in self.entries.values()]

    def _row(self, entry: Entry, now: datetime, count: int) -> dict[str, Any]:
        mark = self.state.marks[entry.name]
        following: list[str] = []
        due = self._after(entry, max(now, mark.done))
        while due is not None and len(following) < count:
            following.append(due.isoformat())
            due = self._after(entry, due)
        return {
            "name": entry.name,
            "task": entry.task,
            "schedule": repr(entry.schedule),
            "timezone": getattr(entry.schedule, "timezone", None),
            "enabled": entry.enabled,
            "paused": entry.name in self.state.paused,
            "catch_up": entry.catch_up,
            "added": entry.added,
            "last_run": None if mark.ran is None else mark.ran.isoformat(),
            "last_task_id": mark.task_id,
            "next": following if entry.enabled and entry.name not in self.state.paused else [],
        }


def _described(entry: Entry) -> str:
    """What an entry's ticks follow from. Switched on again is a change: what it missed while it was off is no tick."""
    zone = getattr(entry.schedule, "timezone", None)
    return " ".join([repr(entry.schedule), *([zone] if zone else []), *([] if entry.enabled else ["off"])])
