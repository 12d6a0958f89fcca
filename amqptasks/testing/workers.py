"""Workers and beats as processes of their own, as an operator starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from amqptasks.testing.waiting import wait_until

__all__ = ["BeatProcess", "WorkerProcess"]

#: Children of the supervisor that lead no queue.
_HELPERS = ("amqptasks-desk", "amqptasks-beat")


class _Program:
    """A command of amqptasks in a subprocess, with its output in a file."""

    def __init__(
        self,
        app: str,
        *arguments: str,
        config: Path | str | None = None,
        log: Path,
        environment: Mapping[str, str] | None = None,
        global_options: Sequence[str] = (),
    ) -> None:
        named = ["--config", str(config)] if config is not None else []
        self.command = [sys.executable, "-m", "amqptasks", "-A", app, *named, *global_options, *arguments]
        self.log_file = log
        with log.open("ab") as output:
            self._begins = output.tell()  # another may have written to it before
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """What it has written so far; whole lines while it runs."""
        runs = self.process.poll() is None
        text = self.log_file.read_bytes()[self._begins :].decode(errors="replace")
        return text[: text.rfind("\n") + 1] if runs else text

    def wait_ready(self, timeout: float = 20.0) -> Self:
        """Wait until it says that it is ready."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.log}")
            return " ready." in self.log

        wait_until(ready, timeout, lambda: f"it is ready:\n{self.log}")
        return self

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code, once it ends."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


class BeatProcess(_Program):
    """``amqptasks beat`` in a subprocess, with its output in a file."""

    def __init__(self, app: str, *options: str, **named: Any) -> None:
        super().__init__(app, "beat", *options, **named)


class WorkerProcess(_Program):
    """``amqptasks worker`` in a subprocess, with its output in a file."""

    def __init__(self, app: str, queues: str, *options: str, **named: Any) -> None:
        super().__init__(app, "worker", "-Q", queues, *options, **named)

    def kill(self) -> None:
        """SIGKILL to the supervisor, and to what it leaves behind, if anything."""
        family = self.leaders() + self.executors()
        super().kill()
        wait_until(lambda: not any(_alive(one) for one in family), 5, "its processes end with it")

    def leaders(self) -> list[psutil.Process]:
        """The leader processes."""
        return [one for one in self._children() if _name(one) not in ("", *_HELPERS)]

    def helper(self, name: str) -> psutil.Process | None:
        """The process beside the leaders of that name: desk, or beat."""
        return next((one for one in self._children() if _name(one) == f"amqptasks-{name}"), None)

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def executors(self) -> list[psutil.Process]:
        """The executor processes of all leaders."""
        found = []
        for leader in self.leaders():
            try:
                found += leader.children()
            except psutil.NoSuchProcess:
                continue
        return found


def _name(process: psutil.Process) -> str:
    """Its name; none for one that has just ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _alive(process: psutil.Process) -> bool:
    try:
        # An orphan that nobody has reaped yet runs nothing any more.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
