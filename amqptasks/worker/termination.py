"""Ending tasks before their time: hard limits and revokes, and who is to blame when an executor dies.

An executor of one task at a time is ended with its task. Where many tasks share a process, the one is asked first (its
thread gets an exception, its coroutine is cancelled); when it does not end, the process is killed: the offender is
settled as what it is, and its neighbours are given out again without blame.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import structlog

from amqptasks.outcome import Failed, Lost, Reason
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.handle import ExecutorHandle, Sentence

__all__ = ["Terminator", "sort_dead"]

#: Seconds from the question to SIGKILL.
_ASK_GRACE = 1.0
#: Seconds from another signal to SIGKILL.
_SIGNAL_GRACE = 2.0

_log = structlog.get_logger("amqptasks.worker")


class Terminator:
    """Sees to it that tasks end which are to end. Belongs to the leader's loop.

    Args:
        concurrent: whether executors run many tasks at once.
        ask: asks an executor of many to end the task of this number.
    """

    def __init__(self, queue: str, *, concurrent: bool, ask: Callable[[ExecutorHandle, int], None]) -> None:
        self._queue = queue
        self._concurrent = concurrent
        self._ask = ask

    def condemn(
        self, executor: ExecutorHandle, number: int, failed: Failed, cause: str, signum: int = signal.SIGKILL
    ) -> None:
        """End the task of this number, which the executor holds; when it has begun, or as soon as it begins."""
        if number not in executor.condemned:
            executor.condemned[number] = Sentence(failed, cause, signum)
            self.tick(executor)

    def tick(self, executor: ExecutorHandle) -> None:
        """What is due for an executor's condemned tasks."""
        now = time.monotonic()
        for number, sentence in executor.condemned.items():
            if sentence.kill_at is None:
                self._begin(executor, number, sentence, now)
            elif now >= sentence.kill_at and executor.killed is None:
                _log.error(
                    "A task does not end: executor killed", queue=self._queue, pid=executor.pid, cause=sentence.cause
                )
                executor.kill(sentence.cause)

    def _begin(self, executor: ExecutorHandle, number: int, sentence: Sentence, now: float) -> None:
        if self._concurrent:
            sentence.kill_at = now + _ASK_GRACE
            self._ask(executor, number)
        elif executor.cell.read()[0] == number:
            sentence.kill_at = now + _SIGNAL_GRACE
            if sentence.signum == signal.SIGKILL:
                executor.kill(sentence.cause)
            else:
                executor.cell.condemn(number)
                executor.signal(sentence.signum)

    def enforce(self, executor: ExecutorHandle, hard_limit: Callable[[Delivery], float | None]) -> None:
        """Condemn the tasks that run longer than they may."""
        for number, ran in executor.running().items():
            delivery = executor.inflight.get(number)
            limit = None if delivery is None else hard_limit(delivery)
            if delivery is None or limit is None or ran <= limit or number in executor.condemned:
                continue
            _log.error(
                "Hard time limit exceeded",
                queue=self._queue,
                limit=limit,
                pid=executor.pid,
                task_id=delivery.headers.get("id"),
            )
            text = f"the hard time limit of {limit:g} s passed; the task was killed"
            self.condemn(executor, number, Failed(Reason.TIME_LIMIT, "TimeLimitExceeded", text), "time_limit")


def sort_dead(
    executor: ExecutorHandle, how: str, *, concurrent: bool
) -> tuple[list[tuple[Delivery, Failed | Lost]], list[Delivery], list[Delivery]]:
    """What becomes of the deliveries that a dead executor held: (settled, suspects, innocent).

    The condemned are settled as was decided. When the leader killed it for them, all others are innocent. When it died
    of itself, the task that ran did it; of several, each is suspect.
    """
    settled: list[tuple[Delivery, Failed | Lost]] = []
    ran: list[Delivery] = []
    innocent: list[Delivery] = []
    running = executor.running()
    for number, delivery in executor.inflight.items():
        sentence = executor.condemned.get(number)
        if sentence is not None:
            settled.append((delivery, sentence.failed))
            executor.killed = executor.killed or sentence.cause
        elif number in running:
            ran.append(delivery)
        else:
            innocent.append(delivery)
    if executor.killed in ("time_limit", "revoked"):
        return settled, [], [*ran, *innocent]
    if concurrent and len(ran) > 1:
        return settled, ran, innocent
    lost = Lost(f"executor {executor.pid} {how}")
    return [*settled, *((delivery, lost) for delivery in ran)], [], innocent
