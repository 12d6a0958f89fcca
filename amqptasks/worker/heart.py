"""Events about the worker itself: online, heartbeat, offline. Sent by the desk, and only while events are on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks import __version__
from amqptasks.broker.event_channel import EventChannel
from amqptasks.broker.link import Link
from amqptasks.protocol.events import event, routing_key
from amqptasks.worker.event_switch import EventSwitch

__all__ = ["Heart"]

#: Monitors take a worker for gone that was silent for twice as long.
_SECONDS = 2.0
#: What an answer to a monitor that asked once promises, as Celery's does.
_ASKED_SECONDS = 5.0

#: (method, arguments, called with the supervisor's answer)
Ask = Callable[[str, dict[str, Any], Callable[[Mapping[str, Any]], None]], None]


class Heart:
    """Belongs to the desk's loop."""

    def __init__(self, switch: EventSwitch, link: Link, node: str, ask: Ask) -> None:
        self._switch = switch
        self._node = node
        self._pid = os.getppid()
        self._ask = ask
        self._channel = EventChannel(link, node, on_open=self._opened)
        self._loop = link.loop
        self._beating = False
        self._asked = False

    def start(self) -> None:
        """Beat, if events are on: they may have been turned on before this process was started."""
        if self._switch.on:
            self._channel.open()
            self._go_on()

    def enable(self) -> bool:
        """Turn events on. Returns whether they were off."""
        if self._switch.on:
            return False
        self._switch.set(True)
        self._channel.open()
        self._tell("worker-online")
        self._go_on()
        return True

    def disable(self) -> bool:
        """Turn events off. Returns whether they were on."""
        was_on = self._switch.on
        self._switch.set(False)
        return was_on

    def beat_once(self) -> None:
        """A monitor asks who is there."""
        self._channel.open()
        self._asked = True
        self._tell("worker-heartbeat", _SECONDS if self._switch.on else _ASKED_SECONDS)

    def stop(self) -> None:
        """The worker ends."""
        if self._switch.on:
            self._send("worker-offline", _SECONDS, {})
        self._switch.set(False)

    def _opened(self) -> None:
        if self._switch.on:
            self._tell("worker-online")
        elif self._asked:
            self._tell("worker-heartbeat", _ASKED_SECONDS)

    def _go_on(self) -> None:
        if not self._beating:
            self._beating = True
            self._loop.call_later(_SECONDS, self._beat)

    def _beat(self) -> None:
        self._beating = self._switch.on
        if self._beating:
            self._loop.call_later(_SECONDS, self._beat)
            self._tell("worker-heartbeat")

    def _tell(self, kind: str, frequency: float = _SECONDS) -> None:
        """Ask the leaders what they do, and tell it."""

        def answered(answer: Mapping[str, Any]) -> None:
            states = [one for one in answer["queues"].values() if "totals" in one]
            active = sum(one["running"] for one in states)
            processed = sum(sum(one["totals"].values()) for one in states)
            self._send(kind, frequency, {"active": active, "processed": processed})

        self._ask("state", {}, answered)

    def _send(self, kind: str, frequency: float, counts: dict[str, int]) -> None:
        fields = {
            "freq": frequency,
            **counts,
            "loadavg": [round(one, 2) for one in os.getloadavg()],
            "sw_ident": "amqptasks",
            "sw_ver": __version__,
            "sw_sys": platform.system(),
        }
        if self._channel.send(routing_key(kind), event(kind, self._node, self._pid, self._switch.tick(), fields)):
            self._asked = False
