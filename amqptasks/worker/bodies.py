"""What a chord comes to, on its way to the broker: its body, or the news that its body will not run.

A body that never will be taken fails its chord. One whose queue nobody has declared is kept where messages are kept
that nobody could route, with the results of its parts; the news of it then goes to a worker of this leader's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog

from amqptasks.calls import Calls
from amqptasks.canvas import from_dict
from amqptasks.canvas.plan import expand
from amqptasks.errors import (
    AmqpTasksError,
    ChordError,
    MessageTooLarge,
    Nacked,
    PublishError,
    Unroutable,
    Unwritable,
)
from amqptasks.execution.reports import reply
from amqptasks.message import Envelope
from amqptasks.outcome import Reason
from amqptasks.protocol.results import ResultMeta, encode_result
from amqptasks.states import FAILURE
from amqptasks.topology.build import dead_letter_exchange
from amqptasks.topology.delays import undelayed_key
from amqptasks.topology.unroutable import address
from amqptasks.worker.chords import Chord, replies
from amqptasks.worker.delivery import VERDICT_HEADER
from amqptasks.worker.settlement import UNROUTABLE_TRIES

__all__ = ["Bodies"]

_RETRY_FIRST, _RETRY_MAX = 0.5, 30.0
_log = structlog.get_logger("amqptasks.worker")


class Bodies:
    """Publishes what chords come to. Belongs to the leader's loop.

    Args:
        calls: makes the body's message.
        home: the queue of this leader.
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        declared: whether exchange and routing key belong to the topology, so that what is missing comes back.
        on_confirmed: called with a chord when all that it came to is confirmed.
        on_refused: called with a chord whose body will not be taken, and why; what was taken of it is confirmed.
    """

    def __init__(
        self,
        calls: Calls,
        prefix: str,
        home: str,
        *,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        declared: Callable[[str, str], bool],
        on_confirmed: Callable[[Chord], None],
        on_refused: Callable[[Chord, str], None],
    ) -> None:
        self._calls = calls
        self._prefix = prefix
        self._home = home
        self._publish = publish
        self._call_later = call_later
        self._declared = declared
        self._on_confirmed = on_confirmed
        self._on_refused = on_refused

    def send(self, chord: Chord, results: list[Any], verdict: str | None = None) -> str | None:
        """Publish the body; with a verdict, the news that it will not run, to a worker that tells who waits for it.

        Returns why no message of it can be made; the chord is as it was then.
        """
        try:
            sent = expand(from_dict(chord.body), (results,))
            for one in sent:
                if verdict is not None:
                    one.options.pop("countdown", None)
                    one.options.pop("eta", None)
                    one.options["headers"] = {
                        **(one.options.get("headers") or {}),
                        VERDICT_HEADER: ["ChordError", verdict],
                    }
            envelopes = [self._calls.signed(one.envelope) for one in self._calls.prepare_all(sent, check=False)]
        except (AmqpTasksError, ValueError, TypeError, AttributeError) as error:
            _log.error(
                "A chord's body cannot be sent; its parts wait for a worker that can",
                group_id=chord.group_id,
                body=chord.body.get("task"),
                error=str(error)[:500],
            )
            return str(error)[:500]
        chord.sent, chord.unconfirmed = True, len(envelopes)
        for envelope in envelopes:
            if verdict is not None and (envelope.exchange, envelope.routing_key) in chord.missing:
                self._bring_home(envelope)
            self._attempt(chord, envelope)
        return None

    def tell(self, chord: Chord, why: str) -> None:
        """Say to those who wait for a reply that the body will not run; nobody else can be told without a message."""
        envelopes = replies(chord.body, ChordError(f"{chord.failure}; {why}"))
        chord.sent, chord.unconfirmed = bool(envelopes), len(envelopes)
        for envelope in envelopes:
            self._attempt(chord, envelope)

    # -- publish, confirm -----------------------------------------------------------------------------------------

    def _attempt(self, chord: Chord, envelope: Envelope, tries: int = 0) -> None:
        def done(error: PublishError | None) -> None:
            if error is None or (envelope.is_reply and isinstance(error, Nacked)):
                # A reply is refused by a queue whose node is down: nobody consumes it there, and its caller was told.
                self._confirmed(chord)
            elif self._is_final(envelope, tries, error):
                self._refused(chord, envelope, error)
            else:
                group_id = chord.group_id
                _log.error("A chord's body cannot be published; trying again", group_id=group_id, error=str(error))
                pause = min(_RETRY_FIRST * 2 ** min(tries, 10), _RETRY_MAX)
                self._call_later(pause, lambda: self._attempt(chord, envelope, tries + 1))

        self._publish(envelope, done)

    def _is_final(self, envelope: Envelope, tries: int, error: PublishError) -> bool:
        """Whether a message never will be taken."""
        if isinstance(error, Unroutable):
            return tries >= UNROUTABLE_TRIES and not self._declared(envelope.exchange, envelope.routing_key)
        return isinstance(error, MessageTooLarge | Unwritable)

    def _refused(self, chord: Chord, envelope: Envelope, error: PublishError) -> None:
        missing = isinstance(error, Unroutable)
        if envelope.is_reply:
            _log.error("Nobody can be told that a chord has failed", group_id=chord.group_id, error=str(error))
        elif VERDICT_HEADER not in envelope.headers:
            # When the others are confirmed, the chord fails for it.
            chord.refused = f"its body cannot be sent: {error}"
            if missing:
                if envelope.exchange.startswith(f"{self._prefix}.delay."):
                    envelope.exchange, envelope.routing_key = self._prefix, undelayed_key(envelope.routing_key)
                chord.missing.add((envelope.exchange, envelope.routing_key))
                self._keep(chord, self._letter(envelope, error))
                return
        elif missing:
            self._bring_home(envelope)
            self._attempt(chord, envelope)
            return
        elif envelope.reply_to:
            task_id = envelope.correlation_id or ""
            meta = ResultMeta(task_id, FAILURE, ChordError(f"{chord.failure}; it cannot be told in full: {error}"))
            self._attempt(chord, reply(task_id, encode_result(meta), envelope.reply_to))
            return
        self._confirmed(chord)

    def _confirmed(self, chord: Chord) -> None:
        chord.unconfirmed -= 1
        if chord.unconfirmed:
            return
        why, chord.refused = chord.refused, None
        if why is None:
            self._on_confirmed(chord)
        else:
            self._on_refused(chord, why)

    # -- a queue that is not there --------------------------------------------------------------------------------

    def _bring_home(self, envelope: Envelope) -> None:
        """A worker of any queue can tell what a chord came to: that runs nothing of the body's."""
        envelope.exchange, envelope.routing_key = self._prefix, self._home

    def _letter(self, envelope: Envelope, error: PublishError) -> Envelope:
        """The body as a dead letter: its queue has none, so that it stands among what nobody could route."""
        envelope.headers = {
            **envelope.headers,
            "x-task-reason": str(Reason.FAILED),
            "x-task-exception": type(error).__name__,
            "x-task-exception-message": str(error)[:1000],
            "x-task-failed-at": datetime.now(UTC).isoformat(),
        }
        where = dead_letter_exchange(self._prefix), envelope.routing_key
        if envelope.exchange != self._prefix:
            with suppress(ValueError):  # an address that is too long: the message names it
                where = address(self._prefix, envelope.exchange, envelope.routing_key)
        envelope.exchange, envelope.routing_key = where
        envelope.expiration = None
        return envelope

    def _keep(self, chord: Chord, letter: Envelope) -> None:
        def done(error: PublishError | None) -> None:
            if error is None:
                self._confirmed(chord)
                return
            _log.error("A chord's body cannot be kept; trying again", group_id=chord.group_id, error=str(error))
            self._call_later(_RETRY_MAX, lambda: self._keep(chord, letter))

        self._publish(letter, done)
