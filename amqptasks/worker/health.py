"""Whether the worker lives, is ready, has started: what the desk knows of it, and what that means.

The desk asks the supervisor every second, which asks every leader. A probe reads the last answers, so that it waits
for nothing, and their age tells whose loop does not turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALIVE_SECONDS", "READY_SECONDS", "Ask", "Health", "Snapshot", "Verdict", "beat_problem", "starting"]

#: The desk asks so often.
POLL_SECONDS = 1.0
#: A leader that has not answered for so long is not ready, or not alive. It answers within milliseconds, whatever its
#: executors do; one that dies has a successor within 10 s.
READY_SECONDS, ALIVE_SECONDS = 5.0, 20.0
#: A beat whose tick is late by more does not work, however alive it is.
LATE_SECONDS = 60.0
#: The supervisor answers within 0.6 s, whatever its leaders do.
SUPERVISOR_SECONDS = 10.0

#: Whether it is well, and the JSON that says so.
Verdict = tuple[bool, dict[str, Any]]
#: Asks the supervisor: method, arguments, and what gets the answer.
Ask = Callable[[str, dict[str, Any], Callable[[Mapping[str, Any]], None]], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known. Times are `time.monotonic`."""

    #: When the supervisor answered last, or the desk started.
    heard: float
    worker: Mapping[str, Any] = field(default_factory=dict)
    #: By queue: when its leader answered last (or was first heard of), and its last answer.
    queues: Mapping[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)


class Health:
    """Asks, and judges. `start` belongs to the loop's thread; everything else may be called from any."""

    def __init__(self, hostname: str, ask: Ask, call_later: Callable[[float, Callable[[], None]], Any]) -> None:
        self._hostname = hostname
        self._ask = ask
        self._call_later = call_later
        self._asking = False
        self.snapshot = Snapshot(time.monotonic())

    def start(self) -> None:
        """Ask now, and every second from now on."""
        self._call_later(POLL_SECONDS, self.start)
        if not self._asking:
            self._asking = True
            self._ask("health", {}, self._answered)

    def _answered(self, answer: Mapping[str, Any]) -> None:
        self._asking = False
        now = time.monotonic()
        before, queues = self.snapshot.queues, {}
        for queue in answer["worker"]["groups"]:
            state = answer["queues"].get(queue)
            queues[queue] = before.get(queue, (now, {})) if state is None else (now, state)
        self.snapshot = Snapshot(now, answer["worker"], queues)

    # -- verdicts -------------------------------------------------------------------------------------------------

    def live(self) -> Verdict:
        """Whether the supervisor's loop and every leader's turn. A broker that is away does not matter."""
        now, known = time.monotonic(), self.snapshot
        problems = []
        if now - known.heard > SUPERVISOR_SECONDS:
            problems.append(f"the supervisor has not answered for {now - known.heard:.0f} s")
        elif not known.worker.get("draining"):
            for queue, (heard, _) in known.queues.items():
                if now - heard > ALIVE_SECONDS:
                    problems.append(f"queue {queue!r}: its leader has not answered for {now - heard:.0f} s")
            beat = known.worker.get("helpers", {}).get("beat", {}).get("pulse")
            if beat and beat["age"] > ALIVE_SECONDS:
                problems.append(f"process 'beat': has not answered for {beat['age']:.0f} s")
        return self._verdict(problems)

    def ready(self) -> Verdict:
        """Whether every queue is consumed, and every helper process runs."""
        known = self.snapshot
        problems = []
        if not known.worker:
            problems.append("the worker is starting")
        elif time.monotonic() - known.heard > READY_SECONDS:
            problems.append("the supervisor does not answer")
        elif known.worker["draining"]:
            problems.append("the worker is stopping")
        elif not known.queues:
            problems.append("no queue is consumed")
        for queue in known.queues:
            problem = self._problem(queue)
            if problem is not None:
                problems.append(f"queue {queue!r}: {problem}")
        for name, helper in known.worker.get("helpers", {}).items():
            problem = _helper_problem(name, helper)
            if problem is not None:
                problems.append(f"process {name!r}: {problem}")
        return self._verdict(problems, queues={queue: self._problem(queue) or "consuming" for queue in known.queues})

    def started(self) -> Verdict:
        """Whether every queue was consumed once."""
        known = self.snapshot
        if known.worker.get("was_ready"):
            return self._verdict([])
        waiting = [queue for queue, group in known.worker.get("groups", {}).items() if not group["ready"]]
        return self._verdict(["not consuming yet: " + (", ".join(map(repr, waiting)) or "the worker is starting")])

    def _problem(self, queue: str) -> str | None:
        heard, state = self.snapshot.queues[queue]
        if not state:
            return "its leader is starting"
        if time.monotonic() - heard > READY_SECONDS:
            return "its leader does not answer"
        if not state["connected"]:
            return "not connected to the broker"
        if not (state["consuming"] or state["paused"]):
            return "connected, and the broker has no consumer of it"
        return None

    def _verdict(self, problems: list[str], **more: Any) -> Verdict:
        word = "failing" if problems else "ok"
        return not problems, {"status": word, "hostname": self._hostname, "problems": problems, **more}


def _helper_problem(name: str, helper: Mapping[str, Any]) -> str | None:
    if not helper["pid"]:
        return "has died and is being replaced"
    if name != "beat":
        return None
    pulse = helper["pulse"]
    if pulse["age"] > READY_SECONDS:
        return "does not answer"
    return beat_problem(bool(pulse.get("connected")), pulse.get("next_due"))


def beat_problem(connected: bool, next_due: float | None) -> str | None:
    """What is wrong with a beat whose loop turns. `next_due` in seconds since the epoch."""
    if not connected:
        return "not connected to the broker"
    late = 0.0 if next_due is None else time.time() - next_due
    return f"it leads, and its next tick is {late:.0f} s late" if late > LATE_SECONDS else None


def starting(hostname: str) -> dict[str, Callable[[], Verdict]]:
    """The probes while the worker waits for its broker, before there are leaders."""
    why = {"status": "failing", "hostname": hostname, "problems": ["waiting for the broker"]}

    return {
        "/livez": lambda: (True, {"status": "ok", "hostname": hostname, "problems": []}),
        "/readyz": lambda: (False, why),
        "/startupz": lambda: (False, why),
    }
