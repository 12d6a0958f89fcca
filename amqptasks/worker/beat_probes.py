"""Probes and metrics of a beat that is a process of its own (`amqptasks beat --http`).

The beat's loop tells each second how it is; a thread serves what it told last, so that a probe waits for nothing, and
a loop that stands still is seen by the age of its last word.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from datetime import datetime

from prometheus_client import CONTENT_TYPE_LATEST

from amqptasks import __version__
from amqptasks.events import BeatPulse, Bus
from amqptasks.worker.health import ALIVE_SECONDS, READY_SECONDS, Verdict, beat_problem
from amqptasks.worker.listening import Listening
from amqptasks.worker.metrics import Samples, resident_bytes
from amqptasks.worker.web import Page, serve, verdict_page

__all__ = ["BeatProbes"]


class BeatProbes:
    """Judges, and serves. Everything but `start` belongs to the server's threads."""

    def __init__(self, hostname: str, listening: Listening, bus: Bus) -> None:
        self._hostname = hostname
        self._listening = listening
        self._started = time.time()
        #: When the loop told something last (`time.monotonic`), and what.
        self._last: tuple[float, BeatPulse] | None = None
        self._was_ready = False
        bus.subscribe(BeatPulse, self._pulsed)

    def start(self) -> None:
        """Serve from now on: also while the beat waits for its broker."""
        pages = {
            "/livez": verdict_page(self.live),
            "/readyz": verdict_page(self.ready),
            "/startupz": verdict_page(self.started),
            "/metrics": self._metrics,
        }
        threading.Thread(target=serve, args=(self._listening.socket, pages), name="http", daemon=True).start()

    def _pulsed(self, pulse: BeatPulse) -> None:
        self._was_ready = self._was_ready or pulse.connected
        self._last = (time.monotonic(), pulse)

    # -- verdicts -------------------------------------------------------------------------------------------------

    def live(self) -> Verdict:
        """Whether the beat's loop turns. A broker that is away does not matter."""
        last = self._last
        age = 0.0 if last is None else time.monotonic() - last[0]
        return self._verdict(f"its loop has stood still for {age:.0f} s" if age > ALIVE_SECONDS else None)

    def ready(self) -> Verdict:
        """Whether the beat leads, or stands by."""
        last = self._last
        if last is None:
            return self._verdict("waiting for the broker")
        if (age := time.monotonic() - last[0]) > READY_SECONDS:
            return self._verdict(f"its loop has stood still for {age:.0f} s")
        pulse = last[1]
        return self._verdict(beat_problem(pulse.connected, _seconds(pulse.next_due)), leads=pulse.leads)

    def started(self) -> Verdict:
        """Whether the broker has known this beat once."""
        return self._verdict(None if self._was_ready else "the broker does not know this beat yet")

    def _verdict(self, problem: str | None, **more: bool) -> Verdict:
        problems = [] if problem is None else [problem]
        word = "failing" if problems else "ok"
        return not problems, {"status": word, "hostname": self._hostname, "problems": problems, **more}

    # -- metrics --------------------------------------------------------------------------------------------------

    def _metrics(self) -> Page:
        samples = Samples()
        samples.put("amqptasks_build_info", 1, __version__, platform.python_version())
        samples.put("amqptasks_start_time_seconds", self._started)
        samples.put("amqptasks_ready", self.ready()[0])
        samples.put("amqptasks_resident_bytes", resident_bytes(os.getpid()), "beat", "")
        last = self._last
        if last is None or time.monotonic() - last[0] > READY_SECONDS:
            samples.beat(connected=False, leads=False, tick=None, due=None)
        else:
            pulse = last[1]
            samples.beat(
                connected=pulse.connected,
                leads=pulse.leads,
                tick=_seconds(pulse.last_tick),
                due=_seconds(pulse.next_due),
            )
        return Page(200, CONTENT_TYPE_LATEST, samples.text())


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()
