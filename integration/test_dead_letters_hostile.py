"""Dead letters that somebody made to do harm, or by mistake: none hinders the others, and none steers a terminal."""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace
from functools import partial
from typing import Any

import pika
import pytest

from amqptasks.broker.wire import EncodedProperties, encode_properties
from amqptasks.deadletters import Filter
from amqptasks.deadletters.moving import publish_all
from amqptasks.message import Envelope
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench
from integration.letters import JOBS, dead, dlq

TOLD = {"task": f"{JOBS}.note", "x-task-reason": "failed", "x-task-exception": "ValueError"}
BODY = b"[[0], {}, {}]"
UGLY = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp.exe \x00\x7f"


def with_header(name: bytes, kind: bytes, value: bytes) -> EncodedProperties:
    """Properties with `TOLD` and one header that our encoder would not write."""
    table = encode_properties(Envelope("", "", b"", headers={**TOLD, "id": name.decode()})).data
    # Flags, content type and encoding, then the table with its length.
    at = 2 + 1 + table[2]
    at += 1 + table[at]
    (size,) = struct.unpack_from(">I", table, at)
    entry = bytes((len(name),)) + name + kind + value
    whole = struct.pack(">I", size + len(entry)) + table[at + 4 : at + 4 + size] + entry
    return EncodedProperties(table[:at] + whole + table[at + 4 + size :])


def plain(headers: dict[Any, Any], **properties: Any) -> EncodedProperties:
    return encode_properties(Envelope("", "", b"", headers={**TOLD, **headers}, **properties))


HOSTILE: dict[str, EncodedProperties] = {
    "markup": plain({"id": "markup", "task": "[/x]", "x-task-exception-message": "[bold]:boom:"}),
    "a correlation id that is no text": plain({}, correlation_id=b"\xff\xfe"),
    "a header's name that is no text": plain({"id": "named", b"\xff": 1, "x": {b"\xfe": b"\xfd"}}),
    "an id that is no text": plain({"id": b"id-\xff"}),
    "a traceback that is no text": plain({"id": "trace", "x-task-traceback": b"\xff\x1b[2J"}),
    "control characters": plain({"id": UGLY, "task": UGLY, "x-task-exception-message": UGLY, UGLY: UGLY}),
    "control characters among lines": plain({"id": "lines", "x-task-traceback": f"one\n{UGLY}\ntwo"}),
    "the least number": with_header(b"least", b"l", struct.pack(">q", -(2**63))),
    "something like a typed value": plain({"id": "typed", "x": {"__type__": "datetime", "__value__": 1}}),
    "endless": plain({"id": "endless", "x": 1e308}),
    "an id of 60 KB": plain({"id": "i" * 60_000}),
    "x-death that is no list": plain({"id": "death", "x-death": "boom", "x-task-failed-at": 7}),
    "x-death of nothing": plain({"id": "deaths", "x-death": [1, {"time": "never", "count": "x"}]}),
    "a type of its own": plain({"id": "reply"}, reply_to=b"\xff", priority=255),
}
#: A time beyond the year 9999.
UNREADABLE = with_header(b"beyond", b"T", struct.pack(">Q", 2**62))


def put(bench: Bench, letters: list[EncodedProperties]) -> None:
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for one in letters:
            channel.basic_publish("", "default.dlq", BODY, one)
    wait_until(lambda: bench.vhost.ready("default.dlq") >= len(letters), 20, "the letters are there")


def steers(text: str) -> list[str]:
    """What in a text is no character to look at."""
    return sorted({one for one in text if not (one.isprintable() or one in "\n\t")})


def wire_of(bench: Bench, queue: str) -> list[tuple[Any, ...]]:
    """What of each message in a queue must not change, as pika reads it."""
    found = []
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        consumed = channel.consume(queue, inactivity_timeout=20)
        for method, properties, body in itertools.islice(consumed, bench.vhost.ready(queue)):
            assert method is not None, "as many come as wait"
            headers = {name: value for name, value in (properties.headers or {}).items() if name != "x-task-replays"}
            kept = {name: value for name, value in headers.items() if not str(name).startswith("x-")}
            found.append(
                (
                    sorted(kept.items(), key=repr),
                    properties.correlation_id,
                    properties.reply_to,
                    properties.priority,
                    body,
                )
            )
        channel.cancel()
    # What this consumer held waits again as soon as it is gone.
    wait_until(lambda: bench.vhost.consumers(queue) == 0, 10, "the consumer is gone")
    return sorted(found, key=repr)


