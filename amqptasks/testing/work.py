"""Counts work instead of time: function calls and system calls of a process, over so many tasks.

A slow or busy machine takes longer, but it does not make a program do more. What is done once a batch depends on how
much came at a time, and that depends on the machine; so a function counts as often as it is called for *each* task.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from amqptasks.testing.rabbitmq import NodeError
from amqptasks.testing.servers import Program
from amqptasks.testing.waiting import wait_until

__all__ = ["FOLDER_VARIABLE", "Strace", "calls_so_far", "count_calls", "each", "processor_time", "strace"]

#: Names the folder where processes that count their calls write them.
FOLDER_VARIABLE = "AMQPTASKS_COUNT_CALLS"
_WRITE = signal.SIGRTMIN + 4
_ROOT = Path(__file__).resolve().parents[2]
_counts: Counter[CodeType | str] = Counter()


class Strace(Program):
    """strace(1)."""

    package, program = "strace", "strace"


# -- function calls ---------------------------------------------------------------------------------------------------


def count_calls() -> None:
    """Count the calls of this process and of its forks from now on, if the environment names a folder for them.

    Each process writes what it has counted when `calls_so_far` asks. A call is one of a Python function or of a
    built-in function or method; what happens inside a built-in one is not seen.
    """
    if FOLDER_VARIABLE not in os.environ:
        return
    _listen()
    os.register_at_fork(after_in_child=_listen)


def _listen() -> None:
    _counts.clear()
    signal.signal(_WRITE, _write)
    threading.setprofile(_called)
    sys.setprofile(_called)


def _called(frame: FrameType, event: str, what: Any) -> None:
    if event == "call":
        _counts[frame.f_code] += 1
    elif event == "c_call":
        _counts[what.__qualname__] += 1


def _write(_number: int, _frame: FrameType | None) -> None:
    sys.setprofile(None)  # not this
    named: Counter[str] = Counter()
    for what, count in list(_counts.items()):
        named[what if isinstance(what, str) else _name(what)] += count
    file = Path(os.environ[FOLDER_VARIABLE]) / str(os.getpid())
    file.with_suffix(".new").write_text(json.dumps(named))
    file.with_suffix(".new").rename(file)
    sys.setprofile(_called)


def _name(code: CodeType) -> str:
    file = Path(code.co_filename)
    if file.is_relative_to(_ROOT) and "site-packages" not in file.parts:
        return f"{file.relative_to(_ROOT)}:{code.co_qualname}"
    return f"{'/'.join(file.parts[-2:])}:{code.co_qualname}"


def calls_so_far(pid: int, folder: Path) -> Counter[str]:
    """How often a process that counts its calls has called each function."""
    file = folder / str(pid)
    file.unlink(missing_ok=True)
    os.kill(pid, _WRITE)
    wait_until(file.exists, 20, f"process {pid} writes its calls")
    return Counter(json.loads(file.read_text()))


def each(counts: Mapping[str, int], tasks: int) -> dict[str, int]:
    """How often each function is called for one task; what is called less often than each time is left out."""
    found = {name: int(count / tasks + 0.02) for name, count in counts.items()}
    return {name: count for name, count in sorted(found.items()) if count}


# -- system calls -----------------------------------------------------------------------------------------------------


@contextmanager
def strace(pids: Mapping[str, int]) -> Iterator[dict[str, Counter[str]]]:
    """Count the system calls of processes, all their threads included.

    Args:
        pids: process ids by any names.

    Yields a dictionary that is filled at the end: the system calls by name, for each of the processes.
    Raises `NodeError` when strace is missing or may not attach.
    """
    command = Strace.find("strace")
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tables = {name: Path(folder) / name for name in pids}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for name, pid in pids.items():
                started.append(_attach([command, "-f", "-c", "-o", str(tables[name]), "-p", str(pid)]))
            yield found
        finally:
            for one in started:
                one.send_signal(signal.SIGINT)
            for one in started:
                one.communicate(timeout=20)
        found.update((name, _table(file.read_text())) for name, file in tables.items())


def _attach(command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.readline().decode()
    if "attached" not in said:
        process.kill()
        process.communicate()
        raise NodeError(f"{' '.join(command)}: {said.strip()}")
    return process


def _table(text: str) -> Counter[str]:
    """Calls by name from the table of `strace -c`: time, seconds, microseconds a call, calls, errors if any, name."""
    rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", text, re.MULTILINE)
    return Counter({name: int(calls) for calls, name in rows if name != "total"})


# -- processor time ---------------------------------------------------------------------------------------------------


def processor_time(pids: Iterable[int]) -> float:
    """Seconds that processes have had a processor, to the nanosecond (proc(5), schedstat)."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9
