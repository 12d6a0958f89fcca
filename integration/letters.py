"""Dead letters for tests: the command, and letters to look at."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime
from typing import Any

from amqptasks import AmqpTasks
from amqptasks.message import Envelope
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

JOBS = "integration.apps.jobs"


def dlq_command(bench: Bench, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "amqptasks", "-A", bench.APP, "--config", str(bench.config), "dlq", *arguments]


def dlq(bench: Bench, *arguments: str, code: int = 0, answer: str | None = None, **environment: str) -> str:
    done = subprocess.run(
        dlq_command(bench, *arguments), capture_output=True, text=True, timeout=60, cwd=ROOT, check=False, input=answer,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + (done.stderr if code else "")


def terminal(command: list[str], columns: int) -> str:
    """What a command shows on a terminal of so many columns, without what steers it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    # Where the tests run may say how wide it is: the terminal's own width counts here.
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    screen = bytearray()
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        while select.select([ours], [], [], 60)[0]:
            try:
                screen.extend(os.read(ours, 65536))
            except OSError:  # the other end is closed: Linux says so with EIO
                break
        assert process.wait(10) == 0, screen
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())


def peak(bench: Bench, *arguments: str) -> tuple[float, str]:
    """The most memory that a command had, in MB, and what it said."""
    with subprocess.Popen(dlq_command(bench, *arguments), cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1000, said


def dead(bench: Bench, app: AmqpTasks, count: int, queue: str = "default", **headers: Any) -> list[str]:
    """Put letters into a dead-letter queue as a worker does; their ids."""
    ids = [f"{queue}-{number}" for number in range(count)]
    told = {
        "task": f"{JOBS}.note", "retries": 3, "eta": None, "x-task-reason": "failed", "x-task-exception": "ValueError",
        "x-task-exception-message": "no", "x-task-failed-at": datetime.now(UTC).isoformat(), "x-task-attempts": 4,
        "x-task-traceback": 'Traceback:\n  File "/srv/shop.py", line 7, in charge\n    x\nValueError: no',
        "x-amqptasks-crashes": 2, "mine": "kept",
    }  # fmt: skip
    envelopes = [
        Envelope("amqptasks.dlx", queue, b"[[0], {}, {}]", headers={**told, "id": one, **headers}, correlation_id=one)
        for one in ids
    ]
    assert app.client.publish_many(envelopes) == [None] * count
    wait_until(lambda: bench.vhost.ready(f"{queue}.dlq") >= count, 20, "the letters are there")
    return ids
