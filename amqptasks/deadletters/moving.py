"""Letters on their way to other queues: how many at a time, and what became of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from amqptasks.broker.reader import QueueReader
from amqptasks.deadletters.groups import Filter
from amqptasks.deadletters.letter import Letter
from amqptasks.deadletters.places import Places, Token
from amqptasks.errors import AmqpTasksError, BrokerError, PublishError, SerializationError
from amqptasks.message import Envelope

__all__ = ["WINDOW", "Moved", "Publish", "Run", "Stopped", "batches", "publish_all", "told", "unreachable"]

#: Letters that are published and not removed yet: what a run that is killed leaves twice.
WINDOW = 500
#: The same in bytes, so that memory is bounded when letters are large.
WINDOW_BYTES = 16 << 20

#: The broker takes back what is held for half an hour (``consumer_timeout``), so a long replay is many visits.
VISIT_SECONDS = 600.0
#: Batches a second of a replay at a rate.
_BATCHES = 10

Publish = Callable[[Sequence[Envelope]], list[PublishError | None]]
T = TypeVar("T")


@dataclass
class Moved:
    """How many letters were moved, and which were not, with the reason. Those stay where they were."""

    moved: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    #: Of those that failed: the how-manieth each was, from 0.
    places: list[int] = field(default_factory=list)

    def add(self, letter: Letter, error: PublishError | None) -> None:
        """Note what became of a letter's message."""
        if error is None:
            self.moved += 1
        else:
            self.places.append(self.moved + len(self.failed))
            self.failed.append((letter.id, str(error)))


class Stopped(AmqpTasksError):
    """Something ended it half-way. `moved` tells how far it came; ``__cause__`` is what ended it."""

    def __init__(self, moved: Moved, cause: AmqpTasksError) -> None:
        super().__init__(f"ended after {moved.moved} letters: {cause}")
        self.moved = moved


@contextmanager
def told(result: Moved) -> Iterator[None]:
    """What ends it half-way says how far it came."""
    try:
        yield
    except AmqpTasksError as error:
        if result.moved or result.failed:
            raise Stopped(result, error) from error
        raise


def batches(
    letters: Iterable[tuple[Letter, T]], size: int, most_bytes: int = WINDOW_BYTES
) -> Iterator[list[tuple[Letter, T]]]:
    """Letters in lists of at most `size`. None is taken before it is needed."""
    batch: list[tuple[Letter, T]] = []
    held = 0
    for one in letters:
        batch.append(one)
        held += len(one[0].body)
        if len(batch) >= size or held >= most_bytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def publish_all(publish: Publish, made: Iterable[Callable[[], Envelope]]) -> list[PublishError | None]:
    """Publish messages. One that cannot be made or written fails alone; the others go."""
    outcomes: list[PublishError | None] = []
    envelopes: list[Envelope] = []
    places: list[int] = []
    for place, make in enumerate(made):
        try:
            envelopes.append(make())
            places.append(place)
            outcomes.append(None)
        except (PublishError, SerializationError) as error:
            outcomes.append(_refused(error))
    try:
        found = publish(envelopes)
    except SerializationError:  # raised before the first is sent, and says not which it is about
        found = [_one(publish, envelope) for envelope in envelopes]
    for place, outcome in zip(places, found, strict=True):
        outcomes[place] = outcome
    return outcomes


def _one(publish: Publish, envelope: Envelope) -> PublishError | None:
    try:
        return publish([envelope])[0]
    except SerializationError as error:
        return _refused(error)


def _refused(error: PublishError | SerializationError) -> PublishError:
    return error if isinstance(error, PublishError) else PublishError(f"no copy can be made: {error}")


def unreachable(outcomes: Iterable[PublishError | None]) -> BrokerError | None:
    """Why no further message would go either."""
    causes = (outcome.__cause__ for outcome in outcomes if outcome is not None)
    return next((cause for cause in causes if isinstance(cause, BrokerError)), None)


class Run:
    """Letters that go from their queues to where `made` says.

    Args:
        which: those that go; of these the ones that were dead when the run began.
        result: what became of them, up to now.
    """

    def __init__(
        self,
        places: Places,
        publish: Publish,
        which: Filter,
        made: Callable[[Letter], Envelope],
        *,
        rate: float | None,
        on_progress: Callable[[int], None],
        result: Moved,
    ) -> None:
        self._places = places
        self._publish = publish
        self._which = which
        self._made = made
        self._rate = rate
        self._size = WINDOW if rate is None else max(1, min(WINDOW, round(rate / _BATCHES)))
        self._on_progress = on_progress
        self._result = result
        self._began = datetime.now(UTC)

    def empty(self, name: str) -> None:
        """Move the letters of one queue: in several visits, where it takes long."""
        passed = left = 0
        while True:
            with self._places.reader(name) as reader:
                # Those that stayed are the first ones again.
                letters = itertools.islice(self._places.read(reader, name, passed + left), passed, None)
                done = self._visit(reader, letters)
                passed, left = reader.seen - reader.removed, reader.found - reader.seen
            if done:
                return

    def _visit(self, reader: QueueReader, letters: Iterable[tuple[Letter, Token]]) -> bool:
        """Move what comes, for as long as a visit may take. Whether that was all."""
        for batch in batches((one for one in letters if self._goes(one[0])), self._size):
            due = time.monotonic() + (len(batch) / self._rate if self._rate is not None else 0.0)
            self._send(reader, batch)
            reader.pause(max(0.0, due - time.monotonic()))
            if reader.seconds > VISIT_SECONDS:
                return False
        return True

    def _goes(self, letter: Letter) -> bool:
        again = letter.died_at is not None and letter.died_at > self._began
        return not again and self._which.matches(letter)

    def _send(self, reader: QueueReader, batch: list[tuple[Letter, Token]]) -> None:
        outcomes = publish_all(self._publish, [partial(self._copy, letter) for letter, _ in batch])
        for (letter, token), error in zip(batch, outcomes, strict=True):
            if error is None:
                reader.remove(*token)
            self._result.add(letter, error)
        reader.flush()
        self._on_progress(self._result.moved)
        if (gone := unreachable(outcomes)) is not None:
            raise gone

    def _copy(self, letter: Letter) -> Envelope:
        if letter.unreadable:
            raise PublishError("its headers cannot be read, so that a copy would be another message")
        return self._made(letter)
