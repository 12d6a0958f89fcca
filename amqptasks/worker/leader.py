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
from amqptasks.broker.stall import StallWatch
from amqptasks.broker.targets import Targets
from amqptasks.broker.wire import encode_properties
from amqptasks.errors import BrokerError, PublishError, Unroutable, Unwritable
from amqptasks.events import Bus
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, GivenBack, Lost, Outcome, Postponed, Reason
from amqptasks.signals import task_rejected
from amqptasks.worker.attendants import Attendants
from amqptasks.worker.board import Board
from amqptasks.worker.control import Channel, Command, News
from amqptasks.worker.delivery import (
    VERDICT_HEADER,
    Delivery,
    Key,
    Stage,
    failure_event,
    header_crashes,
    header_verdict,
    retry_event,
)
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.effects import Effects
from amqptasks.worker.event_feed import EventFeed
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.executor import ExecutorSetup
from amqptasks.worker.flow import Flow
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.handle import report_unfinished
from amqptasks.worker.inspection import Inspection
from amqptasks.worker.intake import disbelieved, examine
from amqptasks.worker.process import set_title
from amqptasks.worker.settlement import Settlement
from amqptasks.worker.tally import Tally
from amqptasks.worker.timelimits import TimeLimits

__all__ = ["LeaderSetup", "run_leader"]

_TICK, _REOPEN_SECONDS, _CLOSE_SECONDS = 0.1, 1.0, 2.0

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
    board: Board
    events: EventSwitch


def run_leader(setup: LeaderSetup, control: socket.socket) -> int:
    """The life of one leader. Returns its exit code: 0 after a drain, 1 after a hard stop."""
    set_title(f"amqptasks:{setup.plan.queue}")
    code = Leader(setup, control).run()
    setup.bus.flush()  # the last lines of the log
    return code


