"""The leader: the process that owns a queue's AMQP connections. One loop, no threads, no user code.

Heartbeats never depend on a task, because no task runs here. A second connection publishes retries and dead letters:
a broker under a memory alarm stops reading connections that publish, and acknowledgements must still get through.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.broker.confirms import ConfirmChannel
from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.wire import encode_properties
from amqptasks.errors import BrokerError, PublishError, Unroutable
from amqptasks.events import Bus
from amqptasks.execution.job import header_limits
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, GivenBack, Lost, Outcome, Postponed, Reason
from amqptasks.worker.control import Command, News
from amqptasks.worker.delivery import VERDICT_HEADER, Delivery, Stage, failure_event, header_crashes, header_verdict
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.effects import Effects
from amqptasks.worker.executor import ExecutorSetup
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.intake import examine
from amqptasks.worker.joiner import Joiner
from amqptasks.worker.prefetch import target_prefetch, worth_changing
from amqptasks.worker.process import set_title
from amqptasks.worker.settlement import Settlement

__all__ = ["LeaderSetup", "run_leader"]

_TICK = 0.1
_REOPEN_SECONDS = 1.0
_CLOSE_SECONDS = 2.0
_FOR_EVER = 365 * 86400.0

_log = structlog.get_logger("amqptasks.worker")


@dataclass(frozen=True, slots=True)
class LeaderSetup:
    """What a leader inherits over the fork."""

    app: AmqpTasks
    bus: Bus
    plan: GroupPlan
    hostname: str
    #: Descriptors that belong to the application and stay open in executors.
    keep: frozenset[int]


def run_leader(setup: LeaderSetup, control: socket.socket) -> int:
    """The life of one leader. Returns its exit code: 0 after a drain, 1 after a hard stop."""
    set_title(f"amqptasks:{setup.plan.queue}")
    return Leader(setup, control).run()


class Leader:
    """One queue's consumer, executors and settlement on one loop."""

    def __init__(self, setup: LeaderSetup, control: socket.socket) -> None:
        self._setup = setup
        self._plan = plan = setup.plan
        self._control = control
        self._loop = new_loop()
        settings = setup.app.settings
        self._tasks = setup.app.tasks
        where = f"amqptasks/{plan.queue}/{setup.hostname}/{os.getpid()}"
        self._publish_link = Link(
            self._loop,
            connection_parameters(settings.broker, f"{where}/publish"),
        )
        self._publish_link.watch(lambda _connection: None, self._publish_down)
        self._confirms = ConfirmChannel(self._publish_link, window=settings.broker.confirm_window)
        self._publish_opened = False
        self._consumer = Consumer(
            plan.queue,
            self._target(None),
            on_message=self._message,
            on_ready=self._ready,
            on_lost=self._lost,
        )
        self._consume_link = Link(
            self._loop,
            connection_parameters(settings.broker, f"{where}/consume"),
        )
        self._consume_link.watch(self._up, self._down)
        self._settlement = Settlement(
            self._consumer,
            Effects(settings.topology.prefix, plan.queue, setup.hostname, plan.dead_letters),
            publish=self._publish,
            call_later=self._loop.call_later,
        )
        self._dispatcher = Dispatcher(
            self._loop,
            ExecutorSetup(setup.app, setup.bus, plan.queue, setup.hostname, plan.pool, plan.concurrency),
            plan.processes,
            keep=setup.keep,
            on_outcome=self._settlement.settle,
            on_death=self._died,
            hard_limit=self._hard_limit,
            on_state=self._send_state,
        )
        self._joiner = Joiner(
            setup.app.calls,
            settings.topology.prefix,
            lifetime=settings.result.expires or _FOR_EVER,
            publish=self._publish,
            call_later=self._loop.call_later,
        )
        self._connection: Any = None
        self._pump_planned = False
        self._paused = False
        self._changed_at = 0.0
        #: Deliveries whose channel was lost while their tasks run, by what a redelivery has in common with them.
        self._orphans: dict[tuple[object, object, int], Delivery] = {}
        self._draining = False
        self._exit_code = 0
        self._stopping = False

    # -- life -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the supervisor says stop, or is gone."""
        # Forked before anything is connected: the first executors inherit no socket of the broker's.
        self._dispatcher.start()
        self._control.setblocking(False)
        self._loop.add_handler(self._control.fileno(), self._commanded, self._loop.READ)
        self._loop.call_later(_TICK, self._tick)
        self._consume_link.open()
        self._loop.start()
        return self._exit_code

    def _commanded(self, _fd: int, _events: int) -> None:
        try:
            commands = self._control.recv(64)
        except BlockingIOError:
            return
        if not commands or Command.STOP in commands:
            # The supervisor is gone, or has no more patience: what runs is the broker's again.
            self._stop(code=1)
        elif Command.DRAIN in commands:
            self._drain()

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        self._joiner.stop()
        self._consumer.stop(self._drained_from_broker)

    def _drained_from_broker(self) -> None:
        self._give_back_waiting()
        self._finish_when_idle()

    def _finish_when_idle(self) -> None:
        if self._stopping:
            return
        if self._dispatcher.busy or self._settlement.settling or not self._joiner.idle:
            self._give_back_waiting()
            self._loop.call_later(0.02, self._finish_when_idle)
            return
        self._stop(code=0)

    def _stop(self, code: int) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._draining = True
        self._exit_code = code
        self._settlement.flush()
        for delivery in self._dispatcher.abandon():
            self._settlement.settle(delivery, delivery.verdict or GivenBack())
        self._give_back_waiting()
        self._publish_link.close()
        self._consume_link.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._loop.call_later(0.0, lambda: self._leave(deadline))

    def _leave(self, deadline: float) -> None:
        open_links = self._consume_link.is_open or self._publish_link.is_open
        if time.monotonic() < deadline and (open_links or self._dispatcher.executors):
            self._loop.call_later(0.01, lambda: self._leave(deadline))
            return
        self._loop.stop()

    def _tell(self, news: bytes) -> None:
        try:
            self._control.send(news)
        except OSError:
            return  # the supervisor reads our end soon enough

    # -- connection -----------------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection
        self._consumer.open(connection)
        self._joiner.up(connection)

    def _down(self, error: BrokerError | None) -> None:
        self._connection = None
        if error is not None and not self._stopping:
            _log.warning("Connection lost or refused; trying again", queue=self._plan.queue, error=str(error))
        self._consumer.connection_lost(str(error))
        self._joiner.down(str(error))

    def _publish_down(self, error: BrokerError | None) -> None:
        if error is not None and not self._stopping:
            _log.warning("Publishing connection lost; trying again", queue=self._plan.queue, error=str(error))

    def _ready(self) -> None:
        self._tell(News.READY)
        _log.info("Consuming", queue=self._plan.queue, prefetch=self._consumer.prefetch)

    def _lost(self, reason: str, missing: bool) -> None:
        """The channel is gone: what waits is the broker's again, what runs goes on."""
        dropped = len(self._dispatcher.waiting)
        self._dispatcher.waiting.clear()
        for delivery in (*self._dispatcher.held(), *self._settlement.settling):
            if delivery.stage in (Stage.RUNNING, Stage.SETTLING):
                self._orphans[delivery.key] = delivery
        _log.warning(
            "Consumer lost", queue=self._plan.queue, reason=reason, running=len(self._orphans), given_back=dropped
        )
        if missing:
            self._tell(News.TOPOLOGY_MISSING)
        self._loop.call_later(_REOPEN_SECONDS, self._reopen)

    def _reopen(self) -> None:
        """A channel of its own may have been closed; when the connection is down, `_up` does it."""
        if self._connection is not None and not self._consumer.is_open and not self._draining:
            self._consumer.open(self._connection)

    def _publish(self, envelope: Envelope, done: Callable[[PublishError | None], None]) -> None:
        if not self._publish_opened:
            self._publish_opened = True
            self._publish_link.open()

        def confirmed(error: PublishError | None) -> None:
            if isinstance(error, Unroutable):
                self._tell(News.TOPOLOGY_MISSING)
            done(error)

        self._confirms.publish(envelope, encode_properties(envelope), confirmed)

    def _send_state(self, envelope: Envelope) -> None:
        """A state that is not final: sent if it can be sent now."""
        if self._publish_link.is_open or not self._publish_opened:
            self._publish(envelope, lambda _error: None)

    # -- messages -------------------------------------------------------------------------------------------------

    def _message(self, incoming: Incoming) -> None:
        delivery = Delivery(incoming, self._plan.queue)
        outcome = examine(incoming.properties.headers, self._tasks)
        if outcome is not None:
            self._refuse(delivery, outcome)
            return
        if incoming.redelivered and self._known(delivery):
            return
        if VERDICT_HEADER in delivery.headers:
            delivery.verdict = header_verdict(delivery.headers)
        self._submit(delivery)

    def _submit(self, delivery: Delivery) -> None:
        self._dispatcher.submit(delivery)
        if not self._pump_planned:
            # After all messages of this read: one batch, one write.
            self._pump_planned = True
            self._loop.call_later(0, self._pump)

    def _pump(self) -> None:
        self._pump_planned = False
        self._dispatcher.pump()

    def _known(self, delivery: Delivery) -> bool:
        """Whether this message's task runs here still, or has ended here: then it is not run again."""
        outcome = self._settlement.remembered(delivery)
        if outcome is not None:
            self._settlement.settle(delivery, outcome)
            return True
        orphan = self._orphans.pop(delivery.key, None)
        if orphan is None or orphan.stage not in (Stage.RUNNING, Stage.SETTLING):
            return False
        orphan.adopt(delivery.incoming)
        return True

    def _refuse(self, delivery: Delivery, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self._report(delivery, outcome)
            self._conclude(delivery, outcome)
            return
        if isinstance(outcome, Postponed):
            _log.debug("Came before its time", queue=self._plan.queue, task_id=delivery.headers.get("id"))
        self._settlement.settle(delivery, outcome)

    def _conclude(self, delivery: Delivery, failed: Failed) -> None:
        """What failed without running: an executor tells those who wait, and then it is settled.

        An executor reads the body for it, so one that dies of that does not get a second one.
        """
        if delivery.verdict is not None or failed.reason is Reason.UNDECODABLE or self._stopping:
            self._settlement.settle(delivery, failed)
            return
        delivery.verdict = failed
        delivery.stage = Stage.WAITING
        self._submit(delivery)

    def _died(self, delivery: Delivery, outcome: Failed | Lost) -> None:
        if isinstance(outcome, Lost):
            crashes = header_crashes(delivery.headers) + 1
            _log.error(
                "Executor lost while running a task",
                queue=self._plan.queue,
                task=delivery.headers.get("task"),
                task_id=delivery.headers.get("id"),
                reason=outcome.description,
                crashes=crashes,
                limit=self._plan.poison_limit,
            )
            if delivery.verdict is not None:
                self._settlement.settle(delivery, delivery.verdict)
            elif crashes >= self._plan.poison_limit:
                text = f"{outcome.description}; the task has cost {crashes} executors, the limit"
                poison = Failed(Reason.POISON, "WorkerLost", text)
                self._report(delivery, poison)
                self._conclude(delivery, poison)
            else:
                self._settlement.settle(delivery, outcome)
        else:
            self._report(delivery, outcome)
            self._conclude(delivery, outcome)

    def _report(self, delivery: Delivery, failed: Failed) -> None:
        self._setup.bus.emit(failure_event(delivery, failed))
        self._setup.bus.flush()

    def _hard_limit(self, delivery: Delivery) -> float | None:
        headers = delivery.headers
        if delivery.verdict is not None:
            return None
        task = self._tasks[str(headers["task"])]
        return header_limits(headers)[0] or task.options.time_limit or self._setup.app.settings.worker.time_limit

    # -- flow -----------------------------------------------------------------------------------------------------

    def _target(self, runtime: float | None) -> int:
        plan = self._plan
        return target_prefetch(
            plan.prefetch,
            runtime=runtime,
            slots=plan.concurrency,
            concurrent=plan.pool == "asyncio",
            priorities=plan.priorities,
        )

    def _tick(self) -> None:
        if self._stopping:
            return
        self._loop.call_later(_TICK, self._tick)
        if self._draining or not (self._consumer.consuming or self._paused):
            return
        dispatcher = self._dispatcher
        if self._paused:
            if dispatcher.free:
                self._paused = False
                self._consumer.prefetch = self._target(dispatcher.runtime)
                self._consumer.resume()
            return
        if dispatcher.waiting and dispatcher.stalled and self._plan.prefetch == "auto":
            # Long tasks everywhere: what waits here would run sooner elsewhere.
            self._paused = True
            dispatcher.runtime = None
            self._consumer.pause(self._give_back_waiting)
            return
        target = self._target(dispatcher.runtime)
        now = time.monotonic()
        if worth_changing(self._consumer.prefetch, target) and now - self._changed_at > 1.0:
            self._changed_at = now
            self._consumer.set_prefetch(target)

    def _give_back_waiting(self) -> None:
        waiting = self._dispatcher.waiting
        while waiting:
            delivery = waiting.popleft()
            self._settlement.settle(delivery, delivery.verdict or GivenBack())
