"""The settings: frozen pydantic models. One attribute is one key of the YAML file.

The descriptions are the configuration reference: ``scripts/config-reference`` writes ``docs/configuration.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from amqptasks.config.fields import (
    AmqpUrls,
    BrokerSeconds,
    Compression,
    Count,
    HttpAddress,
    ManagementUrl,
    PoolName,
    PositiveSeconds,
    Prefetch,
    Priority,
    Rate,
    RegularExpression,
    ResultBackend,
    Seconds,
    Serializer,
    Size,
    TimeZone,
    WholeSeconds,
)
from amqptasks.config.periodic import ScheduleSettings
from amqptasks.config.sections import (
    ClaimCheckSettings,
    EventSettings,
    LoggingSettings,
    RevokeSettings,
    SentrySettings,
    TestingSettings,
)
from amqptasks.config.security import SecuritySettings

__all__ = [
    "AutoscaleSettings",
    "BindingSettings",
    "BrokerSettings",
    "DeadLetterSettings",
    "ExchangeSettings",
    "LoggingSettings",
    "PublishRetrySettings",
    "QueueSettings",
    "ResultSettings",
    "RouteSettings",
    "ScheduleSettings",
    "SentrySettings",
    "SerializationSettings",
    "Settings",
    "TaskSettings",
    "TlsSettings",
    "TopologySettings",
    "WorkerSettings",
]


def _soft_first(soft: float | None, hard: float | None) -> None:
    if soft is not None and hard is not None and soft >= hard:
        raise ValueError(f"soft_time_limit ({soft:g} s) must be below time_limit ({hard:g} s)")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsSettings(_Model):
    """TLS to the broker. With ``amqps://`` alone the system's certificate authorities are trusted."""

    ca_file: str | None = Field(
        None, description="Certificate authorities that the broker's certificate must chain to."
    )
    cert_file: str | None = Field(None, description="This client's certificate, for brokers that ask for one.")
    key_file: str | None = Field(None, description="The key of `cert_file`.")
    verify: bool = Field(True, description="Check the broker's certificate and host name. Turn off for tests only.")

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: give both or neither")
        return self


class PublishRetrySettings(_Model):
    """How often a publish that failed is tried again, within `broker.publish_timeout`."""

    max_retries: Annotated[int, Field(ge=0)] | None = Field(5, description="Retries; null for as many as fit.")
    interval_start: Seconds = Field(0.1, description="Pause before the first retry.")
    interval_step: Seconds = Field(0.3, description="Added to the pause with each retry.")
    interval_max: Seconds = Field(1.5, description="The longest pause.")


class BrokerSettings(_Model):
    """The way to RabbitMQ."""

    url: AmqpUrls = Field(
        ("amqp://guest:guest@localhost:5672/",), description="AMQP URL, or a list of the cluster's nodes."
    )
    management_url: ManagementUrl | None = Field(
        None, description="The management API, with user and password; port 15672, with https 443."
    )
    tls: TlsSettings | None = Field(None, description="Certificates for `amqps://` URLs.")
    heartbeat: Annotated[WholeSeconds, Field(ge=1, le=3600)] = Field(30, description="AMQP heartbeat, whole seconds.")
    connection_timeout: PositiveSeconds = Field(5.0, description="Time for connecting to one node.")
    connection_retry_on_startup: bool = Field(True, description="Wait for a broker that is down when a worker starts.")
    connection_max_retries: Annotated[int, Field(ge=0)] | None = Field(
        100, description="Attempts of a starting worker before it gives up; null for ever."
    )
    blocked_timeout: Seconds = Field(10.0, description="How long a publish waits while the broker has an alarm.")
    publish_timeout: PositiveSeconds = Field(
        10.0, description="The longest a publish takes, with reconnecting and retries."
    )
    publish_retry: PublishRetrySettings = Field(
        default_factory=PublishRetrySettings, description="Retries of a publish."
    )
    confirm_window: Count = Field(1024, description="Most messages on their way without a confirm, per connection.")


class ExchangeSettings(_Model):
    """An exchange of your own. The task exchange and those for dead letters and delays need no entry."""

    type: Literal["direct", "topic", "fanout", "headers"] = Field("direct", description="The exchange's type.")
    durable: bool = Field(True, description="Survives a restart of the broker.")
    auto_delete: bool = Field(False, description="Deleted with its last binding.")
    arguments: Mapping[str, Any] = Field(default_factory=dict, description="Arguments of exchange.declare.")


