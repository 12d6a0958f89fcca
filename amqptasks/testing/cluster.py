"""A RabbitMQ cluster of private nodes on this machine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self
from urllib.parse import quote

from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.rabbitmq import PrivateNode, free_port
from amqptasks.testing.waiting import wait_until

__all__ = ["PrivateCluster"]

_WRONG = "parted"


class PrivateCluster:
    """Nodes that form one cluster and pause when they are in the minority. Use it as a context manager.

    Args:
        application: settings of the Erlang application ``rabbit``, as `PrivateNode` takes them.

    Attributes:
        nodes: each can be stopped, killed and started alone.
        urls: AMQP URLs of the default virtual host, one a node.
    """

    def __init__(
        self, size: int = 3, *, version: str | None = None, application: Mapping[str, int] | None = None
    ) -> None:
        suffix, epmd_port = secrets.token_hex(3), free_port()
        self._cookie = cookie = secrets.token_hex(16)
        names = [f"node{number}-{suffix}@localhost" for number in range(1, size + 1)]
        config = {
            "cluster_partition_handling": "pause_minority",
            "cluster_formation.peer_discovery_backend": "classic_config",
            **{f"cluster_formation.classic_config.nodes.{n}": name for n, name in enumerate(names, 1)},
        }
        self.nodes = [
            PrivateNode(
                name, config=config, version=version, epmd_port=epmd_port, cookie=cookie, application=application
            )
            for name in names
        ]

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    def __enter__(self) -> Self:
        try:
            with ThreadPoolExecutor(len(self.nodes)) as pool:
                list(pool.map(PrivateNode.start, self.nodes))
            self.wait_complete()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """End all nodes and delete their folders."""
        for node in self.nodes:
            node.kill()
        self.nodes[0].end_epmd()
        for node in self.nodes:
            node.delete()

    def wait_complete(self, timeout: float = 60.0) -> None:
        """Wait until every node knows that all run."""

        def complete() -> bool:
            try:
                found = [Management(node.management_url).request("GET", "nodes") for node in self.nodes]
            except (ManagementError, OSError):
                return False
            return all(sum(bool(one.get("running")) for one in nodes) == len(self.nodes) for nodes in found)

        wait_until(complete, timeout, "all nodes of the cluster run", pause=0.2)

    def isolate(self, node: PrivateNode) -> None:
        """Part a node from the others, as a broken network does; clients still reach it. Until `rejoin`.

        It gets another cookie, and nodes without a common cookie do not talk (Erlang, distributed protocol).
        """
        node.rabbitmqctl(
            "eval",
            f"erlang:set_cookie('{_WRONG}'), erlang:set_cookie(node(), '{_WRONG}'), "
            "[erlang:disconnect_node(Other) || Other <- nodes()].",
        )

    def rejoin(self, node: PrivateNode) -> None:
        """End what `isolate` began."""
        node.rabbitmqctl("--erlang-cookie", _WRONG, "eval", f"erlang:set_cookie(node(), '{self._cookie}').")

    def leader(self, queue: str, vhost: str = "/") -> PrivateNode:
        """The node that leads a quorum queue."""

        path = f"queues/{quote(vhost, safe='')}/{quote(queue, safe='')}"

        def look() -> PrivateNode | None:
            for node in self.nodes:
                try:
                    name = Management(node.management_url).request("GET", path).get("leader")
                except (ManagementError, OSError):
                    continue
                return next((one for one in self.nodes if one.name == name and one.runs), None)
            return None

        found = wait_until(look, 30, f"{queue} has a leader", pause=0.2)
        assert found is not None
        return found
