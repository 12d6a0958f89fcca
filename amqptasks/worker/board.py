"""The board: counters in memory that a leader shares with the supervisor.

A leader writes its counters there as it counts, and the supervisor reads them, so that a leader that is killed takes
no count with it, and its successor counts on. No file, no message, no system call: a count is an addition in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Any

__all__ = ["Board", "Boards", "Counts"]

#: By what is counted and its labels: one value, or the values of a histogram.
Counts = dict[tuple[str, ...], list[float]]

_SLOTS = 1 << 16
_NAMES = 1 << 21
_USED = struct.Struct("=q")
_VALUES = _USED.size
_LIST = _VALUES + 8 * _SLOTS
_SIZE = _LIST + _NAMES


class Board:
    """One leader's counters. One process writes at a time, any may read; pages that are not used cost nothing.

    Args:
        descriptor: of a board that another program of this process made; a new one by default.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("amqptasks-counters")
            os.ftruncate(descriptor, _SIZE)
        #: The supervisor's; closed in all other processes, which have the memory.
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        #: Add to these.
        self.values = memoryview(self._memory)[_VALUES:_LIST].cast("d")
        self._slots: dict[tuple[str, ...], tuple[int, int]] = {}
        self._next = 0
        self.load()

    def load(self) -> None:
        """Read what is listed, by whatever process. A line is there when the length that counts it is."""
        (used,) = _USED.unpack_from(self._memory)
        self._slots.clear()
        self._next = 0
        for line in self._memory[_LIST : _LIST + used].splitlines():
            width, *key = json.loads(line)
            self._slots[tuple(key)] = (self._next, width)
            self._next += width

    def slot(self, *key: str, width: int = 1) -> int:
        """Where `values` has what `key` counts. A board that is full counts what is new nowhere."""
        known = self._slots.get(key)
        if known is not None:
            return known[0]
        line = json.dumps([width, *key]).encode() + b"\n"
        (used,) = _USED.unpack_from(self._memory)
        if self._next + width > _SLOTS - 64 or used + len(line) > _NAMES:
            return _SLOTS - 64  # nobody reads the last ones
        self._memory[_LIST + used : _LIST + used + len(line)] = line
        _USED.pack_into(self._memory, 0, used + len(line))
        slot = self._next
        self._slots[key] = (slot, width)
        self._next += width
        return slot

    def counts(self) -> Counts:
        """Everything that stands on it."""
        self.load()
        values: list[Any] = self.values[: self._next].tolist()
        return {key: values[slot : slot + width] for key, (slot, width) in self._slots.items()}


class Boards:
    """The boards of a worker's leaders. Belongs to the supervisor.

    Args:
        kept: (queue, descriptor) of the boards of this process's old program, on which nobody writes any more.
    """

    def __init__(self, kept: Iterable[tuple[str, int]] = ()) -> None:
        self._boards: list[tuple[str, Board]] = []
        self._free = [self.adopt(queue, descriptor) for queue, descriptor in kept]

    def adopt(self, queue: str, descriptor: int) -> Board:
        """A board that this process's old program made."""
        os.set_inheritable(descriptor, False)
        board = Board(descriptor)
        self._boards.append((queue, board))
        return board

    @property
    def descriptors(self) -> frozenset[int]:
        """Of all boards."""
        return frozenset(board.descriptor for _, board in self._boards)

    def open(self, queue: str) -> Board:
        """A board for a leader of this queue, and for those that replace it: one that is free, or a new one."""
        for name, board in self._boards:
            if name == queue and board in self._free:
                self._free.remove(board)
                return board
        board = Board()
        self._boards.append((queue, board))
        return board

    def free(self, board: Board | None) -> None:
        """Its leader has gone for good. What stands on it stays."""
        if board is not None:
            self._free.append(board)

    def counts(self) -> dict[str, Counts]:
        """The sums by queue."""
        sums: dict[str, Counts] = {}
        for queue, board in self._boards:
            total = sums.setdefault(queue, {})
            for key, values in board.counts().items():
                known = total.get(key)
                total[key] = values if known is None else [a + b for a, b in zip(known, values, strict=True)]
        return sums

    def hand_over(self) -> list[tuple[str, int]]:
        """The free boards, for the program that replaces this one; all boards stay open for it."""
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)
        return [(queue, board.descriptor) for queue, board in self._boards if board in self._free]
