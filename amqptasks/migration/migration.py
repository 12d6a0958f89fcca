"""A queue is replaced by one with other arguments, step by step. Any step may be the last one of a process.

Bindings and messages go to a parking queue; when nothing is left in the queue, and nobody holds anything of it, it is
deleted and declared anew under its name; bindings and messages come back. `run` looks at what stands and does what is
missing, so that running it again goes on where another run was killed. See docs/migrate.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from amqptasks.broker.management import ManagementApi
from amqptasks.broker.mover import WINDOW, Mover
from amqptasks.broker.policies import Policy, losing
from amqptasks.broker.replacing import Replacing
from amqptasks.broker.versions import accepted_arguments
from amqptasks.config import Settings
from amqptasks.errors import AccessRefused, ConfigError
from amqptasks.migration.state import Look, Step, former_queue, look_at, parking
from amqptasks.topology.build import due_entity, due_queue, refuses_when_full
from amqptasks.topology.delays import deliver_exchange
from amqptasks.topology.entities import Binding, Queue, Topology
from amqptasks.topology.plan import compare, parking_queue, queue_differences

__all__ = ["Migration", "Report"]

#: More than the tick after which a quorum queue's count is renewed (5 s).
_TICK_SECONDS = 6.0
_TURN_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_HANDOVER_SECONDS = 5.0
_EMPTY_SECONDS = 1.0
#: RabbitMQ confirms messages that are on their way to a queue when it is deleted, and drops them.
_SILENCE_SECONDS = 3.0

Tell = Callable[[Step, str], None]
#: Messages moved in this step, messages there are to move as far as is known, and what is waited for.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What `run` did: whether anything, and how many messages it moved to the parking queue and back."""

    changed: bool
    parked: int = 0
    returned: int = 0


