"""SIGUSR1: where every thread of every process of a worker stands, in the log. For a worker that seems to hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType

import psutil
import structlog

__all__ = ["dump_all", "dump_on_signal"]

_STDERR = 2
#: Seconds for one process to write before the next one is asked, so that their lines do not mix.
_PAUSE = 0.03

_log = structlog.get_logger("amqptasks.worker")


def dump_on_signal(then: Callable[[int, FrameType | None], None] | None = None) -> None:
    """Have SIGUSR1 write all stacks of this process, from C: also while a task holds the interpreter's lock.

    `then`: a handler that is called afterwards.
    """
    faulthandler.unregister(signal.SIGUSR1)
    if then is not None:
        signal.signal(signal.SIGUSR1, then)
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True, chain=then is not None)


def dump_all(children: Iterable[tuple[str, int]]) -> None:
    """Ask the children (name, pid), and the executors below them, for theirs; this process has written its own."""
    _log.warning("SIGUSR1: the supervisor's stacks stand above, those of its processes follow", pid=os.getpid())
    for name, pid in children:
        try:
            executors = [one.pid for one in psutil.Process(pid).children()]
        except psutil.NoSuchProcess:
            continue
        for role, number in ((name, pid), *((f"executor of {name}", one) for one in executors)):
            _log.warning("Stacks of a process", of=role, pid=number)
            time.sleep(_PAUSE)  # a line of the log is written within a few milliseconds
            try:
                os.kill(number, signal.SIGUSR1)
            except ProcessLookupError:
                continue
            time.sleep(_PAUSE)
