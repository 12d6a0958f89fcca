"""Tasks that every app has, under Celery's names: what `map`, `starmap` and `chunks` send, and the end of a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks.canvas.plan import COLLECT
from amqptasks.errors import InvalidArguments

__all__ = ["builtin_tasks"]


def builtin_tasks(tasks: Callable[[str], Callable[..., Any] | None]) -> dict[str, Callable[..., Any]]:
    """Name -> function. `tasks` finds the one to call, in the process that runs them."""

    def find(task: Mapping[str, Any]) -> Callable[..., Any]:
        name = task.get("task")
        found = tasks(str(name))
        if found is None:
            raise InvalidArguments(f"no task is named {name!r}")
        args, kwargs = tuple(task.get("args") or ()), dict(task.get("kwargs") or {})
        return functools.partial(_call, found, args, kwargs)

    def xmap(task: dict[str, Any], it: list[Any]) -> list[Any]:
        call = find(task)
        return [call(item) for item in it]

    def xstarmap(task: dict[str, Any], it: list[Any]) -> list[Any]:
        call = find(task)
        return [call(*items) for items in it]

    def accumulate(*args: Any, **kwargs: Any) -> Any:
        index = kwargs.get("index")
        return list(args) if index is None else args[index]

    return {"celery.map": xmap, "celery.starmap": xstarmap, COLLECT: accumulate}


def _call(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *items: Any) -> Any:
    validate = getattr(task, "validate", None)
    given, named = (*items, *args), kwargs
    if validate is not None:
        given, named = validate(given, named)
    return task(*given, **named)
