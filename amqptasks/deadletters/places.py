"""The queues in which dead letters stand, and what a message there is as a letter."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from amqptasks.broker.consumer import Incoming
from amqptasks.broker.counts import queue_counts
from amqptasks.broker.reader import QueueReader
from amqptasks.broker.wire import encode_properties
from amqptasks.config import Settings
from amqptasks.deadletters.letter import Letter
from amqptasks.deadletters.limits import DeliveryLimits
from amqptasks.errors import ConfigError, SerializationError
from amqptasks.message import Envelope
from amqptasks.topology.build import dead_letter_queue
from amqptasks.topology.unroutable import address, destination, unroutable_queue

__all__ = ["Places", "Token"]

logger = logging.getLogger(__name__)
#: The broker says 0 of a quorum queue whose leader does not answer; so it is asked again.
_AGAIN_SECONDS = 0.5
#: What `QueueReader.remove` takes.
Token = tuple[int, Incoming]


class Places:
    """Where an app's dead letters stand. Methods raise what `DeadLetters` raises."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._prefix = settings.topology.prefix
        self._limits = DeliveryLimits(settings.broker)
        self.unroutable = unroutable_queue(self._prefix)

    def declared(self, queue: str) -> None:
        """Raises `ConfigError` for a queue that the settings do not have."""
        if queue not in self._settings.queues:
            near = get_close_matches(queue, self._settings.queues, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; queues: {', '.join(self._settings.queues)}"
            raise ConfigError(f"queue {queue!r} is not declared{hint}")

    def _names(self, queues: Iterable[str] | None) -> list[str]:
        """The names of the queues in which letters stand."""
        if queues is None:
            return [dead_letter_queue(name) for name, one in self._settings.queues.items() if one.dead_letter.enabled]
        names = []
        for name in queues:
            if name == self.unroutable or name.endswith(dead_letter_queue("")):
                names.append(name)
            else:
                self.declared(name)
                names.append(dead_letter_queue(name))
        return names

    def waiting(self, queues: Iterable[str] | None) -> dict[str, int]:
        """How many letters wait in each of these queues, or in those of the settings that stand."""
        names = self._names(queues)
        counts = queue_counts(self._settings.broker, names)
        missing = [name for name in names if counts[name] is None]
        if missing and (queues is not None or len(missing) == len(names)):
            raise ConfigError(
                f"there is no queue {missing[0]!r}; `amqptasks topology apply` makes those of the settings"
            )
        for name in missing:
            logger.warning("Note: there is no queue %r; the others are shown without it", name)
        empty = [name for name, found in counts.items() if found is not None and not found[0]]
        if empty:
            time.sleep(_AGAIN_SECONDS)
            counts.update(queue_counts(self._settings.broker, empty))
        return {name: found[0] for name, found in counts.items() if found is not None}

    def reader(self, name: str) -> QueueReader:
        """A visit to a queue whose letters bear being looked at."""
        self._limits.check(name)
        return QueueReader(self._settings.broker, name)

    def read(self, reader: QueueReader, name: str, at_least: int = 0) -> Iterator[tuple[Letter, Token]]:
        """A queue's letters, each with what `QueueReader.remove` takes."""
        for token in reader.messages(at_least):
            yield self._letter(name, token[1]), token

    def _letter(self, name: str, incoming: Incoming) -> Letter:
        if name != self.unroutable:
            return Letter.of(name.removesuffix(dead_letter_queue("")), incoming)
        exchange, key = destination(self._prefix, str(incoming.exchange), str(incoming.routing_key))
        return Letter.of(key, incoming, kept_in=name, exchange="" if exchange == self._prefix else exchange)

    def put_back(self, letter: Letter) -> Envelope:
        """The message that puts a letter where it stands."""
        if letter.kept_in:
            return letter.envelope(*address(self._prefix, letter.exchange, letter.queue))
        return letter.envelope("", letter.stands_in)

    def check(self, letter: Letter) -> None:
        """Raises `ConfigError` for a letter that cannot be put anywhere."""
        if letter.kept_in and letter.kept_in != self.unroutable:
            raise ConfigError(f"its queue {letter.kept_in!r} is not where letters are kept")
        if not letter.kept_in:
            self.declared(letter.queue)
            if not self._settings.queues[letter.queue].dead_letter.enabled:
                raise ConfigError(f"queue {letter.queue!r} keeps no dead letters (dead_letter.enabled)")
        try:
            encode_properties(self.put_back(letter))
        except (SerializationError, ValueError) as error:
            raise ConfigError(f"no message can be made of it: {error}") from None
