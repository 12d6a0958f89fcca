"""A worker as a process of its own, as an operator starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from amqptasks.testing.waiting import wait_until

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """``amqptasks worker`` in a subprocess, with its output in a file."""

    def __init__(
        self,
        app: str,
        queues: str,
        *options: str,
        config: Path | str | None = None,
        log: Path,
        environment: Mapping[str, str] | None = None,
        global_options: Sequence[str] = (),
    ) -> None:
        named = ["--config", str(config)] if config is not None else []
        self.command = [
            sys.executable, "-m", "amqptasks", "-A", app, *named, *global_options, "worker", "-Q", queues, *options,
        ]  # fmt: skip
        self.log_file = log
        with log.open("ab") as output:
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
        """What it has written so far."""
        return self.log_file.read_text(errors="replace")

    def wait_ready(self, timeout: float = 20.0) -> Self:
        """Wait until it says that it is ready."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the worker ended with {self.process.returncode}:\n{self.log}")
            return " ready." in self.log

        wait_until(ready, timeout, lambda: f"the worker is ready:\n{self.log}")
        return self

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> int:
        """The exit code, once it ends."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to the supervisor, and to what it leaves behind, if anything."""
        family = self.leaders() + self.executors()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        wait_until(lambda: not any(_alive(one) for one in family), 5, "its processes end with it")

    def leaders(self) -> list[psutil.Process]:
        """The leader processes."""
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


def _alive(process: psutil.Process) -> bool:
    try:
        # An orphan that nobody has reaped yet runs nothing any more.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
