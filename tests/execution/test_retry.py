"""Delays and decisions of retries."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from amqptasks.errors import ConfigError, Retry, TimeLimitExceeded
from amqptasks.execution.retry import backoff, failure_reason, retry_of_killed, retry_plan, wants_retry
from amqptasks.options import TaskOptions
from amqptasks.outcome import Reason, Retrying


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


@pytest.mark.parametrize(
    ("retry", "words"),
    [
        (Retry(when=1e12), "after the year 9999"),
        (Retry(when=float("inf")), "after the year 9999"),
        (Retry(when=float("nan")), "is no number"),
        (Retry(when=True), "a time must be seconds"),
        (Retry(when=2.0, options={"queue": "@x"}), "cannot be delayed"),
        (Retry(when=2.0, options={"queue": "q" * 206}), "takes 206 bytes"),
        (Retry(when=0.0, options={"queue": "q" * 256}), "1 to 255 bytes"),
        (Retry(when=0.0, options={"queue": ""}), "1 to 255 bytes"),
        (Retry(when=0.0, options={"queue": ["q"]}), "1 to 255 bytes"),
        (Retry(when=2.0, options={"priority": "high"}), "priority must be"),
        (Retry(when=2.0, options={"priority": 5.0}), "priority must be"),
        (Retry(when=2.0, options={"priority": 256}), "priority must be"),
    ],
)
def test_a_retry_that_no_message_can_carry_is_refused(retry: Retry, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        retry_plan(retry, TaskOptions(), "amqptasks")


def test_a_retry_has_its_own_delay_queue_and_priority_or_the_tasks() -> None:
    assert retry_plan(Retry(), TaskOptions(default_retry_delay=7), "p") == (7.0, None, None)
    asked = Retry(when=-1, options={"queue": "q" * 205, "priority": 0})
    assert retry_plan(asked, TaskOptions(), "p") == (0.0, "q" * 205, 0)
    later = datetime.now(UTC) + timedelta(days=3650)
    assert retry_plan(Retry(when=later), TaskOptions(), "p")[0] > 3649 * 86400


def test_what_its_hard_limit_killed_runs_again_only_where_that_is_named() -> None:
    named = TaskOptions(autoretry_for=(OSError, TimeLimitExceeded), max_retries=2, default_retry_delay=7)
    assert retry_of_killed(named, 1, "too long") == Retrying(7, "TimeLimitExceeded", "too long")
    assert retry_of_killed(named, 2, "too long") is None
    assert retry_of_killed(TaskOptions(autoretry_for=(Exception,)), 0, "too long") is None
    excepted = TaskOptions(autoretry_for=(TimeLimitExceeded,), dont_autoretry_for=(TimeLimitExceeded,))
    assert retry_of_killed(excepted, 0, "too long") is None
