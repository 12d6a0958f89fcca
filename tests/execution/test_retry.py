"""Delays and decisions of retries."""

from __future__ import annotations

import pytest

from amqptasks.execution.retry import backoff, failure_reason, wants_retry
from amqptasks.options import TaskOptions
from amqptasks.outcome import Reason


def longest(_low: float, high: float) -> float:
    return high


def test_without_backoff_it_is_the_default_delay() -> None:
    assert backoff(TaskOptions(default_retry_delay=7), 5) == 7


@pytest.mark.parametrize(("retries", "seconds"), [(0, 1), (1, 2), (5, 32), (10, 600), (10_000, 600)])
def test_backoff_doubles_up_to_its_maximum(retries: int, seconds: float) -> None:
    assert backoff(TaskOptions(retry_backoff=True, retry_jitter=False), retries) == seconds


def test_a_number_is_the_first_delay() -> None:
    assert backoff(TaskOptions(retry_backoff=0.5, retry_jitter=False), 2) == 2.0


def test_jitter_takes_anything_up_to_the_delay() -> None:
    options = TaskOptions(retry_backoff=True)
    assert backoff(options, 3, uniform=longest) == 8
    assert all(0 <= backoff(options, 3) <= 8 for _ in range(100))


def test_autoretry_is_for_the_named_exceptions_but_not_for_the_excepted() -> None:
    options = TaskOptions(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,))
    assert wants_retry(options, ConnectionError())
    assert not wants_retry(options, FileNotFoundError())
    assert not wants_retry(options, ValueError())


def test_the_reason_tells_whether_retries_were_used_up() -> None:
    assert failure_reason(3, 3) is Reason.RETRIES_EXHAUSTED
    assert failure_reason(3, 1) is Reason.FAILED
    assert failure_reason(0, 0) is Reason.FAILED
    assert failure_reason(None, 9) is Reason.FAILED
