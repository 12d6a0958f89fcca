"""Task exceptions to Sentry, when `sentry.dsn` is set. Retries and expected failures are not reported."""

from __future__ import annotations

from typing import Any

from amqptasks.config import SentrySettings
from amqptasks.events import Bus, ExecutorStarted, ExecutorStopping, TaskFailed

__all__ = ["subscribe_sentry"]

_FLUSH_SECONDS = 2.0


def subscribe_sentry(bus: Bus, settings: SentrySettings) -> None:
    """Report failed tasks. The SDK starts in each executor, after the fork: its sender is a thread."""
    dsn = settings.dsn
    if dsn is None:
        return
    import sentry_sdk  # noqa: PLC0415 - heavy, and needed only with a dsn

    def start(event: ExecutorStarted) -> None:
        options: dict[str, Any] = {"environment": settings.environment, "release": settings.release}
        sentry_sdk.init(
            dsn=dsn.get_secret_value(),
            sample_rate=settings.sample_rate,
            send_default_pii=False,
            **{name: value for name, value in options.items() if value is not None},
        )

    def failed(event: TaskFailed) -> None:
        if event.exception is None or event.expected or not sentry_sdk.is_initialized():
            return
        with sentry_sdk.new_scope() as scope:
            scope.set_transaction_name(event.task, source="task")
            scope.set_tag("task", event.task)
            scope.set_tag("task_id", event.task_id)
            scope.set_tag("queue", event.queue)
            scope.set_tag("reason", str(event.reason))
            scope.set_context("task", {"attempt": event.attempt, "runtime": event.runtime})
            scope.capture_exception(event.exception)

    def stop(event: ExecutorStopping) -> None:
        if sentry_sdk.is_initialized():
            sentry_sdk.flush(_FLUSH_SECONDS)

    bus.subscribe(ExecutorStarted, start)
    bus.subscribe(TaskFailed, failed)
    bus.subscribe(ExecutorStopping, stop)
