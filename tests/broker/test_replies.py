"""The reply queue when its node is down: another queue, and no tag of one channel on the other. Channels are lists."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from amqptasks.broker.pending import Pending
from amqptasks.broker.replies import Replies
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope
from amqptasks.protocol.signing import Keyring


class Channel:
    """Remembers what it was asked."""

    is_open = True

    def __init__(self) -> None:
        self.acks: list[Any] = []
        self.declared: list[str] = []
        self.consumed: list[Callable[..., None]] = []
        self.consuming: Callable[[Any], None] = lambda _frame: None

    def basic_ack(self, tag: int, multiple: bool = False) -> None:
        self.acks.append((tag, multiple))

    def queue_declare(self, queue: str, **_options: Any) -> None:
        self.declared.append(queue)

    def basic_consume(self, _queue: str, message: Callable[..., None], callback: Callable[[Any], None]) -> None:
        self.consumed.append(message)
        self.consuming = callback

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_options: None


class Bench:
    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.timers: list[Callable[[], None]] = []
        self.replies: list[bytes] = []
        self.opened: list[int] = []
        loop = SimpleNamespace(call_later=lambda _seconds, call: self.timers.append(call))
        self.link: Any = SimpleNamespace(loop=loop, blocked_since=None, connection=SimpleNamespace(is_open=True))
        self.link.connection.channel = self.channel
        self.queue = Replies(
            self.link,
            "old",
            lifetime=60,
            on_reply=self.replies.append,
            on_gone=lambda _reason, _for_ever: None,
            renew=lambda _why: "new",
        )

    def channel(self, on_open_callback: Callable[[Any], None]) -> None:
        self.channels.append(Channel())
        on_open_callback(self.channels[-1])

    def open(self) -> None:
        self.queue.open(self.link.connection, lambda: self.opened.append(1))

    def deliver(self, channel: Channel, tag: int, body: bytes) -> None:
        channel.consumed[0](channel, SimpleNamespace(delivery_tag=tag), None, body)


def test_a_queue_whose_node_answers_late_is_left_and_still_listened_to() -> None:
    bench = Bench()
    bench.open()
    bench.channels[0].consuming(None)
    bench.open()  # after a lost connection
    assert bench.opened == [1]
    bench.timers.pop()()  # no answer in time
    late, new = bench.channels[1:]
    assert (late.declared, new.declared) == (["old"], ["new"])
    new.consuming(None)
    assert bench.opened == [1, 1]
    late.consuming(None)
    bench.deliver(late, 7, b"to the old one")
    assert (bench.replies, late.acks, new.acks) == ([b"to the old one"], [(7, False)], [])
    bench.deliver(new, 1, b"to the new one")
    bench.timers.pop()()
    assert (late.acks, new.acks) == ([(7, False)], [(1, True)])


def test_nothing_is_left_while_an_alarm_holds_the_connection() -> None:
    bench = Bench()
    bench.open()
    bench.channels[0].consuming(None)
    bench.open()
    bench.link.blocked_since = 1.0
    bench.timers.pop()()
    assert len(bench.channels) == 2


def test_only_replies_to_the_queue_that_was_left_are_redirected() -> None:
    def pending(reply_to: str | None) -> Pending:
        envelope = Envelope("e", "k", b"", reply_to=reply_to)
        return Pending(envelope, encode_properties(envelope), lambda _error: None)

    left, other, none = pending("old"), pending("another's"), pending(None)
    assert [one.redirect("old", "new", None) for one in (left, other, none)] == [True, False, False]
    assert [one.envelope.reply_to for one in (left, other, none)] == ["new", "another's", None]
    assert left.properties.encode() == encode_properties(left.envelope).encode()


def test_a_message_whose_replies_are_redirected_is_signed_anew() -> None:
    keys = Keyring.read("x" * 32, (), accept_unsigned=False)
    assert keys is not None
    envelope = Envelope("e", "k", b"", reply_to="old", headers={"task": "t"})
    keys.sign(envelope)
    pending = Pending(envelope, encode_properties(envelope), lambda _error: None)
    assert pending.redirect("old", "new", keys)
    assert keys.problem(envelope.headers, envelope.content_type, None, "new", b"") is None
    assert pending.properties.encode() == encode_properties(envelope).encode()
