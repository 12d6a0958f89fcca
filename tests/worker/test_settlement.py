"""Publish, confirm, then ack: every outcome, its effects and their order. No broker: the loop's hands are lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqptasks.broker.consumer import Incoming
from amqptasks.broker.wire import encode_properties
from amqptasks.errors import MessageTooLarge, Nacked, PublishError, Unroutable, Unwritable
from amqptasks.message import Envelope
from amqptasks.outcome import (
    Discarded,
    Failed,
    GivenBack,
    Lost,
    Outcome,
    Postponed,
    RateLimited,
    Reason,
    Retrying,
    Succeeded,
)
from amqptasks.protocol.task import PUBLISHED_HEADER
from amqptasks.worker.delivery import CRASHES_HEADER, Delivery, Stage
from amqptasks.worker.effects import SMALLEST, TRACEBACK_BYTES, Effects
from amqptasks.worker.settlement import Settlement

EFFECTS = Effects("amqptasks", "email", "worker@host")


def delivery(
    number: int = 1, *, tag: int | None = None, epoch: int = 1, redelivered: bool = False, **headers: Any
) -> Delivery:
    known = {"task": "shop.mail", "id": f"id-{number}", "retries": 0, **headers}
    properties = pika.BasicProperties(headers=known, correlation_id=f"id-{number}", priority=4, expiration="5000")
    return Delivery(
        Incoming(epoch, tag or number, redelivered, "amqptasks", "email", properties, b"[[],{},{}]"), "email"
    )


class Wire:
    """What settlement sends, in order."""

    def __init__(self) -> None:
        self.epoch = 1
        self.sent: list[tuple[str, Any]] = []
        self.envelopes: list[Envelope] = []
        self.confirms: list[Callable[[PublishError | None], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.failed: list[tuple[Delivery, Failed]] = []
        self.settlement = Settlement(
            self,
            EFFECTS,
            publish=self.publish,
            call_later=self.call_later,
            on_refused=lambda delivery, failed: self.failed.append((delivery, failed)),
            declared=lambda exchange, _key: exchange in ("amqptasks.dlx", "ours"),
        )

    def send_ack(self, tag: int, epoch: int, *, multiple: bool) -> None:
        self.sent.append(("ack", (tag, multiple)))

    def send_requeue(self, tag: int, epoch: int) -> None:
        self.sent.append(("requeue", tag))

    def publish(self, envelope: Envelope, done: Callable[[PublishError | None], None]) -> None:
        self.sent.append(("publish", (envelope.exchange, envelope.routing_key)))
        self.envelopes.append(envelope)
        self.confirms.append(done)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((delay, callback))

    def turn(self) -> None:
        """The loop's next turns, until no timer is left."""
        while self.timers:
            _, callback = self.timers.pop(0)
            callback()

    def confirm(self, error: PublishError | None = None) -> None:
        self.confirms.pop(0)(error)


@pytest.mark.parametrize("outcome", [Succeeded(), Discarded()])
def test_what_leaves_nothing_is_acknowledged(outcome: Outcome) -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), outcome)
    wire.turn()
    assert wire.sent == [("ack", (1, True))]


def test_what_is_given_back_is_requeued() -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), GivenBack())
    wire.turn()
    assert wire.sent == [("requeue", 1)]


@pytest.mark.parametrize(
    ("outcome", "exchange"),
    [
        (Retrying(2.0), "amqptasks.delay.04"),
        (Retrying(0.0), "amqptasks"),
        (Postponed(2.0), "amqptasks.delay.04"),
        (Failed(Reason.FAILED), "amqptasks.dlx"),
        (Lost("was killed"), "amqptasks"),
    ],
)
def test_what_must_be_durable_is_published_and_confirmed_before_the_ack(outcome: Outcome, exchange: str) -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), outcome)
    wire.turn()
    assert [(kind, value[0]) for kind, value in wire.sent] == [("publish", exchange)]
    wire.confirm()
    wire.turn()
    assert wire.sent[1:] == [("ack", (1, True))]
    assert not wire.settlement.settling


