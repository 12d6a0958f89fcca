"""Chords: the parts of all chords meet in one queue, and its one active consumer sends the body when all are there.

Parts stay unacknowledged until the body is confirmed, so that nothing is lost with this process: the broker gives all
of them to the next consumer, which starts anew (``x-single-active-consumer``). A consumer may hold 65535 messages (AMQP
0-9-1, basic.qos), so when many parts wait, they are bundled: a thousand in one message, published, confirmed, and only
then acknowledged. `docs/canvas.md` tells the whole story.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.calls import Calls
from amqptasks.canvas import from_dict
from amqptasks.canvas.plan import expand
from amqptasks.errors import AmqpTasksError, DecodeError, PublishError
from amqptasks.message import Envelope
from amqptasks.protocol import jsontypes
from amqptasks.protocol.results import error_from_wire
from amqptasks.states import SUCCESS
from amqptasks.topology.build import joins_queue
from amqptasks.worker.delivery import VERDICT_HEADER
from amqptasks.worker.finished import Finished

__all__ = ["Joiner"]

_TICK_SECONDS = 5.0
_REOPEN_SECONDS = 1.0
_MISSING_SECONDS = 15.0
_RETRY_FIRST, _RETRY_MAX = 0.5, 30.0
_log = structlog.get_logger("amqptasks.worker")


#: So many parts wait on their own before they are bundled, and so many, or bytes, go into a bundle.
_PREFETCH, _BUNDLE_ABOVE, _BUNDLE_PARTS, _BUNDLE_BYTES = 65_535, 20_000, 1_000, 4 * 1024 * 1024


class _Held:
    """One unacknowledged message, and how many chords' parts in it still wait."""

    __slots__ = ("acknowledged", "epoch", "part", "size", "tag", "waiting")

    def __init__(self, incoming: Incoming) -> None:
        self.tag, self.epoch, self.size = incoming.tag, incoming.epoch, len(incoming.body)
        self.waiting = 0
        self.acknowledged = False
        #: (chord, part) of a message that holds one part.
        self.part: tuple[str, int] | None = None


class _Chord:
    """The parts of one chord that came so far."""

    __slots__ = ("body", "failure", "held", "parts", "sent", "since", "size", "unconfirmed")

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.size = int(body.get("chord_size") or 0)
        self.parts: dict[int, Any] = {}
        self.held: list[_Held] = []
        #: Why it fails; None while it does not.
        self.failure: str | None = None
        self.since = time.monotonic()
        #: Whether body, or failure, is on its way.
        self.sent = False
        self.unconfirmed = 0


