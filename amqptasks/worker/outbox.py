"""What an executor of many tasks tells its leader: outcomes in batches, and which tasks run."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections import deque

from amqptasks.events import Bus
from amqptasks.worker.cell import Cell
from amqptasks.worker.wire import Report, pack_reports

__all__ = ["Outbox"]


class Outbox:
    """Reports of one executor's tasks, from any thread.

    A task is taken off the cell when its report is sent, not before: the leader takes what is neither on the cell nor
    reported for not begun.
    """

    def __init__(self, channel: socket.socket, cell: Cell, bus: Bus) -> None:
        self._channel = channel
        self._cell = cell
        self._bus = bus
        self._rows: deque[tuple[Report, int]] = deque()
        self._sending = threading.Lock()
        self._free: list[int] = []
        self._next = itertools.count()

    def begin(self, tag: int, now: float) -> int:
        """A task begins: its slot."""
        slot = self._free.pop() if self._free else next(self._next)
        self._cell.occupy(slot, tag, now)
        return slot

    def add(self, report: Report, slot: int = -1) -> None:
        """Add a report, and the slot of the task that has ended. `flush` sends it."""
        self._rows.append((report, slot))

    def flush(self) -> None:
        """Send what there is. When another thread sends just now, it sends this too."""
        while self._rows and self._sending.acquire(blocking=False):
            try:
                self._send()
            finally:
                self._sending.release()

    def _send(self) -> None:
        rows = []
        while self._rows:
            rows.append(self._rows.popleft())
        self._bus.flush()
        try:
            self._channel.sendall(pack_reports([report for report, _ in rows]))
        except OSError:
            os._exit(0)  # the leader is gone: the broker gives the work to others
        for _, slot in rows:
            if slot >= 0:
                self._cell.vacate(slot)
                self._free.append(slot)
