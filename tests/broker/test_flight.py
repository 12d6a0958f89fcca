"""Acks, nacks and returns find their messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from amqptasks.broker.flight import Flight
from amqptasks.broker.pending import Pending
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope


def flight_of(*ids: str, key: str = "k") -> Flight:
    channel: Any = SimpleNamespace(
        channel_number=1,
        connection=SimpleNamespace(
            params=SimpleNamespace(frame_max=131_072), server_properties={}, _body_max_length=131_064
        ),
    )
    flight = Flight(channel)
    for one in ids:
        envelope = Envelope("e", key, b"", correlation_id=one)
        flight.tag += 1
        flight.unconfirmed[flight.tag] = Pending(envelope, encode_properties(envelope), lambda _error: None)
    return flight


def settle(flight: Flight, tag: int, multiple: bool = False) -> list[str | None]:
    return [pending.envelope.correlation_id for pending in flight.settled(tag, multiple)]


def give_back(flight: Flight, one: str, key: str = "k") -> None:
    properties = SimpleNamespace(correlation_id=one, message_id=None)
    flight.returned(SimpleNamespace(exchange="e", routing_key=key, reply_text="NO_ROUTE"), properties)


def test_a_single_ack_takes_its_message_whatever_the_order() -> None:
    flight = flight_of("a", "b", "c")
    assert settle(flight, 2) == ["b"]
    assert settle(flight, 2) == []
    assert settle(flight, 3) == ["c"]
    assert settle(flight, 1) == ["a"]


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=20))
def test_each_message_is_settled_once_and_a_multiple_takes_all_up_to_its_tag(acks: list[tuple[int, bool]]) -> None:
    flight = flight_of(*(str(number) for number in range(1, 11)))
    left = list(range(1, 11))
    for tag, multiple in acks:
        expected = [one for one in left if (one <= tag if multiple else one == tag)]
        assert settle(flight, tag, multiple) == [str(one) for one in expected]
        left = [one for one in left if one not in expected]


def test_a_return_is_about_the_earliest_message_with_its_id_that_was_not_returned() -> None:
    flight = flight_of("a", "twin", "twin", "b")
    give_back(flight, "twin")
    assert [pending.returned for pending in flight.unconfirmed.values()] == [None, "NO_ROUTE", None, None]
    give_back(flight, "twin")
    assert [pending.returned for pending in flight.unconfirmed.values()] == [None, "NO_ROUTE", "NO_ROUTE", None]


def test_a_return_of_another_route_is_not_mistaken() -> None:
    flight = flight_of("a")
    give_back(flight, "a", key="other")
    assert [pending.returned for pending in flight.unconfirmed.values()] == [None]
