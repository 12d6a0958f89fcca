"""The result stores' servers of a test run: each is started when a test first needs it, and ends with the run."""

from __future__ import annotations

import os

from amqptasks.testing.servers import MariaDBServer, MemcachedServer, PostgresServer, RedisServer, Server

__all__ = ["MONGODB", "SERVERS", "server_of", "stop_servers"]

SERVERS: dict[str, type[Server]] = {
    "redis": RedisServer,
    "postgresql": PostgresServer,
    "mysql": MariaDBServer,
    "memcached": MemcachedServer,
}
MONGODB = os.environ.get("AMQPTASKS_TEST_MONGODB_URL")

_running: dict[str, Server] = {}


def server_of(kind: str) -> Server:
    """The server of a store, which runs."""
    if kind not in _running:
        _running[kind] = SERVERS[kind]().__enter__()
    return _running[kind]


def stop_servers() -> None:
    """End all of them."""
    for server in _running.values():
        server.__exit__(None, None, None)
    _running.clear()
