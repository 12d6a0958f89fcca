"""Which delivery tags to acknowledge, and how: few frames, never a tag twice. Pure.

Tags of a channel count up from 1 (AMQP 0-9-1). Finished tags without a gap are acknowledged by one frame
(``multiple``). What finished behind a gap waits for a moment, in case the gap closes, and is then acknowledged alone:
a task that runs for an hour must not hold back a thousand that are done. A tag that is not outstanding any more must
never be named again: RabbitMQ closes the channel for it (406), also with ``multiple``.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["AckWindow"]


T = TypeVar("T")


class AckWindow(Generic[T]):
    """The tags of one channel epoch, each with what it is the tag of."""

    __slots__ = ("_closed", "_finished", "_low", "epoch")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        #: Every tag up to here is settled.
        self._low = 0
        #: Finished, not yet acknowledged.
        self._finished: dict[int, T] = {}
        #: Above `_low`, and already settled alone.
        self._closed: set[int] = set()

    def finish(self, tag: int, what: T) -> None:
        """This tag may be acknowledged."""
        if tag > self._low and tag not in self._closed:
            self._finished[tag] = what

    def close(self, tag: int) -> bool:
        """This tag is settled in another way (requeued). False when it was settled before."""
        if tag <= self._low or tag in self._closed:
            return False
        self._finished.pop(tag, None)
        self._closed.add(tag)
        return True

    @property
    def pending(self) -> bool:
        """Whether something finished is not acknowledged yet."""
        return bool(self._finished)

    def rest(self) -> list[T]:
        """What is finished and not acknowledged yet."""
        return list(self._finished.values())

    def prefix(self) -> int | None:
        """The tag to acknowledge with ``multiple``: the last of the unbroken run. None when there is no run."""
        finished, closed = self._finished, self._closed
        tag, last = self._low + 1, None
        while True:
            if tag in finished:
                del finished[tag]
                last = tag
            elif tag in closed:
                closed.remove(tag)
            else:
                break
            tag += 1
        self._low = tag - 1
        return last

    def stragglers(self) -> list[int]:
        """What finished behind a gap, to be acknowledged one by one."""
        tags = sorted(self._finished)
        self._closed.update(tags)
        self._finished.clear()
        return tags
