"""The delay ladder against a model: a topic exchange in a few lines, and messages that fall through the levels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amqptasks import AmqpTasks
from amqptasks.topology.delays import (
    LADDER_LEVELS,
    LADDER_MAX_SECONDS,
    TARGET_MAX_BYTES,
    TICK_SECONDS,
    delay_key,
    delayed,
    deliver_pattern,
    exchange_target,
    ladder,
    queue_target,
    ticks,
    undelayed_key,
)
from amqptasks.topology.entities import Binding

PREFIX = "amqptasks"


@dataclass(frozen=True)
class To:
    exchange: str = PREFIX
    routing_key: str = ""
    queue: str | None = None


def matches(pattern: list[str], words: list[str]) -> bool:
    """How a topic exchange compares a binding with a routing key (AMQP 0-9-1, 3.1.3.3)."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return matches(pattern[1:], words) or (bool(words) and matches(pattern, words[1:]))
    return bool(words) and pattern[0] in ("*", words[0]) and matches(pattern[1:], words[1:])


def split(key: str) -> list[str]:
    return key.split(".") if key else []


class Model:
    """The ladder's declared entities, run by hand: where a message comes out, and how long it was held."""

    def __init__(self, targets: list[Binding]) -> None:
        rungs = ladder(PREFIX)
        self.bindings = [*rungs.bindings, *targets]
        self.queues = {queue.name: dict(queue.arguments) for queue in rungs.queues}

    def publish(self, exchange: str, key: str) -> tuple[list[str], float, int]:
        """(target queues, seconds held, queues passed)."""
        held, passed = 0.0, 0
        while True:
            queues, exchanges = self._destinations(exchange, key)
            level = [queue for queue in queues if queue in self.queues]
            assert len(level) + len(exchanges) <= 1, "a message must never be copied inside the ladder"
            if level:
                arguments = self.queues[level[0]]
                assert "x-dead-letter-routing-key" not in arguments, "the rest of the bits must stay in the key"
                held += arguments["x-message-ttl"] / 1000
                passed += 1
                exchange = arguments["x-dead-letter-exchange"]
            elif exchanges:
                exchange = exchanges[0]
            else:
                return queues, held, passed

    def _destinations(self, exchange: str, key: str) -> tuple[list[str], list[str]]:
        queues, exchanges = set(), set()
        for binding in self.bindings:
            if binding.source == exchange and matches(split(binding.routing_key), split(key)):
                (queues if binding.destination_type == "queue" else exchanges).add(binding.destination)
        return sorted(queues), sorted(exchanges)


def bound(*names: str) -> list[Binding]:
    return [Binding(f"{PREFIX}.delay.deliver", name, routing_key=deliver_pattern(queue_target(name))) for name in names]


seconds_on_the_ladder = st.floats(min_value=1e-9, max_value=LADDER_MAX_SECONDS, allow_nan=False)
queue_names = st.from_regex(r"[a-z0-9_-]{1,12}(\.[a-z0-9_-]{1,12}){0,3}", fullmatch=True)


@given(seconds_on_the_ladder)
@example(0.1 + 0.2)
@example(0.125)
@example(1.0)
@example(LADDER_MAX_SECONDS)
def test_a_delay_is_never_early_and_less_than_a_tick_late(seconds):
    held = Model(bound("orders")).publish(*delayed(PREFIX, To(queue="orders"), seconds))[1]
    assert seconds <= held < seconds + TICK_SECONDS


@given(seconds_on_the_ladder, queue_names, st.lists(queue_names, max_size=5))
@example(1.0, "orders", ["eu.orders", "orders.eu", "eu.orders.orders"])
@example(1.0, "eu.orders", ["orders", "eu"])
@example(1.0, "0.1", ["1", "0", "1.0.1"])
def test_a_delayed_message_reaches_its_own_queue_and_no_other(seconds, queue, others):
    names = {queue, *others}
    queues, _, _ = Model(bound(*sorted(names))).publish(*delayed(PREFIX, To(queue=queue), seconds))
    assert queues == [queue]


@given(seconds_on_the_ladder)
def test_a_message_passes_one_queue_a_set_bit_and_enters_at_the_highest(seconds):
    exchange, key = delayed(PREFIX, To(queue="orders"), seconds)
    count = ticks(seconds)
    assert exchange == f"{PREFIX}.delay.{int(math.log2(count)):02d}"
    assert Model(bound("orders")).publish(exchange, key)[2] == count.bit_count()


@given(seconds_on_the_ladder)
def test_a_coarse_delay_passes_at_most_seven_queues_and_is_within_two_percent(seconds):
    exact, coarse = ticks(seconds), ticks(seconds, significant_bits=7)
    assert exact <= coarse <= max(exact * 1.016, exact)
    assert coarse.bit_count() <= 7 or coarse == ticks(LADDER_MAX_SECONDS)


