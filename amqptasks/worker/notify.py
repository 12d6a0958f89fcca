"""What a service manager is told: started, reloading, stopping, still alive (systemd's sd_notify protocol).

A datagram of ``NAME=value`` lines to the socket that ``NOTIFY_SOCKET`` names (systemd, sd_notify(3)). Without that
variable nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

import structlog

__all__ = ["Notifier"]

_log = structlog.get_logger("amqptasks.worker")


class Notifier:
    """The line to the service manager that started this process.

    Args:
        environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` stand.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        #: Seconds between two signs of life: half of what the manager waits; None where it does not watch.
        self.interval = _watchdog(environ) if self._address else None

    def ready(self, status: str) -> None:
        """The service is up, or up again after `reloading`."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """New code and settings are being loaded; `ready` ends it."""
        # systemd compares the time with its own: the same clock for all processes.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """The service begins to stop."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """A line for people, in `systemctl status`."""
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the null byte of Linux's abstract namespace.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.settimeout(1.0)
                line.sendto(message.encode(), address)
        except OSError as error:
            _log.warning("The service manager cannot be told", error=str(error), state=message.partition("\n")[0])


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """``WATCHDOG_USEC`` (microseconds) halved, in seconds, if it is meant for this process (sd_watchdog_enabled(3))."""
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", "0"))
        pid = int(environ.get("WATCHDOG_PID", "0"))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and pid in (0, os.getpid()) else None