class Joiner:
    """The parts of chords. Belongs to the leader's loop.

    Args:
        calls: makes the body's message.
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        lifetime: seconds after which a chord that is not complete fails.
    """

    def __init__(
        self,
        calls: Calls,
        prefix: str,
        *,
        lifetime: float,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
    ) -> None:
        self._calls = calls
        self._lifetime = lifetime
        self._publish = publish
        self._call_later = call_later
        self._connection: Any = None
        self._stopped = False
        self._chords: dict[str, _Chord] = {}
        self._sending: dict[str, _Chord] = {}
        self._finished = Finished(self._to_own_queue, call_later, lifetime=lifetime)
        #: Messages of one part, oldest first, to be bundled when there are too many.
        self._singles: deque[_Held] = deque()
        self._bundling = False
        self._prefix = prefix
        self._consumer = Consumer(
            joins_queue(prefix), _PREFETCH, on_message=self._message, on_ready=lambda: None, on_lost=self._lost
        )
        call_later(_TICK_SECONDS, self._tick)

    # -- life -----------------------------------------------------------------------------------------------------

    def up(self, connection: Any) -> None:
        """Consume on this connection."""
        self._connection = connection
        if not self._stopped:
            self._consumer.open(connection)

    def down(self, reason: str) -> None:
        """The connection is gone, and with it every part that was not acknowledged."""
        self._connection = None
        self._consumer.connection_lost(reason)

    def stop(self) -> None:
        """Leave the parts to the next consumer."""
        self._stopped = True
        self._consumer.stop(lambda: None)

    @property
    def idle(self) -> bool:
        """Whether no body is on its way."""
        return not self._sending

    def _lost(self, reason: str, missing: bool) -> None:
        self._chords.clear()
        self._singles.clear()
        self._finished.lost()
        for chord in self._sending.values():
            chord.held.clear()
        if missing:
            _log.warning("The queue of chords' parts does not exist: chords wait", queue=self._consumer.queue)
        self._call_later(_MISSING_SECONDS if missing else _REOPEN_SECONDS, self._reopen)

    def _reopen(self) -> None:
        if self._connection is not None and not self._consumer.is_open and not self._stopped:
            self._consumer.open(self._connection)

    def _tick(self) -> None:
        if self._stopped:
            return
        self._call_later(_TICK_SECONDS, self._tick)
        self._finished.tick()
        now = time.monotonic()
        for group_id, chord in list(self._chords.items()):
            if now - chord.since > self._lifetime:
                text = f"{len(chord.parts)} of {chord.size} parts came within {self._lifetime:g} s"
                self._fail(group_id, chord, text)
                self._settle(group_id, chord)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _message(self, incoming: Incoming) -> None:
        held = _Held(incoming)
        try:
            table = jsontypes.loads(incoming.body)
            if "done" in table:
                self._marker(held, table["done"])
                return
            if "chords" in table:
                for group_id, one in table["chords"].items():
                    for index, value in one["parts"]:
                        self._part(held, group_id, int(index), value, one["failure"], one["chord"])
            else:
                group_id, index, value = str(table["group"]), int(table["index"]), table["result"]
                held.part = group_id, index
                failure = None
                if table["state"] != SUCCESS:
                    error = error_from_wire(value)
                    failure = f"part {index} of the chord, task {table['task_id']}, failed: {error!r}"
                self._part(held, group_id, index, value, failure, table["chord"])
        except (DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            _log.error("Not a part of a chord; dropped", queue=self._consumer.queue, error=str(error)[:200])
        if held.waiting == 0:
            self._ack(held)
        elif held.part is not None:
            self._singles.append(held)
            if len(self._singles) > _BUNDLE_ABOVE and not self._bundling:
                self._bundle()

    def _part(
        self, held: _Held, group_id: str, index: int, value: Any, failure: str | None, body: Mapping[str, Any]
    ) -> None:
        if group_id in self._finished:
            return
        chord = self._sending.get(group_id) or self._chords.get(group_id)
        if chord is None:
            chord = self._chords[group_id] = _Chord(body)
        chord.held.append(held)
        held.waiting += 1
        chord.parts.setdefault(index, value)
        if failure is not None:
            self._fail(group_id, chord, failure)
        if len(chord.parts) >= chord.size and group_id in self._chords:
            if not chord.sent:
                self._complete(group_id, chord)
            if chord.sent:
                self._settle(group_id, chord)

    def _marker(self, held: _Held, done: Mapping[str, float]) -> None:
        self._finished.message(done, lambda: self._ack(held))
        for group_id in done:
            # Parts that came again before the marker did.
            chord = self._chords.pop(group_id, None)
            if chord is not None:
                self._let_go(chord)

    def _to_own_queue(self, table: Mapping[str, Any], done: Callable[[PublishError | None], None]) -> None:
        self._publish(
            Envelope(self._prefix, self._consumer.queue, jsontypes.dumps(table), correlation_id=str(uuid.uuid4())), done
        )

    def _bundle(self) -> None:
        """Put the oldest parts into one message, and acknowledge theirs when it is confirmed."""
        chords: dict[str, Any] = {}
        batch: list[_Held] = []
        size = 0
        while self._singles and len(batch) < _BUNDLE_PARTS and size < _BUNDLE_BYTES:
            held = self._singles.popleft()
            assert held.part is not None
            group_id, index = held.part
            chord = self._chords.get(group_id)
            if held.acknowledged or chord is None:
                continue
            one = chords.setdefault(group_id, {"chord": chord.body, "failure": chord.failure, "parts": []})
            one["parts"].append([index, chord.parts[index]])
            batch.append(held)
            size += held.size
        if not batch:
            return
        self._bundling = True

        def done(error: PublishError | None) -> None:
            self._bundling = False
            if error is None:
                for held in batch:
                    self._ack(held)
                return
            _log.error("Parts of chords cannot be bundled; trying again", error=str(error))
            self._singles.extendleft(reversed(batch))
            self._call_later(_RETRY_FIRST, self._bundle)

        self._to_own_queue({"chords": chords}, done)

    def _ack(self, held: _Held) -> None:
        if not held.acknowledged:
            held.acknowledged = True
            self._consumer.send_ack(held.tag, held.epoch, multiple=False)

    def _complete(self, group_id: str, chord: _Chord) -> None:
        results = [chord.parts[index] for index in sorted(chord.parts)]
        self._send(group_id, chord, results, None)

    def _fail(self, group_id: str, chord: _Chord, why: str) -> None:
        """The body does not run: its message says so to the worker, which tells those who wait."""
        if not chord.sent:
            chord.failure = why[:2000]
            _log.error("Chord failed", group_id=group_id, body=chord.body.get("task"), reason=why[:500])
            self._send(group_id, chord, [], why[:2000])

    def _send(self, group_id: str, chord: _Chord, results: list[Any], verdict: str | None) -> None:
        chord.sent = True
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
            envelopes = [one.envelope for one in self._calls.prepare_all(sent, check=False)]
        except (AmqpTasksError, ValueError, TypeError, AttributeError) as error:
            # Its parts stay where they are, for a worker whose settings know the body's queue.
            _log.error(
                "A chord's body cannot be sent; its parts wait for a worker that can",
                group_id=group_id,
                body=chord.body.get("task"),
                error=str(error)[:500],
            )
            chord.sent = False
            return
        chord.unconfirmed = len(envelopes)
        for envelope in envelopes:
            self._attempt(group_id, chord, envelope, _RETRY_FIRST)

    def _attempt(self, group_id: str, chord: _Chord, envelope: Envelope, pause: float) -> None:
        def done(error: PublishError | None) -> None:
            if error is None:
                chord.unconfirmed -= 1
                if chord.unconfirmed == 0 and group_id in self._sending:
                    self._finished.add(group_id, lambda: self._done(group_id, chord))
                return
            _log.error("A chord's body cannot be published; trying again", group_id=group_id, error=str(error))
            self._call_later(pause, lambda: self._attempt(group_id, chord, envelope, min(pause * 2, _RETRY_MAX)))

        self._publish(envelope, done)

    def _settle(self, group_id: str, chord: _Chord) -> None:
        """All parts are here: acknowledge them when what they led to is confirmed."""
        self._chords.pop(group_id, None)
        self._sending[group_id] = chord
        if chord.unconfirmed == 0:
            self._finished.add(group_id, lambda: self._done(group_id, chord))

    def _done(self, group_id: str, chord: _Chord) -> None:
        self._sending.pop(group_id, None)
        self._let_go(chord)

    def _let_go(self, chord: _Chord) -> None:
        for held in chord.held:
            held.waiting -= 1
            if held.waiting == 0:
                self._ack(held)
