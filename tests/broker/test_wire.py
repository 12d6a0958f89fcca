"""The content header codec against pika's own."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec
from pika.exceptions import AMQPError

from amqptasks.broker.wire import content_frames, decode_properties, encode_properties, forwarded, publish_frame
from amqptasks.errors import SerializationError
from amqptasks.message import Envelope

names = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=30)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=15,
)
tables = st.dictionaries(names, values, max_size=8)


def encoded(envelope: Envelope) -> bytes:
    return b"".join(encode_properties(envelope).encode())


def envelope(headers: dict[Any, Any], **options: Any) -> Envelope:
    return Envelope("e", "k", b"", headers=headers, **options)


@given(tables)
def test_pika_reads_what_we_write(headers: dict[str, Any]) -> None:
    made = envelope(headers, priority=7, correlation_id="c", reply_to="r", expiration="5", message_id="m")
    read = pika.BasicProperties()
    pika.spec.BasicProperties.decode(read, encoded(made))
    assert read.headers == (headers or None)
    assert (read.priority, read.correlation_id, read.reply_to, read.expiration) == (7, "c", "r", "5")
    assert (read.message_id, read.delivery_mode, read.content_type) == ("m", 2, "application/json")


@given(tables)
def test_we_read_what_pika_writes(headers: dict[str, Any]) -> None:
    written = pika.BasicProperties(
        content_type="t", headers=headers, delivery_mode=1, priority=0, correlation_id="c", message_id="m", app_id="a"
    )
    read = pika.BasicProperties()
    decode_properties(read, b"".join(written.encode()))
    assert read.headers == headers
    assert (read.content_type, read.delivery_mode, read.priority) == ("t", 1, 0)
    assert (read.correlation_id, read.message_id, read.reply_to) == ("c", "m", None)


@given(names, names, st.booleans(), tables, st.binary(max_size=100), st.integers(1, 60))
def test_a_message_has_the_frames_that_pika_writes(
    exchange: str, key: str, mandatory: bool, headers: dict[str, Any], body: bytes, most: int
) -> None:
    properties = encode_properties(envelope(headers))
    method = spec.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
    theirs = [frame.Method(3, method).marshal(), frame.Header(3, len(body), properties).marshal()]
    theirs += [frame.Body(3, body[start : start + most]).marshal() for start in range(0, len(body), most)]
    ours = publish_frame(3, exchange, key, mandatory) + content_frames(3, properties, body, most)
    assert ours == b"".join(theirs)


def test_floats_pass_though_pika_cannot_write_them() -> None:
    read = pika.BasicProperties()
    decode_properties(read, encoded(envelope({"timelimit": [300.0, None], "x": 0.5})))
    assert read.headers == {"timelimit": [300.0, None], "x": 0.5}


def test_what_is_not_utf8_stays_bytes() -> None:
    data = encoded(envelope({"name": "wxyz"}))
    read = pika.BasicProperties()
    decode_properties(read, data.replace(b"wxyz", b"\xff\xfe\xff\xff"))
    assert read.headers == {"name": b"\xff\xfe\xff\xff"}
    read = pika.BasicProperties()
    decode_properties(read, data.replace(b"name", b"\xff\xfe\xff\xff"))
    assert read.headers == {b"\xff\xfe\xff\xff": "wxyz"}


@given(st.binary(max_size=60))
def test_rubbish_raises_or_ends_but_never_hangs(data: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError, KeyError, OverflowError, struct.error, AMQPError):
        decode_properties(pika.BasicProperties(), data)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"trace": object()}, "header 'trace'"),
        ({"big": 2**70}, "does not fit 64 bits"),
        ({"n" * 300: 1}, "AMQP allows 255"),
    ],
)
def test_a_header_that_cannot_be_written_is_named(headers: dict[str, Any], words: str) -> None:
    with pytest.raises(SerializationError, match=words):
        encoded(envelope(headers))


@given(tables, st.booleans(), st.booleans())
def test_what_goes_on_is_what_came_without_what_is_the_brokers(
    headers: dict[str, Any], user: bool, copies: bool
) -> None:
    extra = {"CC": ["elsewhere"], "BCC": ["there"], "x-delivery-count": 2} if copies else {}
    fields: dict[str, Any] = {
        "content_type": "t", "headers": {**extra, **headers}, "delivery_mode": 1, "priority": 0, "expiration": "9",
        "timestamp": 1, "type": "k", "app_id": "a", "cluster_id": "c",
    }  # fmt: skip
    written = b"".join(pika.BasicProperties(**fields, user_id="guest" if user else None).encode())
    passed = b"".join(forwarded(written).encode())
    if not (user or copies):
        assert passed == written
    read = pika.BasicProperties().decode(passed)
    kept = {name: value for name, value in headers.items() if name not in ("CC", "BCC", "x-delivery-count")}
    assert read.headers == (kept if user or copies else headers)
    assert read.user_id is None
    assert {name: getattr(read, name) for name in fields if name != "headers"} == {
        name: value for name, value in fields.items() if name != "headers"
    }


def test_headers_in_headers_are_read_to_a_depth_that_can_be_written_again() -> None:
    for depth, kind in ((64, "A"), (65, "A"), (600, "A"), (64, "F"), (65, "F"), (600, "F")):
        value = b"V"
        for _ in range(depth):
            value = value if kind == "A" else b"\x01a" + value
            value = kind.encode() + struct.pack(">I", len(value)) + value
        table = b"\x04deep" + value
        data = struct.pack(">HI", 1 << 13 | 1 << 10, len(table)) + table + b"\x02id"
        read = pika.BasicProperties()
        decode_properties(read, data)
        assert read.correlation_id == "id", "which message it was is known"
        if depth > 64:
            assert read.headers is None
        else:
            assert table in encoded(envelope(read.headers))


def test_a_header_that_nobody_can_read_goes_on_as_it_came() -> None:
    table = b"\x02CC?strange"
    data = struct.pack(">HI", 1 << 13 | 1 << 4, len(table)) + table + b"\x05guest"
    assert forwarded(data).encode() == [struct.pack(">HI", 1 << 13, len(table)) + table]
