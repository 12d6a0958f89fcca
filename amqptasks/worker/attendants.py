"""What a leader does besides its queue: chords, revokes, rate limits. Each has a channel of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.broker.link import Link
from amqptasks.broker.making import make_queue
from amqptasks.config.quantities import parse_rate
from amqptasks.errors import PublishError
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, Outcome, RateLimited, Reason
from amqptasks.protocol.revokes import Revocable, is_revoked
from amqptasks.topology.build import rate_entities, rate_queue
from amqptasks.worker.delivery import PASSED_HEADER, Delivery
from amqptasks.worker.dispatch import LEASE, LEASE_GRACE, Dispatcher
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.joiner import Joiner
from amqptasks.worker.rates import RateQueue
from amqptasks.worker.revoked import RevokeBook

__all__ = ["Attendants"]

_FOR_EVER = 365 * 86400.0
_RETRY_SECONDS = 15.0
_log = structlog.get_logger("amqptasks.worker")


class Attendants:
    """The joiner, the book of revokes and the rate queues of one leader. Belongs to its loop.

    Args:
        link: what `publish` uses.
        declared: whether exchange and routing key belong to the topology.
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        refuse: gives an outcome to a delivery that must not run.
    """

    def __init__(
        self,
        app: AmqpTasks,
        plan: GroupPlan,
        dispatcher: Dispatcher,
        link: Link,
        declared: Callable[[str, str], bool],
        *,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        refuse: Callable[[Delivery, Outcome], None],
    ) -> None:
        settings = app.settings
        self._tasks = app.tasks
        self._router = app.router
        self._plan = plan
        self._prefix = prefix = settings.topology.prefix
        self._dispatcher = dispatcher
        self._publish = publish
        self._call_later = call_later = link.loop.call_later
        self._refuse = refuse
        self._connection: Any = None
        self._stopped = False
        self._joiner = Joiner(
            app.calls,
            prefix,
            plan.queue,
            lifetime=settings.result.expires or _FOR_EVER,
            publish=publish,
            call_later=call_later,
            declared=declared,
        )
        self.revokes = RevokeBook(
            prefix,
            settings.revoke,
            publish=publish,
            call_later=call_later,
            blocked=lambda: link.blocked_since is not None,
            act=self._revoked,
        )
        self._disabled = settings.worker.disable_rate_limits
        #: Task -> starts a second, of those that have or had a limit.
        self._rates: dict[str, float] = {}
        #: Task -> the queue in which it waits for its turn, of those that are limited now.
        self._limited: dict[str, str] = {}
        self._rate_queues: dict[str, RateQueue] = {}
        #: Tasks whose first rate queue is being made.
        self._making: set[str] = set()
        for name, (rate, _) in app.rate_limits().items():
            if self._concerns(name):
                self._rates[name] = 0.0 if self._disabled else rate
                self._add(name)
        #: Whether the end of the revokes is read, so that tasks may run.
        self.ready = False

    # -- life -----------------------------------------------------------------------------------------------------

    def up(self, connection: Any, then: Callable[[], None]) -> None:
        """Work on this connection, and call `then` when tasks may be taken."""
        self._connection = connection
        self._joiner.up(connection)
        for one in self._rate_queues.values():
            one.up(connection)
        for task, rate in self._rates.items():
            if rate and task not in self._rate_queues:
                self._make_first(task)

        def ready() -> None:
            self.ready = True
            then()

        self.revokes.up(connection, ready)

    def down(self, reason: str) -> None:
        """The connection is gone."""
        self._connection = None
        self.ready = False
        self._making.clear()
        self._joiner.down(reason)
        self.revokes.down(reason)
        for one in self._rate_queues.values():
            one.down(reason)

    def stop(self) -> None:
        """Take nothing more. Revokes are read on: they are for what runs still."""
        self._stopped = True
        self._joiner.stop()
        for one in self._rate_queues.values():
            one.stop()

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._joiner.idle and self.revokes.idle and all(one.idle for one in self._rate_queues.values())

    # -- messages -------------------------------------------------------------------------------------------------

    @property
    def judging(self) -> bool:
        """Whether `judge` may have something to say of any message."""
        return bool(self.revokes.known or self._limited)

    def judge(self, delivery: Delivery) -> Outcome | None:
        """The outcome of a message that must not run, or not yet."""
        headers = delivery.headers
        if self.revokes.known and is_revoked(headers, self.revokes.known):
            return _revoked()
        queue = self._limited.get(str(headers["task"]))
        return RateLimited(queue) if queue is not None and PASSED_HEADER not in headers else None

    # -- revokes --------------------------------------------------------------------------------------------------

    def _revoked(self, keys: tuple[Revocable, ...], signum: int | None) -> None:
        dispatcher = self._dispatcher
        if not dispatcher.busy and not dispatcher.waiting:
            return
        wanted = frozenset(keys)
        self._sweep(wanted)
        held = [str(one.headers["id"]) for one in dispatcher.held() if is_revoked(one.headers, wanted)]
        if signum is not None:
            for task_id in held:
                dispatcher.terminate(task_id, _revoked(signum), signum)
        elif held:
            # An executor may have it in its batch: what it does not start while the lease lasts comes back.
            self._call_later(LEASE + 2 * LEASE_GRACE, partial(self._sweep, wanted))

    def _sweep(self, wanted: frozenset[Revocable]) -> None:
        """What waits here and is revoked gets its outcome; the others wait on, in their order."""
        found = []
        for delivery in self._dispatcher.take_waiting(suspects=True):
            if delivery.verdict is None and is_revoked(delivery.headers, wanted):
                found.append(delivery)
            else:
                self._dispatcher.submit(delivery)
        for delivery in found:
            self._refuse(delivery, _revoked())

    # -- rate limits ----------------------------------------------------------------------------------------------

    def set_rate(self, task: str, rate_limit: str | float | None) -> float:
        """Another rate for a task, until this process ends; 0 or None for none. Returns it in starts a second.

        Raises `ValueError` for an unknown task, or what is no rate.
        """
        if task not in self._tasks:
            raise ValueError(f"no task is named {task!r:.200}")
        rate = 0.0 if rate_limit is None else parse_rate(rate_limit)
        if self._disabled:
            raise ValueError("worker.disable_rate_limits is true: this worker keeps no rate limit")
        if not self._concerns(task):
            return rate
        self._rates[task] = rate
        if task in self._rate_queues:
            self._limit(task)
        elif rate:
            self._make_first(task)
        return rate

    def _concerns(self, task: str) -> bool:
        """Every leader keeps the limit of the cluster; a worker's own is kept by the leader of the task's queue."""
        return self._scope(task) == "cluster" or self._home(task) == self._plan.queue

    def _home(self, task: str) -> str | None:
        options = self._tasks[task].options
        return self._router.resolve(task, task_queue=options.queue, task_priority=options.priority).queue

    def _scope(self, task: str) -> str:
        return self._tasks[task].options.rate_limit_scope or "cluster"

    def _make_first(self, task: str) -> None:
        """Make the queue of a limit that was set while this worker runs; without a connection, `up` does it."""
        if self._connection is not None and task not in self._making:
            self._making.add(task)
            self._make(task, partial(self._add, task))

    def _add(self, task: str) -> None:
        """Keep a limit, now that its queue stands."""
        self._making.discard(task)
        if task in self._rate_queues:
            return  # what was begun on a connection that was lost may end, too
        queue = self._rate_queues[task] = RateQueue(
            rate_queue(self._prefix, task, self._scope(task)),
            self._prefix,
            self._plan.queue,
            self._rates[task],
            revoked=self.revokes.known,
            publish=self._publish,
            call_later=self._call_later,
            missing=partial(self._make, task),
        )
        self._limit(task)
        if self._connection is not None:
            queue.up(self._connection)

    def _limit(self, task: str) -> None:
        queue, rate = self._rate_queues[task], self._rates[task]
        queue.set_rate(rate)
        if rate:
            self._limited[task] = queue.queue
        else:
            self._limited.pop(task, None)

    def _make(self, task: str, then: Callable[[], None]) -> None:
        """Make a task's rate queue: one that was deleted, or one for a limit that was set while this worker runs."""
        queue, binding = rate_entities(self._prefix, task, self._scope(task))

        def done(problem: str | None) -> None:
            if problem is None:
                then()
                return
            _log.error(
                "The queue of a rate limit cannot be made; trying again. Name the limit in the settings or the code, "
                "and have a user who may do so run `amqptasks topology apply`",
                task=task,
                queue=queue.name,
                reason=problem,
            )
            self._call_later(_RETRY_SECONDS, lambda: self._make(task, then))

        if self._connection is not None and not self._stopped:
            make_queue(self._connection, queue, binding, done)


def _revoked(signum: int | None = None) -> Failed:
    if signum is None:
        return Failed(Reason.REVOKED, "TaskRevoked", "revoked before it ran")
    # The signal's name stands at the end: the executor that tells of it reads it there.
    text = f"revoked while it ran, and ended by {signal.Signals(signum).name}"
    return Failed(Reason.REVOKED, "TaskRevoked", text, signum=signum)
