"""Suspects: tasks of which one has killed an executor that ran many. They run again one at a time, each alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from amqptasks.worker.delivery import Delivery, Stage
from amqptasks.worker.fleet import Fleet
from amqptasks.worker.handle import ExecutorHandle

__all__ = ["Quarantine"]

#: So many suspects run at a time, each on an executor of its own (a ward).
_WARDS = 4


class Quarantine:
    """Runs suspects on wards: executors beside the others, so that these go on with all that is not suspect.

    Args:
        send: gives a ward its suspect.
    """

    def __init__(self, fleet: Fleet, send: Callable[[ExecutorHandle, list[Delivery]], None]) -> None:
        self._fleet = fleet
        self._send = send
        self.suspects: deque[Delivery] = deque()

    def admit(self) -> None:
        """Give each ward a suspect; make wards while there are suspects for them; let idle ones go."""
        if self._fleet.closing:
            return
        wards = [one for one in self._fleet.executors if one.ward and one.killed is None and one.leaving is None]
        wards += [self._fleet.spawn(ward=True) for _ in range(min(_WARDS, len(self.suspects)) - len(wards))]
        for ward in wards:
            while self.suspects and not ward.inflight:
                delivery = self.suspects.popleft()
                if delivery.stage is Stage.WAITING:
                    self._send(ward, [delivery])
            if not ward.inflight:
                self._fleet.retire(ward, "quarantine")