class Migration:
    """One queue's way from what stands to what `wanted` says.

    Args:
        topology: what the settings declare.
        name: a work queue or its dead-letter queue.
        rollback: back to what the queue was before a migration that is under way.

    Raises:
        ConfigError: the queue is not declared in the settings, does not exist, is of a kind that cannot be moved, or
            there is nothing to roll back.
    """

    def __init__(
        self,
        settings: Settings,
        topology: Topology,
        name: str,
        api: ManagementApi,
        *,
        rollback: bool = False,
        tell: Tell = lambda _step, _text: None,
        progress: Progress = lambda _moved, _total, _text: None,
    ) -> None:
        self._settings, self._topology, self._name, self._api = settings, topology, name, api
        self._prefix = settings.topology.prefix
        self._parking = parking_queue(self._prefix, name)
        self._tell, self._progress = tell, progress
        self._rollback = rollback
        self._broker: Replacing
        self._parked = self._returned = 0
        #: Whether a migration is under way, so that somebody has to finish it or roll it back.
        self.under_way = False
        self.first_look = first = self.look()
        self.wanted = self._wanted(first)
        self._sent = accepted_arguments(self.wanted, api.server())
        self._check(first)
        self.under_way = first.parked is not None

    # -- looking --------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """What stands in the broker now."""
        return look_at(self._api.topology(), self._api.depths(), self._name, self._parking)

    @property
    def differences(self) -> list[str]:
        """What is to change, as ``argument: old → new``. Empty when only the rest of a migration is left."""
        return self._differences(self.first_look)

    @property
    def nothing_to_do(self) -> bool:
        """Whether the queue is as wanted, and no migration of it is under way."""
        return not self.differences and self.first_look.queue is not None and self.first_look.parked is None

    def missing(self) -> list[str]:
        """What else is not as declared: queues, exchanges and bindings that are missing in the broker."""
        server = self._api.server()
        sent = {queue.name: accepted_arguments(queue, server) for queue in self._topology.queues}
        changes = compare(self._topology, self._api.topology(), sent)
        return [one.name for one in changes if one.action in ("create", "bind")]

    def steps(self) -> list[str]:
        """What `run` does, in sentences."""
        name, parking_name = self._name, self._parking
        away = [
            f"declare {parking_name}, and lead the bindings of {name} to it: new messages wait there",
            f"move the messages of {name} to it; workers go on until none is left",
            f"wait until workers have done what they hold of {name}",
            f"delete {name}, and declare it anew",
        ]
        back = [
            f"lead the bindings to {name} again: workers go on",
            f"move the parked messages back, and delete {parking_name}",
        ]
        return [*([] if self._reached(self.first_look) else away), *back]

    def _differences(self, look: Look) -> list[str]:
        return [] if look.queue is None else queue_differences(self.wanted, look.queue, self._sent)

    def _reached(self, look: Look) -> bool:
        return look.queue is not None and not self._differences(look)

    def _wanted(self, look: Look) -> Queue:
        declared = self._topology.queue(self._name)
        own = [*self._settings.queues, *(f"{name}.dlq" for name in self._settings.queues)]
        if declared is None or self._name not in own:
            raise ConfigError(self._not_ours(look, declared is not None))
        if not self._rollback:
            return declared
        if look.parked is None:
            raise ConfigError(
                f"no migration of queue {self._name!r} is under way: there is no queue {self._parking!r}. One that is "
                "finished is undone by putting the old settings back and migrating again"
            )
        return former_queue(look.parked, self._name)

    def _not_ours(self, look: Look, internal: bool) -> str:
        if internal:
            return f"queue {self._name!r} is one of those that amqptasks needs for itself: it cannot be migrated"
        names = ", ".join(self._settings.queues)
        if look.queue is not None:
            return f"queue {self._name!r} is not declared in the settings: it belongs to somebody else. Queues: {names}"
        return f"queue {self._name!r} is not declared in the settings. Queues: {names}"

    def _check(self, look: Look) -> None:
        if look.parked is not None:
            former_queue(look.parked, self._name)
        elif look.queue is None:
            raise ConfigError(f"queue {self._name!r} does not exist yet: `amqptasks topology apply` makes it")
        if look.queue is None:
            return
        if look.queue.exclusive or look.queue.auto_delete:
            raise ConfigError(f"queue {self._name!r} goes with its consumers (exclusive or auto-delete): delete it")
        if "stream" in (look.queue.kind, self.wanted.kind):
            raise ConfigError(f"queue {self._name!r}: messages of a stream cannot be moved, since reading removes none")

    # -- the way --------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Do what is missing.

        Raises `AlreadyRunning` when another process migrates the same queue; `AccessRefused` for a missing permission,
        with nothing changed where it could be foreseen; `BrokerUnreachable`, `PublishError` and `ConfigError` with
        everything left as it is: run it again, or roll back.
        """
        if self.nothing_to_do:
            return Report(changed=False)
        with Replacing(self._settings.broker, f"{self._parking}.lock") as self._broker:
            look = self.look()
            if look.queue is not None and not self._reached(look):
                self._refuse_single(look.queue)
                self._broker.rehearse(self.wanted, f"{self._parking}.rehearsal", look.bound)
            while not self._reached(look):
                self._replace(look)
                look = self.look()
            self._give_back(look)
        return Report(True, self._parked, self._returned)

    def _refuse_single(self, queue: Queue) -> None:
        consumers = self._broker.count(self._name)[1]
        if dict(queue.arguments).get("x-single-active-consumer") and consumers:
            raise ConfigError(
                f"queue {self._name!r} has a single active consumer, which gets all that comes: stop its workers, "
                "migrate, and start them again"
            )

    def _replace(self, look: Look) -> None:
        if look.queue is None:
            self._tell(Step.SWITCH, f"declaring {self._name}: a run ended before it did")
            self._broker.declare(self.wanted)
            return
        self._park(look, look.queue)
        with ExitStack() as stack:
            mover = Mover(self._settings.broker, self._name, self._parking)
            try:
                stack.enter_context(mover)
            except AccessRefused:
                if look.parked is None and not (mover.moved or mover.held):
                    self._broker.delete(self._parking)
                raise
            self._divert(look)
            self._drain(mover, look.depth(self._name))
            self._tell(Step.SETTLE, f"waiting until workers have done what they hold of {self._name}")
            self._settle(mover, look.queue)
            while not self._switch(mover, look.queue):
                self._settle(mover, look.queue)
            self._parked += mover.moved

    def _park(self, look: Look, former: Queue) -> None:
        self._tell(Step.PARK, f"declaring {self._parking}, in which messages wait meanwhile")
        if look.parked is None:
            self._broker.declare(parking(self._parking, former, self.wanted))
        policy = self._api.policies().get(self._parking, Policy())
        harmful = losing(policy.definition)
        if harmful:
            if look.parked is None:
                self._broker.delete(self._parking)
            raise ConfigError(
                f"the policy {policy.names} applies to {self._parking!r} too, and its {', '.join(harmful)} would drop "
                "messages that wait there. Give it a narrower pattern until the migration is done"
            )

    def _divert(self, look: Look) -> None:
        self.under_way = True
        self._tell(Step.DIVERT, f"leading {_counted(len(look.bound), 'binding')} to {self._parking}")
        for one in look.bound:
            self._broker.lead(one, self._name, self._parking)

    def _drain(self, mover: Mover, messages: int) -> None:
        self._tell(Step.DRAIN, f"moving about {_counted(messages, 'message')}; workers go on meanwhile")
        empty, looked = 0, time.monotonic()
        while empty < 2:
            left = self._broker.count(self._name)[0]
            self._turn(mover, left, "")
            empty = empty + 1 if left == 0 and mover.held < WINDOW else 0
            if time.monotonic() - looked > _LOOK_SECONDS:
                self._divert_again()
                looked = time.monotonic()
        mover.prefer()

    def _turn(self, mover: Mover, left: int, waiting: str) -> None:
        before = mover.refused
        mover.turn(_TURN_SECONDS)
        self._broker.keep_alive()
        if mover.refused > before:
            waiting = "the queue refuses messages (it is full?); trying again"
        self._progress(mover.moved, mover.moved + mover.held + left, waiting)

    def _settle(self, mover: Mover, queue: Queue) -> None:
        """Wait until nothing is in the queue, nobody holds anything of it, and nothing comes.

        From some moment on, messages come to the mover alone: to the queue, because its consumer is preferred; to the
        parking queue, because no other consumes it. What others hold can only get less from then on, so that one count
        of nothing is proof. It must be from after that moment, and a quorum queue's count is as old as the last tick;
        it is 0 as well when the queue has a new leader that has not ticked yet.
        """
        ours, pause = queue.name == self._parking, _TICK_SECONDS if queue.kind == "quorum" else 0.0
        node, began = "", 0.0
        while True:
            look = self.look() if ours else self._divert_again()
            messages, counts = look.counted(queue.name)
            # The mover does nothing while this asks: what it holds is part of the number that a classic queue gives.
            known = mover.held if queue.kind == "classic" else 0
            if counts != node:
                node, began = counts, time.monotonic()
            since = began if ours else max(began, mover.preferred_since or math.inf)
            ready, consumers = self._broker.count(queue.name)
            now = time.monotonic()
            silent = ours or now - mover.last_came > _SILENCE_SECONDS
            # What the mover holds is in no count yet that is as old as it. Classic queues count it: it is known.
            held = mover.held if queue.kind != "classic" else 0
            # A leader that does not answer counts as 0 consumers too.
            if messages <= known and not held and now - since > pause and silent and ready == 0 and consumers:
                return
            waiting = "" if ours or now - since < _SILENCE_SECONDS else _reason(messages - known, silent)
            self._turn(mover, ready, waiting)

    def _divert_again(self) -> Look:
        """A process that starts with the old settings binds the queue again: that is undone."""
        look = self.look()
        if look.bound:
            self._divert(look)
        return look

    def _switch(self, mover: Mover, queue: Queue) -> bool:
        """Delete the queue and declare it anew. False when a message came just now."""
        deadline = time.monotonic() + _EMPTY_SECONDS
        while mover.held and time.monotonic() < deadline:
            mover.turn(0.01)
        if mover.held:
            return False
        self._tell(Step.SWITCH, f"deleting {self._name} and declaring it anew")
        if not self._broker.swap(self.wanted, if_empty=queue.kind == "classic"):
            return False
        # What somebody sent to the queue by its name in the last moment is here, and in no queue.
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while (mover.held or not mover.source_gone) and time.monotonic() < deadline:
            mover.turn(0.01)
        return True

    def _give_back(self, look: Look) -> None:
        if look.parked is None:
            return
        self._tell(Step.RETURN, f"leading {_counted(len(look.diverted), 'binding')} to {self._name} again")
        for one in look.diverted:
            self._broker.lead(one, self._parking, self._destination(one))
        self._lead_delayed()
        self._tell(Step.REFILL, f"moving about {_counted(look.depth(self._parking), 'message')} back")
        with Mover(self._settings.broker, self._parking, self._name) as mover:
            self._settle(mover, look.parked)
            self._returned += mover.moved
        self._tell(Step.FINISH, f"deleting {self._parking}, which is empty")
        if self.look().diverted:
            raise ConfigError(f"somebody has bound {self._parking!r} again: run it once more")
        self._broker.delete(self._parking)
        self.under_way = False

    def _destination(self, one: Binding) -> str:
        """Where a binding leads afterwards: to the queue, or, for the ladder's foot, to what stands before it.

        A queue with a length limit takes delayed messages by way of another one, which is made if need be.
        """
        if one.source != deliver_exchange(self._prefix) or not refuses_when_full(self.wanted.arguments):
            return self._name
        due = due_entity(self._prefix, self._name)
        self._broker.declare(due)
        return due.name

    def _lead_delayed(self) -> None:
        """The other way round: a queue that has no length limit any more gets delayed messages itself."""
        if refuses_when_full(self.wanted.arguments):
            return
        due = due_queue(self._prefix, self._name)
        for one in self._api.topology().bindings:
            if one.destination == due and one.source == deliver_exchange(self._prefix):
                self._broker.lead(one, due, self._name)


def _reason(messages: int, silent: bool) -> str:
    if not silent:
        return (
            "messages come to the queue by its name, by the default exchange, where they cannot be led elsewhere: stop "
            "their senders for a moment, since what is sent while the queue is replaced is lost"
        )
    return f"{_counted(messages, 'message')} held by workers, which is waited for" if messages > 0 else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