@pytest.mark.parametrize("outcome", [Succeeded, Discarded, partial(Failed, Reason.FAILED), partial(Retrying, 0.0)])
def test_the_ack_waits_for_the_confirms_of_result_follow_ups_and_dead_letter(outcome: Any) -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), outcome(messages=(Envelope("", "a", b"{}"), Envelope("", "b", b""))))
    count = len(wire.confirms)
    assert count >= 2
    for _ in range(count):
        wire.turn()
        assert {kind for kind, _ in wire.sent} == {"publish"}
        wire.confirm()
    wire.turn()
    assert wire.sent[count:] == [("ack", (1, True))]


def test_a_publish_that_fails_is_tried_again_and_nothing_is_acknowledged_meanwhile() -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), Failed(Reason.FAILED))
    for _ in range(5):
        wire.confirm(Nacked("full"))
        wire.turn()
    assert {kind for kind, _ in wire.sent} == {"publish"}
    wire.confirm()
    wire.turn()
    assert wire.sent[-1] == ("ack", (1, True))


def test_a_reply_that_its_queue_refuses_is_dropped_and_everything_else_is_not() -> None:
    """The queue's node is down: its caller was told, and the worker must not wait for it."""
    wire = Wire()
    reply = Envelope("", "client.reply.1", b"{}", correlation_id="id-1", mandatory=False)
    wire.settlement.settle(delivery(), Succeeded((reply,)))
    wire.confirm(Nacked("refused"))
    wire.turn()
    assert wire.sent == [("publish", ("", "client.reply.1")), ("ack", (1, True))]
    wire.settlement.settle(delivery(2), Failed(Reason.FAILED))
    wire.confirm(Nacked("refused"))
    wire.turn()
    assert [what for what, _ in wire.sent[2:]] == ["publish", "publish"]


def test_an_outcome_after_the_channel_was_lost_is_kept_for_the_redelivery_and_not_published() -> None:
    wire = Wire()
    lost = delivery()
    wire.epoch = 2
    wire.settlement.settle(lost, Failed(Reason.FAILED, "ValueError"))
    wire.turn()
    assert wire.sent == []
    again = delivery(9, tag=1, epoch=2, redelivered=True, id="id-1")
    assert wire.settlement.remembered(again) == Failed(Reason.FAILED, "ValueError")
    assert wire.settlement.remembered(again) is None


def test_an_effect_confirmed_after_the_channel_was_lost_leaves_only_the_ack_to_do() -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), Failed(Reason.FAILED))
    wire.epoch = 2
    wire.confirm()
    wire.turn()
    assert [kind for kind, _ in wire.sent] == ["publish"]
    assert wire.settlement.remembered(delivery(9, tag=1, epoch=2, redelivered=True, id="id-1")) == Discarded()


@pytest.mark.parametrize(
    "other",
    [
        {"redelivered": False},
        {"x-amqptasks-published": 2000},
        {"x-task-replays": 1},
        {"x-death": [{"queue": "amqptasks.delay.04", "count": 1}]},
        {"retries": 1},
        {"x-amqptasks-crashes": 1},
        {"x-amqptasks-passed": 5},
    ],
    ids=str,
)
def test_a_task_that_is_sent_again_under_its_id_is_not_settled_by_what_became_of_it_before(other: Any) -> None:
    """The redelivery went to another worker, so that what is remembered here waits; acked by it, a call is lost."""
    wire = Wire()
    sent = {"id": "fixed", "x-amqptasks-published": 1000}
    held = delivery(**sent)
    wire.epoch = 2
    wire.settlement.settle(held, Succeeded())
    anew = delivery(tag=1, epoch=2, **{"redelivered": True, **sent, **other})
    assert wire.settlement.remembered(anew) is None
    assert wire.settlement.remembered(delivery(tag=2, epoch=2, redelivered=True, **sent)) == Succeeded()


