"""Dispatch: waiting deliveries go to executors with room, in batches.

An idle executor takes the next task, whoever is busy. How many jobs an executor holds at a time (its *credit*) follows
the measured run time: one for long tasks, dozens for tasks of microseconds. A batch is a lease: what an executor has
not started when the lease ends, it returns, and the leader gives it to another.

When an executor of many tasks dies, its tasks are suspects: they run again one at a time, each alone on an executor (a
*ward*), so that only the one that kills it is blamed.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable

import structlog

from amqptasks.message import Envelope
from amqptasks.outcome import Failed, Lost, Outcome
from amqptasks.worker.delivery import Delivery, Stage, header_crashes
from amqptasks.worker.executor import REPORT_SIGNAL, ExecutorSetup
from amqptasks.worker.fleet import Fleet, Loop
from amqptasks.worker.group import CONCURRENT_POOLS, Recycling
from amqptasks.worker.handle import ExecutorHandle, Sentence
from amqptasks.worker.prefetch import LONG_TASK, patience
from amqptasks.worker.quarantine import Quarantine
from amqptasks.worker.termination import Terminator, sort_dead
from amqptasks.worker.wire import STATE, TERMINATED, Report, ask_frame, envelopes, pack_jobs, unpack_report

__all__ = ["Dispatcher"]

#: Seconds for which an executor may start what it holds.
LEASE = 0.5
#: After lease and grace the leader takes back what was not started.
LEASE_GRACE = 0.25
_TICK = 0.1
_WEIGH_SECONDS = 1.0
_MAX_CREDIT = 64
#: An executor should hold about so many seconds of work.
_WORK_IN_HAND = 0.02
#: An executor that holds nothing, is stopped, and was not heard of for so long is replaced; one that may be stuck has
#: five times as long.
_SILENCE_SECONDS = 2.0

_log = structlog.get_logger("amqptasks.worker")


class Dispatcher:
    """The executors of one queue, and the deliveries that wait for them.

    Args:
        processes: how many executors.
        recycling: when executors are replaced.
        on_outcome: called with each delivery, the outcome that its executor reported, and its run time in seconds.
        on_death: called with a delivery whose task was ended or ended its executor, and what that means for it.
        hard_limit: seconds a delivery's task may run; None for no limit.
        on_state: called with a message that a running task sends.
    """

    def __init__(
        self,
        loop: Loop,
        setup: ExecutorSetup,
        processes: int,
        *,
        keep: frozenset[int],
        on_outcome: Callable[[Delivery, Outcome, float], None],
        on_death: Callable[[Delivery, Failed | Lost], None],
        hard_limit: Callable[[Delivery], float | None],
        on_state: Callable[[Envelope], None],
        recycling: Recycling,
    ) -> None:
        self._loop = loop
        self._queue = setup.queue
        self._on_outcome = on_outcome
        self._on_death = on_death
        self._hard_limit = hard_limit
        self._on_state = on_state
        self._concurrent, self._solo = setup.pool in CONCURRENT_POOLS, setup.pool == "solo"
        self._slots = max(1, -(-setup.concurrency // processes)) if self._concurrent else 1
        self._fleet = Fleet(
            loop, setup, processes, keep, recycling, on_events=self._ready, on_death=self._gone, on_capacity=self.pump
        )
        self._terminator = Terminator(setup.queue, concurrent=self._concurrent, ask=self._ask)
        self.executors = self._fleet.executors
        #: Executors that ended, by cause.
        self.restarts = self._fleet.restarts
        #: Replaces all executors, one after another, each when it has finished.
        self.roll = self._fleet.roll
        self.waiting: deque[Delivery] = deque()
        self._quarantine = Quarantine(self._fleet, self._send)
        #: Mean run time in seconds, exponentially weighted; None before the first task.
        self.runtime: float | None = None
        self.finished = 0
        self._given_out = 0
        self._limited = False
        self._weighed_at = 0.0

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fork the executors."""
        self._fleet.fill()
        self._loop.call_later(_TICK, self._tick)

    def abandon(self) -> list[Delivery]:
        """End the executors, idle ones in their own time. Returns what was held, to be given back."""
        held = self.held()
        self._fleet.close()
        return held

    def take_waiting(self, *, suspects: bool) -> list[Delivery]:
        """Take what no executor holds, to be given back."""
        taken: list[Delivery] = []
        for line in (self._quarantine.suspects, self.waiting) if suspects else (self.waiting,):
            taken += line
            line.clear()
        return taken

    def held(self) -> list[Delivery]:
        """What the executors hold."""
        return [delivery for executor in self.executors for delivery in executor.inflight.values()]

    def running(self) -> list[tuple[Delivery, int, float]]:
        """What runs now: (delivery, pid of its executor, seconds since it began)."""
        return [
            (executor.inflight[number], executor.pid, ran)
            for executor in self.executors
            for number, ran in executor.running().items()
            if number in executor.inflight
        ]

    @property
    def busy(self) -> int:
        """How many deliveries the executors hold."""
        return sum(len(one.inflight) for one in self.executors)

    @property
    def empty(self) -> bool:
        """Whether there is nothing here, neither given out nor waiting."""
        return not (self.busy or self.waiting or self._quarantine.suspects)

    @property
    def engaged(self) -> int:
        """How many of the slots have work."""
        return self.busy if self._concurrent else sum(1 for executor in self.executors if executor.inflight)

    @property
    def concurrency(self) -> int:
        """How many tasks run at once."""
        return self._fleet.size * self._slots

    def resize(self, concurrency: int) -> None:
        """Run so many tasks at once, in more executors or in more of each; fewer as what runs ends."""
        if self._concurrent:
            self._slots = max(1, -(-concurrency // self._fleet.size))
        else:
            self._fleet.resize(concurrency)
        self.pump()

    def terminate(self, task_id: str, failed: Failed, signum: int = signal.SIGTERM) -> bool:
        """End the task of this id, if this queue holds it here; it is settled with `failed`, whatever its state.

        A task that runs in a process of its own gets `signum`, and SIGKILL when it has not ended two seconds later.
        Where it shares the process it is asked (an exception in its thread, cancellation), and the process is killed
        when it has not ended a second later. A task that ends in time by itself keeps its own outcome. True if found.
        """
        for queue in (self._quarantine.suspects, self.waiting):
            for delivery in queue:
                if delivery.is_call(task_id):
                    queue.remove(delivery)
                    self._on_death(delivery, failed)
                    return True
        for executor in self.executors:
            for number, delivery in executor.inflight.items():
                if delivery.is_call(task_id):
                    self._terminator.condemn(executor, number, failed, "revoked", signum)
                    return True
        return False

    # -- out ------------------------------------------------------------------------------------------------------

    def submit(self, delivery: Delivery) -> None:
        """Put a delivery at the end of the line: ahead if it is only told, apart if it has cost an executor."""
        if delivery.verdict is not None:
            self.waiting.appendleft(delivery)
        else:
            suspect = self._concurrent and header_crashes(delivery.headers)
            (self._quarantine.suspects if suspect else self.waiting).append(delivery)

    def pump(self) -> None:
        """Give waiting deliveries to executors with room, least busy first, in even shares."""
        if self._quarantine.suspects:
            self._quarantine.admit()
        waiting = self.waiting
        if not waiting or not self.executors:
            return
        credit = self.credit
        able = [one for one in self.executors if self._room(one, credit) > 0]
        able.sort(key=lambda one: len(one.inflight))
        for index, executor in enumerate(able):
            room = self._room(executor, credit)
            # Half of an executor's credit at least, so that a wake-up carries more than one job; and no more than its
            # share, so that none idles while another has a batch.
            if not self._concurrent and len(executor.inflight) * 2 > credit and len(waiting) > room:
                continue
            share = -(-len(waiting) // (len(able) - index))
            batch: list[Delivery] = []
            while waiting and len(batch) < min(room, share):
                delivery = waiting.popleft()
                if delivery.stage is Stage.WAITING:
                    batch.append(delivery)
            if batch:
                self._send(executor, batch)
            if not waiting:
                return

    def _room(self, executor: ExecutorHandle, credit: int) -> int:
        """How many more jobs it may be given."""
        if executor.leaving is not None or executor.killed is not None or executor.ward or self._stuck(executor):
            return 0
        if self._solo and any(one.inflight for one in self.executors if one is not executor):
            return 0  # one after the other, though there is a successor
        held = len(executor.inflight)
        room = credit - held
        if executor.quota is not None:
            room = min(room, executor.quota - executor.done - held)
        return room

    def _stuck(self, executor: ExecutorHandle) -> bool:
        """Whether it runs a task that takes long, or is silent, so that nothing should wait behind it."""
        if executor.silent:
            return True
        return not self._concurrent and bool(executor.inflight) and executor.cell.read()[1] > LONG_TASK

    @property
    def stalled(self) -> bool:
        """Whether every slot has a task that takes long: what waits here should wait in the broker."""
        staying, longest = self._fleet.staying, patience(self.runtime)
        return bool(staying) and all(one.silent or one.occupied(self._slots) > longest for one in staying)

    @property
    def free(self) -> bool:
        """Whether an executor would take a job now."""
        credit = self.credit
        return any(self._room(one, credit) > 0 for one in self.executors)

    @property
    def credit(self) -> int:
        """How many deliveries one executor may hold."""
        if self._concurrent:
            return self._slots
        if self.runtime is None or self.runtime >= LONG_TASK:
            return 1
        return max(2, min(_MAX_CREDIT, int(_WORK_IN_HAND / max(self.runtime, 1e-6))))

    def _send(self, executor: ExecutorHandle, batch: list[Delivery]) -> None:
        jobs = []
        for delivery in batch:
            delivery.stage = Stage.RUNNING
            self._given_out += 1
            delivery.number = self._given_out
            executor.inflight[delivery.number] = delivery
            jobs.append(delivery.job())
            if not self._limited and self._hard_limit(delivery) is not None:
                self._limited = True
        executor.lease = time.monotonic() + LEASE
        executor.slots = max(executor.slots, len(executor.inflight))
        self._push(executor, pack_jobs(jobs, executor.lease))

    def _ask(self, executor: ExecutorHandle, number: int) -> None:
        self._push(executor, ask_frame(number))

    def _push(self, executor: ExecutorHandle, frame: bytes) -> None:
        if not executor.send(frame):
            self._loop.update_handler(executor.socket.fileno(), self._loop.READ | self._loop.WRITE)

    # -- in -------------------------------------------------------------------------------------------------------

    def _ready(self, executor: ExecutorHandle, events: int) -> None:
        if events & self._loop.WRITE and executor.output and executor.send(b""):
            self._loop.update_handler(executor.socket.fileno(), self._loop.READ)
        if events & ~self._loop.WRITE:
            self._read(executor)

    def _read(self, executor: ExecutorHandle) -> None:
        reports = executor.receive()
        if reports is None:
            # Its end of the socket is closed; the process descriptor says when it is gone.
            self._loop.remove_handler(executor.socket.fileno())
            return
        for report in reports:
            self._report(executor, report)
        self._heard(executor)

    def _heard(self, executor: ExecutorHandle) -> None:
        """Reports were read: who has finished goes, and who has room gets more."""
        if executor.leaving is not None:
            self._fleet.dismiss(executor)
        elif executor.quota is not None and executor.done >= executor.quota:
            self._fleet.retire(executor, "recycled_tasks")
        elif executor.ward:
            self._quarantine.admit()
        self.pump()

    def _report(self, executor: ExecutorHandle, report: Report) -> None:
        if report[1] == STATE:
            for message in envelopes(report[3]):
                self._on_state(message)
            return
        delivery = executor.inflight.pop(report[0], None)
        if delivery is None or delivery.stage is not Stage.RUNNING:
            return  # taken back when the lease had ended
        sentence = executor.condemned.pop(report[0], None) if executor.condemned else None
        if report[1] == TERMINATED and sentence is not None:
            self._on_death(delivery, sentence.failed)
            return
        outcome = unpack_report(report)
        if outcome is None:
            self._unstarted(delivery, sentence, ward=executor.ward)
            return
        executor.done += 1
        runtime = report[2]
        self.runtime = runtime if self.runtime is None else self.runtime + (runtime - self.runtime) / 16
        self.finished += 1
        self._fleet.healthy()
        self._on_outcome(delivery, outcome, runtime)

    def _unstarted(self, delivery: Delivery, sentence: Sentence | None = None, *, ward: bool = False) -> None:
        """It did not run: first in line again, unless it is not to run."""
        if sentence is not None:
            self._on_death(delivery, sentence.failed)
            return
        delivery.stage = Stage.WAITING
        (self._quarantine.suspects if ward else self.waiting).appendleft(delivery)

    # -- limits, leases -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._fleet.closing and not self.executors:
            return
        self._loop.call_later(_TICK, self._tick)
        if self._fleet.closing:
            return
        now = time.monotonic()
        for executor in list(self.executors):
            if executor.inflight:
                if self._limited:
                    self._terminator.enforce(executor, self._hard_limit)
                if executor.condemned:
                    self._terminator.tick(executor)
                if now > executor.lease + LEASE_GRACE:
                    self._take_back(executor, now)
                if not self._concurrent and executor.owes(LONG_TASK):
                    executor.signal(REPORT_SIGNAL)
            elif executor.silent and now > executor.silent + _SILENCE_SECONDS and executor.killed is None:
                # One that has not done anything yet may be at its beginning still, however long that takes.
                overdue = executor.done and now > executor.silent + 5 * _SILENCE_SECONDS
                if overdue or executor.stopped:
                    _log.error("Executor killed: it does not answer", queue=self._queue, pid=executor.pid)
                    executor.kill("silent")
        self._fleet.tick()
        if now > self._weighed_at + _WEIGH_SECONDS:
            self._weighed_at = now
            self._fleet.weigh()

    def _take_back(self, executor: ExecutorHandle, now: float) -> None:
        """What an executor did not start before its lease ended goes to others; it returns it unstarted."""
        # Looked at first: a task is taken off the cell when its report has been sent.
        begun = executor.running() if self._concurrent else range(executor.cell.begun() + 1)
        # What it has reported counts, though this process was stopped for a while and has not read it yet.
        self._read_rest(executor)
        for number in reversed([one for one in executor.inflight if one not in begun]):
            delivery = executor.inflight.pop(number)
            self._unstarted(delivery, executor.condemned.pop(number, None), ward=executor.ward)
            executor.silent = executor.silent or now
        self._heard(executor)  # of what was read here nobody else hears

    # -- death ----------------------------------------------------------------------------------------------------

    def _gone(self, executor: ExecutorHandle, how: str) -> None:
        self._read_rest(executor)
        settled, suspects, innocent = sort_dead(executor, how, concurrent=self._concurrent)
        executor.inflight.clear()
        for delivery in suspects:
            delivery.stage = Stage.WAITING
            self._quarantine.suspects.append(delivery)
        for delivery in reversed(innocent):
            self._unstarted(delivery)
        for delivery, outcome in settled:
            self._on_death(delivery, outcome)
        self.pump()

    def _read_rest(self, executor: ExecutorHandle) -> None:
        """Outcomes that were sent before it died count."""
        while reports := executor.receive():
            for report in reports:
                self._report(executor, report)
