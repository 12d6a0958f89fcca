"""Which letters are meant, and what letters have in common. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase

from amqptasks.deadletters.letter import Letter

__all__ = ["Filter", "Group"]


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; what is left out matches all. `task` and `exception` are glob patterns."""

    ids: frozenset[str] = frozenset()
    task: str | None = None
    reason: str | None = None
    exception: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, letter: Letter) -> bool:
        """Whether a letter is meant."""
        if self.ids and letter.id not in self.ids:
            return False
        if self.task is not None and not fnmatchcase(letter.task, self.task):
            return False
        if self.reason is not None and letter.reason != self.reason:
            return False
        if self.exception is not None and not fnmatchcase(letter.exception, self.exception):
            return False
        died = letter.died_at
        if self.since is not None and (died is None or died < self.since):
            return False
        return self.until is None or (died is not None and died <= self.until)


@dataclass
class Group:
    """Letters that died of the same."""

    queue: str
    task: str
    reason: str
    exception: str
    top_frame: str
    count: int = 0
    first: datetime | None = None
    last: datetime | None = None
    message: str = ""
    #: Ids of some of them.
    examples: list[str] = field(default_factory=list)

    def add(self, letter: Letter) -> None:
        """Count a letter."""
        self.count += 1
        self.message = self.message or letter.message
        if len(self.examples) < 3:
            self.examples.append(letter.id)
        died = letter.died_at
        if died is not None:
            self.first = died if self.first is None else min(self.first, died)
            self.last = died if self.last is None else max(self.last, died)
