"""Whether events are sent, and the node's logical clock: memory that all processes of a worker share.

One byte turns events on and off for processes that run already. Reading it costs a tenth of a microsecond, so that a
worker whose events are off does nothing more for them.
"""

from __future__ import annotations

import mmap
import os
import struct

__all__ = ["EventSwitch"]

_CLOCK = struct.Struct("=q")
_AT = 8
_SIZE = _AT + _CLOCK.size
#: A stranger's clock beyond this is not followed: there must be room to count on.
_HIGHEST = 1 << 61


class EventSwitch:
    """Shared across forks. The clock is Lamport's: it moves on with every event, and past every clock that is seen.

    Two processes that tick at once may give the same number, which receivers bear: the order of events of different
    processes is not known better.

    Args:
        file: a descriptor of the memory of another process's switch, for one that is no fork of it.
    """

    def __init__(self, on: bool = False, file: int | None = None) -> None:
        self.file = os.memfd_create("amqptasks-events") if file is None else file
        if file is None:
            os.ftruncate(self.file, _SIZE)
        self._memory = mmap.mmap(self.file, _SIZE)
        if file is None:
            self.set(on)

    @property
    def on(self) -> bool:
        """Whether events are sent."""
        return self._memory[0] == 1

    def set(self, on: bool) -> None:
        """Turn events on or off, in all processes."""
        self._memory[0] = int(on)

    @property
    def clock(self) -> int:
        """What the clock shows."""
        value: int = _CLOCK.unpack_from(self._memory, _AT)[0]
        return value

    def tick(self) -> int:
        """The clock's next number."""
        value = self.clock + 1
        _CLOCK.pack_into(self._memory, _AT, value)
        return value

    def adjust(self, seen: int) -> None:
        """Another node's clock was seen: go on from the later of the two."""
        if seen < _HIGHEST:
            _CLOCK.pack_into(self._memory, _AT, max(self.clock, seen) + 1)
