"""What is worked out of the management API's samples, and what is not claimed."""

from __future__ import annotations

from typing import Any

import pytest

from amqptasks.broker.queue_figures import Age, QueueFigures, oldest

NOW = 1_000_000


def _answer(*points: tuple[int, int, int], **stats: list[tuple[int, int]]) -> dict[str, Any]:
    """An answer of the API. Points: seconds ago, messages in the queue, acknowledged so far."""

    def details(samples: list[tuple[int, int]]) -> dict[str, Any]:
        newest_first = sorted(samples)
        return {"samples": [{"timestamp": (NOW - ago) * 1000, "sample": value} for ago, value in newest_first]}

    return {
        "messages_details": details([(ago, depth) for ago, depth, _ in points]),
        "message_stats": {
            "ack_details": details([(ago, gone) for ago, _, gone in points]),
            **{f"{name}_details": details(samples) for name, samples in stats.items()},
        },
    }


def _queue(ready: int, held: int = 0, **arguments: Any) -> dict[str, Any]:
    return {"messages_ready": ready, "messages_unacknowledged": held, "arguments": arguments}


def test_the_oldest_came_after_all_that_are_gone_or_held() -> None:
    # 100 came 60 s ago, 30 are gone and 10 are held: what waits came 60 s ago.
    history = _answer((90, 0, 5), (60, 100, 5), (30, 90, 15), (0, 70, 35))
    assert oldest(_queue(60, 10), history) == Age(90 - 30 * 40 / 100)
    # The 100 are gone; of the 20 that came between 40 and 20 s ago, half.
    history = _answer((60, 100, 0), (40, 0, 100), (20, 20, 100), (0, 10, 110))
    assert oldest(_queue(10), history) == Age(30)


def test_what_was_purged_is_not_the_oldest() -> None:
    assert oldest(_queue(5), _answer((60, 100, 0), (40, 0, 0), (20, 5, 0), (0, 5, 0))) == Age(40)


def test_before_the_first_sample_nobody_knows() -> None:
    assert oldest(_queue(50), _answer((60, 50, 7), (30, 50, 7), (0, 50, 7))) == Age(60, "at least")
    # A broker that has started lately gives zeros for the time before.
    assert oldest(_queue(50), _answer((60, 0, 0), (30, 50, 0), (0, 50, 0))) == Age(30, "at least")
    assert oldest(_queue(50), _answer((60, 0, 0), (0, 0, 0))) is None
    assert oldest(_queue(50), {}) is None


@pytest.mark.parametrize("arguments", [{"x-max-priority": 5}, {"x-max-length": 9}])
def test_where_the_order_is_not_known_it_is_a_bound_or_nothing(arguments: dict[str, Any]) -> None:
    assert oldest(_queue(5, **arguments), _answer((60, 3, 0), (40, 0, 3), (0, 5, 3))) == Age(40, "at most")
    assert oldest(_queue(5, **arguments), _answer((60, 3, 0), (0, 5, 3))) is None


def test_a_full_queue_that_refuses_keeps_its_order() -> None:
    history = _answer((60, 9, 1), (30, 1, 9), (0, 4, 10))
    assert oldest(_queue(4, **{"x-max-length": 9, "x-overflow": "reject-publish"}), history) == Age(30)
    assert oldest(_queue(4), history, counted=False) is None


def test_nothing_is_older_than_it_may_get() -> None:
    history = _answer((60, 5, 0), (0, 5, 0))
    assert oldest(_queue(5, **{"x-message-ttl": 20_000}), history) == Age(20, "at most")
    by_policy = {**_queue(5), "effective_policy_definition": {"message-ttl": 30_000}}
    assert oldest(by_policy, history) == Age(30, "at most")


def test_counters_without_samples_have_not_changed() -> None:
    history = _answer((60, 10, 0), (0, 4, 0), ack=[(60, 0), (50, 6)])
    assert oldest(_queue(4), history) == Age(60, "at least")


def test_time_to_empty_is_told_where_it_follows() -> None:
    assert QueueFigures("q", ready=90, unacknowledged=10, rate_in=5.0, rate_out=10.0).seconds_to_empty == 20
    assert QueueFigures("q", ready=90, unacknowledged=10, rate_in=5.0, rate_out=5.0).seconds_to_empty is None
    assert QueueFigures("q", ready=0, rate_in=5.0, rate_out=5.0).seconds_to_empty == 0
    assert QueueFigures("q", ready=1).seconds_to_empty is None
    assert QueueFigures("q").seconds_to_empty is None
