"""A broker's bytes cut into deliveries and other frames, against pika's own reading of them."""

from __future__ import annotations

import marshal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pika import frame, spec
from pika.channel import ContentFrameAssembler

from amqptasks.broker.inflow import Inflow
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope

LONGEST = 60  # of a body frame
TAKEN = ((1, "q.1"), (1, "q.2"), (7, "q.1"))

keys = st.sampled_from(["", "default", "email.fast", "ü", "\x00"])
messages = st.tuples(
    st.sampled_from([*TAKEN, (1, "other"), (9, "q.1")]),
    st.integers(1, 2**63 - 1),
    st.booleans(),
    keys,
    keys,
    st.integers(0, 2**40),
    st.binary(max_size=3 * LONGEST),
)


def delivery(where: tuple[int, str], tag: int, again: bool, exchange: str, key: str, sent: int, body: bytes) -> bytes:
    """A message as RabbitMQ sends it: two frames, and the body in pieces."""
    channel, consumer = where
    method = spec.Basic.Deliver(consumer, tag, again, exchange, key)
    headers: dict[str, object] = {"task": "a.b", "retries": 0, "x-sent": sent}
    properties: Any = encode_properties(Envelope("e", "k", b"", headers=headers, correlation_id="c"))
    parts = [frame.Method(channel, method).marshal(), frame.Header(channel, len(body), properties).marshal()]
    for start in range(0, len(body), LONGEST):
        parts.append(frame.Body(channel, body[start : start + LONGEST]).marshal())
    return b"".join(parts)


class Reading:
    """What was read: messages by either way, in order, and other frames."""

    def __init__(self) -> None:
        self.messages: list[tuple[Any, ...]] = []
        self.others: list[str] = []
        self.fast = 0
        self._assemblers: dict[int, ContentFrameAssembler] = {}
        self.inflow = Inflow(self._other)
        self.inflow.confirms[1] = lambda tag, multiple: self.others.append(f"ack {tag} {multiple}")
        for channel, consumer in TAKEN:
            self.inflow.takers[channel, consumer.encode()] = self._taker((channel, consumer))

    def _taker(self, where: tuple[int, str]) -> Any:
        def take(tag: int, again: bool, exchange: str, key: str, properties: Any, body: bytes) -> None:
            self.fast += 1
            self._add(where, tag, again, exchange, key, properties, body)

        return take

    def _add(
        self, where: tuple[int, str], tag: int, again: bool, exchange: str, key: str, read: Any, body: bytes
    ) -> None:
        marshal.dumps(read.headers)  # goes to executors as it is
        assert (read.headers["task"], read.correlation_id, read.reply_to) == ("a.b", "c", None)
        self.messages.append((where, tag, again, exchange, key, read.headers["x-sent"], body))

    def _other(self, data: bytes) -> None:
        used, read = frame.decode_frame(data)
        assert used == len(data)
        if isinstance(read, frame.Heartbeat):
            self.others.append("heartbeat")
            return
        assert isinstance(read, frame.Method | frame.Header | frame.Body)
        if isinstance(read, frame.Method) and isinstance(read.method, spec.Basic.Ack):
            self.others.append(f"ack {read.method.delivery_tag} on {read.channel_number}")
            return
        whole = self._assemblers.setdefault(read.channel_number, ContentFrameAssembler()).process(read)
        if whole is not None:
            method, header, body = whole
            got: Any = method.method
            where = (method.channel_number, got.consumer_tag)
            self._add(where, got.delivery_tag, got.redelivered, got.exchange, got.routing_key, header.properties, body)


@given(st.data(), st.lists(messages, max_size=6))
def test_whatever_the_pieces_in_which_it_comes_each_message_is_read_once(data: st.DataObject, sent: list[Any]) -> None:
    others = []
    stream = b""
    for number, message in enumerate(sent):
        stream += delivery(*message)
        if number % 2:
            acks = [(1, spec.Basic.Ack(number, multiple=number % 3 == 0)), (5, spec.Basic.Ack(number))]
            stream += frame.Heartbeat().marshal()
            stream += b"".join(frame.Method(channel, ack).marshal() for channel, ack in acks)
            others += ["heartbeat", f"ack {number} {number % 3 == 0}", f"ack {number} on 5"]
    reading = Reading()
    done = 0
    rest = stream
    while rest:
        piece = data.draw(st.integers(1, len(rest)))
        done += reading.inflow.feed(rest[:piece])
        rest = rest[piece:]
    assert done == len(stream)
    assert reading.messages == sent
    assert reading.others == others
    assert reading.fast == sum(where in TAKEN and len(body) <= LONGEST for where, *_, body in sent)


def test_a_frame_without_its_end_is_left_to_pika() -> None:
    good = delivery((1, "q.1"), 1, False, "e", "k", 5, b"body")
    for cut in range(len(good)):
        if good[cut] != spec.FRAME_END:
            continue
        taken: list[Any] = []
        others: list[bytes] = []
        inflow = Inflow(others.append)
        inflow.takers[1, b"q.1"] = lambda *message, taken=taken: taken.append(message)
        inflow.feed(good[:cut] + b"\x00" + good[cut + 1 :])
        assert others
        assert not taken


def test_the_frames_of_two_channels_may_lie_between_each_other() -> None:
    one, two = (delivery((channel, "q.1"), 5, False, "e", "k", 1, b"body") for channel in (1, 7))
    first = len(frame.Method(1, spec.Basic.Deliver("q.1", 5, False, "e", "k")).marshal())
    reading = Reading()
    reading.inflow.feed(one[:first] + two[:first] + one[first:] + two[first:])
    assert [where for where, *_ in reading.messages] == [(1, "q.1"), (7, "q.1")]


def test_a_broker_of_another_version_says_so_in_eight_bytes() -> None:
    seen: list[bytes] = []
    assert Inflow(seen.append).feed(b"AMQP\x00\x01\x00\x00") == 8
    assert seen == [b"AMQP\x00\x01\x00\x00"]
