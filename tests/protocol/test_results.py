"""Results in Celery's form, compared with what Celery itself writes and reads."""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import celery
import pytest
from celery.backends.base import Backend

from amqptasks import SerializationError
from amqptasks.errors import DecodeError, RemoteError
from amqptasks.protocol.results import ResultMeta, decode_result, encode_result, error_from_wire, error_to_wire


class Odd(Exception):
    """Wants more than it keeps."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.fixture
def theirs() -> Backend:
    return Backend(celery.Celery("theirs", set_as_current=False))


def same(meta: ResultMeta) -> ResultMeta:
    return decode_result(encode_result(meta))


@pytest.mark.parametrize(
    "value",
    [None, 1, 1.5, "ü", [1, {"a": None}], Decimal("1.10"), datetime(2026, 1, 2, tzinfo=UTC), UUID(int=5), b"\x00\xff"],
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    meta = same(ResultMeta("id", "SUCCESS", value, children=[[["child", None], None]], parent_id="p", group_id="g"))
    assert meta.result == value
    assert (meta.task_id, meta.children, meta.parent_id, meta.group_id) == ("id", [[["child", None], None]], "p", "g")
    assert meta.ready
    assert meta.date_done is not None
    assert same(ResultMeta("id", "PROGRESS", {"done": 1})).date_done is None


def test_celery_reads_what_we_write(theirs: Backend) -> None:
    found = theirs.meta_from_decoded(
        theirs.decode_result(encode_result(ResultMeta("id", "FAILURE", ValueError("a", 1))))
    )
    assert isinstance(found["result"], ValueError)
    assert found["result"].args == ("a", 1)
    found = theirs.decode_result(encode_result(ResultMeta("id", "SUCCESS", Decimal("1.10"))))
    assert (found["task_id"], found["status"], found["result"]) == ("id", "SUCCESS", Decimal("1.10"))


def test_we_read_what_celery_writes(theirs: Backend) -> None:
    stored = theirs._get_result_meta(theirs.prepare_exception(KeyError("k")), "FAILURE", "Traceback …", None)
    meta = decode_result(theirs.encode({**stored, "task_id": "id"}).encode())
    assert isinstance(meta.result, KeyError)
    assert (meta.result.args, meta.traceback) == (("k",), "Traceback …")


def test_an_exception_has_its_own_class_where_it_is_imported_and_else_its_name() -> None:
    again = error_from_wire(error_to_wire(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")))
    assert isinstance(again, UnicodeDecodeError)
    stranger = error_from_wire({"exc_type": "Broken", "exc_message": ["why"], "exc_module": "far.away"})
    assert isinstance(stranger, RemoteError)
    assert (type(stranger).__name__, type(stranger).__module__, stranger.args) == ("Broken", "far.away", ("why",))
    assert error_to_wire(stranger) == {"exc_type": "Broken", "exc_message": ["why"], "exc_module": "far.away"}
    odd = error_from_wire(error_to_wire(Odd(1, reason="why")))
    assert isinstance(odd, RemoteError)
    assert (type(odd).__name__, odd.args) == ("Odd", ("why",))


def test_a_result_imports_and_calls_nothing_but_exceptions() -> None:
    for module, name in (("antigravity", "x"), ("os", "system"), ("builtins", "print"), ("builtins", "SystemExit")):
        found = error_from_wire({"exc_type": name, "exc_message": ["true"], "exc_module": module})
        assert isinstance(found, RemoteError), name
    assert "antigravity" not in sys.modules
    assert isinstance(error_from_wire("text"), RemoteError)
    assert isinstance(error_from_wire(None), RemoteError)


def test_what_json_cannot_carry_is_told_or_replaced() -> None:
    with pytest.raises(SerializationError, match=r"the result \(_thread.lock\) cannot be serialized"):
        encode_result(ResultMeta("id", "SUCCESS", threading.Lock()))
    for strange in (threading.Lock(), NoRepr(), object()):
        meta = same(ResultMeta("id", "FAILURE", ValueError("a", strange)))
        assert isinstance(meta.result, ValueError)
        assert meta.result.args[0] == "a"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"status": 5}', b"\xff", b"null"])
def test_nonsense_is_no_result(body: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_result(body)
