"""Results over AMQP (``rpc://``): replies to the process that called.

They come in by one queue per process. A result is kept for as long as somebody holds the task's `AsyncResult`; of the
others the last ones are kept, so that a handle that is made from an id finds them, and memory stays bounded.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from weakref import WeakSet, WeakValueDictionary

from amqptasks.errors import ResultUnavailable
from amqptasks.protocol.results import ResultMeta
from amqptasks.results.access import Listener

__all__ = ["ReplyInbox"]

#: Tasks whose handles were dropped, and that may be asked for again by id.
_KEPT_PENDING, _KEPT_READY = 10_000, 1_000


class _Slot:
    """What came for one task."""

    __slots__ = ("__weakref__", "listeners", "lost", "meta")

    def __init__(self, task_id: str) -> None:
        self.meta = ResultMeta(task_id)
        self.listeners: list[Listener] = []
        self.lost: str | None = None


class ReplyInbox:
    """The replies to this process. `receive` is called by the publisher's I/O thread, the rest by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: WeakValueDictionary[str, _Slot] = WeakValueDictionary()
        self._pending: OrderedDict[str, _Slot] = OrderedDict()
        self._ready: OrderedDict[str, _Slot] = OrderedDict()
        #: Why no replies can come; None while they can.
        self.problem: str | None = None
        _inboxes.add(self)

    def expect(self, task_id: str) -> None:
        """A call of this id is about to be published."""
        with self._lock:
            slot = self._slots.get(task_id)
            if slot is None:
                slot = self._slots[task_id] = _Slot(task_id)
            self._pending[task_id] = slot
            if len(self._pending) > _KEPT_PENDING:
                self._pending.popitem(last=False)

    def receive(self, meta: ResultMeta) -> None:
        """A reply came. One that is ready is final: a duplicate changes nothing."""
        with self._lock:
            slot = self._slots.get(meta.task_id)
            if slot is None or slot.meta.ready:
                return
            slot.meta = meta
            if meta.ready:
                self._pending.pop(meta.task_id, None)
                self._ready[meta.task_id] = slot
                if len(self._ready) > _KEPT_READY:
                    self._ready.popitem(last=False)
            listeners = list(slot.listeners)
        for listener in listeners:
            listener(meta)

    def gone(self, reason: str, for_ever: bool) -> None:
        """Replies were lost: what was on its way will not come; or none will come at all."""
        if for_ever:
            self.problem = reason
        self.give_up(reason)

    def give_up(self, reason: str, besides: Collection[str] = ()) -> None:
        """Tell everybody who waits that nothing comes, besides for these tasks."""
        with self._lock:
            slots = [slot for slot in self._slots.values() if not slot.meta.ready and slot.meta.task_id not in besides]
            for slot in slots:
                slot.lost = reason
            told = [(listener, slot.meta) for slot in slots for listener in slot.listeners]
        for listener, meta in told:
            listener(meta)

    # -- Results --------------------------------------------------------------------------------------------------

    def track(self, task_id: str) -> object:
        """The slot: for as long as a handle holds it, the result stays."""
        return self._slots.get(task_id)

    def meta(self, task_id: str) -> ResultMeta:
        """What came so far."""
        return self._slot(task_id).meta

    def listen(self, task_ids: Iterable[str], listener: Listener) -> Callable[[], None]:
        """Tell what came, and what comes."""
        slots = [self._slot(task_id) for task_id in task_ids]
        with self._lock:
            for slot in slots:
                slot.listeners.append(listener)
            known = [slot.meta for slot in slots]
        for meta in known:
            listener(meta)

        def stop() -> None:
            with self._lock:
                for slot in slots:
                    if listener in slot.listeners:
                        slot.listeners.remove(listener)

        return stop

    def _slot(self, task_id: str) -> _Slot:
        slot = self._slots.get(task_id)
        if slot is None:
            raise ResultUnavailable(
                f"the result of {task_id} is not available here: rpc:// sends results to the process that called, and "
                "keeps the last ones. Keep the AsyncResult, or use a store that processes share (redis://, "
                "postgresql://)"
            )
        if not slot.meta.ready and (slot.lost or self.problem):
            raise ResultUnavailable(f"the result of {task_id} cannot come: {slot.lost or self.problem}")
        return slot

    def forget(self, task_ids: Iterable[str]) -> None:
        """Drop them; a reply that comes later is dropped too."""
        with self._lock:
            for task_id in task_ids:
                self._slots.pop(task_id, None)
                self._pending.pop(task_id, None)
                self._ready.pop(task_id, None)

    def save_group(self, group_id: str, encoded: bytes) -> None:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable("rpc:// keeps no groups: use a store that processes share (redis://, postgresql://)")

    def load_group(self, group_id: str) -> bytes | None:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable("rpc:// keeps no groups: use a store that processes share (redis://, postgresql://)")

    def delete_group(self, group_id: str) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """The reply queue goes with the publisher."""
        self.give_up("the connection was closed")

    def _forget_parent(self) -> None:
        """In a forked child: the replies go to the parent."""
        self._lock = threading.Lock()
        self.give_up("it was sent by the process that this one was forked from")


_inboxes: WeakSet[ReplyInbox] = WeakSet()


def _after_fork_in_child() -> None:
    for inbox in list(_inboxes):
        inbox._forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
