"""Faults to inject while work goes on: each is done, and undone, by one call.

    scene = Scene(node, proxy, workers=[start(), start()], start=start)
    FAULTS["leader killed"](scene, random.Random(seed))

The proxy stands between the broker and whom it is to part from it. `amqptasks.testing.ledger` says what came of it.

`FAULTS` are those of any scene with publishers; what must not be mixed with them stands apart: `DELETIONS` (messages go
with their queue), `DISK_FAULTS` (want `Scene.disk`), `CLUSTER_FAULTS` (want `Scene.cluster`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from amqptasks.broker.counts import queue_counts
from amqptasks.config import BrokerSettings
from amqptasks.testing.cluster import PrivateCluster
from amqptasks.testing.disks import SmallDisk
from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.workers import WorkerProcess

__all__ = ["CLUSTER_FAULTS", "DELETIONS", "DISK_FAULTS", "FAULTS", "Fault", "Scene"]

_LENGTH = 1.5
#: For long enough that the nodes of a cluster and their clients give the silent one up.
_LONG = 8.0
#: A round trip in a far network, and a slow one.
_DELAYS = (0.1, 0.5)


@dataclass(frozen=True)
class Deletion:
    """A queue was deleted between two moments (seconds of the epoch); `stood` messages stood in it at the first."""

    counted: float
    deleted: float
    stood: int


@dataclass
class Scene:
    """What faults are done to.

    Attributes:
        start: starts a worker in the place of one that has ended.
        publishers: processes that publish, if there are any to kill.
        start_publisher: starts a process that publishes in the place of one that has ended.
        queue: what workers consume here.
        deletions: what is known of each time that queue was deleted.
        disk: what the node's data lies on. Let the alarm of that node (``disk_free_limit.absolute``) come too late.
        cluster: what the node is one of.
    """

    node: PrivateNode
    proxy: TcpProxy
    workers: list[WorkerProcess]
    start: Callable[[], WorkerProcess]
    publishers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    start_publisher: Callable[[], subprocess.Popen[bytes]] | None = None
    queue: str = "default"
    deletions: list[Deletion] = field(default_factory=list)
    disk: SmallDisk | None = None
    cluster: PrivateCluster | None = None

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


def kill_publisher(scene: Scene, dice: random.Random) -> None:
    """SIGKILL to a process that publishes; another starts."""
    if scene.publishers and scene.start_publisher is not None:
        number = dice.randrange(len(scene.publishers))
        scene.publishers[number].kill()
        scene.publishers[number].wait(10)
        scene.publishers[number] = scene.start_publisher()


def freeze_publisher(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP for a moment: nobody reads confirms."""
    if scene.publishers:
        _frozen(dice.choice(scene.publishers).pid)


def freeze_supervisor(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP for a moment: nobody replaces what ends."""
    _frozen(dice.choice(scene.workers).process.pid)


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


def delay_connections(scene: Scene, dice: random.Random) -> None:
    """Everything comes late for a moment, as from another continent or over a bad line."""
    scene.proxy.delay(dice.uniform(*_DELAYS))
    time.sleep(_LENGTH)
    scene.proxy.delay(0)


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


def freeze_broker(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP to the node for a moment: its connections stay open, and nothing comes."""
    scene.node.freeze()
    time.sleep(_LENGTH)
    scene.node.thaw()


def revoke_permissions(scene: Scene, dice: random.Random) -> None:
    """The user may do nothing for a moment. Connections are closed, since channels remember what was permitted."""
    management = Management(scene.node.management_url)
    management.permit(management.user, "^$", "^$", "^$")
    close_connections(scene, dice)
    time.sleep(_LENGTH)
    management.permit(management.user)


def delete_queue(scene: Scene, dice: random.Random) -> None:
    """Delete the queue that workers consume, with what stands in it."""
    management = Management(scene.node.management_url)
    with contextlib.suppress(ManagementError):  # nobody has declared it anew yet
        ready, unacked = management.counts(scene.queue)
        counted = time.time()
        # The management's count is as old as a quorum queue's last tick, the other one is not, but may be 0 (busy).
        now = queue_counts(BrokerSettings.model_validate({"url": scene.node.url}), [scene.queue])[scene.queue]
        stood = unacked + max(ready, now[0] if now else 0)
        management.delete_queue(scene.queue)
        scene.deletions.append(Deletion(counted, time.time(), stood))
    time.sleep(_LENGTH)


def fill_disk(scene: Scene, dice: random.Random) -> None:
    """No byte is left for a moment. RabbitMQ before 4 takes messages again only after a restart, so it gets one."""
    assert scene.disk is not None, "this fault wants a disk that can be filled"
    scene.disk.fill(leave=0)
    time.sleep(_LENGTH)
    scene.disk.clear()
    scene.node.restart()


def _leading(scene: Scene) -> tuple[PrivateCluster, PrivateNode]:
    assert scene.cluster is not None, "this fault wants a cluster"
    return scene.cluster, scene.cluster.leader(scene.queue)


def kill_node(scene: Scene, dice: random.Random) -> None:
    """SIGKILL to the node that leads the queue, and a start after a while."""
    cluster, node = _leading(scene)
    node.kill()
    time.sleep(_LENGTH)
    node.start()
    cluster.wait_complete()


def part_node(scene: Scene, dice: random.Random) -> None:
    """Part the node that leads the queue from the others for a while. Clients reach all of them."""
    cluster, node = _leading(scene)
    cluster.isolate(node)
    time.sleep(_LONG)
    cluster.rejoin(node)
    cluster.wait_complete()


def freeze_node(scene: Scene, dice: random.Random) -> None:
    """SIGSTOP to the node that leads the queue for a while."""
    cluster, node = _leading(scene)
    node.freeze()
    time.sleep(_LONG)
    node.thaw()
    cluster.wait_complete()


FAULTS: dict[str, Fault] = {
    "executor killed": kill_executor,
    "leader killed": kill_leader,
    "worker killed": kill_worker,
    "worker terminated": terminate_worker,
    "publisher killed": kill_publisher,
    "executor frozen": freeze_executor,
    "leader frozen": freeze_leader,
    "supervisor frozen": freeze_supervisor,
    "publisher frozen": freeze_publisher,
    "connections cut": cut_connections,
    "connections stalled": stall_connections,
    "connections delayed": delay_connections,
    "connections closed by the broker": close_connections,
    "permissions revoked": revoke_permissions,
    "memory alarm": memory_alarm,
    "disk alarm": disk_alarm,
    "broker frozen": freeze_broker,
    "broker killed": kill_broker,
    "broker restarted": restart_broker,
}

DELETIONS: dict[str, Fault] = {"queue deleted": delete_queue}

DISK_FAULTS: dict[str, Fault] = {"disk full": fill_disk}

CLUSTER_FAULTS: dict[str, Fault] = {
    "leading node killed": kill_node,
    "leading node parted from the others": part_node,
    "leading node frozen": freeze_node,
}
