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
from amqptasks.protocol.results import ResultMeta, decode_result
from amqptasks.results.access import Listener, Revoker, tell

__all__ = ["ReplyInbox"]

#: Tasks whose handles were dropped, and that may be asked for again by id; and how much their results may be, in bytes
#: as they came, and the states of those that still run. One of each is kept whatever its size.
_KEPT_PENDING, _KEPT_READY, _KEPT_READY_BYTES, _KEPT_STATE_BYTES = 10_000, 1_000, 64 * 1024 * 1024, 64 * 1024 * 1024


class _Slot:
    """What came for one task."""

    __slots__ = ("__weakref__", "listeners", "lost", "meta", "size")

    def __init__(self, task_id: str) -> None:
        self.meta = ResultMeta(task_id)
        self.listeners: list[Listener] = []
        self.lost: str | None = None
        #: Bytes of its message.
        self.size = 0


class ReplyInbox:
    """The replies to this process. `receive` is called by the publisher's I/O thread, the rest by any thread."""

    revoker: Callable[[], Revoker] | None = None

    def __init__(self) -> None:
        # A signal handler may make a call while its thread makes one.
        self._lock = threading.RLock()
        # Each slot stands in one of these. A weak reference costs as much as a slot: the last go without.
        self._pending: OrderedDict[str, _Slot] = OrderedDict()
        self._ready: OrderedDict[str, _Slot] = OrderedDict()
        self._ready_bytes = 0
        #: Those of `_pending` of which a state came, the one heard of last at the end.
        self._stated: OrderedDict[str, _Slot] = OrderedDict()
        self._stated_bytes = 0
        self._held: WeakValueDictionary[str, _Slot] = WeakValueDictionary()
        #: Why no replies can come; None while they can.
        self.problem: str | None = None
        _inboxes.add(self)

    def expect(self, task_id: str) -> object:
        """A call of this id is about to be published. Hold what this returns until a handle is made of the id: only
        the last ones are kept without."""
        with self._lock:
            slot = self._find(task_id)
            if slot is None:
                slot = self._pending[task_id] = _Slot(task_id)
                if len(self._pending) > _KEPT_PENDING:
                    self._hold(self._pending)
            return slot

    def take(self, encoded: bytes) -> None:
        """A message came. Raises `DecodeError` for what is no reply."""
        self.receive(decode_result(encoded), len(encoded))

    def receive(self, meta: ResultMeta, size: int) -> None:
        """A reply of so many bytes came. One that is ready is final: a duplicate changes nothing."""
        with self._lock:
            slot = self._find(meta.task_id)
            if slot is None or slot.meta.ready:
                return
            if not meta.ready:
                self._state(slot, meta, size)
            else:
                self._drop(meta.task_id)
                slot.meta, slot.size = meta, size
                self._ready[meta.task_id] = slot
                self._ready_bytes += size
                while len(self._ready) > _KEPT_READY or (
                    self._ready_bytes > _KEPT_READY_BYTES and len(self._ready) > 1
                ):
                    self._ready_bytes -= self._hold(self._ready)
            listeners = list(slot.listeners)
        for listener in listeners:
            tell(listener, meta)

    def gone(self, reason: str, for_ever: bool) -> None:
        """Replies were lost: what was on its way will not come; or none will come at all."""
        if for_ever:
            self.problem = reason
        self.give_up(reason)

    def give_up(self, reason: str, besides: Collection[str] = ()) -> None:
        """Tell everybody who waits that nothing comes, besides for these tasks."""
        with self._lock:
            known = [*self._pending.values(), *self._held.values()]
            slots = [slot for slot in known if not slot.meta.ready and slot.meta.task_id not in besides]
            for slot in slots:
                slot.lost = reason
            told = [(listener, slot.meta) for slot in slots for listener in slot.listeners]
        for listener, meta in told:
            tell(listener, meta)

    # -- Results --------------------------------------------------------------------------------------------------

    def track(self, task_id: str) -> object:
        """The slot: for as long as a handle holds it, the result stays."""
        return self._known(task_id)

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
            tell(listener, meta)

        def stop() -> None:
            with self._lock:
                for slot in slots:
                    if listener in slot.listeners:
                        slot.listeners.remove(listener)

        return stop

    def _slot(self, task_id: str) -> _Slot:
        slot = self._known(task_id)
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
                self._drop(task_id)

    def _known(self, task_id: str) -> _Slot | None:
        slot = self._find(task_id)
        if slot is None:
            with self._lock:  # it may be on its way from one dictionary to another
                slot = self._find(task_id)
        return slot

    def _find(self, task_id: str) -> _Slot | None:
        return self._pending.get(task_id) or self._ready.get(task_id) or self._held.get(task_id)

    def _state(self, slot: _Slot, meta: ResultMeta, size: int) -> None:
        """A state came. The oldest ones that nobody holds are forgotten when they are too large together; what comes
        of their tasks later is not."""
        self._unstate(meta.task_id)
        slot.meta, slot.size = meta, size
        if meta.task_id not in self._pending:
            return  # a handle holds it
        self._stated[meta.task_id] = slot
        self._stated_bytes += size
        while self._stated_bytes > _KEPT_STATE_BYTES and len(self._stated) > 1:
            oldest = next(iter(self._stated))
            self._unstate(oldest)
            lost = self._pending[oldest].lost
            self._held[oldest] = self._pending.pop(oldest)
            if oldest not in self._held:
                self._pending[oldest] = _Slot(oldest)
                self._pending[oldest].lost = lost

    def _unstate(self, task_id: str) -> None:
        if (slot := self._stated.pop(task_id, None)) is not None:
            self._stated_bytes -= slot.size

    def _drop(self, task_id: str) -> None:
        if (slot := self._ready.pop(task_id, None)) is not None:
            self._ready_bytes -= slot.size
        self._unstate(task_id)
        self._pending.pop(task_id, None)
        self._held.pop(task_id, None)

    def _hold(self, slots: OrderedDict[str, _Slot]) -> int:
        """The first of these stays only where a handle holds it. Returns its size."""
        task_id, slot = slots.popitem(last=False)
        self._unstate(task_id)
        self._held[task_id] = slot
        return slot.size

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
        self._lock = threading.RLock()
        self.give_up("it was sent by the process that this one was forked from")


_inboxes: WeakSet[ReplyInbox] = WeakSet()


def _after_fork_in_child() -> None:
    for inbox in list(_inboxes):
        inbox._forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
