"""Every error of amqptasks, in one tree.

::

    AmqpTasksError
    ├── ConfigError                    settings, routes, options: file, line and key are named
    │   └── TopologyConflict           a live queue or exchange differs from the declared one
    ├── AlreadyRunning                 another process holds the pid file
    ├── BrokerError                    the broker cannot be used
    │   ├── BrokerUnreachable          refused, timed out, connection lost
    │   └── AccessRefused              password, virtual host or permission
    ├── PublishError                   a message may not have been taken
    │   ├── Unroutable                 returned: no queue is bound for its key
    │   ├── Nacked                     the broker refused it (queue full, no quorum)
    │   ├── MessageTooLarge            larger than the broker takes
    │   ├── Unwritable                 AMQP cannot carry it: headers beyond a frame, a name beyond 255 bytes
    │   ├── BrokerBlocked              memory or disk alarm on the broker
    │   └── PublishTimeout             no confirm in time
    ├── SerializationError             an argument or body cannot be encoded
    ├── DecodeError                    a body cannot be decoded
    ├── InvalidArguments               arguments do not fit the task
    ├── UnknownTask                    no task of that name is registered
    ├── SignatureError                 a message's signature is missing or wrong
    ├── MaxRetriesExceeded             `Task.retry` was called once too often
    ├── TaskRevoked                    the task was revoked before it ran
    ├── TimeLimitExceeded              the hard time limit ended the task
    ├── ResultUnavailable              there is no result to be had, now or later
    ├── ResultTimeout                  no result in time; a `TimeoutError` too
    ├── StoreUnavailable               the store of results, or of large bodies, cannot be used
    ├── ChordError                     a part of the chord failed
    ├── RemoteError                    an exception whose class is not imported here
    └── WorkerLost                     the process that ran the task died

Raised inside tasks, to steer what happens to the message:

``Retry``, ``Reject``, ``Ignore`` and ``SoftTimeLimitExceeded`` derive from `Exception` directly, so that
``except AmqpTasksError`` in a task does not swallow them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

__all__ = [
    "AccessRefused",
    "AlreadyRunning",
    "AmqpTasksError",
    "BrokerBlocked",
    "BrokerError",
    "BrokerUnreachable",
    "ChordError",
    "ConfigError",
    "DecodeError",
    "Ignore",
    "InvalidArguments",
    "MaxRetriesExceeded",
    "MessageTooLarge",
    "Nacked",
    "PublishError",
    "PublishTimeout",
    "Reject",
    "RemoteError",
    "Replaced",
    "ResultTimeout",
    "ResultUnavailable",
    "Retry",
    "SerializationError",
    "SignatureError",
    "SoftTimeLimitExceeded",
    "StoreUnavailable",
    "TaskRevoked",
    "TimeLimitExceeded",
    "TopologyConflict",
    "UnknownTask",
    "Unroutable",
    "Unwritable",
    "WorkerLost",
]


class AmqpTasksError(Exception):
    """Base of every error that amqptasks raises to its callers."""


class ConfigError(AmqpTasksError):
    """A setting, a route or an option is wrong. The message names the place and the nearest valid name."""


class TopologyConflict(ConfigError):
    """A queue or exchange exists in the broker with arguments that differ from the declared ones.

    AMQP freezes arguments at the first declaration (AMQP 0-9-1, queue.declare; RabbitMQ answers 406).
    """

    def __init__(self, message: str, *, entity: str, argument: str, declared: str, live: str) -> None:
        super().__init__(message)
        self.entity = entity
        self.argument = argument
        self.declared = declared
        self.live = live


class AlreadyRunning(AmqpTasksError):
    """A process that lives holds the pid file."""


class BrokerError(AmqpTasksError):
    """The broker cannot be used. Names the node, never the password."""


class BrokerUnreachable(BrokerError):
    """No node of the broker answers: refused, timed out, or the connection was lost."""


class AccessRefused(BrokerError):
    """The broker refused the user, the virtual host or an operation for lack of permission."""


class PublishError(AmqpTasksError):
    """A message may not have been taken by the broker.

    `sent` tells whether its bytes left this process: when it is true, the message may still be delivered.
    """

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        #: After `send_many`: every call that failed, as (index, error).
        self.failed: list[tuple[int, PublishError]] = []


class Unroutable(PublishError):
    """The broker returned the message: no queue is bound to the exchange for this routing key (basic.return)."""


class Nacked(PublishError):
    """The broker refused the message (basic.nack): the queue is full, or has no quorum."""


class MessageTooLarge(PublishError):
    """The message is larger than the broker takes (``max_message_size``: 16 MiB by default from RabbitMQ 4.0 on)."""


class Unwritable(PublishError):
    """AMQP cannot carry the message: its headers do not fit one frame, or one of them, or its address, is too long."""


class BrokerBlocked(PublishError):
    """The broker stopped taking messages (connection.blocked: a memory or disk alarm) for `blocked_timeout`."""


class PublishTimeout(PublishError):
    """The broker did not confirm the message before the deadline."""


class SerializationError(AmqpTasksError):
    """An argument cannot be serialized. The message names it."""


class DecodeError(AmqpTasksError):
    """A message body cannot be decoded: content type not accepted, malformed, or too large."""


class InvalidArguments(AmqpTasksError):
    """Arguments do not fit the task's signature or annotations."""


