"""The desk: the process that speaks for a worker, so that no leader has to.

It answers remote control and tells monitors that the worker is there, on a connection of its own, and serves probes and
metrics over HTTP. It runs no task; when it dies, tasks go on, and the supervisor starts another.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amqptasks.app import AmqpTasks
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.mailbox import Mailbox
from amqptasks.broker.parameters import connection_parameters
from amqptasks.worker.control import Channel, Command, News
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.heart import Heart
from amqptasks.worker.listening import Listening
from amqptasks.worker.pidbox import Answer, RemoteControl
from amqptasks.worker.probes import Probes
from amqptasks.worker.process import set_title

__all__ = ["TITLE", "DeskSetup", "run_desk"]

#: What `ps` and `top` call it.
TITLE = "amqptasks-desk"
_CLOSE_SECONDS = 1.0
_MOST_ASKED = 500


@dataclass(frozen=True, slots=True)
class DeskSetup:
    """What the desk inherits over the fork."""

    app: AmqpTasks
    hostname: str
    #: When the worker started (`time.time`).
    started: float
    events: EventSwitch
    #: Where probes and metrics are served; None for nowhere.
    listening: Listening | None = None


def run_desk(setup: DeskSetup, control: socket.socket) -> int:
    """The life of the desk. Returns its exit code."""
    set_title(TITLE)
    return _Desk(setup, control).run()


class _Desk:
    """Mailbox, remote control, and the line to the supervisor, on one loop."""

    def __init__(self, setup: DeskSetup, control: socket.socket) -> None:
        self._loop = new_loop()
        self._control = Channel(control)
        self._ticket = 0
        self._asked: dict[int, Callable[[Answer], None]] = {}
        settings = setup.app.settings
        self._link: Link | None = None
        if settings.worker.remote_control or setup.events.on:
            name = f"amqptasks/desk/{setup.hostname}/{os.getpid()}"
            self._link = link = Link(self._loop, connection_parameters(settings.broker, name))
            self._heart = heart = Heart(setup.events, link, setup.hostname, self._ask)
            self._remote = RemoteControl(setup.app, setup.hostname, setup.started, self._ask, heart, setup.events)
            self._mailbox = Mailbox(setup.hostname, on_request=self._request, call_later=self._loop.call_later)
            if settings.worker.remote_control:
                link.watch(self._mailbox.up, lambda _error: self._mailbox.down())
        self._probes = None if setup.listening is None else Probes(setup, setup.listening, self._loop, self._ask)

    def run(self) -> int:
        self._loop.add_handler(self._control.fileno(), self._told, self._loop.READ)
        if self._link is not None:
            self._link.open()
            self._heart.start()
        if self._probes is not None:
            self._probes.start()
        self._loop.start()
        return 0

    def _told(self, _fd: int, _events: int) -> None:
        messages = self._control.receive()
        if messages is None:
            self._stop()
            return
        for message in messages:
            if message[0] == Command.STOP:
                self._stop()
            elif message[0] == News.ANSWER:
                answered = self._asked.pop(message[1], None)
                if answered is not None:
                    answered(message[2])

    def _request(self, body: bytes, headers: dict[str, Any]) -> None:
        if len(self._asked) < _MOST_ASKED:  # the supervisor stands still: who asks gets no answer, and asks again
            self._remote.request(body, headers, self._mailbox.reply)

    def _ask(self, method: str, arguments: dict[str, Any], reply: Callable[[Answer], None]) -> None:
        self._ticket += 1
        self._asked[self._ticket] = reply
        self._control.deliver(self._loop.call_later, Command.ASK, self._ticket, method, arguments)

    def _stop(self) -> None:
        self._loop.remove_handler(self._control.fileno())
        link = self._link
        if link is not None:
            self._heart.stop()
            link.close()
        deadline = time.monotonic() + _CLOSE_SECONDS

        def leave() -> None:
            if link is not None and link.is_open and time.monotonic() < deadline:
                self._loop.call_later(0.01, leave)
            else:
                self._loop.stop()

        leave()
