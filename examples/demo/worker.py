"""The worker as a user starts it, in a process of its own, and what its log says afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from examples.demo.errors import DemoError

__all__ = ["Ran", "Worker", "read_log", "summary"]

ROOT = Path(__file__).resolve().parents[2]
QUEUES = ("high_priority", "email", "media")
CONFIG = ROOT / "examples" / "amqptasks.yaml"
ARGUMENTS = ("-A", "examples.shop:app", "--config", str(CONFIG.relative_to(ROOT)), "worker", "-Q", ",".join(QUEUES))
# The worker's own grace period is 30 s.
_STOP_SECONDS = 40


class Worker:
    """``amqptasks worker`` as a child process; its log goes to a file, one JSON object a line."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self._environment = {**os.environ, **environment, "AMQPTASKS_LOGGING__FORMAT": "json"}
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None, "the worker is not started"
        return self._process.pid

    def start(self) -> None:
        """Start it. Its messages may be published before it is ready: they wait in the broker."""
        self._file = self.log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "amqptasks", *ARGUMENTS],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            # Ctrl-C goes to the whole foreground group; a worker that got it twice would stop hard.
            start_new_session=True,
        )

    def check(self) -> None:
        """Raise `DemoError` with the end of its log when it is no longer there."""
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            raise DemoError(f"the worker ended with code {code}; the end of its log:\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> int | None:
        """Stop it as an init system does: SIGTERM, and time to finish. Returns its exit code, None if not started."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Leaders and executors end with their supervisor.
            self._process.kill()
            return self._process.wait()
        finally:
            if self._file is not None:
                self._file.close()


@dataclass
class Ran:
    """What became of the runs of one task on one queue, and in which processes. `busy` is seconds."""

    queue: str
    task: str
    succeeded: int = 0
    retried: int = 0
    failed: int = 0
    busy: float = 0.0
    by_process: dict[int, int] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """All executions; a retry is one of its own."""
        return self.succeeded + self.retried + self.failed


def read_log(log: Path) -> Iterable[dict[str, Any]]:
    """The records of a JSON log. Other lines (the banner) are left out."""
    with log.open(errors="replace") as file:
        for line in file:
            if line.startswith("{"):
                yield json.loads(line)


def summary(records: Iterable[Mapping[str, Any]]) -> list[Ran]:
    """The runs by queue and task, from the worker's log."""
    found: dict[tuple[str, str], Ran] = {}
    outcomes = {" succeeded in ": "succeeded", " retry: ": "retried", " failed: ": "failed"}
    for record in records:
        text = str(record.get("event", ""))
        outcome = next((name for words, name in outcomes.items() if words in text), None)
        if outcome is None or not text.startswith("Task "):
            continue
        key = (str(record.get("queue")), str(record.get("task")))
        ran = found.setdefault(key, Ran(*key))
        setattr(ran, outcome, getattr(ran, outcome) + 1)
        ran.busy += float(record.get("runtime") or 0.0)
        process = record.get("pid")
        if isinstance(process, int):
            ran.by_process[process] = ran.by_process.get(process, 0) + 1
    return [found[key] for key in sorted(found, key=lambda key: (QUEUES.index(key[0]) if key[0] in QUEUES else 9, key))]
