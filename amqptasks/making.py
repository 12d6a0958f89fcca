"""Tasks are made here: of a function, or of a class."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amqptasks.errors import ConfigError
from amqptasks.options import class_options, task_options
from amqptasks.task import Task, TaskHost

__all__ = ["class_task", "make_task"]

AnyTask = Task[..., Any]


def make_task(
    function: Callable[..., Any],
    app: str,
    bind: bool,
    base: type[AnyTask],
    options: Mapping[str, Any],
    host: Callable[[], TaskHost],
) -> AnyTask:
    """The task of a function; the decorator's options win over those of its class. Raises `ConfigError`."""
    given = dict(options)
    name = given.pop("name", None) or f"{_module_name(function.__module__, app)}.{function.__name__}"
    return _new(base, name).made_of(
        function, name=name, options=task_options(name, class_options(base) | given), bind=bind, host=host
    )


def class_task(task: type[AnyTask] | AnyTask, app: str, host: Callable[[], TaskHost]) -> AnyTask:
    """The task of a class with a `run` method, under the class's `name`. Raises `ConfigError`."""
    base = task if isinstance(task, type) else type(task)
    function = getattr(base, "run", None)
    if not issubclass(base, Task) or not callable(function):
        raise ConfigError(f"register_task takes a subclass of Task with a method `run`, not {task!r}")
    own = getattr(base, "name", None)
    name = own if isinstance(own, str) and own else f"{_module_name(base.__module__, app)}.{base.__name__}"
    made = _new(base, name) if isinstance(task, type) else task
    return made.made_of(function, name=name, options=task_options(name, class_options(base)), bind=True, host=host)


def _new(base: type[AnyTask], name: str) -> AnyTask:
    if not isinstance(base, type) or not issubclass(base, Task):
        raise ConfigError(f"task {name}: base must be a subclass of amqptasks.Task, not {base!r}")
    try:
        return base()
    except TypeError as error:
        raise ConfigError(f"task {name}: its base {base.__qualname__} cannot be made: {error}") from error


def _module_name(module: str, app: str) -> str:
    """A name that the worker will see too: ``__main__`` is the module's real name, else the app's."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else app
