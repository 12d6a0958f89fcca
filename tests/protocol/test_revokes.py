"""The journal of revokes: what is written is read, and nothing else is."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqptasks.errors import DecodeError
from amqptasks.protocol.revokes import Revocation, checked_ids, decode_journal, marker, signal_number

ids = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=20, unique=True)


@given(ids, st.floats(0, 1e11), st.sampled_from([None, signal.SIGTERM, signal.SIGKILL]))
def test_what_is_written_is_read(names, expires, signum):
    entry = Revocation(tuple(names), expires, None if signum is None else int(signum))
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
    "body",
    [b"", b"x", b"[]", b"{}", b'{"marker": 1}', b'{"revoke": "a", "expires": 1}', b'{"revoke": ["a"]}',
     b'{"revoke": ["a"], "expires": true}', b'{"revoke": ["a"], "expires": 1, "terminate": true, "signal": "X"}'],
)  # fmt: skip
def test_everything_else_is_refused(body):
    with pytest.raises(DecodeError):
        decode_journal(body)