def test_what_became_of_a_task_is_remembered_for_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire()
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    held = [delivery(number) for number in (1, 2)]
    wire.epoch = 2
    wire.settlement.settle(held[0], Succeeded())
    now += 500
    wire.settlement.settle(held[1], Succeeded())
    now += 101
    again = [delivery(number, epoch=2, redelivered=True) for number in (1, 2)]
    assert [wire.settlement.remembered(one) for one in again] == [None, Succeeded()]


def test_a_delivery_is_settled_once() -> None:
    wire = Wire()
    one = delivery()
    wire.settlement.settle(one, Succeeded())
    wire.settlement.settle(one, Failed(Reason.FAILED))
    wire.turn()
    assert wire.sent == [("ack", (1, True))]
    assert one.stage is Stage.SETTLED


outcomes = st.sampled_from(
    [Succeeded(), Discarded(), GivenBack(), Retrying(1.0), Postponed(1.0), Failed(Reason.FAILED), Lost("died")]
)


@given(st.lists(outcomes, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_in_any_order_each_delivery_is_settled_exactly_once_and_never_before_its_confirm(
    what: list[Outcome], dice: Any
) -> None:
    wire = Wire()
    for number, outcome in enumerate(what, 1):
        wire.settlement.settle(delivery(number), outcome)
        if dice.random() < 0.3:
            wire.turn()
        if wire.confirms and dice.random() < 0.4:
            wire.confirms.pop(dice.randrange(len(wire.confirms)))(None)
    while wire.confirms:
        wire.confirms.pop(dice.randrange(len(wire.confirms)))(None)
    wire.turn()
    outstanding = set(range(1, len(what) + 1))
    for kind, value in wire.sent:
        if kind == "requeue":
            outstanding.remove(value)
        elif kind == "ack":
            tag, multiple = value
            assert tag in outstanding, "an unknown tag would close the channel"
            outstanding -= {one for one in outstanding if one <= tag} if multiple else {tag}
    assert outstanding == set()


# --- effects ---------------------------------------------------------------------------------------------------------


def envelope(outcome: Outcome, **headers: Any) -> Envelope:
    (made,) = EFFECTS.envelopes(delivery(**headers), outcome)
    return made


def test_a_retry_counts_keeps_its_priority_and_carries_no_expiration() -> None:
    made = envelope(Retrying(2.0, "ValueError", "no"), retries=2, **{"x-death": [], "x-delivery-count": 4, "CC": ["q"]})
    assert made.headers["retries"] == 3
    assert made.headers["eta"]
    assert (made.priority, made.expiration) == (4, None)
    assert not {"x-death", "x-delivery-count", "CC"} & set(made.headers)
    assert made.routing_key.endswith(".email")


def test_a_retry_may_bring_another_body_queue_and_priority() -> None:
    made = envelope(Retrying(0.0, body=b"new", queue="other", priority=9))
    assert (made.body, made.routing_key, made.priority) == (b"new", "other", 9)


def test_a_dead_letter_has_the_headers_that_operators_read() -> None:
    made = envelope(Failed(Reason.RETRIES_EXHAUSTED, "shop.Broken", "why", "Traceback …"), retries=3)
    headers = {name: value for name, value in made.headers.items() if name.startswith("x-task-")}
    failed_at = headers.pop("x-task-failed-at")
    assert failed_at.endswith("+00:00")
    assert headers == {
        "x-task-exception": "shop.Broken",
        "x-task-exception-message": "why",
        "x-task-traceback": "Traceback …",
        "x-task-worker": "worker@host",
        "x-task-attempts": 4,
        "x-task-reason": "retries_exhausted",
    }
    assert (made.exchange, made.routing_key, made.body) == ("amqptasks.dlx", "email", b"[[],{},{}]")


def test_a_long_traceback_keeps_its_end() -> None:
    made = envelope(Failed(Reason.FAILED, "E", "m", "ü" * 20_000 + "ValueError: the end"))
    text = made.headers["x-task-traceback"]
    assert len(text.encode()) <= TRACEBACK_BYTES
    assert text.endswith("ValueError: the end")


@pytest.mark.parametrize("before", [None, 1, 7])
def test_a_lost_executor_is_counted_in_the_message(before: int | None) -> None:
    made = envelope(Lost("executor 7 was killed by SIGSEGV"), **({} if before is None else {CRASHES_HEADER: before}))
    assert (made.exchange, made.headers[CRASHES_HEADER]) == ("amqptasks", (before or 0) + 1)


def test_a_queue_without_dead_letters_only_acknowledges() -> None:
    effects = Effects("amqptasks", "email", "worker@host", dead_letters=False)
    assert effects.envelopes(delivery(), Failed(Reason.FAILED)) == []


def test_what_had_ended_and_was_not_acknowledged_when_the_channel_was_lost_is_not_run_again() -> None:
    wire = Wire()
    wire.settlement.settle(delivery(2), Succeeded())  # behind a gap: its ack waits for a moment
    wire.epoch = 2
    again = delivery(2, tag=1, epoch=2, redelivered=True)
    outcome = wire.settlement.remembered(again)
    assert outcome is not None
    wire.settlement.settle(again, outcome)
    wire.turn()
    assert wire.sent == [("ack", (1, True))]


def test_what_was_acknowledged_as_the_channel_was_lost_is_not_run_again() -> None:
    wire = Wire()
    sent = [{PUBLISHED_HEADER: 1000 + number} for number in range(2000)]
    for number, headers in enumerate(sent, 1):
        wire.settlement.settle(delivery(number, **headers), Succeeded())
        wire.turn()
    wire.settlement.settle(delivery(2001), Succeeded())  # who sent it does not say when
    wire.turn()
    assert len(wire.sent) == 2001
    wire.epoch = 2
    again = [delivery(number, epoch=2, redelivered=True, **headers) for number, headers in enumerate(sent, 1)]
    found = [wire.settlement.remembered(one) for one in again]
    assert found == [None] * (2000 - 1023) + [Discarded()] * 1023
    assert wire.settlement.remembered(delivery(2001, epoch=2, redelivered=True)) is None
    anew = delivery(2000, epoch=2, redelivered=True, **{PUBLISHED_HEADER: 9000})
    assert wire.settlement.remembered(anew) is None, "another call under the same id"


def test_a_message_that_is_too_large_fails_its_task_when_the_others_are_confirmed() -> None:
    wire, held = Wire(), delivery()
    outcome = Succeeded(messages=(Envelope("", "a", b"{}"), Envelope("", "b", b"")))
    wire.settlement.settle(held, outcome)
    wire.confirm(MessageTooLarge("the broker's limit is 7"))
    wire.turn()
    assert wire.failed == []
    wire.confirm()
    wire.turn()
    assert {kind for kind, _ in wire.sent} == {"publish"}, "nothing is acknowledged"
    ((found, failed),) = wire.failed
    assert (found, failed.reason, failed.exception) == (held, Reason.FAILED, "MessageTooLarge")
    assert "limit is 7" in failed.message
    held.verdict = failed
    wire.settlement.settle(held, failed)
    wire.confirm(MessageTooLarge("nor is the dead letter taken"))
    wire.turn()
    assert len(wire.failed) == 1, "it is told once; the dead letter is tried again"
    wire.confirm()
    wire.turn()
    assert wire.sent[-1] == ("ack", (1, True))


# --- what never can be published -------------------------------------------------------------------------------------


def step(wire: Wire, error: PublishError | None = None) -> None:
    """The oldest publish is answered; then the loop turns."""
    wire.confirm(error)
    wire.turn()


def test_a_dead_letter_that_cannot_be_written_loses_its_traceback_then_others_headers_and_is_acknowledged() -> None:
    wire = Wire()
    held = delivery(foreign="x" * 130_000, argsrepr="y" * 500)
    wire.settlement.settle(held, Failed(Reason.FAILED, "E", "why", "Traceback …"))
    seen = []
    for _ in range(4):
        seen.append(wire.envelopes[-1].headers)
        if len(seen) < 4:
            step(wire, Unwritable("too many headers"))
    assert {kind for kind, _ in wire.sent} == {"publish"}, "nothing is acknowledged"
    full, plain, own, least = seen
    assert (full["x-task-traceback"], "x-task-cut" in full) == ("Traceback …", False)
    assert (plain["x-task-traceback"], plain["x-task-cut"], len(plain["foreign"])) == ("", "traceback", 130_000)
    assert (own["x-task-cut"], own.get("foreign"), len(own["argsrepr"])) == ("traceback and headers", None, 500)
    assert {"task", "id", "x-task-reason", "x-task-exception-message"} <= set(least)
    assert "argsrepr" not in least
    step(wire)
    assert wire.sent[-1] == ("ack", (1, True))


@pytest.mark.parametrize(
    "headers",
    [
        {"retries": 2**63 - 1},
        {"task": "t" * 70_000, "id": "i" * 70_000, "x-task-replays": 3},
        {f"x-task-{number}": "x" * 100 for number in range(2000)},
        {"task": {"a": object()}, "id": object(), "retries": "many"},
    ],
)
def test_the_smallest_dead_letter_can_be_written_whatever_came(headers: dict[str, Any]) -> None:
    failed = Failed(Reason.FAILED, "E" * 10_000, "m" * 10_000, "t" * 100_000)
    made = EFFECTS.smaller(delivery(**headers), failed, SMALLEST)
    assert made is not None
    assert len(encode_properties(made).data) < 8192
    assert (made.headers["x-task-reason"], made.body) == ("failed", b"[[],{},{}]")


@pytest.mark.parametrize("outcome", [Retrying(1e12), Retrying(float("nan")), Retrying(2.0, queue="@x")])
def test_what_cannot_even_be_made_fails_its_task(outcome: Outcome) -> None:
    wire, held = Wire(), delivery()
    wire.settlement.settle(held, outcome)
    ((found, failed),) = wire.failed
    assert (found, failed.reason, held.stage) == (held, Reason.FAILED, Stage.WAITING)
    assert "cannot be written" in failed.message
    held.verdict = failed
    wire.settlement.settle(held, failed)
    step(wire)
    assert wire.sent == [("publish", ("amqptasks.dlx", "email")), ("ack", (1, True))]


def test_a_failure_that_cannot_be_made_leaves_the_smallest_dead_letter() -> None:
    wire = Wire()
    odd: Any = 7
    wire.settlement.settle(delivery(), Failed(Reason.FAILED, "E", odd))
    assert wire.failed == []
    assert wire.envelopes[-1].headers["x-task-cut"]
    step(wire)
    assert wire.sent == [("publish", ("amqptasks.dlx", "email")), ("ack", (1, True))]


@pytest.mark.parametrize("outcome", [Succeeded((Envelope("amqptasks", "typo", b""),)), Retrying(0.0, queue="typo")])
def test_what_goes_to_a_queue_that_nobody_declares_fails_its_task_after_some_tries(outcome: Outcome) -> None:
    wire, held = Wire(), delivery()
    wire.settlement.settle(held, outcome)
    for _ in range(4):
        step(wire, Unroutable("no queue"))
        assert wire.failed == []
    step(wire, Unroutable("no queue"))
    ((_, failed),) = wire.failed
    assert (failed.reason, failed.exception) == (Reason.FAILED, "Unroutable")
    assert {kind for kind, _ in wire.sent} == {"publish"}, "nothing is acknowledged"


def test_an_errback_to_a_queue_that_nobody_declares_is_dropped_and_the_error_stays() -> None:
    wire, held = Wire(), delivery()
    wire.settlement.settle(held, Failed(Reason.FAILED, "ValueError", messages=(Envelope("amqptasks", "typo", b""),)))
    wire.confirms.reverse()
    step(wire)  # the dead letter
    for _ in range(5):
        step(wire, Unroutable("no queue"))
    assert wire.failed == []
    assert wire.envelopes[1].headers["x-task-exception"] == "ValueError"
    assert wire.sent[-1] == ("ack", (1, True))


@pytest.mark.parametrize(
    "outcome",
    [
        Succeeded((Envelope("ours", "email", b""),)),
        Failed(Reason.FAILED),
        RateLimited("amqptasks.rate.t"),
    ],
)
def test_a_queue_of_the_topology_is_waited_for_without_end(outcome: Outcome) -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), outcome)
    for _ in range(30):
        step(wire, Unroutable("gone"))
    assert wire.failed == []
    assert {kind for kind, _ in wire.sent} == {"publish"}
    step(wire)
    assert wire.sent[-1] == ("ack", (1, True))


