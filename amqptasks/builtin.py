"""Tasks that every app has: what `map`, `starmap` and `chunks` send and the end of a group, under Celery's names; and
the one that deletes a large body."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks.canvas.plan import COLLECT
from amqptasks.claims import FORGET, Claims
from amqptasks.errors import ConfigError, InvalidArguments, Retry, StoreUnavailable

__all__ = ["builtin_tasks", "is_builtin"]


#: When a body that could not be deleted is tried again.
_AGAIN_SECONDS = 60.0


def is_builtin(name: str) -> bool:
    """Whether nobody's application has this task, but every one."""
    return name.startswith(("celery.", "amqptasks."))


def builtin_tasks(
    tasks: Callable[[str], Callable[..., Any] | None], claims: Callable[[], Claims | None]
) -> dict[str, Callable[..., Any]]:
    """Name -> function. `tasks` finds the one to call, and `claims` the store of large bodies, in the process that runs
    them."""

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

    def forget_body(key: str) -> None:
        store = claims()
        if store is None:
            raise ConfigError(f"the body {key} cannot be deleted: claim_check.url is not set here")
        try:
            store.forget(key)
        except StoreUnavailable as error:
            raise Retry(exc=error, when=_AGAIN_SECONDS) from error

    return {"celery.map": xmap, "celery.starmap": xstarmap, COLLECT: accumulate, FORGET: forget_body}


def _call(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *items: Any) -> Any:
    validate = getattr(task, "validate", None)
    given, named = (*items, *args), kwargs
    if validate is not None:
        given, named = validate(given, named)
    return task(*given, **named)