@pytest.mark.parametrize("seconds", [0, 0.0, -1, -1e9, -math.inf])
def test_no_delay_publishes_to_the_route_itself(seconds):
    assert delayed(PREFIX, To("tasks", "image.resize", "media"), seconds) == ("tasks", "image.resize")


@pytest.mark.parametrize("seconds", [LADDER_MAX_SECONDS + 1, 1e12, math.inf])
def test_a_delay_beyond_the_ladder_is_cut_to_its_maximum(seconds):
    assert delayed(PREFIX, To(queue="orders"), seconds) == (
        "amqptasks.delay.24",
        ".".join("1" * LADDER_LEVELS) + ".orders",
    )


def test_a_delay_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        delayed(PREFIX, To(queue="orders"), math.nan)


def test_the_key_has_one_bit_a_level_and_then_the_queue():
    assert delayed(PREFIX, To(queue="eu.orders"), 1.0) == ("amqptasks.delay.03", "0." * 21 + "1.0.0.0.eu.orders")


def test_the_levels_hold_an_eighth_of_a_second_to_twenty_four_days():
    ttls = [dict(queue.arguments)["x-message-ttl"] for queue in ladder(PREFIX).queues]
    assert ttls == [125 * 2**level for level in range(LADDER_LEVELS)]


def test_a_key_of_the_task_exchange_without_a_queue_is_a_plain_target():
    assert delayed(PREFIX, To(PREFIX, "email.bulk"), 0.125)[1] == delay_key(1, "email.bulk")
    assert delayed(PREFIX, To("", "email"), 0.125)[1] == delay_key(1, "email")


def test_a_target_on_an_exchange_is_marked_so_that_no_queue_of_that_name_receives_it():
    assert delayed(PREFIX, To("tasks", "image.resize"), 0.125)[1] == delay_key(1, "@tasks.image.resize")
    assert delayed(PREFIX, To("news"), 0.125)[1] == delay_key(1, "@news")


def test_exchanges_with_dots_in_their_names_do_not_mix():
    assert exchange_target("a", "b.c") != exchange_target("a.b", "c")
    assert exchange_target("a.b", "c") != exchange_target("a%2Eb", "c")


def test_a_headers_exchange_cannot_be_delayed():
    with pytest.raises(ValueError, match="headers exchange 'by-size'"):
        delayed(PREFIX, To("by-size"), 1.0, exchange_type="headers")
    assert delayed(PREFIX, To("by-size", queue="media"), 0.125, exchange_type="headers")[1] == delay_key(1, "media")


@given(st.text(min_size=1, max_size=80).filter(lambda text: not text.startswith("@")), st.integers(1, 2**25 - 1))
def test_every_key_fits_into_amqps_short_string_or_is_refused(name, count):
    try:
        key = delay_key(count, queue_target(name))
    except ValueError:
        assert len(name.encode()) > TARGET_MAX_BYTES or {"*", "#"} & set(name.split("."))
    else:
        assert len(key.encode()) <= 255


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 206, "206 bytes"),
        ("é" * 103, "206 bytes"),
        ("orders.*", "wildcard"),
        ("#", "wildcard"),
        ("@orders", "marks an exchange"),
        ("", "needs a queue"),
    ],
)
def test_a_name_that_the_ladder_cannot_carry_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        queue_target(name)


def test_a_name_of_the_greatest_length_is_taken():
    assert len(delay_key(1, queue_target("x" * 205))) == 255


@pytest.mark.parametrize(
    ("route", "key"),
    [
        (To(queue="eu.orders"), "eu.orders"),
        (To("tasks", "image.resize"), "image.resize"),
        (To("news"), ""),
    ],
)
def test_the_key_before_the_delay_can_be_read_back(route, key):
    assert undelayed_key(delayed(PREFIX, route, 77.3)[1]) == key


@pytest.mark.parametrize("key", ["orders", "0.1.orders", "", "2." * 25 + "orders", "1." * 24 + "1"])
def test_a_key_that_did_not_come_down_the_ladder_stays_as_it_is(key):
    assert undelayed_key(key) == key


def test_each_level_is_bound_after_the_next_one_stands():
    known: set[str] = {f"{PREFIX}.delay.deliver"}
    rungs = ladder(PREFIX)
    for exchange, queue in zip(rungs.exchanges[1:], rungs.queues, strict=True):
        assert dict(queue.arguments)["x-dead-letter-exchange"] in known
        assert re.fullmatch(r"amqptasks\.delay\.\d\d", exchange.name)
        known.add(exchange.name)


def test_a_key_is_not_taken_for_a_queues_name_before_a_delay() -> None:
    """A queue of that name is looked for (`broker/targets.py`), and a key may lead to a queue of another one."""
    calls = AmqpTasks("keys", config={}).calls

    def mandatory(**options: Any) -> bool:
        return calls.prepare(calls.callee("t"), (), {}, **options).envelope.mandatory

    assert mandatory(countdown=5, queue="other")
    assert mandatory(countdown=5, exchange="", routing_key="other")
    assert mandatory(routing_key="key")
    assert not mandatory(countdown=5, routing_key="key")
