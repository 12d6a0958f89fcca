"""What a program needs that runs in the background: a pid file, a log file, another user, and to let its starter go."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import re
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from amqptasks.errors import AlreadyRunning, ConfigError

__all__ = ["DaemonOptions", "Launch", "PidFile", "expand"]

_STDIN, _STDOUT, _STDERR = 0, 1, 2


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """The flags of a background program."""

    pidfile: str | None = None
    logfile: str | None = None
    detach: bool = False
    umask: int | None = None
    uid: str | None = None
    gid: str | None = None


def expand(pattern: str, node: str) -> str:
    """A file's name for the node ``name@host``, with Celery's marks.

    ``%p`` the node's whole name, ``%n`` its part before the @, ``%h`` the host, ``%d`` the host's domain; ``%i`` is 0
    and ``%I`` nothing, because all processes of a worker write one file.
    """
    name, _, host = node.partition("@")
    host = host or socket.gethostname()
    marks: Mapping[str, str] = {
        "p": node, "n": name, "h": host, "d": host.partition(".")[2], "i": "0", "I": "", "%": "%",
    }  # fmt: skip
    return re.sub("%(.)", lambda mark: marks.get(mark[1], mark[0]), pattern)


class PidFile:
    """A file that holds the pid of the one process that runs with it.

    It is locked as long as that process lives (fcntl, which no child inherits), so that two that start at the same
    moment cannot both have it. What is not locked is stale, unless a process that is older than the file has its pid.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._descriptor = -1

    def acquire(self) -> None:
        """Write this process's pid. Raises `AlreadyRunning`, `ConfigError`."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise ConfigError(f"--pidfile {self.path}: {error.strerror}") from None
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._replaced(descriptor):
                    os.close(descriptor)
                    continue
                self._refuse_the_living(descriptor)
            except BaseException as error:
                holder = _written(descriptor)
                os.close(descriptor)
                if isinstance(error, OSError):
                    raise AlreadyRunning(self._already(holder)) from None
                raise
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            self._descriptor = descriptor
            return

    def release(self) -> None:
        """Remove the file, if this process holds it."""
        if self._descriptor >= 0:
            with suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def _replaced(self, descriptor: int) -> bool:
        """Whether its holder removed the file between our opening and locking it."""
        try:
            return not os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return True

    def _refuse_the_living(self, descriptor: int) -> None:
        pid = _written(descriptor)
        if pid is None or pid == os.getpid():
            return
        with suppress(psutil.Error):
            # A process that began after the file was written has got the pid of one that is gone.
            if psutil.Process(pid).create_time() <= os.fstat(descriptor).st_mtime + 1.0:
                raise AlreadyRunning(self._already(pid))

    def _already(self, pid: int | None) -> str:
        who = "another process" if pid is None else f"process {pid}"
        return f"--pidfile {self.path}: {who} runs with it. Stop it first, or give this one a file of its own"


def _written(descriptor: int) -> int | None:
    try:
        pid = int(os.pread(descriptor, 32, 0))
    except ValueError:
        return None
    return pid if pid > 0 else None


class Launch:
    """A start that becomes a background program, where the flags say so.

    With ``--detach`` the program goes on in a grandchild of this process, in a session of its own. What is wrong with
    flags, settings or code is still told to the terminal, and the starter ends when all of that is checked and the pid
    file is written: with exit code 0, or with the one that the program would have had.

    Args:
        again: the process runs in the background already, and has replaced its own program.
    """

    def __init__(self, options: DaemonOptions, node: str, *, again: bool = False) -> None:
        self._options = options
        self._again = again
        self._line = -1
        self._pidfile = PidFile(expand(options.pidfile, node)) if options.pidfile else None
        #: Where stdout and stderr will go; None for where they went.
        self.logfile = Path(expand(options.logfile, node)).absolute() if options.logfile else None

    def __enter__(self) -> Self:
        options = self._options
        _change_user(options.uid, options.gid)
        if options.umask is not None:
            os.umask(options.umask)
        if options.detach and not self._again:
            self._line = _detach()
        return self

    def complete(self) -> None:
        """Everything is checked: take the pid file and the log file, and let the starter go.

        Raises `AlreadyRunning`, `ConfigError`.
        """
        log = -1
        if self.logfile is not None:
            try:
                log = os.open(self.logfile, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            except OSError as error:
                raise ConfigError(f"--logfile {self.logfile}: {error.strerror}") from None
        if self._pidfile is not None:
            self._pidfile.acquire()
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        if self._options.detach:
            os.dup2(nowhere, _STDIN)
        for number in (_STDOUT, _STDERR):
            if log >= 0:
                os.dup2(log, number)
            elif self._options.detach and not _outlives_the_starter(number):
                os.dup2(nowhere, number)
        for one in (nowhere, log):
            if one > _STDERR:
                os.close(one)
        if self._line >= 0:
            os.write(self._line, b"1")
            os.close(self._line)
            self._line = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pidfile is not None:
            self._pidfile.release()


def _outlives_the_starter(descriptor: int) -> bool:
    """A file, or a socket such as the journal's; not a terminal, nor a pipe whose reader waits for its end."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _detach() -> int:
    """Go on in a grandchild. Returns the descriptor on which it says that it has started."""
    reader, writer = os.pipe()
    starter = os.fork()
    if starter:
        os.close(writer)
        _, status = os.waitpid(starter, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.setsid()
    program = os.fork()
    if program:
        # Waits in the starter's place: only a parent can tell how a program ended.
        os.close(writer)
        if os.read(reader, 1):
            os._exit(0)
        _, status = os.waitpid(program, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(reader)
    return writer


def _change_user(uid: str | None, gid: str | None) -> None:
    """Become another user and group (names or numbers), as root may. Raises `ConfigError`."""
    try:
        group = None if gid is None else int(gid) if gid.isdigit() else grp.getgrnam(gid).gr_gid
        user = None if uid is None else pwd.getpwuid(int(uid)) if uid.isdigit() else pwd.getpwnam(uid)
    except KeyError as error:
        raise ConfigError(f"--uid, --gid: {error.args[0]}") from None
    if user is not None and user.pw_uid == os.getuid() and group in (None, os.getgid()):
        return
    try:
        if user is not None:
            os.initgroups(user.pw_name, user.pw_gid if group is None else group)
        if group is not None:
            os.setgid(group)
        if user is not None:
            if group is None:
                os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
    except PermissionError:
        raise ConfigError("--uid, --gid: only root may become another user") from None
