"""Results in Celery's form: what a reply carries and what a store keeps.

A result is one JSON object: ``task_id, status, result, traceback, children, date_done`` and, where there is one,
``parent_id`` and ``group_id``. An exception is ``{exc_type, exc_message, exc_module}`` (Celery 5.6 and 5.7, JSON).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from amqptasks.errors import DecodeError, RemoteError, SerializationError
from amqptasks.protocol import jsontypes
from amqptasks.states import EXCEPTION_STATES, PENDING, READY_STATES

__all__ = [
    "ResultMeta",
    "decode_result",
    "encode_result",
    "error_from_wire",
    "error_to_wire",
]


@dataclass(frozen=True, slots=True)
class ResultMeta:
    """What is known of a task's outcome. `result` is the value, the progress, or an exception."""

    task_id: str
    status: str = PENDING
    result: Any = None
    traceback: str | None = None
    #: Handles of the tasks that this one sent, in Celery's tuple form.
    children: list[Any] = field(default_factory=list)
    date_done: str | None = None
    parent_id: str | None = None
    group_id: str | None = None

    @property
    def ready(self) -> bool:
        """Whether this will not change any more."""
        return self.status in READY_STATES


def encode_result(meta: ResultMeta) -> bytes:
    """The JSON of a result. Raises `SerializationError` for a value that JSON and its extra types cannot carry."""
    result = meta.result
    if meta.status in EXCEPTION_STATES and isinstance(result, BaseException):
        result = error_to_wire(result)
    table: dict[str, Any] = {
        "task_id": meta.task_id,
        "status": str(meta.status),
        "result": result,
        "traceback": meta.traceback,
        "children": meta.children,
        "date_done": meta.date_done or (datetime.now(UTC).isoformat() if meta.ready else None),
    }
    if meta.parent_id is not None:
        table["parent_id"] = meta.parent_id
    if meta.group_id is not None:
        table["group_id"] = meta.group_id
    try:
        return jsontypes.dumps(table)
    except Exception as error:
        kind = f"{type(result).__module__}.{type(result).__qualname__}"
        raise SerializationError(
            f"the result ({kind}) cannot be serialized as JSON: {error}. Return a plain value or a pydantic model, or "
            "give the task ignore_result=True"
        ) from error


def decode_result(body: bytes) -> ResultMeta:
    """The result in this JSON. Raises `DecodeError` for what is none."""
    table = jsontypes.loads(body)
    if not isinstance(table, dict) or not isinstance(table.get("status"), str):
        raise DecodeError("not a task result: no object with a status")
    status, result = table["status"], table.get("result")
    if status in EXCEPTION_STATES:
        result = error_from_wire(result)
    children = table.get("children")
    return ResultMeta(
        str(table.get("task_id")),
        status,
        result,
        table.get("traceback"),
        children if isinstance(children, list) else [],
        table.get("date_done"),
        table.get("parent_id"),
        table.get("group_id"),
    )


# -- exceptions ---------------------------------------------------------------------------------------------------


def error_to_wire(error: BaseException) -> dict[str, Any]:
    """An exception as Celery writes it. Arguments that JSON cannot carry become their `repr`."""
    if isinstance(error, RemoteError):
        return {"exc_type": error.exc_type, "exc_message": list(error.args), "exc_module": error.exc_module}
    return {
        "exc_type": type(error).__qualname__,
        "exc_message": [_portable(one) for one in error.args],
        "exc_module": type(error).__module__,
    }


def _portable(value: Any) -> Any:
    try:
        jsontypes.dumps(value)
    except Exception:
        try:
            return repr(value)[:2048]
        except Exception:
            return f"<{type(value).__qualname__}>"
    return value


def error_from_wire(value: Any) -> BaseException:
    """The exception: of its own class when that is imported here already, else a `RemoteError` of its name.

    Nothing is imported for it: a result must not choose what code runs here.
    """
    if isinstance(value, BaseException):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("exc_type"), str):
        return RemoteError(value) if value is not None else RemoteError()
    name, module = value["exc_type"], str(value.get("exc_module") or "builtins")
    message = value.get("exc_message")
    args = tuple(message) if isinstance(message, list | tuple) else () if message is None else (message,)
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        try:
            found = getattr(found, part, None)
        except Exception:  # a module that makes its names when they are asked for
            found = None
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(*args)
        except Exception:  # it wants other arguments than it keeps
            return _stand_in(name, module)(*args)
    return _stand_in(name, module)(*args)


@lru_cache(maxsize=1000)
def _stand_in(name: str, module: str) -> type[RemoteError]:
    about = {"__module__": module, "exc_type": name, "exc_module": module}
    try:
        return type(name.rpartition(".")[2], (RemoteError,), about)
    except ValueError:  # Python has no class of this name
        return type(RemoteError.__name__, (RemoteError,), about)
