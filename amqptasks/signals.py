"""Signals: your own functions, called when something happens to a task, a message or a worker.

Names and keyword arguments are Celery's; `docs/signals.md` says in which process each one is sent. A handler is a plain
function that takes ``**kwargs``; one that raises is logged on the ``amqptasks.signals`` logger, and the work goes on.

A class of our own rather than blinker: handlers are called in the order in which they connected, with keyword arguments
alone, and none of them stops the others.
"""

from __future__ import annotations

import inspect
import logging
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, overload

__all__ = [
    "ExceptionInfo",
    "Signal",
    "after_setup_logger",
    "after_setup_task_logger",
    "after_task_publish",
    "beat_embedded_init",
    "beat_init",
    "before_task_publish",
    "celeryd_after_setup",
    "celeryd_init",
    "heartbeat_sent",
    "import_modules",
    "setup_logging",
    "task_failure",
    "task_internal_error",
    "task_postrun",
    "task_prerun",
    "task_received",
    "task_rejected",
    "task_retry",
    "task_revoked",
    "task_signals",
    "task_success",
    "task_unknown",
    "worker_init",
    "worker_process_init",
    "worker_process_shutdown",
    "worker_ready",
    "worker_shutdown",
    "worker_shutting_down",
]

Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
_log = logging.getLogger("amqptasks.signals")


@dataclass(frozen=True, slots=True)
class ExceptionInfo:
    """An exception as hooks and handlers get it (``einfo``), with Celery's attributes."""

    exception: BaseException

    @property
    def type(self) -> type[BaseException]:
        """Its class."""
        return type(self.exception)

    @property
    def tb(self) -> TracebackType | None:
        """Its traceback object; None for what was not raised in this process."""
        return self.exception.__traceback__

    @property
    def traceback(self) -> str:
        """Its traceback as text, formatted when it is asked for."""
        try:
            return "".join(traceback.format_exception(self.exception, limit=-50))
        except Exception:  # an exception whose own __str__ raises
            return f"{self.type.__qualname__} (its traceback could not be formatted)"

    def __str__(self) -> str:
        return self.traceback


