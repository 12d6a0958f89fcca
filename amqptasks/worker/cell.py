"""The cell: shared memory in which an executor writes what it runs now, so that its leader can read it after a crash.

Writing costs a fraction of a microsecond and no system call, so every task is marked, and what ran when a process died
is known for certain.
"""

from __future__ import annotations

import mmap
import struct
import time

__all__ = ["MOST_SLOTS", "Cell"]

#: So many tasks can be marked at once; memory is taken for those that are.
MOST_SLOTS = 16384
_TAG = struct.Struct("=q")
# The start time goes first: whoever reads between the two sees an old task as young, and harms nobody.
_SLOT, _WHOLE = struct.Struct("=dq"), struct.Struct("=qdq")
_CONDEMNED, _BEGUN, _FIRST = 0, 8, 16


class Cell:
    """Tag and start time of each task that runs (tag 0: none). Shared across a fork.

    A task has a slot. An executor that runs one task at a time uses slot 0, where the tag that began last is kept too.

    Args:
        slots: how many tasks run at once at most.
        file: a descriptor of shared memory (memfd_create), for an executor that is no fork; -1 for anonymous memory.
    """

    def __init__(self, slots: int = 1, file: int = -1) -> None:
        self._memory = mmap.mmap(file, self.size(slots))

    @staticmethod
    def size(slots: int) -> int:
        """Bytes of shared memory for so many slots."""
        return _FIRST + slots * _SLOT.size

    def begin(self, tag: int, now: float) -> None:
        """In an executor of one task at a time: `tag` starts now."""
        _WHOLE.pack_into(self._memory, _BEGUN, tag, now, tag)

    def end(self) -> None:
        """In an executor of one task at a time: nothing runs."""
        _SLOT.pack_into(self._memory, _FIRST, 0.0, 0)

    def occupy(self, slot: int, tag: int, now: float) -> None:
        """In an executor of many: `tag` starts now, in a free slot."""
        _SLOT.pack_into(self._memory, _FIRST + slot * _SLOT.size, now, tag)

    def vacate(self, slot: int) -> None:
        """In an executor of many: the task of this slot has ended, and the leader has been told."""
        _SLOT.pack_into(self._memory, _FIRST + slot * _SLOT.size, 0.0, 0)

    def read(self) -> tuple[int, float]:
        """In the leader: the running tag of slot 0 (0 for none) and the seconds since it began."""
        began, tag = _SLOT.unpack_from(self._memory, _FIRST)
        return tag, time.monotonic() - began if tag else 0.0

    def running(self, slots: int = 1) -> dict[int, float]:
        """In the leader: the tags in the first `slots`, and the seconds since each began."""
        now = time.monotonic()
        rows = self._memory[_FIRST : _FIRST + slots * _SLOT.size]
        return {tag: now - began for began, tag in _SLOT.iter_unpack(rows) if tag}

    def begun(self) -> int:
        """In the leader: the tag of the task that began last, whether it has ended or not; 0 before the first."""
        tag: int = _TAG.unpack_from(self._memory, _BEGUN)[0]
        return tag

    def condemn(self, tag: int) -> None:
        """In the leader: a signal follows that is meant for `tag`."""
        _TAG.pack_into(self._memory, _CONDEMNED, tag)

    @property
    def condemned(self) -> bool:
        """In the executor, when a signal came: whether it is meant for the task that runs."""
        tag = _TAG.unpack_from(self._memory, _CONDEMNED)[0]
        return bool(tag) and tag == _SLOT.unpack_from(self._memory, _FIRST)[1]

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
