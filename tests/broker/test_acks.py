"""The ack window against a model of the broker's side of the channel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amqptasks.broker.acks import AckWindow


def test_an_unbroken_run_is_one_frame() -> None:
    window = AckWindow[int](1)
    for tag in (2, 1, 3):
        window.finish(tag, tag)
    assert window.prefix() == 3
    assert window.prefix() is None
    assert not window.pending


def test_what_finished_behind_a_gap_waits_and_then_goes_alone() -> None:
    window = AckWindow[int](1)
    for tag in (1, 3, 4):
        window.finish(tag, tag)
    assert window.prefix() == 1
    assert window.pending
    assert window.stragglers() == [3, 4]
    window.finish(2, 2)
    # 3 and 4 are gone already: to name 4 now would close the channel.
    assert window.prefix() == 2
    window.finish(5, 5)
    assert window.prefix() == 5


def test_a_requeued_tag_is_never_acknowledged() -> None:
    window = AckWindow[int](1)
    assert window.close(1)
    assert not window.close(1)
    window.finish(1, 1)
    assert window.prefix() is None
    window.finish(2, 2)
    assert window.prefix() == 2


class BrokerChannel:
    """What RabbitMQ keeps of a channel: outstanding tags. An ack of a tag that is not outstanding is a 406."""

    def __init__(self, tags: int) -> None:
        self.outstanding = list(range(1, tags + 1))
        self.acknowledged: set[int] = set()
        self.requeued: set[int] = set()

    def ack(self, tag: int, *, multiple: bool) -> None:
        assert tag in self.outstanding, f"406 unknown delivery tag {tag}"
        done = [one for one in self.outstanding if one <= tag] if multiple else [tag]
        self.outstanding = [one for one in self.outstanding if one not in done]
        self.acknowledged.update(done)

    def nack(self, tag: int) -> None:
        assert tag in self.outstanding, f"406 unknown delivery tag {tag}"
        self.outstanding.remove(tag)
        self.requeued.add(tag)


@given(
    st.permutations(range(1, 25)),
    st.lists(st.sampled_from(["prefix", "stragglers", "nothing"]), min_size=24, max_size=24),
    st.sets(st.integers(1, 24)),
)
def test_every_order_of_finishing_settles_each_tag_once_and_as_it_should(
    order: list[int], moves: list[str], requeue: set[int]
) -> None:
    window, broker = AckWindow[int](1), BrokerChannel(24)

    def flush(*, stragglers: bool) -> None:
        tag = window.prefix()
        if tag is not None:
            broker.ack(tag, multiple=True)
        if stragglers:
            for one in window.stragglers():
                broker.ack(one, multiple=False)

    for tag, move in zip(order, moves, strict=True):
        if tag in requeue:
            assert window.close(tag)
            broker.nack(tag)
        else:
            window.finish(tag, tag)
        if move != "nothing":
            flush(stragglers=move == "stragglers")
    flush(stragglers=True)
    assert broker.outstanding == []
    assert broker.requeued == requeue
    assert broker.acknowledged == set(range(1, 25)) - requeue
