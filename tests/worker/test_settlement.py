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
from amqptasks.errors import Nacked, PublishError
from amqptasks.message import Envelope
from amqptasks.outcome import (
    Discarded,
    Failed,
    GivenBack,
    Lost,
    Outcome,
    Postponed,
    Reason,
    Retrying,
    Succeeded,
)
from amqptasks.worker.delivery import CRASHES_HEADER, Delivery, Stage
from amqptasks.worker.effects import TRACEBACK_BYTES, Effects
from amqptasks.worker.settlement import Settlement

EFFECTS = Effects("amqptasks", "email", "worker@host")


def delivery(number: int = 1, *, tag: int | None = None, epoch: int = 1, **headers: Any) -> Delivery:
    method = pika.spec.Basic.Deliver("consumer", tag or number, False, "amqptasks", "email")
    known = {"task": "shop.mail", "id": f"id-{number}", "retries": 0, **headers}
    properties = pika.BasicProperties(headers=known, correlation_id=f"id-{number}", priority=4, expiration="5000")
    return Delivery(Incoming(epoch, method, properties, b"[[],{},{}]"), "email")


class Wire:
    """What settlement sends, in order."""

    def __init__(self) -> None:
        self.epoch = 1
        self.sent: list[tuple[str, Any]] = []
        self.confirms: list[Callable[[PublishError | None], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.settlement = Settlement(self, EFFECTS, publish=self.publish, call_later=self.call_later)

    def send_ack(self, tag: int, epoch: int, *, multiple: bool) -> None:
        self.sent.append(("ack", (tag, multiple)))

    def send_requeue(self, tag: int, epoch: int) -> None:
        self.sent.append(("requeue", tag))

    def publish(self, envelope: Envelope, done: Callable[[PublishError | None], None]) -> None:
        self.sent.append(("publish", (envelope.exchange, envelope.routing_key)))
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
    again = delivery(9, tag=1, epoch=2, id="id-1")
    assert wire.settlement.remembered(again) == Failed(Reason.FAILED, "ValueError")
    assert wire.settlement.remembered(again) is None


def test_an_effect_confirmed_after_the_channel_was_lost_leaves_only_the_ack_to_do() -> None:
    wire = Wire()
    wire.settlement.settle(delivery(), Failed(Reason.FAILED))
    wire.epoch = 2
    wire.confirm()
    wire.turn()
    assert [kind for kind, _ in wire.sent] == ["publish"]
    assert wire.settlement.remembered(delivery(9, tag=1, epoch=2, id="id-1")) == Discarded()


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
