"""The socket that probes and metrics are served on.

It is opened before anything else, so that an address that cannot be used ends the start, and belongs to the
supervisor, so that no request is refused while a process behind it is replaced.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from amqptasks.errors import ConfigError

__all__ = ["Listening", "listen"]

_BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Listening:
    """An address and the socket that listens there."""

    address: str
    socket: socket.socket

    @property
    def descriptors(self) -> frozenset[int]:
        """Of the socket."""
        return frozenset({self.socket.fileno()})

    def hand_over(self) -> tuple[str, int]:
        """For the program that replaces this one: it stays open."""
        os.set_inheritable(self.socket.fileno(), True)
        return self.address, self.socket.fileno()

    @classmethod
    def adopted(cls, address: str, descriptor: int) -> Listening:
        """What `hand_over` gave."""
        os.set_inheritable(descriptor, False)
        return cls(address, socket.socket(fileno=descriptor))


def listen(address: str | None, old: Listening | None = None, *, name: str = "worker.http") -> Listening | None:
    """Listen on ``HOST:PORT``; on `old` when that is its address. None for None. Raises `ConfigError` with the name of
    the setting.
    """
    if old is not None and old.address == address:
        return old
    if old is not None:
        old.socket.close()
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host or "0.0.0.0", int(port)), family=family, backlog=_BACKLOG)  # noqa: S104 - `:PORT`
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]  # Python says the address once more
        raise ConfigError(f"{name}: cannot listen on {address}: {why}") from None
    return Listening(address, made)
