"""The private node that benchmarks run on, and what the run was made with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import pika

from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.trees import SUITES

__all__ = ["Machine", "machine", "private_node"]


def private_node(version: str | None) -> PrivateNode:
    """A node of a version that there is a tree of, or of the installed one where `version` is None or names that."""
    # As in production: statistics every five seconds.
    return PrivateNode("race", tune=False, version=version if version in SUITES else None)


@dataclass(frozen=True)
class Machine:
    """Where and with what it ran. `load`: of the machine before the run, which should be near nothing."""

    rabbitmq: str
    python: str
    cores: int
    load: float

    @property
    def series(self) -> str:
        """3.10 of 3.10.8."""
        return ".".join(self.rabbitmq.split(".")[:2])

    def __str__(self) -> str:
        return (
            f"RabbitMQ {self.rabbitmq}, Python {self.python}, {self.cores} cores for broker, workers and clients; "
            f"load average before the run {self.load:.1f}"
        )


def machine(url: str, wanted: str | None) -> Machine:
    """What runs here. Raises ValueError when the broker is not of the version that was wanted."""
    load = os.getloadavg()[0]
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        version = connection._impl.server_properties["version"]
    found = Machine(version, platform.python_version(), len(os.sched_getaffinity(0)), load)
    if wanted and found.series != wanted:
        raise ValueError(f"the installed RabbitMQ is {version}; {wanted} has no tree (there are {', '.join(SUITES)})")
    return found