class BindingSettings(_Model):
    """A binding of a queue to one of `exchanges`."""

    exchange: str = Field(description="Name of the exchange.")
    routing_key: str = Field("", description="Routing key, or pattern for a topic exchange.")
    arguments: Mapping[str, Any] = Field(default_factory=dict, description="Arguments, for a headers exchange.")


class DeadLetterSettings(_Model):
    """A queue's dead-letter queue, `<queue>.dlq`."""

    enabled: bool = Field(True, description="False drops what fails for good. Think twice.")
    ttl: BrokerSeconds | None = Field(None, description="Dead letters are dropped after this time; null keeps them.")
    max_length: Count | None = Field(None, description="The oldest dead letters are dropped beyond so many.")
    type: Literal["quorum", "classic"] = Field("quorum", description="The dead-letter queue's type.")


class AutoscaleSettings(_Model):
    """Bounds of a pool that follows the work: it grows with a backlog, and shrinks after half a minute without."""

    max: Count = Field(description="Most tasks at once.")
    min: Count = Field(1, description="Fewest tasks at once.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class QueueSettings(_Model):
    """A queue that holds work. Quorum unless `max_priority` or `type` says otherwise."""

    type: Literal["quorum", "classic"] | None = Field(
        None, description="quorum, or classic when `max_priority` is set."
    )
    max_priority: Annotated[int, Field(ge=1, le=255)] | None = Field(
        None, description="Priorities 0 to this (x-max-priority). Keep it at 10 or below. Makes the queue classic."
    )
    delivery_limit: Count | None = Field(None, description="Deliveries before the broker dead-letters (quorum only).")
    message_ttl: BrokerSeconds | None = Field(None, description="Messages that wait longer are dead-lettered.")
    max_length: Count | None = Field(None, description="Most messages that may wait.")
    max_length_bytes: Size | None = Field(None, description="Most bytes that may wait.")
    overflow: Literal["reject-publish", "drop-head"] | None = Field(
        None, description="What a full queue does: refuse the publish (the default), or dead-letter its oldest message."
    )
    expires: Annotated[BrokerSeconds, Field(gt=0)] | None = Field(
        None, description="The queue is deleted when unused for so long."
    )
    durable: bool = Field(True, description="Survives a restart of the broker (classic queues only can be false).")
    consumer_timeout: Annotated[BrokerSeconds, Field(gt=0)] | None = Field(
        2_592_000.0, description="Longest time for one task before the broker takes it back (RabbitMQ 3.12+)."
    )
    bindings: tuple[BindingSettings, ...] = Field((), description="Bindings to exchanges of your own.")
    arguments: Mapping[str, Any] = Field(default_factory=dict, description="More arguments of queue.declare.")
    dead_letter: DeadLetterSettings = Field(default_factory=DeadLetterSettings, description="The dead-letter queue.")
    concurrency: Count | None = Field(None, description="Tasks at once in one worker.")
    pool: PoolName | None = Field(
        None, description="How executors run tasks: process, thread, asyncio, gevent or solo."
    )
    processes: Count | None = Field(None, description="Executor processes of a thread, asyncio or gevent pool.")
    autoscale: AutoscaleSettings | None = Field(None, description="Bounds between which the pool follows the work.")
    prefetch: Prefetch | None = Field(None, description="Messages held unacknowledged; auto follows the run time.")
    max_tasks_per_child: Count | None = Field(None, description="Replace an executor after so many tasks.")
    max_memory_per_child: Size | None = Field(
        None, description="Replace an executor that grew beyond this, when it has finished."
    )
    max_memory_per_child_hard: Size | None = Field(
        None, description="Kill an executor that grew beyond this, with its tasks."
    )
    poison_limit: Count | None = Field(None, description="Executors that one message may cost before it is poison.")

    @property
    def kind(self) -> Literal["quorum", "classic"]:
        """The queue's type in the broker."""
        if self.type is not None:
            return self.type
        return "classic" if self.max_priority is not None else "quorum"

    @field_validator("arguments")
    @classmethod
    def _has_a_key_of_its_own(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for argument, key in (("x-queue-type", "type"), ("x-max-priority", "max_priority")):
            if argument in value:
                raise ValueError(f"{argument} is set with the key {key!r} of the queue")
        return value

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if self.kind == "quorum":
            if self.max_priority is not None:
                raise ValueError("max_priority needs a classic queue: leave `type` out, or set type: classic")
            if not self.durable:
                raise ValueError("a quorum queue is always durable")
        elif self.delivery_limit is not None:
            raise ValueError("delivery_limit needs a quorum queue; poison_limit works on both types")
        return self


class RouteSettings(_Model):
    """A route: the first one that matches a task's name wins."""

    match: str | None = Field(None, description="Glob on the task's name: `payment.*`.")
    regex: RegularExpression | None = Field(None, description="Regular expression, searched in the task's name.")
    queue: str | None = Field(None, description="The queue.")
    exchange: str | None = Field(None, description="One of `exchanges`, instead of the task exchange.")
    routing_key: str | None = Field(None, description="Routing key; the queue's name by default.")
    priority: Priority | None = Field(None, description="Priority of the messages.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.match is None) == (self.regex is None):
            both = self.match is not None
            raise ValueError(f"a route has `match` (glob) or `regex`; this one has {'both' if both else 'neither'}")
        if self.queue is None and self.exchange is None and self.priority is None:
            raise ValueError("a route names a queue, an exchange or a priority")
        if self.routing_key is not None and self.queue is None and self.exchange is None:
            raise ValueError("routing_key needs a queue or an exchange")
        return self


class TaskSettings(_Model):
    """Options of the tasks whose names match the pattern (a glob). They win over those in the code; later patterns
    win over earlier ones."""

    queue: str | None = Field(None, description="Queue, after the routes.")
    priority: Priority | None = Field(None, description="Priority of the messages.")
    time_limit: PositiveSeconds | None = Field(None, description="The task is killed after this time.")
    soft_time_limit: PositiveSeconds | None = Field(None, description="SoftTimeLimitExceeded is raised in the task.")
    rate_limit: Rate | None = Field(None, description="10/m, 5/s or 100/h; 0 lifts a limit.")
    rate_limit_scope: Literal["cluster", "worker"] = Field("cluster", description="Who shares the limit.")
    max_retries: Annotated[int, Field(ge=0)] | None = Field(None, description="Retries; null for ever.")
    default_retry_delay: Seconds | None = Field(None, description="Pause before a retry.")
    ignore_result: bool | None = Field(None, description="Store no result.")
    expires: Seconds | None = Field(None, description="Calls that wait longer are dead-lettered.")
    serializer: Serializer | None = Field(None, description="How arguments are written.")
    compression: Compression | None = Field(None, description="How bodies are compressed.")
    track_started: bool | None = Field(None, description="Report the state STARTED.")
    deduplicate: bool | None = Field(
        None, description="False runs a redelivered task that succeeded by its stored result; true by default."
    )
    acks_late: bool | None = Field(None, description="Always true here: a task is acknowledged after its outcome.")

    @field_validator("acks_late")
    @classmethod
    def _always_late(cls, value: bool | None) -> bool | None:
        if value is False:
            raise ValueError("false is not offered: a task is acknowledged when its outcome is durable")
        return value

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        _soft_first(self.soft_time_limit, self.time_limit)
        return self


class ResultSettings(_Model):
    """Where results go."""

    backend: ResultBackend = Field(
        "rpc://", description="rpc:// redis:// postgresql:// mysql:// sqlite:/// memcached:// mongodb:// none"
    )
    expires: Seconds = Field(86400.0, description="How long results are kept.")


class WorkerSettings(_Model):
    """Defaults of the worker; queues and flags win over them."""

    prefetch: Prefetch = Field("auto", description="Messages held unacknowledged per queue; auto follows the run time.")
    grace_period: Seconds = Field(30.0, description="Time that running tasks get to finish at shutdown.")
    disable_rate_limits: bool = Field(False, description="Tasks run however often; what waits for its turn goes on.")
    http: HttpAddress | None = Field(None, description="Probes and metrics are served here: HOST:PORT or :PORT.")
    remote_control: bool = Field(
        True, description="Answer inspect and control commands, Celery's and these; costs a process and a connection."
    )
    send_task_events: bool = Field(False, description="Tell monitors of tasks and heartbeats; -E does it too.")
    pool: PoolName = Field("process", description="process, thread, asyncio, gevent or solo.")
    concurrency: Count | None = Field(None, description="Tasks at once per queue; by default the usable CPU cores.")
    autoscale: AutoscaleSettings | None = Field(None, description="Bounds between which pools follow the work.")
    poison_limit: Count = Field(
        3, description="Executors that one message may cost before it is dead-lettered as poison."
    )
    time_limit: PositiveSeconds | None = Field(None, description="Tasks are killed after this time.")
    soft_time_limit: PositiveSeconds | None = Field(None, description="SoftTimeLimitExceeded is raised in the task.")
    max_tasks_per_child: Count | None = Field(None, description="Replace an executor after so many tasks.")
    max_memory_per_child: Size | None = Field(
        None, description="Replace an executor that grew beyond this, when it has finished."
    )
    max_memory_per_child_hard: Size | None = Field(
        None, description="Kill an executor that grew beyond this, with its tasks."
    )

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        _soft_first(self.soft_time_limit, self.time_limit)
        return self


class SerializationSettings(_Model):
    """How message bodies are written, and which are read."""

    serializer: Serializer = Field("json", description="For calls that name none.")
    accept_content: Annotated[tuple[Serializer, ...], Field(min_length=1)] = Field(
        ("json",), description="What a worker decodes. pickle executes code: name it only where you trust every sender."
    )
    compression: Compression | None = Field(None, description="For calls that name none.")
    max_body: Size = Field(16 * 1024 * 1024, description="Largest body that a worker decodes, decompressed.")


class TopologySettings(_Model):
    """Names in the broker, and whether they are declared."""

    prefix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        "amqptasks", description="Name of the task exchange, and prefix of the others."
    )
    declare: bool = Field(
        True, description="False checks only that everything exists, for users without configure permission."
    )
    default_queue: Annotated[str, Field(min_length=1)] = Field(
        "default", description="Queue of tasks that no route and no option sends elsewhere."
    )


class Settings(_Model):
    """The whole file."""

    app: str | None = Field(None, description="The app, as `-A` names it: `shop.tasks:app`.")
    include: tuple[str, ...] = Field((), description="Modules that define tasks.")
    timezone: TimeZone = Field("UTC", description="Zone of schedules, such as Asia/Shanghai.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings, description="The way to RabbitMQ.")
    exchanges: Mapping[str, ExchangeSettings] = Field(
        default_factory=dict, description="Exchanges of your own, by name."
    )
    queues: Mapping[str, QueueSettings] = Field(default_factory=dict, description="Queues, by name.")
    routes: tuple[RouteSettings, ...] = Field(
        (), description="First match wins; then the task's queue; then the default."
    )
    tasks: Mapping[str, TaskSettings] = Field(default_factory=dict, description="Options by glob on the task's name.")
    result: ResultSettings = Field(default_factory=ResultSettings, description="Results.")
    schedule: Mapping[str, ScheduleSettings] = Field(default_factory=dict, description="Periodic calls, by name.")
    revoke: RevokeSettings = Field(default_factory=RevokeSettings, description="Revoked tasks.")
    worker: WorkerSettings = Field(default_factory=WorkerSettings, description="Defaults of the worker.")
    events: EventSettings = Field(default_factory=EventSettings, description="Events for monitors.")
    serialization: SerializationSettings = Field(default_factory=SerializationSettings, description="Bodies.")
    claim_check: ClaimCheckSettings = Field(default_factory=ClaimCheckSettings, description="A store of large bodies.")
    security: SecuritySettings = Field(default_factory=SecuritySettings, description="Signatures of messages.")
    logging: LoggingSettings = Field(default_factory=LoggingSettings, description="Logs.")
    sentry: SentrySettings = Field(default_factory=SentrySettings, description="Sentry.")
    topology: TopologySettings = Field(default_factory=TopologySettings, description="Names in the broker.")
    testing: TestingSettings = Field(default_factory=TestingSettings, description="Eager mode.")

    @model_validator(mode="before")
    @classmethod
    def _has_default_queue(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        queues, topology = data.get("queues") or {}, data.get("topology") or {}
        name = topology.get("default_queue", "default") if isinstance(topology, dict) else "default"
        if isinstance(queues, dict) and isinstance(name, str) and name not in queues:
            data = {**data, "queues": {**queues, name: {}}}
        return data
