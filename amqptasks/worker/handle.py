"""An executor, as its leader sees it."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass

import structlog

from amqptasks.outcome import Failed
from amqptasks.worker.cell import Cell
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.wire import FrameReader, Report, unpack_reports

__all__ = ["ExecutorHandle", "Sentence", "describe_exit", "report_unfinished"]

_log = structlog.get_logger("amqptasks.worker")
_READ = 1 << 18
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Sentence:
    """What was decided about a task that is to end before its time."""

    #: What it is settled with.
    failed: Failed
    #: What the executor is counted under when it dies of it.
    cause: str
    #: The signal for the executor of one task at a time.
    signum: int
    #: When its executor is killed; None while the task has not been asked to end.
    kill_at: float | None = None


class ExecutorHandle:
    """The leader's side of one executor."""

    __slots__ = (
        "cell",
        "condemned",
        "dismissed",
        "done",
        "frames",
        "grown",
        "inflight",
        "killed",
        "lease",
        "leaving",
        "output",
        "pid",
        "pidfd",
        "quota",
        "silent",
        "slots",
        "socket",
        "started",
        "stood",
        "ward",
    )

    def __init__(self, pid: int, channel: socket.socket, cell: Cell, *, slots: int = 1, ward: bool = False) -> None:
        self.pid = pid
        self.socket = channel
        self.pidfd = os.pidfd_open(pid)
        self.cell = cell
        self.started = time.monotonic()
        self.inflight: dict[int, Delivery] = {}
        self.frames = FrameReader()
        self.output = bytearray()
        self.lease = 0.0
        #: Since when nothing was heard of it, after something was taken back from it; 0 otherwise.
        self.silent = 0.0
        #: The oldest of its tasks, and since when it has been that and the process stopped (SIGSTOP).
        self.stood = (0, 0.0)
        #: Tasks that are to end, by number.
        self.condemned: dict[int, Sentence] = {}
        #: Why the leader killed it.
        self.killed: str | None = None
        #: Why it gets nothing more and goes when it has finished.
        self.leaving: str | None = None
        #: When it was let go; 0 before.
        self.dismissed = 0.0
        #: The most tasks that it has been allowed at once.
        self.slots = slots
        #: It runs suspects: tasks of which one has killed an executor, one at a time.
        self.ward = ward
        self.done = 0
        #: Tasks that it may run before it is replaced; None for no limit.
        self.quota: int | None = None
        #: Resident bytes beyond which it is replaced, this executor's share of chance included; None for no limit.
        self.grown: int | None = None

    # -- messages -------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> bool:
        """Send a frame after what waits already. False when a part of it waits for room in the socket."""
        output = self.output
        try:
            if output:
                output += frame
                del output[: self.socket.send(output)]
                return not output
            sent = self.socket.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            output.clear()  # it is gone: its deliveries come back with its death
            return True
        if sent < len(frame) and not output:
            output += frame[sent:]
        return not output

    def receive(self) -> list[Report] | None:
        """The reports that have come; None when its end is closed."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.silent = 0.0
        return [report for frame in self.frames.feed(data) for report in unpack_reports(frame)]

    # -- the process ----------------------------------------------------------------------------------------------

    def owes(self, seconds: float) -> bool:
        """Whether it runs a task for so long already, and has not said yet what became of one before."""
        begun = self.cell.begun()
        return begun in self.inflight and next(iter(self.inflight)) != begun and self.cell.read()[1] > seconds

    def signal(self, number: int) -> None:
        """Send a signal; one that is gone already is fine."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def kill(self, cause: str) -> None:
        """SIGKILL, and remember why."""
        if self.killed is None:
            self.killed = cause
        self.signal(signal.SIGKILL)

    def running(self) -> dict[int, float]:
        """Seconds since each of its tasks began, by number."""
        # As many again are ended and reported, but not taken off yet.
        return self.cell.running(2 * self.slots)

    def occupied(self, slots: int) -> float:
        """Seconds for which so many slots have had the tasks that run in them; 0 while one is free."""
        if len(self.inflight) < slots:
            return 0.0
        ran = [seconds for number, seconds in self.running().items() if number in self.inflight]
        return min(ran) if len(ran) >= slots else 0.0

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP), and not just slow."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:  # noqa: PTH123 - as below
                return file.read().rpartition(b")")[2].split()[0] == b"T"
        except (OSError, IndexError):
            return False

    def resident(self) -> int:
        """Resident memory in bytes; 0 for a process that is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:  # noqa: PTH123 - several times a second
                return int(file.read().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            return 0


def describe_exit(status: int) -> str:
    """How a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"


def report_unfinished(deliveries: list[Delivery]) -> list[Delivery]:
    """Log what goes back to its queue though an executor has it, by id."""
    for one in deliveries:
        name, task_id = str(one.headers.get("task"))[:200], str(one.headers.get("id"))[:200]
        _log.warning(f"Task {name}[{task_id}] goes back to its queue: not finished", queue=one.queue, task_id=task_id)
    return deliveries
