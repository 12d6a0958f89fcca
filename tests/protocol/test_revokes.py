"""The journal of revokes: what is written is read, and nothing else is."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqptasks.errors import DecodeError
from amqptasks.protocol.revokes import (
    Revocation,
    checked_ids,
    checked_stamps,
    decode_journal,
    is_revoked,
    marker,
    signal_number,
)

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
ids = st.lists(texts, min_size=1, max_size=20, unique=True)
stamps = st.lists(st.tuples(texts, texts), max_size=5, unique=True)


@given(ids, stamps, st.floats(0, 1e11), st.sampled_from([None, signal.SIGTERM, signal.SIGKILL]))
def test_what_is_written_is_read(names, marks, expires, signum):
    entry = Revocation((*names, *marks), expires, None if signum is None else int(signum))
    assert decode_journal(entry.encode()) == entry


def test_a_marker_is_its_name():
    assert decode_journal(marker("the end")) == "the end"


@pytest.mark.parametrize("value", ["SIGTERM", "term", "TERM", 15, "15"])
def test_signals_go_by_name_and_number(value):
    assert signal_number(value) == signal.SIGTERM


@pytest.mark.parametrize("value", ["", "SIGNONSENSE", 0, -9, 1000, None, True, 1.5, [9]])
def test_what_is_no_signal_says_so(value):
    with pytest.raises(ValueError, match="is no signal; write SIGTERM"):
        signal_number(value)


def test_ids_are_kept_in_order_and_once():
    assert checked_ids(["b", "a", "b"]) == ("b", "a")


@pytest.mark.parametrize("wrong", [[""], ["x" * 256], [7], [None], ["é" * 128]])
def test_what_is_no_id_says_so(wrong):
    with pytest.raises(ValueError, match="is no task id"):
        checked_ids(wrong)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"customer": "acme"}, [("customer", "acme")]),
        (
            {"customer": ["acme", "umbrella"], "batch": 7},
            [("customer", "acme"), ("customer", "umbrella"), ("batch", "7")],
        ),
        (["customer=acme", "url=a=b"], [("customer", "acme"), ("url", "a=b")]),
        ({"customer": ("acme", "acme")}, [("customer", "acme")]),
    ],
)
def test_stamps_are_given_as_to_celery_and_become_texts(given, found):
    assert checked_stamps(given) == tuple(found)


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "customer=acme", {}, [], ["customer"], ["=acme"], ["customer="], [7], {"": "x"}, {7: "x"},
     {"customer": None}, {"customer": {"a": 1}}, {"customer": []}, {"customer": ""},
     {"customer": "x" * 248}, {"customer": "é" * 124}, {"n": list(range(1001))}],
)  # fmt: skip
def test_what_is_no_stamp_says_so(wrong):
    with pytest.raises(ValueError, match="write name=value"):
        checked_stamps(wrong)


@pytest.mark.parametrize(
    ("headers", "revoked"),
    [
        ({"id": "a"}, True),
        ({"id": "b"}, False),
        ({"id": "b", "stamped_headers": ["customer"], "stamps": {"customer": "acme"}}, True),
        ({"id": "b", "stamped_headers": ["x", "customer"], "stamps": {"customer": ["other", "acme"]}}, True),
        ({"id": "b", "stamped_headers": ["batch"], "stamps": {"batch": 7}}, True),
        ({"id": "b", "stamped_headers": ["customer"], "stamps": {"customer": "other"}}, False),
        ({"id": "b", "stamped_headers": [], "stamps": {"customer": "acme"}}, False),
        ({"id": "b", "stamped_headers": ["customer"], "stamps": None}, False),
        ({"id": ["a"], "stamped_headers": [{}, ["customer"]], "stamps": {"customer": {}}}, False),
        ({"stamped_headers": "customer", "stamps": "acme"}, False),
        ({}, False),
    ],
)
def test_a_message_is_revoked_by_its_id_or_a_stamp(headers, revoked):
    assert is_revoked(headers, {"a": 1.0, ("customer", "acme"): 1.0, ("batch", "7"): 1.0}) is revoked


@pytest.mark.parametrize(
    "body",
    [b'{"revoke": [], "stamps": [["a"]], "expires": 1}',
     b'{"revoke": [], "stamps": [%s], "expires": 1}' % b", ".join(b'["a", "%d"]' % one for one in range(1001)),
     b'{"revoke": [], "stamps": 7, "expires": 1}',
     b'{"revoke": [], "stamps": [["a", "b", "c"]], "expires": 1}',
     b'{"revoke": [], "stamps": [["a", null]], "expires": 1}',
     b"", b"x", b"[]", b"{}", b'{"marker": 1}', b'{"revoke": "a", "expires": 1}', b'{"revoke": ["a"]}',
     b'{"revoke": ["a"], "expires": true}', b'{"revoke": ["a"], "expires": 1, "terminate": true, "signal": "X"}'],
)  # fmt: skip
def test_everything_else_is_refused(body):
    with pytest.raises(DecodeError):
        decode_journal(body)
