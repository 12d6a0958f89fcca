"""Finding the app that a command line names, and importing its tasks."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amqptasks.app import AmqpTasks
from amqptasks.errors import AmqpTasksError, ConfigError

__all__ = ["find_app", "import_tasks"]

#: Files that are not the application's: ours, Python's and those of packages.
_NOT_THEIRS = (
    f"{Path(__file__).parent}/",
    f"{sysconfig.get_path('stdlib')}/",
    f"{sysconfig.get_path('purelib')}/",
    "<",
)


def find_app(name: str) -> AmqpTasks:
    """The app that ``-A`` names: ``module:attribute``, or a module with an `app`, or one in ``<module>.amqptasks``.

    Raises `ConfigError` naming what was looked for, or the file and line that raised while it was imported.
    """
    module_name, _, attribute = name.partition(":")
    candidates = [module_name] if attribute else [module_name, f"{module_name}.amqptasks"]
    for candidate in candidates:
        try:
            with _importing(f"the app {name!r}"):
                module = importlib.import_module(candidate)
        except ConfigError as error:
            missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
            if missing is not None and (candidate == missing or candidate.startswith(missing + ".")):
                continue
            raise
        names = [attribute] if attribute else ["app", "amqptasks"]
        for one in names:
            found = getattr(module, one, None)
            if isinstance(found, AmqpTasks):
                return found
        if not attribute:
            apps = [value for value in vars(module).values() if isinstance(value, AmqpTasks)]
            if len(apps) == 1:
                return apps[0]
    raise ConfigError(
        f"no app at {name!r}: looked in {', '.join(candidates)} for an AmqpTasks instance. "
        "Is the module's folder the current one, or on PYTHONPATH?"
    )


def import_tasks(app: AmqpTasks) -> None:
    """Import the modules of ``include``. Raises `ConfigError` as `find_app` does."""
    with _importing(f"what the app {app.name!r} includes"):
        app.import_tasks()


@contextmanager
def _importing(what: str) -> Iterator[None]:
    try:
        yield
    except AmqpTasksError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()) or "no more is said"
        text = f"{type(error).__name__}: {said}"
        if isinstance(error, SyntaxError):
            text = f"SyntaxError: {error.msg}"
        raise ConfigError(f"{what} cannot be imported: {text} ({_place(error)}). -v shows the traceback") from error


def _place(error: BaseException) -> str:
    """File and line of the application's code that raised, or that called what raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    last = (theirs or frames)[-1]
    return f"{last.filename}:{last.lineno}"
