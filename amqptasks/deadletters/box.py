"""What can be done with dead letters. A letter leaves its queue only when its copy elsewhere is confirmed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from amqptasks.app import AmqpTasks
from amqptasks.broker.admin import purge
from amqptasks.claims import Claim, read_body
from amqptasks.deadletters.groups import Filter, Group
from amqptasks.deadletters.letter import EDITED_HEADER, Letter
from amqptasks.deadletters.moving import WINDOW, Moved, Publish, Run, batches, publish_all, told, unreachable
from amqptasks.deadletters.places import Places
from amqptasks.errors import ConfigError, InvalidArguments, PublishError
from amqptasks.message import Envelope
from amqptasks.protocol.compression import compress
from amqptasks.protocol.serializers import accepted
from amqptasks.protocol.signing import SIGNATURE_HEADER
from amqptasks.protocol.task import Body, decode_body, encode_arguments, shown

__all__ = ["DeadLetters"]

_ALL = Filter()
_TOLD_EVERY = 1000


class DeadLetters:
    """The dead letters of an app's queues. Everything here works while workers run and dead-letter more.

    `queues` are names of work queues, or of the queues to look into themselves: ``email.dlq``, also of a queue that the
    settings do not have any more, and ``<prefix>.unroutable``. By default it is all of the settings; one that does not
    stand in the broker is left out, and logged.

    Reading holds the letters unacknowledged until the end, then they go back in their order; so two of these at a time
    see a part each. Every method raises `BrokerUnreachable`, `AccessRefused`, and `ConfigError` for a queue that is not
    declared, or whose letters could be deleted by being looked at; those that move, `Stopped`, when it comes after the
    first letters.
    """

    def __init__(self, app: AmqpTasks, publish: Publish) -> None:
        self._app = app
        self._settings = app.settings
        self._publish = publish
        self._prefix = app.settings.topology.prefix
        self._places = Places(app.settings)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def unroutable(self) -> str:
        """The name of the queue that keeps what nobody could route."""
        return self._places.unroutable

    def letters(self, which: Filter = _ALL, queues: Iterable[str] | None = None) -> Iterator[Letter]:
        """The letters that match, oldest first in each queue; none is removed."""
        yield from self._letters(self._places.waiting(queues), which)

    def _letters(self, waiting: Mapping[str, int], which: Filter) -> Iterator[Letter]:
        for name, some in waiting.items():
            if some:
                yield from self._letters_in(name, which)

    def _letters_in(self, name: str, which: Filter) -> Iterator[Letter]:
        with self._places.reader(name) as reader:
            for letter, _token in self._places.read(reader, name):
                if which.matches(letter):
                    yield letter

    def groups(
        self,
        which: Filter = _ALL,
        queues: Iterable[str] | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda _count, _total: None,
    ) -> list[Group]:
        """The letters that match, gathered by queue, task, reason, exception and line; most first.

        Args:
            on_progress: called with the number of letters that were gathered so far, and of all that wait.
        """
        found: dict[tuple[str, ...], Group] = {}
        waiting = self._places.waiting(queues)
        total = sum(waiting.values())
        for number, letter in enumerate(self._letters(waiting, which), 1):
            if number % _TOLD_EVERY == 0:
                on_progress(number, total)
            group = found.get(letter.group)
            if group is None:
                group = found[letter.group] = Group(*letter.group)
            group.add(letter)
        return sorted(found.values(), key=lambda group: -group.count)

    def counts(self, which: Filter = _ALL, queues: Iterable[str] | None = None) -> dict[str, int]:
        """How many letters match, by the queue in which they stand. All of them the broker counts by itself."""
        waiting = self._places.waiting(queues)
        if which == _ALL:
            return waiting
        return {name: sum(1 for _ in self._letters_in(name, which)) if some else 0 for name, some in waiting.items()}

    def count(self, which: Filter = _ALL, queues: Iterable[str] | None = None) -> int:
        """How many letters match."""
        return sum(self.counts(which, queues).values())

    def find(self, letter_id: str, queues: Iterable[str] | None = None) -> Letter:
        """The letter of this id. Raises `ConfigError` when there is none."""
        for letter in self.letters(Filter(ids=frozenset({letter_id})), queues):
            return letter
        raise ConfigError(f"there is no dead letter {letter_id!r}; `amqptasks dlq list` shows ids")

    def body(self, letter: Letter) -> Body:
        """A letter's arguments. Raises `DecodeError`, and `StoreUnavailable` where a store keeps them."""
        return self._read(letter)[0]

    def _read(self, letter: Letter) -> tuple[Body, Claim | None]:
        accept = accepted(self._settings.serialization.accept_content)
        compression = letter.headers.get("compression")
        limit = self._settings.serialization.max_body
        body, content_type, claim = read_body(self._app.calls.claims, letter.body, letter.content_type)
        return decode_body(body, content_type, compression, accept, limit), claim

    # -- moving ---------------------------------------------------------------------------------------------------

    def replay(
        self,
        which: Filter = _ALL,
        queues: Iterable[str] | None = None,
        *,
        to: str | None = None,
        rate: float | None = None,
        on_progress: Callable[[int], None] = lambda _count: None,
    ) -> Moved:
        """Send letters to their queues again: same id, attempts from the start.

        A letter is removed when the broker has confirmed its new message. Killed half-way, a run loses none, and at
        most `WINDOW` are sent twice. Letters that die while it runs are left for another one.

        Args:
            to: another queue for all of them.
            rate: letters a second; as fast as the broker confirms by default.
            on_progress: called with the number of letters that were moved so far.
        """
        if to is not None:
            self._places.declared(to)

        def made(letter: Letter) -> Envelope:
            exchange = self._prefix if to is not None else letter.exchange or self._prefix
            return self._vouched(letter, letter.revived(exchange, to or letter.queue))

        return self._move(which, queues, made, rate, on_progress)

    def _vouched(self, letter: Letter, envelope: Envelope) -> Envelope:
        """Signed anew, since its `expires` may have gone, if it was signed: a letter may be anybody's."""
        keys = self._app.calls.keys
        if keys is not None and keys.can_sign and SIGNATURE_HEADER in letter.headers:
            old = (letter.headers, letter.content_type, envelope.correlation_id, envelope.reply_to, letter.body)
            if keys.problem(*old) is None:
                keys.sign(envelope)
        return envelope

    def edit(self, letter_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Letter:
        """Give a letter other arguments; it stays in its dead-letter queue, marked with when it was edited.

        Raises:
            InvalidArguments: they do not fit the task. ConfigError: no such letter. DecodeError: its body is no task's.
        """
        letter = self.find(letter_id)
        task = self._app.tasks.get(letter.task)
        if task is None:
            raise ConfigError(f"the app knows no task {letter.task!r}, so that nobody can check its arguments")
        try:
            task.validate(list(args), dict(kwargs))
        except InvalidArguments as error:
            raise InvalidArguments(f"not edited: {error}") from None
        old, claim = self._read(letter)
        content_type = letter.content_type if claim is None else claim.content_type
        packer = accepted(self._settings.serialization.accept_content)[content_type]
        body = plain = encode_arguments(letter.task, args, kwargs, old.embed, packer)
        compression = letter.headers.get("compression")
        if compression:
            body = compress(body, compression)
        if (claims := self._app.calls.claims) is not None:
            body, content_type = claims.packed(body, content_type)
        headers = {
            **letter.headers,
            "argsrepr": shown(tuple(args), args, plain),
            "kwargsrepr": shown(dict(kwargs), kwargs.values(), plain),
            EDITED_HEADER: datetime.now(UTC).isoformat(),
        }
        edited = replace(letter, headers=headers, body=body, content_type=content_type)
        # Who edits a letter has read it, and vouches for what it says now.
        moved = self._move(
            Filter(ids=frozenset({letter_id})),
            [letter.stands_in],
            lambda _: self._app.calls.signed(self._places.put_back(edited)),
        )
        if moved.failed or not moved.moved:
            raise PublishError(f"not edited: {moved.failed[0][1] if moved.failed else 'it is gone'}", sent=False)
        return edited

    def check(self, letter: Letter) -> None:
        """Raises `ConfigError` for a letter that `import_` cannot put anywhere."""
        self._places.check(letter)

    def import_(self, letters: Iterable[Letter]) -> Moved:
        """Put letters into their dead-letter queues. Raises `ConfigError` for one that `check` refuses."""
        result = Moved()
        with told(result):
            for batch in batches(((letter, None) for letter in letters), WINDOW):
                for letter, _ in batch:
                    self.check(letter)
                outcomes = publish_all(self._publish, [partial(self._places.put_back, letter) for letter, _ in batch])
                for (letter, _), error in zip(batch, outcomes, strict=True):
                    result.add(letter, error)
                if (gone := unreachable(outcomes)) is not None:
                    raise gone
        return result

    def purge(
        self,
        which: Filter = _ALL,
        queues: Iterable[str] | None = None,
        *,
        counted: Mapping[str, int] | None = None,
        before: datetime | None = None,
    ) -> int:
        """Delete letters for good. Returns how many.

        Without a filter the broker deletes what waits at that moment (AMQP 0-9-1, queue.purge), a million in seconds.
        With `counted`, what `counts` gave at the time `before`, no others go than those that were counted then: so many
        of the oldest.
        """
        result = Moved()
        with told(result):
            for name in self._places.waiting(queues) if counted is None else counted:
                if which == _ALL and counted is None:
                    result.moved += purge(self._settings.broker, name)
                elif counted is None or counted[name]:
                    self._purge_some(name, which, None if counted is None else counted[name], before, result)
        return result.moved

    # -- parts ----------------------------------------------------------------------------------------------------

    def _purge_some(self, name: str, which: Filter, most: int | None, before: datetime | None, result: Moved) -> None:
        def meant(letter: Letter) -> bool:
            later = before is not None and letter.died_at is not None and letter.died_at > before
            return not later and which.matches(letter)

        with self._places.reader(name) as reader:
            tokens = (token for letter, token in self._places.read(reader, name) if meant(letter))
            for token in itertools.islice(tokens, most):
                reader.remove(*token)
                result.moved += 1
            reader.flush()

    def _move(
        self,
        which: Filter,
        queues: Iterable[str] | None,
        made: Callable[[Letter], Envelope],
        rate: float | None = None,
        on_progress: Callable[[int], None] = lambda _count: None,
    ) -> Moved:
        result = Moved()
        run = Run(self._places, self._publish, which, made, rate=rate, on_progress=on_progress, result=result)
        with told(result):
            for name, waiting in self._places.waiting(queues).items():
                if waiting:
                    run.empty(name)
        return result
