"""Retry decisions: pure functions from options and attempt to a delay, or to a clear refusal."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime

from amqptasks.calls import seconds_until
from amqptasks.errors import ConfigError, Retry, TimeLimitExceeded
from amqptasks.options import TaskOptions
from amqptasks.outcome import Reason, Retrying
from amqptasks.routing import Route
from amqptasks.topology.delays import delayed

__all__ = ["backoff", "failure_reason", "retry_of_killed", "retry_plan", "wants_retry"]

_LAST_DAY = datetime(9999, 12, 31, tzinfo=UTC)
_LONGEST_KEY = 255


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


def retry_plan(retry: Retry, options: TaskOptions, prefix: str) -> tuple[float, str | None, int | None]:
    """What a task asks for: (seconds, queue, priority). Raises `ConfigError` for what no message can carry."""
    delay = seconds_until(options.default_retry_delay if retry.when is None else retry.when)
    if not delay <= (_LAST_DAY - datetime.now(UTC)).total_seconds():  # nor is nan
        raise ConfigError(f"retry: a delay of {delay} s ends after the year 9999, or is no number")
    delay = max(0.0, delay)
    queue, priority = retry.options.get("queue"), retry.options.get("priority")
    if queue is not None:
        if not isinstance(queue, str) or not queue or len(queue.encode("utf-8", "surrogatepass")) > _LONGEST_KEY:
            raise ConfigError(f"retry: queue must be a name of 1 to {_LONGEST_KEY} bytes, not {queue!r:.300}")
        try:
            delayed(prefix, Route(prefix, queue, queue, None), delay)
        except ValueError as error:
            raise ConfigError(f"retry: {error}") from None
    if priority is not None and (
        isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority < 256
    ):
        raise ConfigError(f"retry: priority must be a whole number from 0 to 255, not {priority!r:.80}")
    return delay, queue, priority


def retry_of_killed(options: TaskOptions, retries: int, message: str) -> Retrying | None:
    """What becomes of a task that its hard time limit killed, where `autoretry_for` names `TimeLimitExceeded` itself.

    Not for ``(Exception,)``: as with Celery, what cannot clean up runs again only where its author says so.
    """
    named = TimeLimitExceeded in options.autoretry_for and TimeLimitExceeded not in options.dont_autoretry_for
    if not named or (options.max_retries is not None and retries >= options.max_retries):
        return None
    return Retrying(backoff(options, retries), TimeLimitExceeded.__name__, message)


def failure_reason(max_retries: int | None, retries: int) -> Reason:
    """Why a task that raised goes to the dead-letter queue."""
    exhausted = retries > 0 and max_retries is not None and retries >= max_retries
    return Reason.RETRIES_EXHAUSTED if exhausted else Reason.FAILED
