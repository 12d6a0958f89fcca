"""Calls become messages here: options, route, delay and body, then the confirmed publish."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

from amqptasks.broker.aio import AioPublisher
from amqptasks.broker.publisher import Publisher
from amqptasks.config import Settings
from amqptasks.errors import ConfigError
from amqptasks.message import Envelope
from amqptasks.options import TaskOptions
from amqptasks.protocol.compression import mime_type
from amqptasks.protocol.serializers import serializer as serializer_named
from amqptasks.protocol.task import TaskHeaders, task_envelope
from amqptasks.request import current_request
from amqptasks.results import AsyncResult
from amqptasks.routing import Router
from amqptasks.topology.delays import delayed

__all__ = ["Callee", "Client", "NamedCallee", "seconds_until"]


class Callee(Protocol):
    """What is called: a task, or only its name."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def options(self) -> TaskOptions:
        """The options that apply to the call."""

    @property
    def validate(self) -> Callable[..., tuple[Sequence[Any], Mapping[str, Any]]]:
        """Checks and converts arguments."""


@dataclass(frozen=True, slots=True)
class NamedCallee:
    """A task known by its name only (`send_task`): its arguments are checked at the worker."""

    name: str
    options: TaskOptions = field(default_factory=TaskOptions)

    @property
    def validate(self) -> Callable[..., tuple[Sequence[Any], Mapping[str, Any]]]:
        """Takes any arguments."""
        return _as_they_are


def _as_they_are(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    return args, kwargs


class _Publishing(NamedTuple):
    envelope: Envelope
    retry: bool
    policy: Mapping[str, Any] | None


class Client:
    """Publishes calls of one app. Thread-safe; opens its connection at the first call."""

    def __init__(self, settings: Settings, router: Router, publisher: Publisher, async_publisher: AioPublisher) -> None:
        self._settings = settings
        self._router = router
        self._publisher = publisher
        self._async_publisher = async_publisher

    def send(self, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any) -> AsyncResult[Any]:
        """Publish one call and return after the broker's confirm. Raises what `Task.delay` raises."""
        envelope, retry, policy = self._prepare(callee, args, kwargs, **options)
        self._publisher.publish(envelope, retry=retry, retry_policy=policy)
        return AsyncResult(envelope.correlation_id or "")

    async def asend(
        self, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> AsyncResult[Any]:
        """`send` for asyncio."""
        envelope, retry, policy = self._prepare(callee, args, kwargs, **options)
        await self._async_publisher.publish(envelope, retry=retry, retry_policy=policy)
        return AsyncResult(envelope.correlation_id or "")

    def send_many(
        self, calls: Sequence[tuple[Callee, Sequence[Any], Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[AsyncResult[Any]]:
        """Publish many calls with one pipelined wait for all confirms.

        Nothing is published when one call cannot be prepared. Raises the first `PublishError`, with all of them in
        its ``failed`` attribute as ``(index, error)``; calls that are not named there are confirmed.
        """
        envelopes = [self._prepare(callee, args, kwargs, **options).envelope for callee, args, kwargs, options in calls]
        outcomes = self._publisher.publish_many(envelopes)
        failed = [(index, error) for index, error in enumerate(outcomes) if error is not None]
        if failed:
            first = failed[0][1]
            first.add_note(f"{len(failed)} of {len(envelopes)} messages were not confirmed")
            first.failed = failed
            raise first
        return [AsyncResult(envelope.correlation_id or "") for envelope in envelopes]

    def close(self) -> None:
        """Close the publisher's connection."""
        self._publisher.close()

    async def aclose(self) -> None:
        """Close this event loop's connection."""
        await self._async_publisher.close()

    def _prepare(
        self,
        callee: Callee,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | timedelta | None = None,
        queue: str | None = None,
        exchange: str | None = None,
        routing_key: str | None = None,
        priority: int | None = None,
        task_id: str | None = None,
        link: object = None,
        link_error: object = None,
        headers: Mapping[str, Any] | None = None,
        serializer: str | None = None,
        compression: str | None = None,
        retry: bool = True,
        retry_policy: Mapping[str, Any] | None = None,
        ignore_result: bool | None = None,
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
        mandatory: bool = True,
        shadow: str | None = None,
        reply_to: str | None = None,
    ) -> _Publishing:
        """One call as an envelope on its way. Raises `TypeError` for an option that does not exist."""
        if link is not None or link_error is not None:
            raise NotImplementedError("link and link_error are not available in this version")
        name, own = callee.name, callee.options
        args, kwargs = callee.validate(args, kwargs)
        route = self._router.resolve(
            name,
            queue=queue,
            exchange=exchange,
            routing_key=routing_key,
            priority=priority,
            task_queue=own.queue,
            task_priority=own.priority,
        )
        task_headers = TaskHeaders(
            task=name,
            id=task_id or str(uuid.uuid4()),
            retries=0,
            time_limit=own.time_limit if time_limit is None else time_limit,
            soft_time_limit=own.soft_time_limit if soft_time_limit is None else soft_time_limit,
            ignore_result=own.ignore_result if ignore_result is None else ignore_result,
            shadow=shadow,
            extra=headers or {},
        )
        parent = current_request()
        if parent is not None:
            task_headers.parent_id, task_headers.root_id = parent.id, parent.root_id
        packer = serializer_named(serializer or own.serializer or self._settings.serialization.serializer)
        packing = compression or own.compression or self._settings.serialization.compression
        target_exchange, target_key = route.exchange, route.routing_key
        expiration: str | None = None
        if countdown is not None or eta is not None:
            wait = seconds_until(eta) if eta is not None else float(countdown or 0)
            if wait > 0:
                task_headers.eta = datetime.now(UTC) + timedelta(seconds=wait) if eta is None else _aware(eta)
                own_exchange = self._settings.exchanges.get(route.exchange)
                target_exchange, target_key = delayed(
                    self._settings.topology.prefix,
                    route,
                    wait,
                    exchange_type=None if own_exchange is None else own_exchange.type,
                )
        lifetime = own.expires if expires is None else expires
        if lifetime is not None:
            left = seconds_until(lifetime)
            task_headers.expires = datetime.now(UTC) + timedelta(seconds=left)
            if task_headers.eta is None:
                # Never on a delayed message: a level of the ladder would let it go early (RabbitMQ, per-message TTL).
                expiration = str(max(0, int(left * 1000)))
        envelope = task_envelope(
            task_headers,
            args,
            kwargs,
            serializer=packer,
            exchange=target_exchange,
            routing_key=target_key,
            compression=None if packing is None else mime_type(packing),
            priority=route.priority,
            reply_to=reply_to,
            mandatory=mandatory,
        )
        envelope.expiration = expiration
        return _Publishing(envelope, retry, retry_policy)


def _aware(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when


def seconds_until(when: float | datetime | timedelta) -> float:
    """Seconds from now until `when`. A datetime without a zone is UTC, as in Celery. Raises `ConfigError`."""
    if isinstance(when, timedelta):
        return when.total_seconds()
    if isinstance(when, datetime):
        return (_aware(when) - datetime.now(UTC)).total_seconds()
    if isinstance(when, bool) or not isinstance(when, int | float):
        raise ConfigError(f"a time must be seconds, a timedelta or a datetime, not {when!r}")
    return float(when)
