"""The process of a beat: one loop, one connection that comes back, and no task."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.beat.calls import TickCalls
from amqptasks.beat.leadership import Leadership
from amqptasks.beat.roster import Roster
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.errors import AmqpTasksError, BrokerError
from amqptasks.events import BeatPulse, Bus
from amqptasks.periodic import Entry

__all__ = ["BEAT_TITLE", "BeatSetup", "run_beat", "run_beat_here"]

#: A leader that hangs is given up by the broker after two to three of these seconds: leadership passes within ten.
_HEARTBEAT = 3
#: What `ps` and `top` call it.
BEAT_TITLE = "amqptasks-beat"
_PULSE = 1.0
_REOPEN_FIRST, _REOPEN_MAX = 0.5, 10.0
_CLOSE_SECONDS = 2.0

_log = structlog.get_logger("amqptasks.beat")


@dataclass(frozen=True, slots=True)
class BeatSetup:
    """What a beat needs."""

    app: AmqpTasks
    bus: Bus
    entries: Sequence[Entry]
    hostname: str
    #: The entries as the settings have them now; None when those cannot be used. Called at SIGHUP.
    reload: Callable[[], Sequence[Entry] | None] | None = None


def run_beat_here(setup: BeatSetup) -> int:
    """Be a beat until SIGTERM, SIGINT or SIGQUIT. Returns the exit code."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def wake(signum: int, frame: FrameType | None) -> None:
        """The byte that Python writes to the socket says it."""

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, wake)
    signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    try:
        return run_beat(setup, theirs, ready=lambda: None)
    finally:
        signal.set_wakeup_fd(-1)


def run_beat(setup: BeatSetup, control: socket.socket, *, ready: Callable[[], None]) -> int:
    """Be a beat until something, or the end, is read from `control`. Returns the exit code.

    `ready` is called when the broker knows this beat, be it as the leader or not.
    """
    return _Beat(setup, control, ready).run()


class _Beat:
    """One beat on one loop."""

    def __init__(self, setup: BeatSetup, control: socket.socket, ready: Callable[[], None]) -> None:
        self._setup = setup
        self._control = control
        self._ready = ready
        self._loop = new_loop()
        settings = setup.app.settings
        heartbeat = min(settings.broker.heartbeat, _HEARTBEAT)
        broker = settings.broker.model_copy(update={"heartbeat": heartbeat})
        name = f"amqptasks/beat/{setup.hostname}/{os.getpid()}"
        self._link = Link(self._loop, connection_parameters(broker, name))
        self._link.watch(self._up, self._down)
        calls = TickCalls(setup.app)
        self._leadership = Leadership(
            Roster(setup.app, calls, setup.entries),
            calls,
            settings.topology.prefix,
            setup.bus,
            call_later=self._loop.call_later,
            cancel=self._loop.remove_timeout,
            on_ready=self._joined,
            on_lost=self._lost,
            on_unknown=self._unable,
        )
        self._connection: Any = None
        self._declaring = False
        self._reopen_seconds = _REOPEN_FIRST
        self._said_ready = False
        self._stopping = False
        self._exit_code = 0

    def run(self) -> int:
        """Run until told to stop."""
        self._control.setblocking(False)
        self._loop.add_handler(self._control.fileno(), self._told, self._loop.READ)
        self._pulse()
        self._link.open()
        self._loop.start()
        _log.info("Beat stopped", exit_code=self._exit_code)
        self._setup.bus.flush()
        return self._exit_code

    # -- connection -----------------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection
        self._leadership.consumer.open(connection)

    def _down(self, error: BrokerError | None) -> None:
        self._connection = None
        if error is not None and not self._stopping:
            _log.warning("Connection lost or refused; trying again", error=str(error))
        self._leadership.consumer.connection_lost(str(error))

    def _joined(self) -> None:
        if not self._said_ready:
            self._said_ready = True
            self._ready()
        self._reopen_seconds = _REOPEN_FIRST
        _log.info("Beat ready.", entries=self._leadership.entries)

    def _lost(self, reason: str, missing: bool) -> None:
        if self._connection is not None and not self._stopping:
            _log.warning("Channel lost", reason=reason)
        if missing:
            self._declare()
        self._loop.call_later(self._reopen_seconds, self._reopen)
        self._reopen_seconds = min(self._reopen_seconds * 2, _REOPEN_MAX)

    def _reopen(self) -> None:
        if self._connection is not None and not self._declaring and not self._stopping:
            self._leadership.consumer.open(self._connection)

    def _declare(self) -> None:
        """Beside the loop, which must not wait for it."""
        if self._declaring:
            return
        self._declaring = True

        def declare() -> None:
            try:
                self._setup.app.declare()
            except AmqpTasksError as error:
                _log.error("Cannot declare the topology", error=str(error))
            self._loop.add_callback_threadsafe(declared)

        def declared() -> None:
            self._declaring = False
            self._loop.call_later(_REOPEN_FIRST, self._reopen)

        threading.Thread(target=declare, name="amqptasks-declare", daemon=True).start()

    # -- life -----------------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        lead = self._leadership
        connected = lead.consumer.consuming
        self._setup.bus.emit(BeatPulse(connected, lead.leads, lead.entries, lead.last_tick, lead.next_due))
        # A line of log that came right behind another one waits for the next, which may be hours away.
        self._setup.bus.flush()
        if not self._stopping:
            self._loop.call_later(_PULSE, self._pulse)

    def _unable(self, why: str) -> None:
        """The state is the broker's again, for a beat that can read it."""
        _log.error("Cannot lead", error=why)
        self._exit_code, self._stopping = 1, True
        self._link.close()
        self._leave(time.monotonic() + _CLOSE_SECONDS)

    def _told(self, _fd: int, _events: int) -> None:
        try:
            told = self._control.recv(64)
        except BlockingIOError:
            return
        if told and set(told) == {signal.SIGHUP} and self._setup.reload is not None:
            # Bytes are numbers of signals where there is something to load (`signal.set_wakeup_fd`).
            entries = self._setup.reload()
            if entries is not None:
                self._leadership.edit(entries)
            return
        self._loop.remove_handler(self._control.fileno())
        self._stopping = True
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._leadership.stop(self._link.close)
        self._leave(deadline)

    def _leave(self, deadline: float) -> None:
        if self._link.is_open and time.monotonic() < deadline:
            self._loop.call_later(0.01, lambda: self._leave(deadline))
            return
        self._loop.stop()
