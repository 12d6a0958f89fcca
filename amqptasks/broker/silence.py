"""Confirms that do not come, or a channel that does not open, though the connection lives.

A channel of a cluster may never hear what became of its messages: the queue's leader stood still, and somebody else
leads now. Another queue may answer all the while. To send everything again on suspicion would run tasks twice, so one
message is sent again, on a new channel, as a test; when it is confirmed and others still are not, they follow. When
nothing at all is confirmed, the next node is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from amqptasks.broker.flight import Flight
from amqptasks.broker.pending import Pending

__all__ = ["Silence"]

#: What was on its way at the last look already is overdue.
_LOOK_SECONDS = 3.0
#: A test is given so long at first.
_TEST_SECONDS = 0.5
#: Without any confirm for so long, the next node; then for twice as long, and so on.
_PATIENCE_FIRST, _PATIENCE_MOST = 30.0, 600.0
#: After so many deadlines that passed meanwhile, it may be sooner.
_DEADLINES, _DEADLINES_SECONDS = 3, 5.0
#: A node that answers heartbeats, and for so long no channel.open, is left.
_OPEN_SECONDS = 10.0


class Silence:
    """Looks for overdue messages while there are any on their way, and for a channel while there is none.

    Args:
        flights: the channels in use, the current one last.
        opening: whether there is a connection, and no channel yet.
        again: sends messages again, before others; on a new channel, if the second argument is true.
        leave: leaves the node; called with the reason.
    """

    def __init__(
        self,
        loop: Any,
        *,
        flights: Callable[[], list[Flight]],
        opening: Callable[[], bool],
        blocked: Callable[[], bool],
        again: Callable[[list[Pending], bool], None],
        leave: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._flights = flights
        self._opening = opening
        self._blocked = blocked
        self._again = again
        self._leave = leave
        self._patience = _PATIENCE_FIRST
        self._passed, self._passed_since = 0, 0.0
        #: `time.monotonic` of the last confirm, or of what may be late since.
        self.heard_at = 0.0
        self._looking = False

    def begin(self) -> None:
        """Messages are on their way from now on, or a channel was asked for."""
        self.heard_at = time.monotonic()
        if not self._looking:
            self._plan()

    def deadlines_passed(self) -> None:
        """Messages were given up."""
        if self._passed_since != self.heard_at:
            self._passed, self._passed_since = 0, self.heard_at
        self._passed += 1
        quiet = time.monotonic() - self.heard_at
        if self._passed >= _DEADLINES and quiet >= _DEADLINES_SECONDS:
            self._passed = 0
            self._leave(f"no confirm for {quiet:.0f} s")

    def _plan(self) -> None:
        self._looking = True
        self._loop.call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = False
        flights = [one for one in self._flights() if one.unconfirmed]
        opening = self._opening()
        if not flights and not opening:
            return
        self._plan()
        now = time.monotonic()
        if self._blocked():
            self.heard_at = now
            for flight in flights:
                flight.looked_at = flight.tag
            return
        quiet = now - self.heard_at
        if opening and quiet > _OPEN_SECONDS:
            self._leave(f"no channel for {quiet:.0f} s")
            return
        if quiet < _LOOK_SECONDS:
            self._patience = _PATIENCE_FIRST
        elif quiet > self._patience:
            self._patience = min(self._patience * 2, _PATIENCE_MOST)
            self.heard_at = now
            self._leave(f"no confirm for {quiet:.0f} s")
            return
        self._follow_tests()
        tested = {key for one in flights for key in one.tests}
        for flight in flights:
            first = {key: tags[0] for key, tags in flight.unconfirmed_keys(flight.looked_at).items()}
            tests = {key: flight.unconfirmed[tag] for key, tag in first.items() if key not in tested}
            flight.looked_at = flight.tag
            if tests:
                tested |= tests.keys()
                flight.tests |= tests
                self._again(list(tests.values()), flight is self._flights()[-1])
        if tested:
            self._loop.call_later(_TEST_SECONDS, self._follow_tests)

    def _follow_tests(self) -> None:
        """Where a test is confirmed and others are not, the channel is deaf."""
        for flight in self._flights():
            passed = [key for key, test in flight.tests.items() if test.done is None]
            waiting = flight.unconfirmed_keys(flight.tag) if passed else {}
            for key in passed:
                del flight.tests[key]
                self._again([flight.unconfirmed.pop(tag) for tag in waiting.get(key, ())], False)
