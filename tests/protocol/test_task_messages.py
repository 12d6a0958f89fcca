"""Message protocol 2: what is written, and what is refused."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from amqptasks.errors import ConfigError, DecodeError, SerializationError
from amqptasks.protocol import jsontypes
from amqptasks.protocol.compression import compress, decompress, mime_type
from amqptasks.protocol.serializers import accepted, serializer
from amqptasks.protocol.task import EMPTY_EMBED, TaskHeaders, decode_body, parse_time, task_envelope

JSON = serializer("json")
LIMIT = 1 << 20


def envelope(args: tuple[Any, ...] = (2, 2), **options: Any) -> Any:
    headers = TaskHeaders(task="proj.add", id="9f", **options)
    return task_envelope(headers, args, {}, serializer=JSON, exchange="amqptasks", routing_key="default")


def test_the_envelope_has_every_field_of_protocol_2() -> None:
    made = envelope()
    assert made.correlation_id == made.message_id == "9f"
    assert made.delivery_mode == 2
    assert (made.content_type, made.content_encoding) == ("application/json", "utf-8")
    assert json.loads(made.body) == [[2, 2], {}, dict(EMPTY_EMBED)]
    origin = made.headers.pop("origin")
    assert origin.startswith("gen")
    published = made.headers.pop("x-amqptasks-published")
    assert abs(published / 1000 - datetime.now(UTC).timestamp()) < 60
    assert made.headers == {
        "lang": "py",
        "task": "proj.add",
        "id": "9f",
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": "9f",
        "parent_id": None,
        "argsrepr": "(2, 2)",
        "kwargsrepr": "{}",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }


def test_time_limits_are_hard_then_soft() -> None:
    assert envelope(time_limit=300, soft_time_limit=240).headers["timelimit"] == [300, 240]


def test_shown_arguments_are_cut() -> None:
    assert len(envelope(args=("x" * 100_000,)).headers["argsrepr"]) < 1000


class Colour(Enum):
    RED = "red"


class Model(BaseModel):
    amount: Decimal


@dataclass
class Point:
    x: int
    at: datetime


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        datetime(2026, 1, 2, 3, 4, 5),
        date(2026, 1, 2),
        time(3, 4, 5),
        Decimal("9.990"),
        UUID("12345678-1234-5678-1234-567812345678"),
        b"\x00\xff",
        {"deep": [{"when": date(2026, 1, 2)}]},
    ],
)
def test_values_with_a_type_survive_the_wire(value: Any) -> None:
    assert jsontypes.loads(jsontypes.dumps(value)) == value


def test_models_dataclasses_and_enums_are_written_as_plain_json() -> None:
    assert jsontypes.loads(jsontypes.dumps(Model(amount=Decimal("1.5")))) == {"amount": Decimal("1.5")}
    when = datetime(2026, 1, 2, tzinfo=UTC)
    assert jsontypes.loads(jsontypes.dumps(Point(1, when))) == {"x": 1, "at": when}
    assert jsontypes.loads(jsontypes.dumps([Colour.RED, {3}])) == ["red", [3]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_json_values_survive_the_wire(value: Any) -> None:
    if isinstance(value, float) and abs(value) == float("inf"):
        return
    try:
        body = jsontypes.dumps(value)
    except ValueError:
        return  # infinity somewhere inside: no JSON
    assert jsontypes.loads(body) == value


def test_an_argument_that_cannot_be_written_is_named() -> None:
    headers = TaskHeaders(task="proj.add", id="9f")
    with pytest.raises(SerializationError, match=r"argument 'user' \(builtins.object\)"):
        task_envelope(headers, (1,), {"user": object()}, serializer=JSON, exchange="", routing_key="q")
    with pytest.raises(SerializationError, match="positional argument 1"):
        task_envelope(headers, (1, object()), {}, serializer=JSON, exchange="", routing_key="q")
    with pytest.raises(SerializationError, match="positional argument 0"):
        task_envelope(headers, (float("nan"),), {}, serializer=JSON, exchange="", routing_key="q")


def decoded(body: bytes, content_type: str | None = "application/json", compression: str | None = None) -> Any:
    return decode_body(body, content_type, compression, accepted(["json"]), LIMIT)


def test_a_body_is_decoded() -> None:
    body = decoded(b'[[1],{"a":2},{"chord":null}]')
    assert (body.args, body.kwargs, body.embed) == ([1], {"a": 2}, {"chord": None})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x80\x81",
        b"{}",
        b"[]",
        b"[1,2,3]",
        b"[[],[],{}]",
        b'[[],{"__type__":1,"__value__":2},{}]',
        b'[[{"__type__":"spaceship","__value__":2}],{},{}]',
        b'[[{"__type__":"datetime","__value__":"never"}],{},{}]',
        b"[" * 100_000,
        b"[[" + b'{"__type__":' * 3000 + b"1" + b"}" * 3000 + b"],{},{}]",
        b"NaN",
    ],
)
def test_a_body_of_another_shape_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        decoded(body)


def test_only_the_accept_list_is_decoded() -> None:
    pickled = serializer("pickle").dumps(([], {}, {}))
    with pytest.raises(DecodeError, match=r"not on the accept list \(application/json\)"):
        decoded(pickled, "application/x-python-serialize")
    assert decode_body(pickled, "application/x-python-serialize", None, accepted(["pickle"]), LIMIT).args == []


@pytest.mark.parametrize("name", ["json", "msgpack", "yaml", "pickle"])
def test_each_serializer_reads_what_it_writes(name: str) -> None:
    packer = serializer(name)
    body = packer.dumps(([1, "ü"], {"k": [None, 1.5]}, {}))
    assert decode_body(body, packer.content_type, None, accepted([name]), LIMIT).kwargs == {"k": [None, 1.5]}


@pytest.mark.parametrize("name", ["msgpack", "yaml", "pickle"])
def test_rubbish_is_a_decode_error_in_every_serializer(name: str) -> None:
    for body in (b"\xc1\xc1", b"\x00: [", b"%"):
        with pytest.raises(DecodeError):
            decode_body(body, serializer(name).content_type, None, accepted([name]), LIMIT)


def test_yaml_constructs_nothing() -> None:
    with pytest.raises(DecodeError):
        decode_body(b"!!python/object/apply:os.system [true]", "application/x-yaml", None, accepted(["yaml"]), LIMIT)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma"])
def test_compressed_bodies_are_read_back(name: str) -> None:
    mime = mime_type(name)
    body = b"[[1],{},{}]"
    assert decompress(compress(body, mime), mime, LIMIT) == body
    assert decoded(compress(body, mime), compression=mime).args == [1]


def test_gzip_is_the_zlib_stream_that_celery_sends() -> None:
    assert zlib.decompress(compress(b"body", mime_type("gzip"))) == b"body"


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma"])
def test_a_decompression_bomb_is_refused(name: str) -> None:
    mime = mime_type(name)
    bomb = compress(b"0" * (50 << 20), mime)
    assert len(bomb) < 100_000
    with pytest.raises(DecodeError, match="larger than"):
        decompress(bomb, mime, LIMIT)


def test_damaged_and_unknown_compression_is_a_decode_error() -> None:
    with pytest.raises(DecodeError, match="damaged"):
        decompress(b"not zlib", "application/x-gzip", LIMIT)
    with pytest.raises(DecodeError, match="not known"):
        decompress(b"", "application/x-magic", LIMIT)
    with pytest.raises(ConfigError, match="gzip"):
        mime_type("magic")


def test_times_are_read_as_celery_writes_them() -> None:
    assert parse_time(None) is None
    assert parse_time("2026-01-02T03:04:05.123456") == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)
    assert parse_time("2026-01-02T03:04:05Z") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for bad in ("soon", 5, [], b"2026"):
        with pytest.raises(DecodeError):
            parse_time(bad)
