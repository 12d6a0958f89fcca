"""Settings of periodic calls: the sections ``schedule`` and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from amqptasks.config.fields import Compression, PositiveSeconds, Priority, Seconds, Serializer, TimeZone
from amqptasks.errors import ConfigError
from amqptasks.schedules import crontab

__all__ = ["CatchUp", "ScheduleOptions", "ScheduleSettings"]

#: What becomes of the runs that were missed while no beat ran.
CatchUp = Literal["skip", "one", "all"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleOptions(_Model):
    """How a periodic call is sent."""

    queue: str | None = Field(None, description="The queue, before any route.")
    exchange: str | None = Field(None, description="One of `exchanges`, instead of the task exchange.")
    routing_key: str | None = Field(None, description="Routing key; the queue's name by default.")
    priority: Priority | None = Field(None, description="The message's priority.")
    expires: Annotated[Seconds, Field(gt=0)] | None = Field(
        None, description="A call that has waited longer does not run any more."
    )
    serializer: Serializer | None = Field(None, description="How arguments are written.")
    compression: Compression | None = Field(None, description="How the body is compressed.")
    time_limit: PositiveSeconds | None = Field(None, description="The task is killed after this time.")
    soft_time_limit: PositiveSeconds | None = Field(None, description="SoftTimeLimitExceeded is raised in the task.")
    ignore_result: bool | None = Field(None, description="Store no result.")
    headers: Mapping[str, Any] = Field(default_factory=dict, description="Headers of your own.")


class ScheduleSettings(_Model):
    """A periodic call."""

    task: str = Field(description="Name of the task.")
    cron: str | None = Field(None, description="Five fields: minute hour day month weekday.")
    every: Annotated[PositiveSeconds, Field(ge=0.01)] | None = Field(None, description="Interval.")
    args: tuple[Any, ...] = Field((), description="Positional arguments.")
    kwargs: Mapping[str, Any] = Field(default_factory=dict, description="Named arguments.")
    options: ScheduleOptions = Field(default_factory=ScheduleOptions, description="How the call is sent.")
    enabled: bool = Field(True, description="False: it is not called.")
    catch_up: CatchUp = Field(
        "one", description="Runs missed while no beat ran: skip them, run one for all of them, or run all."
    )
    timezone: TimeZone | None = Field(None, description="Zone of `cron`; that of the settings by default.")

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if (self.cron is None) == (self.every is None):
            both = self.cron is not None
            raise ValueError(f"a schedule has `cron` or `every`; this one has {'both' if both else 'neither'}")
        if self.every is not None and self.timezone is not None:
            raise ValueError("`timezone` needs `cron`: an interval knows no zone")
        return self

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                crontab.from_string(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value
