"""What a forked process does before anything else: drop what it inherited, die with its parent, leave signals alone."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from amqptasks.worker.stacks import dump_on_signal

__all__ = ["die_with_parent", "fork_child", "ignore_group_signals", "open_descriptors", "set_title"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# Loaded before the fork: a child must not import, because another thread may have held the import lock.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def open_descriptors() -> frozenset[int]:
    """The file descriptors that this process has open now."""
    listing = Path("/proc/self/fd")
    if not listing.is_dir():
        return frozenset()
    # The listing's own descriptor is among them and gone by the time it is used; that is harmless.
    return frozenset(int(entry.name) for entry in listing.iterdir())


def _close_all_but(keep: Iterable[int]) -> None:
    """Close what was inherited: the leader's AMQP sockets must not live on in a child."""
    low = 0
    for number in sorted({0, 1, 2, *keep}):
        if number > low:  # an empty range would be taken for "all of them"
            os.closerange(low, number)
        low = number + 1
    os.closerange(low, 1 << 16)


def _nothing(signum: int, frame: object) -> None:
    """A handler in Python rather than SIG_IGN: programs that a task starts get the default back."""


def ignore_group_signals() -> None:
    """A signal to the process group (Ctrl-C, a service manager) is the supervisor's to act on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _nothing)


def fork_child(main: Callable[[], int], *, keep: Iterable[int]) -> int:
    """Fork; in the child close all descriptors but `keep`, and run `main`, whose value is the exit code.

    Returns the child's pid. The child never returns: it leaves through `os._exit`, so that no handler of the parent's
    (atexit, a test runner's) runs twice.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(main, parent, keep)
    return pid


def _child(main: Callable[[], int], parent: int, keep: Iterable[int]) -> NoReturn:
    code = 70
    try:
        # Objects of the parent's stay as they are: collecting a socket whose descriptor is closed (and used anew)
        # would close somebody else's.
        gc.freeze()
        ignore_group_signals()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        dump_on_signal()
        signal.set_wakeup_fd(-1)
        die_with_parent(parent, signal.SIGKILL)
        _close_all_but(keep)
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Get this signal when `parent`, which has just forked this process, ends; leave where it has ended already."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died between fork and prctl


def set_title(title: str) -> None:
    """Name the process for `top` and `ps -o comm` (15 bytes, PR_SET_NAME)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
