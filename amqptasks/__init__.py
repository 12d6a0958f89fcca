"""amqptasks: a RabbitMQ-first task platform.

The names below load on first use (PEP 562), so that ``import amqptasks`` costs a web process next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqptasks import signals, states
    from amqptasks.app import AmqpTasks, current_app, shared_task
    from amqptasks.canvas import Signature, chain, chord, chunks, group, signature
    from amqptasks.errors import (
        AccessRefused,
        AmqpTasksError,
        BrokerBlocked,
        BrokerError,
        BrokerUnreachable,
        ChordError,
        ConfigError,
        Ignore,
        InvalidArguments,
        MaxRetriesExceeded,
        Nacked,
        PublishError,
        PublishTimeout,
        Reject,
        RemoteError,
        ResultTimeout,
        ResultUnavailable,
        Retry,
        SerializationError,
        SoftTimeLimitExceeded,
        StoreUnavailable,
        TaskRevoked,
        TimeLimitExceeded,
        TopologyConflict,
        Unroutable,
    )
    from amqptasks.results import AsyncResult, GroupResult, ResultSet
    from amqptasks.task import Task

__version__ = "0.1.0"

_HOMES = {
    "amqptasks.app": ("AmqpTasks", "current_app", "shared_task"),
    "amqptasks.errors": (
        "AccessRefused",
        "AmqpTasksError",
        "BrokerBlocked",
        "BrokerError",
        "BrokerUnreachable",
        "ChordError",
        "ConfigError",
        "Ignore",
        "InvalidArguments",
        "MaxRetriesExceeded",
        "Nacked",
        "PublishError",
        "PublishTimeout",
        "Reject",
        "RemoteError",
        "ResultTimeout",
        "ResultUnavailable",
        "Retry",
        "SerializationError",
        "SoftTimeLimitExceeded",
        "StoreUnavailable",
        "TaskRevoked",
        "TimeLimitExceeded",
        "TopologyConflict",
        "Unroutable",
    ),
    "amqptasks.results": ("AsyncResult", "GroupResult", "ResultSet"),
    "amqptasks.canvas": ("Signature", "chain", "chord", "chunks", "group", "signature"),
    "amqptasks.task": ("Task",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AccessRefused",
    "AmqpTasks",
    "AmqpTasksError",
    "AsyncResult",
    "BrokerBlocked",
    "BrokerError",
    "BrokerUnreachable",
    "ChordError",
    "ConfigError",
    "GroupResult",
    "Ignore",
    "InvalidArguments",
    "MaxRetriesExceeded",
    "Nacked",
    "PublishError",
    "PublishTimeout",
    "Reject",
    "RemoteError",
    "ResultSet",
    "ResultTimeout",
    "ResultUnavailable",
    "Retry",
    "SerializationError",
    "Signature",
    "SoftTimeLimitExceeded",
    "StoreUnavailable",
    "Task",
    "TaskRevoked",
    "TimeLimitExceeded",
    "TopologyConflict",
    "Unroutable",
    "__version__",
    "chain",
    "chord",
    "chunks",
    "current_app",
    "group",
    "shared_task",
    "signals",
    "signature",
    "states",
]


def __getattr__(name: str) -> Any:
    if name in {"signals", "states"}:
        return importlib.import_module(f"amqptasks.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'amqptasks' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
