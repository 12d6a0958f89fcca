"""Calls become messages here: options, route, delay and body. Nothing is published."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any, NamedTuple, Protocol

from amqptasks.announce import Announced, announce
from amqptasks.canvas import Signature
from amqptasks.canvas.types import as_list
from amqptasks.claims import claims_of
from amqptasks.config import Settings
from amqptasks.errors import ConfigError
from amqptasks.ids import new_id
from amqptasks.message import Envelope
from amqptasks.options import TaskOptions
from amqptasks.protocol.compression import mime_type
from amqptasks.protocol.serializers import serializer as serializer_named
from amqptasks.protocol.task import EMPTY_EMBED, TaskHeaders, task_envelope
from amqptasks.request import current_request
from amqptasks.routing import Route, Router
from amqptasks.signals import before_task_publish
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
    #: As the signals of publishing show it.
    body: Announced
    #: When it was made (`time.time`).
    called: float


class Calls:
    """Makes the messages of one app's calls.

    Args:
        callee: the task of a name, or a `NamedCallee`.
    """

    def __init__(self, settings: Settings, router: Router, callee: Callable[[str], Callee]) -> None:
        self._settings = settings
        #: The keys of messages' signatures; None where nothing is signed.
        self.keys = settings.security.keyring()
        #: Keeps large bodies; None where they travel whole.
        self.claims = claims_of(settings)
        self._router = router
        self.callee = callee

    def signed(self, envelope: Envelope) -> Envelope:
        """The envelope with its signature, where messages are signed. A publisher signs what it publishes itself."""
        if self.keys is not None:
            self.keys.sign(envelope)
        return envelope

    def check_in(self, envelope: Envelope) -> None:
        """Keep the envelope's body, where it is large and a store is set, and have a claim travel. May block.

        Raises `StoreUnavailable`, `MessageTooLarge`.
        """
        if self.claims is not None:
            self.claims.check_in(envelope)

    def pin(self, one: Signature) -> None:
        """Write into a task's signature where it goes by these settings: a process with others may send it."""
        options, own = one.options, self.callee(one.task).options
        if any(options.get(name) is not None for name in ("queue", "exchange", "routing_key")):
            return
        name = _routed_as(one.task, one.to_dict()["kwargs"], options.get("shadow"))
        route = self._router.resolve(name, task_queue=own.queue, task_priority=own.priority)
        options.update(exchange=route.exchange, routing_key=route.routing_key)
        if route.queue is not None:
            options["queue"] = route.queue
        if route.priority is not None:
            options.setdefault("priority", route.priority)

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
                known = _OPTIONS.union(options.get("stamped_headers") or ())
                options = {name: value for name, value in options.items() if name in known}
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
        stamped_headers: Sequence[str] | None = None,
        **stamps: Any,
    ) -> Prepared:
        """One call as an envelope on its way. Raises `TypeError` for an option that does not exist.

        As with Celery, a stamp is an option whose name is in `stamped_headers`.
        """
        if stamps or stamped_headers is not None:
            _check_stamps(stamped_headers or (), stamps)
        for limit in (time_limit, soft_time_limit):
            if limit is not None and not 0 <= limit < inf:
                raise ConfigError(f"a time limit must be a number of seconds of at least 0, not {limit!r}")
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
            id=task_id or new_id(),
            root_id=root_id,
            parent_id=parent_id,
            group=group_id,
            group_index=group_index,
            time_limit=own.time_limit if time_limit is None else time_limit,
            soft_time_limit=own.soft_time_limit if soft_time_limit is None else soft_time_limit,
            ignore_result=own.ignore_result if ignore_result is None else ignore_result,
            shadow=shadow,
            stamps=stamps,
            extra=headers or {},
        )
        parent = current_request()
        if parent is not None and parent_id is None:
            task_headers.parent_id, task_headers.root_id = parent.id, root_id or parent.root_id
        exchange_now, key_now = self._delay(task_headers, route, countdown, eta)
        expiration = self._expiry(task_headers, own.expires if expires is None else expires)
        packing = compression or own.compression or self._settings.serialization.compression
        embed = _embed(link, link_error, chain, chord)
        envelope = task_envelope(
            task_headers,
            args,
            kwargs,
            serializer=serializer_named(serializer or own.serializer or self._settings.serialization.serializer),
            exchange=exchange_now,
            routing_key=key_now,
            embed=embed,
            compression=None if packing is None else mime_type(packing),
            priority=route.priority,
            reply_to=reply_to,
            mandatory=mandatory,
        )
        envelope.expiration = expiration
        if route.queue is None and route.exchange == self._settings.topology.prefix and key_now != route.routing_key:
            # It may lead to a queue of another name: nobody can look for that before the delay.
            envelope.mandatory = False
        prepared = Prepared(
            envelope, retry, retry_policy, task_headers.ignore_result, (args, kwargs, embed), time.time()
        )
        if before_task_publish.receivers:
            announce(envelope, prepared.body, retry_policy)
        return prepared

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


_OPTIONS = frozenset(inspect.signature(Calls.prepare).parameters) - {"self", "callee", "args", "kwargs", "stamps"}


def _check_stamps(names: Sequence[str], stamps: Mapping[str, Any]) -> None:
    unknown = sorted(stamps.keys() - set(names))
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}, and `stamped_headers` does not name it")
    missing = sorted(set(names) - stamps.keys())
    if missing:
        raise TypeError(
            f"`stamped_headers` names {missing[0]!r}, which is not given, or is an option of another meaning"
        )


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
