"""When a node is left that does not answer. The loop's timers are a list."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from amqptasks.broker.stall import StallWatch


@pytest.mark.parametrize(("answered", "left"), [(None, 1), (11, 0)])
def test_a_node_that_does_not_answer_a_subscription_for_a_minute_is_left(answered: int | None, left: int) -> None:
    timers: list[Callable[[], None]] = []
    reasons: list[str] = []
    watchers: list[Any] = []
    link: Any = SimpleNamespace(
        loop=SimpleNamespace(call_later=lambda _seconds, callback: timers.append(callback)),
        watch=lambda *both: watchers.extend(both),
        give_up=reasons.append,
    )
    consumer: Any = SimpleNamespace(queue="email", asking=True, consuming=False, seen=0)
    StallWatch(link, consumer, lambda: True)
    watchers[0](object())
    for look in range(13):
        consumer.asking = look != answered
        timers.pop()()
    assert len(reasons) == left
