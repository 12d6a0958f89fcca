"""A result store that is away, at the start and later: no result is lost, none acknowledged before it is stored."""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amqptasks.results.stores import open_store
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.servers import Server
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.apps.canvas import counted
from integration.conftest import CanvasBench
from integration.store_servers import SERVERS, server_of


class Store(ABC):
    """A result store that can be taken away."""

    url: str

    @abstractmethod
    def away(self) -> None:
        """From now on nobody can use it."""

    @abstractmethod
    def back(self) -> None:
        """It is there again, with what it held."""

    @abstractmethod
    def stored(self, ids: Iterable[str]) -> int:
        """How many of these have a result in it; also while it is away."""


class Remote(Store):
    """A server behind a proxy, which first says nothing and then refuses."""

    def __init__(self, server: Server, proxy: TcpProxy) -> None:
        self._server, self._proxy = server, proxy
        self.url = server.url.replace(f"127.0.0.1:{server.port}", f"127.0.0.1:{proxy.port}")

    def away(self) -> None:
        """What is under way gets no answer, and then a reset."""
        self._proxy.stall()
        time.sleep(0.3)
        self._proxy.refuse()
        self._proxy.resume()

    def back(self) -> None:
        """Accept again."""
        self._proxy.accept()

    def stored(self, ids: Iterable[str]) -> int:
        """Past the proxy."""
        store = open_store(self._server.url, expires=None)
        try:
            return len(store.get(list(ids)))
        finally:
            store.close()


class Local(Store):
    """A file whose folder is not there at first, and that another process locks later."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "results.db"
        self._lock: sqlite3.Connection | None = None
        self.url = f"sqlite:///{self._file}"

    def away(self) -> None:
        """Lock it, if it is there."""
        if self._file.exists():
            self._lock = sqlite3.connect(self._file, timeout=60, isolation_level=None)
            self._lock.execute("BEGIN EXCLUSIVE")

    def back(self) -> None:
        """Make the folder, or leave the lock."""
        self._file.parent.mkdir(exist_ok=True)
        if self._lock is not None:
            self._lock.close()

    def stored(self, ids: Iterable[str]) -> int:
        """By the connection that has the lock."""
        if self._lock is None:
            return 0
        found = {one for (one,) in self._lock.execute("SELECT task_id FROM amqptasks_results")}
        return len(found & set(ids))


@contextmanager
def store_of(kind: str, folder: Path) -> Iterator[Store]:
    if kind == "sqlite":
        yield Local(folder / "later")
        return
    server = server_of(kind)
    with TcpProxy("127.0.0.1", server.port) as proxy:
        yield Remote(server, proxy)


@pytest.mark.timing
@pytest.mark.fault
@pytest.mark.parametrize("kind", [*SERVERS, "sqlite"])
def test_a_store_that_is_away_at_the_start_and_in_the_middle_costs_no_result(desk: CanvasBench, kind: str) -> None:
    with store_of(kind, desk.folder) as store:
        desk.settings["result"] = {"backend": store.url, "expires": "1h"}
        store.away()
        app = desk.caller()
        worker = desk.worker("default", "-c", "2")
        early = app.send_many([counted.s() for _ in range(20)])
        wait_until(lambda: len(desk.ledger.ids("counted")) == 2, 20, "one has run in each process")
        time.sleep(1.0)
        assert sum(desk.vhost.management.counts("default")) == 20, "none is acknowledged"
        store.back()
        assert [one.get(60) for one in early] == [1] * 20
        assert "A result cannot be stored; trying again" in worker.log
        assert "s3cret" not in worker.log

        desk.vhost.wait_settled("default")
        late = app.send_many([counted.s(0.02) for _ in range(200)])
        ids = {one.id for one in late}
        wait_until(lambda: len(desk.ledger.ids("counted") & ids) > 40, 20, "some have run")
        store.away()
        time.sleep(1.0)
        acknowledged = 200 - sum(desk.vhost.management.counts("default"))
        stored = store.stored(ids)
        store.back()
        assert 0 < acknowledged <= stored < 200
        assert [one.get(60) for one in late] == [1] * 200
        desk.vhost.wait_settled("default", 30)
        ran = Counter(one.task_id for one in desk.ledger.entries("counted"))
        assert ran == Counter(one.id for one in [*early, *late]), "each has run once"
    canvas.app.close()


@pytest.mark.fault
def test_while_the_database_is_frozen_nothing_is_acknowledged_and_its_results_come_afterwards(
    desk: CanvasBench,
) -> None:
    """A frozen server says neither yes nor no: the wait for it has an end, and the task is not run again for it."""
    server = server_of("postgresql")
    desk.settings["result"] = {"backend": server.url, "expires": "1h"}
    app = desk.caller()
    worker = desk.worker("default", "-c", "1")
    assert counted.delay().get(30) == 1, "its connection is open"
    desk.vhost.wait_settled("default")
    server.freeze()
    try:
        handles = app.send_many([counted.s() for _ in range(10)])
        wait_until(lambda: "A result cannot be stored; trying again" in worker.log, 40, "it has given up once")
        assert sum(desk.vhost.management.counts("default")) == 10, "none is acknowledged"
    finally:
        server.thaw()
    assert [one.get(60) for one in handles] == [1] * 10
    desk.vhost.wait_settled("default", 30)
    ran = Counter(one.task_id for one in desk.ledger.entries("counted"))
    assert all(ran[one.id] == 1 for one in handles), "each has run once"
    canvas.app.close()
