"""Retry decisions: pure functions from options and attempt to a delay."""

from __future__ import annotations

import random
from collections.abc import Callable

from amqptasks.options import TaskOptions
from amqptasks.outcome import Reason

__all__ = ["backoff", "failure_reason", "wants_retry"]


def backoff(options: TaskOptions, retries: int, *, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Seconds before retry number `retries` + 1.

    Without `retry_backoff` the default delay; with it ``factor * 2 ** retries``, at most `retry_backoff_max`, and
    with `retry_jitter` anything from 0 to that (full jitter), as in Celery.
    """
    if not options.retry_backoff:
        return options.default_retry_delay
    factor = 1.0 if options.retry_backoff is True else float(options.retry_backoff)
    # The exponent is bounded before the power is taken: a message may claim any number of retries.
    delay = min(options.retry_backoff_max, factor * 2.0 ** min(retries, 64))
    return uniform(0.0, delay) if options.retry_jitter else delay


def wants_retry(options: TaskOptions, error: BaseException) -> bool:
    """Whether `autoretry_for` names this exception and `dont_autoretry_for` does not."""
    return isinstance(error, options.autoretry_for) and not isinstance(error, options.dont_autoretry_for)


def failure_reason(max_retries: int | None, retries: int) -> Reason:
    """Why a task that raised goes to the dead-letter queue."""
    exhausted = retries > 0 and max_retries is not None and retries >= max_retries
    return Reason.RETRIES_EXHAUSTED if exhausted else Reason.FAILED