def test_one_hostile_letter_hinders_neither_the_others_nor_itself(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    put(bench, list(HOSTILE.values()))
    before = wire_of(bench, "default.dlq")
    listed = dlq(bench, "list")
    assert "[/x]" in listed
    assert steers(listed) == []
    assert sum(one["count"] for one in json.loads(dlq(bench, "list", "--json"))) == len(HOSTILE)
    for letter in list(app.dead_letters.letters()):
        assert app.dead_letters.find(letter.id).body == letter.body
    for one in ("lines", "trace", "id-\\xff", "\\xff\\xfe", "deaths"):
        assert steers(dlq(bench, "show", one)) == [], one
    for one in ("typed", "\\xff\\xfe"):
        assert json.loads(dlq(bench, "show", one, "--json"))["id"] == one
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    assert len(file.read_text().splitlines()) == len(HOSTILE)
    dlq(bench, "purge", "--all", "-f")
    dlq(bench, "import", str(file))
    assert wire_of(bench, "default.dlq") == before
    assert dlq(bench, "replay", "--all") == f"{len(HOSTILE)} letters replayed\n"
    assert wire_of(bench, "default") == before
    assert bench.vhost.ready("default.dlq") == 0


def test_a_letter_of_which_no_copy_can_be_made_stays_and_the_others_go(bench: Bench) -> None:
    """Its headers would be lost on the way; and an import of what no header can be stops before it begins."""
    app = bench.client()
    app.declare()
    put(bench, [plain({"id": "first"}), UNREADABLE, plain({"id": "last"})])
    (odd,) = (one for one in app.dead_letters.letters() if one.unreadable)
    assert "they cannot be read" in dlq(bench, "show", odd.id)
    file = bench.folder / "letters.jsonl"
    assert "1 letter left out" in dlq(bench, "export", "-o", str(file), code=1)
    assert len(file.read_text().splitlines()) == 2
    told = dlq(bench, "replay", "--all", code=1)
    assert "2 letters replayed" in told
    assert "its headers cannot be read" in told
    assert [one.id for one in app.dead_letters.letters()] == [odd.id]
    assert app.dead_letters.purge(Filter(ids=frozenset({odd.id}))) == 1
    line = {**json.loads(file.read_text().splitlines()[0]), "headers": {"x": 2**63}}
    file.write_text(file.read_text() + json.dumps(line) + "\n")
    assert "line 3: no message can be made of it: header 'x'" in dlq(bench, "import", str(file), code=2)
    assert bench.vhost.ready("default.dlq") == 0


def test_a_letter_that_no_header_can_hold_does_not_stop_its_batch(bench: Bench) -> None:
    """The one fails, those around it are sent."""
    app = bench.client()
    app.declare()
    dead(bench, app, 3)
    first, middle, last = app.dead_letters.letters()
    middle = replace(middle, headers={"x": 2**63})
    made = [partial(one.envelope, "", "default.dlq") for one in (first, middle, last)]
    before, failed, after = publish_all(app.client.publish_many, made)
    assert (before, after) == (None, None)
    assert "header 'x': 9223372036854775808 does not fit 64 bits" in str(failed)
    wait_until(lambda: bench.vhost.ready("default.dlq") == 5, 10, "two more are there")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x1f\x8b\x08\x00\x00junk\n", "this is a gzip file"),
        (b"\xff\xfe\n", "line 1: "),
        (b"[" * 100_000 + b"\n", "line 1: "),
        (b"[]\n", "a list instead of an object"),
        (b"\n", "line 1: "),
        ({"priority": "high"}, "priority is 'high'"),
        ({"priority": True}, "priority is True"),
        ({"priority": 256}, "priority is 256"),
        ({"content_type": 7}, "content_type is 7"),
        ({"headers": []}, "headers is []"),
        ({"body": "no base64"}, "line 2: "),
        ({"correlation_id": {"__type__": "base64", "__value__": "?"}}, "line 2: a value of type base64"),
        ({"correlation_id": "x" * 256}, "correlation_id has 256 bytes"),
        ({"queue": "defualt"}, "did you mean 'default'"),
        ({"kept_in": "default"}, "is not where letters are kept"),
        ({"timestamp": -1}, "timestamp is -1"),
    ],
)
def test_a_bad_line_of_a_file_is_named_and_nothing_of_the_file_is_in(bench: Bench, content: Any, said: str) -> None:
    app = bench.client()
    app.declare()
    good = {"queue": "default", "headers": {"id": "good"}, "body": "W10=", "content_type": "", "content_encoding": ""}
    file = bench.folder / "letters.jsonl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text("".join(json.dumps({**good, **more}) + "\n" for more in ({}, content)))
    told = dlq(bench, "import", str(file), code=2)
    assert said in told
    assert "Traceback" not in told
    assert len(told.splitlines()) == 1
    assert bench.vhost.ready("default.dlq") == 0
