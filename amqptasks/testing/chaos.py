"""Faults to inject while work goes on: each is done, and undone, by one call.

    scene = Scene(node, proxy, workers=[start(), start()], start=start)
    FAULTS["leader killed"](scene, random.Random(seed))

The proxy stands between the broker and whom it is to part from it. `amqptasks.testing.ledger` says what came of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.workers import WorkerProcess

__all__ = ["FAULTS", "Fault", "Scene"]

_LENGTH = 1.5


@dataclass
class Scene:
    """What faults are done to. `start` starts a worker in the place of one that has ended."""

    node: PrivateNode
    proxy: TcpProxy
    workers: list[WorkerProcess]
    start: Callable[[], WorkerProcess]

    def replace(self, worker: WorkerProcess) -> None:
        """Start another worker for one that has ended."""
        self.workers[self.workers.index(worker)] = self.start()


Fault = Callable[[Scene, random.Random], None]


def _one_of(dice: random.Random, processes: list[psutil.Process]) -> int | None:
    return dice.choice(processes).pid if processes else None


def _signal(pid: int | None, number: signal.Signals) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _frozen(pid: int | None) -> None:
    _signal(pid, signal.SIGSTOP)
    time.sleep(_LENGTH)
    _signal(pid, signal.SIGCONT)


def kill_executor(scene: Scene, dice: random.Random) -> None:
    """SIGKILL, as the kernel does when memory is short."""
    _signal(_one_of(dice, dice.choice(scene.workers).executors()), signal.SIGKILL)


def kill_leader(scene: Scene, dice: random.Random) -> None:
    """SIGKILL to the process that owns the connection."""
    _signal(_one_of(dice, dice.choice(scene.workers).leaders()), signal.SIGKILL)


def kill_worker(scene: Scene, dice: random.Random) -> None:
    """SIGKILL to a supervisor; its processes end with it, and another worker starts."""
    worker = dice.choice(scene.workers)
    worker.kill()
    scene.replace(worker)


def terminate_worker(scene: Scene, dice: random.Random) -> None:
    """SIGTERM, as Kubernetes does."""
    worker = dice.choice(scene.workers)
    worker.stop()
    scene.replace(worker)


def freeze_executor(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP for a moment."""
    _frozen(_one_of(dice, dice.choice(scene.workers).executors()))


def freeze_leader(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP for a moment: nobody answers the broker."""
    _frozen(_one_of(dice, dice.choice(scene.workers).leaders()))


def cut_connections(scene: Scene, dice: random.Random) -> None:
    """Reset all connections that go through the proxy."""
    scene.proxy.cut()


def stall_connections(scene: Scene, dice: random.Random) -> None:
    """Nothing comes through for a moment, and nobody is told."""
    scene.proxy.stall()
    time.sleep(_LENGTH)
    scene.proxy.resume()


def close_connections(scene: Scene, dice: random.Random) -> None:
    """The broker closes all connections, as an operator can have it do."""
    management = Management(scene.node.management_url)
    for connection in management.connections():
        with contextlib.suppress(ManagementError):
            management.close_connection(connection["name"])


def memory_alarm(scene: Scene, dice: random.Random) -> None:
    """The broker stops reading from those who publish."""
    scene.node.rabbitmqctl("set_vm_memory_high_watermark", "0.0000001")
    time.sleep(_LENGTH)
    scene.node.rabbitmqctl("set_vm_memory_high_watermark", "0.4")


def disk_alarm(scene: Scene, dice: random.Random) -> None:
    """The same, for the disk."""
    scene.node.rabbitmqctl("set_disk_free_limit", "1000000000000000")
    time.sleep(_LENGTH)
    scene.node.rabbitmqctl("set_disk_free_limit", "50000000")


def kill_broker(scene: Scene, dice: random.Random) -> None:
    """SIGKILL to the node, and a start."""
    scene.node.kill()
    scene.node.start()


def restart_broker(scene: Scene, dice: random.Random) -> None:
    """A stop in good order, and a start."""
    scene.node.restart()


FAULTS: dict[str, Fault] = {
    "executor killed": kill_executor,
    "leader killed": kill_leader,
    "worker killed": kill_worker,
    "worker terminated": terminate_worker,
    "executor frozen": freeze_executor,
    "leader frozen": freeze_leader,
    "connections cut": cut_connections,
    "connections stalled": stall_connections,
    "connections closed by the broker": close_connections,
    "memory alarm": memory_alarm,
    "disk alarm": disk_alarm,
    "broker killed": kill_broker,
    "broker restarted": restart_broker,
}