class UnknownTask(AmqpTasksError):
    """No task of that name is registered."""


class SignatureError(AmqpTasksError):
    """A message is not signed, or not with a key of ours, or is not what was signed. It never runs."""


class MaxRetriesExceeded(AmqpTasksError):
    """A task asked for a retry after its last one, and named no exception to raise instead."""


class TaskRevoked(AmqpTasksError):
    """The task was revoked before it ran."""


class TimeLimitExceeded(AmqpTasksError):
    """The hard time limit passed and the task was killed."""


class WorkerLost(AmqpTasksError):
    """The process that ran the task died (signal, memory, exit)."""


class ResultUnavailable(AmqpTasksError):
    """There is no result to be had: the task ignores it, no store is set, or it went to another process."""


class ResultTimeout(AmqpTasksError, TimeoutError):
    """No result in time. The task may still run."""


class StoreUnavailable(AmqpTasksError):
    """The store of results, or of large bodies, cannot be used. Names host and port, never the password."""


class ChordError(AmqpTasksError):
    """A part of the chord failed, so that its body does not run. The message names the part."""


class RemoteError(AmqpTasksError):
    """Stands in for a task's exception whose class is not imported in this process, under the same name."""

    exc_type = "RemoteError"
    exc_module = "amqptasks.errors"


class Retry(Exception):
    """Raised in a task: run it again later. `Task.retry` builds and raises it."""

    def __init__(
        self,
        message: str | None = None,
        exc: BaseException | None = None,
        when: float | datetime | None = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message or (f"retry: {exc!r}" if exc is not None else "retry"))
        self.exc = exc
        #: Seconds from now, or the time at which to run again; None for the task's default delay.
        self.when = when
        self.sig_args = args
        self.sig_kwargs = kwargs
        self.options = options or {}


class Replaced(Exception):
    """Raised by `Task.replace`: another signature runs in this task's place."""

    def __init__(self, signature: Any) -> None:
        super().__init__(f"replaced by {signature!r}")
        self.signature = signature


class Reject(Exception):
    """Raised in a task: dead-letter the message (reason ``rejected``), or give it back with ``requeue=True``."""

    def __init__(self, reason: str = "", requeue: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.requeue = requeue


class Ignore(Exception):
    """Raised in a task: acknowledge the message and record no state."""


class SoftTimeLimitExceeded(Exception):
    """Raised inside a task when its soft time limit passes, so that it can clean up."""
