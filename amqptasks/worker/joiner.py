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
from amqptasks.errors import DecodeError, PublishError
from amqptasks.message import Envelope
from amqptasks.outcome import Reason
from amqptasks.protocol import jsontypes
from amqptasks.protocol.results import error_from_wire
from amqptasks.states import SUCCESS
from amqptasks.topology.build import dead_letter_exchange, joins_queue
from amqptasks.worker.bodies import Bodies
from amqptasks.worker.chords import Chord, Held
from amqptasks.worker.finished import Finished

__all__ = ["Joiner"]

_TICK_SECONDS = 5.0
_REOPEN_SECONDS = 1.0
_MISSING_SECONDS = 15.0
_BUNDLE_SECONDS, _REFUSE_SECONDS = 0.5, 30.0
_log = structlog.get_logger("amqptasks.worker")


#: So many parts wait on their own before they are bundled, and so many, or bytes, go into a bundle.
_PREFETCH, _BUNDLE_ABOVE, _BUNDLE_PARTS, _BUNDLE_BYTES = 65_535, 20_000, 1_000, 4 * 1024 * 1024


class Joiner:
    """The parts of chords. Belongs to the leader's loop.

    Args:
        calls: makes the body's message.
        home: the queue of this leader.
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        declared: whether exchange and routing key belong to the topology, so that what is missing comes back.
        lifetime: seconds after which a chord that is not complete fails.
    """

    def __init__(
        self,
        calls: Calls,
        prefix: str,
        home: str,
        *,
        lifetime: float,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        declared: Callable[[str, str], bool],
    ) -> None:
        self._calls = calls
        self._lifetime = lifetime
        self._publish = publish
        self._call_later = call_later
        self._connection: Any = None
        self._stopped = False
        self._bodies = Bodies(
            calls,
            prefix,
            home,
            publish=publish,
            call_later=call_later,
            declared=declared,
            on_confirmed=self._confirmed,
            on_refused=self._fail_for_good,
        )
        self._chords: dict[str, Chord] = {}
        self._sending: dict[str, Chord] = {}
        self._finished = Finished(self._to_own_queue, call_later, lifetime=lifetime)
        #: Messages of one part, oldest first, to be bundled when there are too many.
        self._singles: deque[Held] = deque()
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
        if not self._stopped and self._may_join():
            self._consumer.open(connection)

    def _may_join(self) -> bool:
        keys = self._calls.keys
        if keys is None or keys.can_sign:
            return True
        _log.info("Chords are left to other workers: this one has no key to sign their bodies with")
        return False

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
        now = time.time()
        for chord in list(self._chords.values()):
            if now - chord.since > self._lifetime:
                self._fail_for_good(chord, f"{len(chord.parts)} of {chord.size} parts came within {self._lifetime:g} s")

    # -- parts ----------------------------------------------------------------------------------------------------

    def _message(self, incoming: Incoming) -> None:
        held = Held(incoming)
        problem = self._disbelieved(incoming)
        if problem is not None:
            self._refuse(held, incoming, problem)
            return
        try:
            table = jsontypes.loads(incoming.body)
            if "done" in table:
                self._marker(held, table["done"])
                return
            if "chords" in table:
                for group_id, one in table["chords"].items():
                    for index, value in one["parts"]:
                        self._part(held, group_id, int(index), value, one["failure"], one)
            else:
                group_id, index, value = str(table["group"]), int(table["index"]), table["result"]
                held.part = group_id, index
                failure = None
                if table["state"] != SUCCESS:
                    error = error_from_wire(value)
                    failure = f"part {index} of the chord, task {table['task_id']}, failed: {error!r}"
                self._part(held, group_id, index, value, failure, table)
        except (DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            _log.error("Not a part of a chord; dropped", queue=self._consumer.queue, error=str(error)[:200])
        if held.waiting == 0:
            self._ack(held)
        elif held.part is not None:
            self._singles.append(held)
            if len(self._singles) > _BUNDLE_ABOVE and not self._bundling:
                self._bundle()

    def _disbelieved(self, incoming: Incoming) -> str | None:
        """Why a message is not to be believed: what it says becomes a task, which this process signs."""
        keys, properties = self._calls.keys, incoming.properties
        if keys is None:
            return None
        headers = properties.headers or {}
        if "task" in headers:
            return "a task's message is no part of a chord"
        return keys.problem(
            headers, properties.content_type, properties.correlation_id, properties.reply_to, incoming.body
        )

    def _refuse(self, held: Held, incoming: Incoming, problem: str) -> None:
        """Keep what is not believed where dead letters go whose queue has none for them."""
        _log.error("Not a part of a chord that we signed; kept as unroutable", queue=self._consumer.queue, why=problem)
        properties = incoming.properties
        letter = Envelope(
            dead_letter_exchange(self._prefix),
            self._consumer.queue,
            incoming.body,
            content_type=properties.content_type,
            headers={"x-task-reason": str(Reason.REJECTED), "x-task-exception-message": problem},
            message_id=properties.message_id,
            correlation_id=properties.correlation_id,
        )

        def done(error: PublishError | None) -> None:
            if error is None:
                self._ack(held)
            else:
                self._call_later(_REFUSE_SECONDS, lambda: self._publish(letter, done))

        self._publish(letter, done)

    def _part(
        self, held: Held, group_id: str, index: int, value: Any, failure: str | None, table: Mapping[str, Any]
    ) -> None:
        if group_id in self._finished:
            return
        chord = self._sending.get(group_id) or self._chords.get(group_id)
        if chord is None:
            chord = self._chords[group_id] = Chord(group_id, table["chord"])
        sent = table.get("time")
        if isinstance(sent, int | float):
            chord.since = min(chord.since, sent)
        chord.held.append(held)
        held.waiting += 1
        chord.parts.setdefault(index, value)
        if failure is not None:
            self._fail(chord, failure)
        if len(chord.parts) >= chord.size and group_id in self._chords:
            if not chord.sent:
                self._bodies.send(chord, [chord.parts[index] for index in sorted(chord.parts)])
            if chord.sent:
                self._settle(chord)

    def _marker(self, held: Held, done: Mapping[str, float]) -> None:
        self._finished.message(done, lambda: self._ack(held))
        for group_id in done:
            # Parts that came again before the marker did.
            chord = self._chords.pop(group_id, None)
            if chord is not None:
                self._let_go(chord)

    def _to_own_queue(self, table: Mapping[str, Any], done: Callable[[PublishError | None], None]) -> None:
        body = jsontypes.dumps(table)
        envelope = Envelope(self._prefix, self._consumer.queue, body, correlation_id=str(uuid.uuid4()))
        self._publish(self._calls.signed(envelope), done)

    def _bundle(self) -> None:
        """Put the oldest parts into one message, and acknowledge theirs when it is confirmed."""
        chords: dict[str, Any] = {}
        batch: list[Held] = []
        size = 0
        while self._singles and len(batch) < _BUNDLE_PARTS and size < _BUNDLE_BYTES:
            held = self._singles.popleft()
            assert held.part is not None
            group_id, index = held.part
            chord = self._chords.get(group_id)
            if held.acknowledged or chord is None:
                continue
            one = chords.setdefault(
                group_id, {"chord": chord.body, "failure": chord.failure, "time": chord.since, "parts": []}
            )
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
            self._call_later(_BUNDLE_SECONDS, self._bundle)

        self._to_own_queue({"chords": chords}, done)

    def _ack(self, held: Held) -> None:
        if not held.acknowledged:
            held.acknowledged = True
            self._consumer.send_ack(held.tag, held.epoch, multiple=False)

    def _fail(self, chord: Chord, why: str) -> str | None:
        """The body does not run: its message says so to a worker, which tells those who wait, once: with that the chord
        is done, and parts that are outstanding are dropped when they come. Returns why it cannot be sent."""
        if chord.sent:
            return None
        chord.failure = why = why[:2000]
        _log.error("Chord failed", group_id=chord.group_id, body=chord.body.get("task"), reason=why[:500])
        problem = self._bodies.send(chord, [], why)
        if problem is None:
            self._settle(chord)
        return problem

    def _fail_for_good(self, chord: Chord, why: str) -> None:
        """It is done with, though its body was not taken, or no message of it can be made."""
        chord.sent = False
        problem = self._fail(chord, why)
        if problem is not None:
            self._bodies.tell(chord, f"its body cannot be sent: {problem}")
        self._settle(chord)

    def _confirmed(self, chord: Chord) -> None:
        if chord.group_id in self._sending:
            self._settle(chord)

    def _settle(self, chord: Chord) -> None:
        """What its parts led to is decided: acknowledge them when that is confirmed."""
        self._chords.pop(chord.group_id, None)
        self._sending[chord.group_id] = chord
        if chord.unconfirmed == 0 and not chord.settled:
            chord.settled = True
            self._finished.add(chord.group_id, lambda: self._done(chord))

    def _done(self, chord: Chord) -> None:
        self._sending.pop(chord.group_id, None)
        self._let_go(chord)

    def _let_go(self, chord: Chord) -> None:
        for held in chord.held:
            held.waiting -= 1
            if held.waiting == 0:
                self._ack(held)
