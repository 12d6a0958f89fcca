"""Sections of the file that stand for themselves: what is revoked, events, logs, Sentry, eager mode."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from amqptasks.config.fields import Count, FileSystemUrl, Seconds, Size

__all__ = [
    "ClaimCheckSettings",
    "EventSettings",
    "LoggingSettings",
    "RevokeSettings",
    "SentrySettings",
    "TestingSettings",
]

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_KEEP_MAX_SECONDS = 30 * 86400
_REVOKE_MAX_SECONDS = 60 * 86400


class RevokeSettings(BaseModel):
    """What is remembered of `revoke`."""

    model_config = _FROZEN

    expires: Annotated[Seconds, Field(gt=0, le=_REVOKE_MAX_SECONDS)] = Field(
        50 * 86400.0, description="A revoke is forgotten after this time, 60d at most. The delay ladder holds 48.5d."
    )
    limit: Count = Field(100_000, description="Most revoked ids that a worker remembers; the newest win.")


class ClaimCheckSettings(BaseModel):
    """A store for large bodies: a claim travels through the broker in their place (the claim check pattern)."""

    model_config = _FROZEN

    url: FileSystemUrl | None = Field(
        None,
        description="A directory that all processes see (file:///mnt/tasks/bodies); or s3://, gs://, abfs://.",
    )
    above: Size = Field(256 * 1024, description="Bodies larger than this go there, as they are written.")
    keep: Annotated[Seconds, Field(le=_KEEP_MAX_SECONDS)] = Field(
        600.0, description="A body is deleted so long after its task has succeeded; 30d at most."
    )


class EventSettings(BaseModel):
    """Events for monitors, in Celery's format. Those of workers are turned on with `worker.send_task_events`."""

    model_config = _FROZEN

    send_sent: bool = Field(False, description="Processes that call tasks tell monitors of each call (task-sent).")


class TestingSettings(BaseModel):
    """For tests of applications: calls run in the calling process, without a broker."""

    model_config = _FROZEN

    always_eager: bool = Field(False, description="Calls run at once, here.")
    eager_propagates: bool = Field(False, description="A task that fails raises at the call.")
    store_eager_result: bool = Field(False, description="Results go to the result store too.")


class LoggingSettings(BaseModel):
    """Logs, to stderr."""

    model_config = _FROZEN

    format: Literal["console", "json"] = Field("console", description="json writes one object a line.")
    level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="The lowest level written."
    )


class SentrySettings(BaseModel):
    """Sentry receives task exceptions when a DSN is set."""

    model_config = _FROZEN

    dsn: SecretStr | None = Field(None, description="The project's DSN.")
    environment: str | None = Field(None, description="Sentry's environment.")
    release: str | None = Field(None, description="Sentry's release.")
    sample_rate: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="Share of the exceptions that is sent.")