class Family:
    """Signals that are watched together: the hot path asks once whether any of them has a handler."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self.connected = False


@dataclass(frozen=True, slots=True)
class _Connection:
    key: object
    sender: object
    handler: Callable[[], Handler | None]


class Signal:
    """One thing that happens, and the handlers that are called when it does.

    Args:
        name: as users import it.
        arguments: the keyword arguments that handlers get besides ``signal`` and ``sender``.
    """

    def __init__(self, name: str, arguments: str = "", *, family: Family | None = None) -> None:
        self.name = name
        self.arguments = tuple(arguments.split())
        #: Empty while nobody listens. Replaced, never changed, so that `send` needs no lock.
        self.receivers: tuple[_Connection, ...] = ()
        self._lock = threading.RLock()
        self._family = family
        if family is not None:
            family.signals.append(self)

    def __repr__(self) -> str:
        return f"<signal {self.name}>"

    @overload
    def connect(self, handler: H, /, *, sender: Any = ..., weak: bool = ..., dispatch_uid: object = ...) -> H: ...
    @overload
    def connect(
        self, handler: None = ..., /, *, sender: Any = ..., weak: bool = ..., dispatch_uid: object = ...
    ) -> Callable[[H], H]: ...
    def connect(
        self, handler: Any = None, /, *, sender: Any = None, weak: bool = True, dispatch_uid: object = None
    ) -> Any:
        """Call `handler` each time this happens: ``connect(handler)``, ``@connect`` or ``@connect(sender=…)``.

        Args:
            sender: only for this one: a task, or the name of one.
            weak: forget the handler when nothing else refers to it; a function inside a function needs False.
            dispatch_uid: the same again connects nothing anew.

        Raises:
            TypeError: the handler is no plain function that takes ``**kwargs``.
        """

        def add(function: H) -> H:
            _check(self, function)
            who = _identity(sender)
            key = (dispatch_uid if dispatch_uid is not None else _handler_key(function), who)
            with self._lock:
                if all(one.key != key for one in self.receivers):
                    made = _Connection(key, who, self._reference(function, key, weak))
                    self._become((*self.receivers, made))
            return function

        return add if handler is None else add(handler)

    def disconnect(self, handler: Handler | None = None, *, sender: Any = None, dispatch_uid: object = None) -> bool:
        """Undo `connect` with the same handler (or `dispatch_uid`) and `sender`. Returns whether it was connected."""
        return self._forget((dispatch_uid if dispatch_uid is not None else _handler_key(handler), _identity(sender)))

    def send(self, sender: Any = None, **named: Any) -> list[tuple[Handler, Any]]:
        """Call the handlers in order. Returns each with what it returned, or with the exception that it raised."""
        answers: list[tuple[Handler, Any]] = []
        who: object = None
        for one in self.receivers:
            if one.sender is not None:
                who = _identity(sender) if who is None else who
                if one.sender != who:
                    continue
            handler = one.handler()
            if handler is None:
                continue
            try:
                answers.append((handler, handler(signal=self, sender=sender, **named)))
            except Exception as error:
                _log.exception("A handler of %s raised: %s", self.name, _describe(handler))
                answers.append((handler, error))
        return answers

    def _reference(self, function: Handler, key: object, weak: bool) -> Callable[[], Handler | None]:
        if not weak:
            return lambda: function
        kind: Any = weakref.WeakMethod if inspect.ismethod(function) else weakref.ref
        reference: Callable[[], Handler | None] = kind(function, lambda _gone: self._forget(key))
        return reference

    def _forget(self, key: object) -> bool:
        with self._lock:
            left = tuple(one for one in self.receivers if one.key != key)
            found = len(left) < len(self.receivers)
            self._become(left)
        return found

    def _become(self, receivers: tuple[_Connection, ...]) -> None:
        self.receivers = receivers
        if self._family is not None:
            self._family.connected = any(one.receivers for one in self._family.signals)


def _identity(sender: Any) -> object:
    """What senders are told apart by: the name of what has one (a task and its name are the same), else the object."""
    if sender is None or isinstance(sender, str):
        return sender
    name = getattr(sender, "name", None)
    return name if isinstance(name, str) else ("object", id(sender))


def _handler_key(handler: Any) -> object:
    if inspect.ismethod(handler):
        return id(handler.__self__), id(handler.__func__)
    return id(handler)


def _check(signal: Signal, handler: Any) -> None:
    if not callable(handler) or inspect.iscoroutinefunction(handler):
        raise TypeError(f"{signal.name}: a handler is a plain function, not {handler!r}")
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:  # a builtin that does not tell
        return
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise TypeError(f"{signal.name}: {_describe(handler)} must take **kwargs, for arguments that come later")


def _describe(handler: Any) -> str:
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', repr(handler))}"


#: What the path of a task asks: does anybody watch tasks?
task_signals = Family()

before_task_publish = Signal(
    "before_task_publish", "body exchange routing_key headers properties declare retry_policy"
)  # fmt: skip
after_task_publish = Signal("after_task_publish", "body headers exchange routing_key")

task_received = Signal("task_received", "request", family=task_signals)
task_prerun = Signal("task_prerun", "task_id task args kwargs", family=task_signals)
task_postrun = Signal("task_postrun", "task_id task args kwargs retval state", family=task_signals)
task_success = Signal("task_success", "result", family=task_signals)
task_failure = Signal("task_failure", "task_id exception args kwargs traceback einfo", family=task_signals)
task_retry = Signal("task_retry", "request reason einfo", family=task_signals)
task_revoked = Signal("task_revoked", "request terminated signum expired")
task_rejected = Signal("task_rejected", "message exc")
task_unknown = Signal("task_unknown", "message exc name id")
task_internal_error = Signal("task_internal_error", "task_id args kwargs request exception traceback einfo")

celeryd_init = Signal("celeryd_init", "instance conf options")
celeryd_after_setup = Signal("celeryd_after_setup", "instance conf")
import_modules = Signal("import_modules")
worker_init = Signal("worker_init")
worker_ready = Signal("worker_ready")
worker_shutting_down = Signal("worker_shutting_down", "sig how exitcode")
worker_shutdown = Signal("worker_shutdown")
worker_process_init = Signal("worker_process_init")
worker_process_shutdown = Signal("worker_process_shutdown", "pid exitcode")
heartbeat_sent = Signal("heartbeat_sent")

beat_init = Signal("beat_init")
beat_embedded_init = Signal("beat_embedded_init")

setup_logging = Signal("setup_logging", "loglevel logfile format colorize")
after_setup_logger = Signal("after_setup_logger", "logger loglevel logfile format colorize")
after_setup_task_logger = Signal("after_setup_task_logger", "logger loglevel logfile format colorize")
