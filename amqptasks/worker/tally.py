"""What became of a queue's messages, counted where they are settled, on the leader's board."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Self

from amqptasks.broker.confirms import ConfirmChannel
from amqptasks.broker.consumer import Incoming
from amqptasks.broker.link import Link
from amqptasks.broker.pending import Pending
from amqptasks.errors import DecodeError
from amqptasks.outcome import (
    Discarded,
    Failed,
    GivenBack,
    Lost,
    Outcome,
    Postponed,
    RateLimited,
    Reason,
    Retrying,
    Succeeded,
)
from amqptasks.protocol.task import PUBLISHED_HEADER, parse_time
from amqptasks.worker.board import Board
from amqptasks.worker.delivery import CRASHES_HEADER, Delivery

__all__ = ["BUCKETS", "Tally"]

#: Upper bounds of the histograms of times, in seconds.
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
#: A bucket for each bound, one for longer times, and the sum of seconds.
_WIDTH = len(BUCKETS) + 2
#: Names of exceptions that are counted by name; those of further ones are "other".
_MAX_EXCEPTIONS = 200
_WORDS: dict[type[Any], str] = {
    Succeeded: "succeeded",
    Retrying: "retried",
    Failed: "failed",
    Discarded: "ignored",
    GivenBack: "given_back",
    Postponed: "postponed",
    RateLimited: "rate_limited",
    Lost: "lost",
}


#: The message goes on as it came.
_UNDECIDED = (GivenBack, Postponed, RateLimited)


class _Row(NamedTuple):
    """A task, and where the board has what most of its messages count."""

    task: str
    received: int
    sent: int
    succeeded: int
    runtime: int
    wait: int


class Tally:
    """Counts by task. Belongs to the leader's loop; a count costs a few dictionary look-ups.

    Args:
        board: where the counts stand; what stands there already goes on.
        tasks: names that are counted by name. A stranger's message must not make a row for whatever name it has.
    """

    def __init__(self, board: Board | None = None, tasks: Collection[str] = ()) -> None:
        self._board = board or Board()
        self._board.load()
        self._values = self._board.values
        self._tasks = tasks
        self._slots: dict[tuple[str, ...], int] = {}
        self._rows: dict[str, _Row] = {}
        self._exceptions = {key[4] for key in self._board.counts() if key[0] == "outcome"}
        #: Seconds since the epoch at which the message was published that came last, if it says so.
        self.newest: float | None = None
        self._publisher: Link | None = None
        self._restarts = {key[1]: values[0] for key, values in self._board.counts().items() if key[0] == "restarts"}

    # -- counting -------------------------------------------------------------------------------------------------

    def received(self, incoming: Incoming) -> None:
        """A message came."""
        headers = incoming.properties.headers or {}
        self._values[self._row(headers.get("task")).received] += 1.0
        if incoming.redelivered:
            self._count("redelivered")
        published = headers.get(PUBLISHED_HEADER)
        if isinstance(published, int):
            self.newest = published / 1000

    def settled(self, delivery: Delivery, outcome: Outcome, runtime: float) -> None:
        """A delivery has this outcome; `runtime` is 0 for what did not run."""
        headers = delivery.headers
        row = self._row(headers.get("task"))
        values = self._values
        if type(outcome) is Succeeded:
            values[row.succeeded] += 1.0
        else:
            self._ended(row.task, outcome, ran=runtime > 0 and delivery.verdict is None)
        if not (headers.get("retries") or CRASHES_HEADER in headers or isinstance(outcome, _UNDECIDED)):
            values[row.sent] += 1.0
        if not runtime or delivery.verdict is not None:
            return
        values[row.runtime + bisect_left(BUCKETS, runtime)] += 1.0
        values[row.runtime + _WIDTH - 1] += runtime
        published = headers.get(PUBLISHED_HEADER)
        if isinstance(published, int):
            wait = max(0.0, time.time() - runtime - _since(published / 1000, headers.get("eta")))
            values[row.wait + bisect_left(BUCKETS, wait)] += 1.0
            values[row.wait + _WIDTH - 1] += wait

    def _ended(self, task: str, outcome: Outcome, *, ran: bool) -> None:
        reason = None
        if isinstance(outcome, Failed):
            reason = outcome.reason
            self._count("outcome", task, "failed", str(reason), self._exception(outcome.exception))
        else:
            self._count("outcome", task, _WORDS[type(outcome)], "", "")
        if not ran and (isinstance(outcome, Lost) or reason in (Reason.TIME_LIMIT, Reason.POISON)):
            self._count("killed", task)  # it ran, and its time is not known

    def confirmed(self, messages: Iterable[Pending], refused: bool) -> None:
        """The broker took or refused these (basic.ack or basic.nack)."""
        now = time.monotonic()
        for one in messages:
            if refused:
                self._count("publish", "nacked")
            elif one.returned is not None:
                self._count("publish", "returned")
            else:
                self._count("publish", "confirmed")
                self._observe(now - one.since, "publish_seconds")

    def follow(self, consume: Link, publish: Link, confirms: ConfirmChannel) -> Self:
        """Count these connections, and what becomes of what is published on them."""
        self._publisher = publish
        confirms.observe = self.confirmed
        for result in ("confirmed", "nacked", "returned"):
            self._slot("publish", result)  # a counter that starts at zero: the first refusal is an increase
        for role, link in (("consume", consume), ("publish", publish)):
            self._slot("reconnect", role)
            self._watch(link, role)
        return self

    def _watch(self, link: Link, role: str) -> None:
        known = False

        def up(_connection: object) -> None:
            nonlocal known
            if known:
                self._count("reconnect", role)
            known = True

        link.watch(up, lambda _error: None)

    def restarted(self, causes: Mapping[str, int]) -> None:
        """So many executors were replaced since this leader started, by cause."""
        for cause, count in causes.items():
            self._values[self._slot("restarts", cause)] = self._restarts.get(cause, 0.0) + count

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def publish_blocked(self) -> bool:
        """Whether the broker takes no messages from this leader (connection.blocked)."""
        return self._publisher is not None and self._publisher.blocked_since is not None

    def totals(self) -> dict[str, int]:
        """How many messages of each task were accepted, as Celery counts them: all that were not given back."""
        totals: dict[str, int] = {}
        for key, (count, *_) in self._board.counts().items():
            if key[0] == "outcome" and key[2] not in ("given_back", "postponed", "rate_limited", "lost"):
                totals[key[1]] = totals.get(key[1], 0) + int(count)
        return totals

    # -- the board ------------------------------------------------------------------------------------------------

    def _row(self, task: object) -> _Row:
        """The row of a task; that of "" for whatever is none."""
        row = self._rows.get(task) if isinstance(task, str) else self._rows.get("")
        if row is not None:
            return row
        if not isinstance(task, str) or task not in self._tasks:
            task = ""
        row = self._rows[task] = _Row(
            task,
            self._slot("received", task),
            self._slot("sent", task),
            self._slot("outcome", task, "succeeded", "", ""),
            self._slot("runtime", task, width=_WIDTH),
            self._slot("wait", task, width=_WIDTH),
        )
        return row

    def _exception(self, name: str) -> str:
        if name not in self._exceptions:
            if len(self._exceptions) >= _MAX_EXCEPTIONS:
                return "other"
            self._exceptions.add(name)
        return name

    def _slot(self, *key: str, width: int = 1) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = self._board.slot(*key, width=width)
        return slot

    def _count(self, *key: str) -> None:
        self._values[self._slot(*key)] += 1.0

    def _observe(self, seconds: float, *key: str) -> None:
        slot = self._slot(*key, width=_WIDTH)
        self._values[slot + bisect_left(BUCKETS, seconds)] += 1.0
        self._values[slot + _WIDTH - 1] += seconds


def _since(published: float, eta: object) -> float:
    """When the wait began, in seconds since the epoch: at the publish, or when the message was due."""
    if eta is None:
        return published
    try:
        due = parse_time(eta)
    except DecodeError:
        return published
    return published if due is None else max(published, due.timestamp())