class Leader:
    """One queue's consumer, executors and settlement on one loop."""

    def __init__(self, setup: LeaderSetup, control: socket.socket) -> None:
        self._setup = setup
        self._plan = plan = setup.plan
        self._control = Channel(control)
        self._loop = new_loop()
        settings = setup.app.settings
        self._tasks = setup.app.tasks
        where = f"amqptasks/{plan.queue}/{setup.hostname}/{os.getpid()}"
        self._publish_link = Link(self._loop, connection_parameters(settings.broker, f"{where}/publish"))
        self._publish_link.watch(lambda _connection: None, self._publish_down)
        self._confirms = ConfirmChannel(self._publish_link, window=settings.broker.confirm_window)
        self._feed = EventFeed(setup.events, self._publish_link, setup.hostname, settings.events.send_sent)
        self._consumer = Consumer(plan.queue, 1, on_message=self._message, on_ready=self._ready, on_lost=self._lost)
        self._consume_link = Link(self._loop, connection_parameters(settings.broker, f"{where}/consume"))
        self._consume_link.watch(self._up, self._down)
        self._targets = Targets(self._consume_link, setup.app.topology, settings.topology.prefix)
        self._tally = Tally(setup.board, self._tasks).follow(self._consume_link, self._publish_link, self._confirms)
        self._settlement = Settlement(
            self._consumer,
            Effects(settings.topology.prefix, plan.queue, setup.hostname, plan.dead_letters),
            publish=self._publish,
            call_later=self._loop.call_later,
            tally=self._tally,
            on_refused=self._died,
            declared=self._targets.declared,
            on_settled=self._feed.settled,
        )
        self._limits = TimeLimits(self._tasks, settings.worker.time_limit)
        self._dispatcher = Dispatcher(
            self._loop,
            ExecutorSetup(setup.app, setup.bus, plan.queue, setup.hostname, plan.pool, plan.concurrency, setup.events),
            plan.processes,
            keep=setup.keep,
            on_outcome=self._settlement.settle,
            on_death=self._died,
            hard_limit=self._limits.hard,
            on_state=self._send_state,
            recycling=plan.recycling,
        )
        self._flow = Flow(plan, self._consume_link, self._consumer, self._dispatcher, self._give_back_waiting)
        declared = self._targets.declared
        self._attendants = Attendants(
            setup.app, plan, self._dispatcher, self._publish_link, declared, publish=self._publish, refuse=self._refuse
        )
        self._inspection = Inspection(
            plan, self._dispatcher, self._consumer, self._consume_link, self._tally, self._limits, self._attendants
        )
        self._inspection.watch(self._feed, self._flow.scaler)
        if "x-single-active-consumer" not in setup.app.settings.queues[plan.queue].arguments:
            StallWatch(
                self._consume_link, self._consumer, lambda: self._dispatcher.empty and not self._settlement.settling
            )
        self._connection: Any = None
        self._publish_opened = self._pump_planned = self._draining = self._stopping = False
        #: Deliveries whose channel was lost while their tasks run, by what a redelivery has in common with them.
        self._orphans: dict[Key, Delivery] = {}
        self._exit_code = 0

    # -- life -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the supervisor says stop, or is gone."""
        # Forked before anything is connected: the first executors inherit no socket of the broker's.
        self._dispatcher.start()
        self._loop.add_handler(self._control.fileno(), self._commanded, self._loop.READ)
        self._loop.call_later(_TICK, self._tick)
        self._consume_link.open()
        self._loop.start()
        return self._exit_code

    def _commanded(self, _fd: int, _events: int) -> None:
        messages = self._control.receive()
        if messages is None:
            self._stop(code=1)  # the supervisor is gone: what runs is the broker's again
            return
        for message in messages:
            if message[0] == Command.STOP:
                self._stop(code=1)
            elif message[0] == Command.DRAIN:
                self._drain()
            elif message[0] == Command.ASK:
                self._tell(News.ANSWER, message[1], self._inspection.answer(message[2], message[3]))

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        self._attendants.stop()
        self._consumer.stop(self._drained_from_broker)

    def _drained_from_broker(self) -> None:
        self._give_back_waiting()
        self._finish_when_idle()

    def _finish_when_idle(self) -> None:
        if self._stopping:
            return
        if self._dispatcher.busy or self._settlement.settling or not self._attendants.idle:
            self._give_back_waiting()
            self._loop.call_later(0.02, self._finish_when_idle)
            return
        self._stop(code=0)

    def _stop(self, code: int) -> None:
        if self._stopping:
            return
        self._stopping = self._draining = True
        self._exit_code = code
        self._attendants.revokes.stop()
        self._settlement.flush()
        for delivery in report_unfinished(self._dispatcher.abandon()):
            self._settlement.settle(delivery, delivery.verdict or GivenBack())
        self._give_back_waiting()
        self._feed.flush()
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

    def _tell(self, *news: object) -> None:
        self._control.deliver(self._loop.call_later, *news)

    # -- connection -----------------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection
        self._attendants.up(connection, self._reopen)

    def _down(self, error: BrokerError | None) -> None:
        self._connection = None
        if error is not None and not self._stopping:
            _log.warning("Connection lost or refused; trying again", queue=self._plan.queue, error=str(error))
        self._consumer.connection_lost(str(error))
        self._attendants.down(str(error))

    def _publish_down(self, error: BrokerError | None) -> None:
        if error is not None and not self._stopping:
            _log.warning("Publishing connection lost; trying again", queue=self._plan.queue, error=str(error))

    def _ready(self) -> None:
        self._tell(News.READY)
        if self._consumer.returns():
            self._tell(News.TOPOLOGY_MISSING, True)
        _log.info("Consuming", queue=self._plan.queue, prefetch=self._consumer.prefetch)

    def _lost(self, reason: str, missing: bool) -> None:
        """The channel is gone: what waits is the broker's again, what runs goes on."""
        dropped = len(self._dispatcher.take_waiting(suspects=True))
        # Made anew each time: what has ended meanwhile, or came again elsewhere, is in nobody's hands any more.
        held = (*self._dispatcher.held(), *self._settlement.settling)
        self._orphans = {one.key: one for one in held if one.stage in (Stage.RUNNING, Stage.SETTLING)}
        self._flow.lost()
        running = len(self._orphans)
        _log.warning("Consumer lost", queue=self._plan.queue, reason=reason, running=running, given_back=dropped)
        if missing:
            self._tell(News.TOPOLOGY_MISSING, False)
        self._loop.call_later(_REOPEN_SECONDS, self._reopen)

    def _reopen(self) -> None:
        """A channel of its own may have been closed; when the connection is down, `_up` does it."""
        if self._attendants.ready and not self._consumer.is_open and not self._draining:
            self._consumer.open(self._connection)

    def _publish(self, envelope: Envelope, done: Callable[[PublishError | None], None]) -> None:
        if envelope.exchange in self._targets.levels and self._targets.look(
            envelope, lambda lost: done(lost) if lost else self._publish(envelope, done)
        ):
            return
        if not self._publish_opened:
            self._publish_opened = True
            self._publish_link.open()

        def confirmed(error: PublishError | None) -> None:
            if isinstance(error, Unroutable) and self._targets.declared(envelope.exchange, envelope.routing_key):
                self._tell(News.TOPOLOGY_MISSING, False)
            done(error)

        try:
            properties = encode_properties(envelope)
        except Exception as error:  # it costs who wanted this, and not the leader
            done(Unwritable(f"the message cannot be written: {error}"))
            return
        self._confirms.publish(envelope, properties, confirmed)

    def _send_state(self, envelope: Envelope) -> None:
        """A state that is not final: sent if it can be sent now. A task that tells one a moment fills no memory."""
        if self._feed.took(envelope) or self._publish_link.blocked_since is not None or self._confirms.full:
            return
        if self._publish_link.is_open or not self._publish_opened:
            self._publish(envelope, lambda _error: None)

    # -- messages -------------------------------------------------------------------------------------------------

    def _message(self, incoming: Incoming) -> None:
        delivery = Delivery(incoming, self._plan.queue)
        try:
            outcome = examine(incoming.properties.headers, self._tasks)
            self._tally.received(incoming)
            if outcome is not None or incoming.redelivered:
                outcome = disbelieved(self._setup.app.calls.keys, delivery) or outcome
            if outcome is not None:
                self._refuse(delivery, outcome)
                return
            self._limits.mark(delivery)
            if incoming.redelivered and self._known(delivery):
                return
            if VERDICT_HEADER in delivery.headers:
                delivery.verdict = header_verdict(delivery.headers)
            elif self._attendants.judging and (verdict := self._attendants.judge(delivery)) is not None:
                self._refuse(delivery, disbelieved(self._setup.app.calls.keys, delivery) or verdict)
                return
            self._submit(delivery)
        except Exception as error:  # it would end this leader, come back, and end the next
            _log.exception("A message cannot be taken", queue=self._plan.queue)
            self._settlement.settle(delivery, Failed(Reason.UNDECODABLE, type(error).__name__, str(error)))

    def _submit(self, delivery: Delivery) -> None:
        self._feed.received(delivery)
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
            self._settlement.settle(delivery, outcome, known=True)
            return True
        orphan = self._orphans.pop(delivery.key, None)
        if orphan is None or orphan.stage not in (Stage.RUNNING, Stage.SETTLING):
            return False
        orphan.adopt(delivery.incoming)
        return True

    def _refuse(self, delivery: Delivery, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self._setup.bus.emit(failure_event(delivery, outcome))
            self._setup.bus.flush()
            self._conclude(delivery, outcome)
            return
        if isinstance(outcome, Postponed):
            _log.debug("Came before its time", queue=self._plan.queue, task_id=delivery.headers.get("id"))
        self._settlement.settle(delivery, outcome)

    def _conclude(self, delivery: Delivery, failed: Failed) -> None:
        """What failed without running: an executor tells those who wait, and then it is settled.

        An executor reads the body for it, so one that dies of that does not get a second one.
        """
        unread = failed.reason is Reason.REJECTED
        unread |= failed.reason is Reason.UNDECODABLE and not task_rejected.receivers
        if delivery.verdict is not None or unread or self._stopping:
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
                self._refuse(delivery, Failed(Reason.POISON, "WorkerLost", text))
            else:
                self._settlement.settle(delivery, outcome)
        elif (again := self._limits.retry(delivery, outcome)) is not None:
            self._setup.bus.emit(retry_event(delivery, again))
            self._setup.bus.flush()
            self._settlement.settle(delivery, again)
        else:
            self._refuse(delivery, outcome)

    # -- flow -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._stopping:
            return
        self._loop.call_later(_TICK, self._tick)
        if not self._draining:
            self._flow.tick()

    def _give_back_waiting(self) -> None:
        # Before the end nobody gets suspects from here: elsewhere they would run among others, and cost them a process.
        for delivery in self._dispatcher.take_waiting(suspects=self._draining):
            self._settlement.settle(delivery, delivery.verdict or GivenBack())
