"""Which message the broker meant when it closed the channel."""

from __future__ import annotations

from typing import Any

import pytest

from amqptasks.broker import verdicts
from amqptasks.errors import AccessRefused, BrokerUnreachable, PublishTimeout, Unroutable
from amqptasks.message import Envelope


def envelope(exchange: str = "shop", key: str = "orders", body: bytes = b"{}", **more: Any) -> Envelope:
    return Envelope(exchange, key, body, **more)


def test_a_missing_exchange_is_the_fault_of_who_publishes_to_it() -> None:
    text = "NOT_FOUND - no exchange 'shop' in vhost '/'"
    assert isinstance(verdicts.blame(envelope(), 404, text), Unroutable)
    assert verdicts.blame(envelope("other"), 404, text) is None


def test_a_refused_exchange_has_the_permission_as_its_cause() -> None:
    text = "ACCESS_REFUSED - access to exchange 'shop' in vhost '/' refused for user 'ann'"
    error = verdicts.blame(envelope(), 403, text)
    assert error is not None
    assert isinstance(error.__cause__, AccessRefused)
    assert verdicts.blame(envelope("other"), 403, text) is None


def test_a_refused_topic_is_the_fault_of_that_key_only() -> None:
    text = "ACCESS_REFUSED - access to topic 'orders' in exchange 'shop' in vhost '/' refused for user 'ann'"
    assert verdicts.blame(envelope(), 403, text) is not None
    assert verdicts.blame(envelope(key="invoices"), 403, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "PRECONDITION_FAILED - message size 60 is larger than max size 50",
        "PRECONDITION_FAILED - message size 60 is larger than configured max size 50",
    ],
)
def test_a_message_beyond_the_limit_is_told_its_size(text: str) -> None:
    assert "60 bytes; the broker's limit is 50" in str(verdicts.blame(envelope(body=b"x" * 60), 406, text))
    assert verdicts.blame(envelope(body=b"x" * 50), 406, text) is None


def test_what_names_nobody_blames_nobody() -> None:
    assert verdicts.blame(envelope(), 406, "PRECONDITION_FAILED - invalid expiration 'abc': no_integer") is None
    assert verdicts.is_about_a_message(406)
    assert not verdicts.is_about_a_message(541)


@pytest.mark.parametrize(("exchange", "key", "what"), [("e" * 256, "k", "exchange"), ("e", "é" * 128, "routing key")])
def test_an_address_that_amqp_cannot_carry_is_named(exchange: str, key: str, what: str) -> None:
    assert f"the {what}" in str(verdicts.too_long(envelope(exchange, key)))
    assert verdicts.too_long(envelope("e" * 255, "é" * 127)) is None


def test_what_left_this_process_is_never_called_unpublished() -> None:
    gone = BrokerUnreachable("node: gone")
    assert "was not published" in str(verdicts.lost(gone, sent=False))
    assert "may or may not" in str(verdicts.lost(gone, sent=True))
    assert verdicts.lost(gone, sent=True).__cause__ is gone
    assert "may or may not" in str(verdicts.late("node", gone, sent=True))
    unsent = verdicts.late("node", None, sent=False)
    assert isinstance(unsent, PublishTimeout)
    assert isinstance(unsent.__cause__, BrokerUnreachable)