def last(name: str = "forget") -> Envelope:
    return Envelope("ours", name, b"", last=True)


@pytest.mark.parametrize("make", [Succeeded, Discarded])
def test_what_comes_last_is_published_when_the_others_are_confirmed_and_acknowledged_after_it(
    make: Callable[[tuple[Envelope, ...]], Outcome],
) -> None:
    """The call that deletes a large body: until then another delivery may need it."""
    wire = Wire()
    wire.settlement.settle(one := delivery(), make((last(), Envelope("ours", "result", b""), Envelope("", "r", b""))))
    assert [key for _, (_, key) in wire.sent] == ["result", "r"]
    wire.confirms[1](None)
    assert len(wire.sent) == 2
    wire.confirms[0](None)
    assert [key for _, (_, key) in wire.sent] == ["result", "r", "forget"]
    assert one.stage is Stage.SETTLING
    assert one in wire.settlement.settling
    wire.confirms[2](None)
    assert one.stage is Stage.SETTLED
    alone = delivery(2)
    wire.settlement.settle(alone, make((last(),)))
    assert alone.stage is Stage.SETTLING
    wire.confirms[3](None)
    assert alone.stage is Stage.SETTLED


def test_what_comes_last_does_not_come_when_another_message_is_refused() -> None:
    """Its task fails then, and its dead letter needs the body."""
    wire = Wire()
    wire.settlement.settle(one := delivery(), Succeeded((Envelope("ours", "result", b""), last())))
    wire.confirms[0](MessageTooLarge("too large"))
    assert [key for _, (_, key) in wire.sent] == ["result"]
    assert [failed.exception for _, failed in wire.failed] == ["MessageTooLarge"]
    wire.settlement.settle(one, wire.failed[0][1])
    wire.confirms[1](None)
    assert [key for _, (_, key) in wire.sent] == ["result", "email"]


def test_what_comes_last_waits_for_as_long_as_another_message_is_not_taken() -> None:
    wire = Wire()
    retry = Retrying(1.0, body=b"[[2],{},{}]", messages=(last(),))
    wire.settlement.settle(delivery(), retry)
    for _ in range(5):
        wire.confirms[-1](Nacked("the queue is full"))
        wire.timers[-1][1]()
    assert "forget" not in [key for _, (_, key) in wire.sent]
    wire.confirms[-1](None)
    assert [key for _, (_, key) in wire.sent][-1] == "forget"


def test_what_comes_last_comes_though_the_channel_is_gone_meanwhile() -> None:
    wire = Wire()
    one = delivery()
    wire.settlement.settle(one, Succeeded((Envelope("ours", "result", b""), last())))
    wire.epoch = 2
    wire.confirms[0](None)
    wire.confirms[1](None)
    assert [key for _, (_, key) in wire.sent] == ["result", "forget"]
    assert wire.settlement.remembered(delivery(redelivered=True)) == Discarded()
