"""Calls become messages here: options, route, delay and body. Nothing is published."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

from amqptasks.canvas import Signature
from amqptasks.canvas.types import as_list
from amqptasks.config import Settings
from amqptasks.errors import ConfigError
from amqptasks.message import Envelope
from amqptasks.options import TaskOptions
from amqptasks.protocol.compression import mime_type
from amqptasks.protocol.serializers import serializer as serializer_named
from amqptasks.protocol.task import EMPTY_EMBED, TaskHeaders, task_envelope
from amqptasks.request import current_request
from amqptasks.routing import Route, Router
from amqptasks.topology.delays import delayed

__all__ = ["Callee", "Calls", "NamedCallee", "Prepared", "seconds_until"]


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

    @property
    def convert(self) -> Callable[[Any], Any] | None:
        """Makes the value that the task returned of its JSON; None when that is the value."""


@dataclass(frozen=True, slots=True)
class NamedCallee:
    """A task known by its name only (`send_task`): its arguments are checked at the worker."""

    name: str
    options: TaskOptions = field(default_factory=TaskOptions)

    @property
    def validate(self) -> Callable[..., tuple[Sequence[Any], Mapping[str, Any]]]:
        """Takes any arguments."""
        return _as_they_are

    @property
    def convert(self) -> Callable[[Any], Any] | None:
        """JSON as it is."""
        return None


def _as_they_are(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    return args, kwargs


class Prepared(NamedTuple):
    """One call, ready to be published."""

    envelope: Envelope
    retry: bool
    policy: Mapping[str, Any] | None
    ignored: bool


class Calls:
    """Makes the messages of one app's calls.

    Args:
        callee: the task of a name, or a `NamedCallee`.
    """

    def __init__(self, settings: Settings, router: Router, callee: Callable[[str], Callee]) -> None:
        self._settings = settings
        self._router = router
        self.callee = callee

    def prepare_all(self, signatures: Sequence[Signature], *, check: bool = True) -> list[Prepared]:
        """Plain signatures as envelopes. Nothing is published.

        With `check` False arguments are left for the worker to check: what follows a task is not its fault.
        """
        prepared = []
        for one in signatures:
            callee, options = self.callee(one.task), one.options
            if not check:
                callee = NamedCallee(callee.name, callee.options)
                # Celery's clients put more into a signature's options than they send.
                options = {name: value for name, value in options.items() if name in _OPTIONS}
            prepared.append(self.prepare(callee, one.args, one.kwargs, **options))
        return prepared

    def prepare(
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
        chain: Sequence[Mapping[str, Any]] | None = None,
        chord: Mapping[str, Any] | None = None,
        group_id: str | None = None,
        group_index: int | None = None,
        root_id: str | None = None,
        parent_id: str | None = None,
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
    ) -> Prepared:
        """One call as an envelope on its way. Raises `TypeError` for an option that does not exist."""
        name, own = callee.name, callee.options
        args, kwargs = callee.validate(args, kwargs)
        route = self._router.resolve(
            _routed_as(name, kwargs, shadow),
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
            root_id=root_id,
            parent_id=parent_id,
            group=group_id,
            group_index=group_index,
            time_limit=own.time_limit if time_limit is None else time_limit,
            soft_time_limit=own.soft_time_limit if soft_time_limit is None else soft_time_limit,
            ignore_result=own.ignore_result if ignore_result is None else ignore_result,
            shadow=shadow,
            extra=headers or {},
        )
        parent = current_request()
        if parent is not None and parent_id is None:
            task_headers.parent_id, task_headers.root_id = parent.id, root_id or parent.root_id
        exchange_now, key_now = self._delay(task_headers, route, countdown, eta)
        expiration = self._expiry(task_headers, own.expires if expires is None else expires)
        packing = compression or own.compression or self._settings.serialization.compression
        envelope = task_envelope(
            task_headers,
            args,
            kwargs,
            serializer=serializer_named(serializer or own.serializer or self._settings.serialization.serializer),
            exchange=exchange_now,
            routing_key=key_now,
            embed=_embed(link, link_error, chain, chord),
            compression=None if packing is None else mime_type(packing),
            priority=route.priority,
            reply_to=reply_to,
            mandatory=mandatory,
        )
        envelope.expiration = expiration
        ignored = task_headers.ignore_result
        return Prepared(envelope, retry, retry_policy, ignored)

    def _delay(
        self, headers: TaskHeaders, route: Route, countdown: float | None, eta: datetime | None
    ) -> tuple[str, str]:
        if countdown is None and eta is None:
            return route.exchange, route.routing_key
        wait = seconds_until(eta) if eta is not None else float(countdown or 0)
        if wait <= 0:
            return route.exchange, route.routing_key
        headers.eta = datetime.now(UTC) + timedelta(seconds=wait) if eta is None else _aware(eta)
        own = self._settings.exchanges.get(route.exchange)
        return delayed(self._settings.topology.prefix, route, wait, exchange_type=None if own is None else own.type)

    def _expiry(self, headers: TaskHeaders, lifetime: float | datetime | timedelta | None) -> str | None:
        if lifetime is None:
            return None
        left = seconds_until(lifetime)
        headers.expires = datetime.now(UTC) + timedelta(seconds=left)
        # Never on a delayed message: a level of the ladder would let it go early (RabbitMQ, per-message TTL).
        return str(max(0, int(left * 1000))) if headers.eta is None else None


_OPTIONS = frozenset(inspect.signature(Calls.prepare).parameters) - {"self", "callee", "args", "kwargs"}


def _routed_as(name: str, kwargs: Mapping[str, Any], shadow: str | None) -> str:
    """Celery's own tasks go where the task goes that they stand for."""
    if name.startswith("celery."):
        inner = kwargs.get("task")
        if isinstance(inner, Mapping) and isinstance(inner.get("task"), str):
            return str(inner["task"])
        return shadow or name
    return name


def _embed(
    link: object, link_error: object, chain: Sequence[Mapping[str, Any]] | None, chord: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    if link is None and link_error is None and not chain and chord is None:
        return EMPTY_EMBED
    return {
        "callbacks": [one.to_dict() for one in as_list(link)] or None,
        "errbacks": [one.to_dict() for one in as_list(link_error)] or None,
        "chain": list(chain) if chain else None,
        "chord": chord,
    }


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
