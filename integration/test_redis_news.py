"""Waiting for results in Redis while its connection is lost, silent, or shared by many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from amqptasks import AsyncResult
from amqptasks.protocol.results import ResultMeta, encode_result
from amqptasks.results.access import StoredResults
from amqptasks.results.store import ResultStore
from amqptasks.results.stores import open_store
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until
from integration.store_servers import server_of


def fresh() -> str:
    return os.urandom(8).hex()


@contextmanager
def opened(url: str) -> Iterator[ResultStore]:
    store = open_store(url, expires=60)
    yield store
    store.close()


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", server_of("redis").port) as made:
        yield made


@pytest.fixture
def store(proxy: TcpProxy) -> Iterator[ResultStore]:
    """Its connections go through the proxy."""
    server = server_of("redis")
    with opened(server.url.replace(f"127.0.0.1:{server.port}", f"127.0.0.1:{proxy.port}")) as made:
        yield made


@pytest.fixture
def direct() -> Iterator[ResultStore]:
    """Past the proxy."""
    with opened(server_of("redis").url) as made:
        yield made


def put(store: ResultStore, task_id: str) -> None:
    store.put(task_id, encode_result(ResultMeta(task_id, "SUCCESS", 1)), ready=True)


def test_who_begins_to_wait_when_the_connection_was_just_lost_is_subscribed(
    proxy: TcpProxy, store: ResultStore, direct: ResultStore
) -> None:
    """The store is there: nobody is told that it is not."""
    told: list[str] = []
    for _ in range(60):
        before, after = fresh(), fresh()
        stops = [store.listen([before], lambda task_id, _: told.append(task_id))]
        proxy.cut()
        stops.append(store.listen([after], lambda task_id, _: told.append(task_id)))
        put(direct, after)
        wait_until(lambda after=after: after in told, 10, "who began later is told")  # type: ignore[misc]
        put(direct, before)
        wait_until(lambda before=before: before in told, 10, "who waited before is told")  # type: ignore[misc]
        for stop in stops:
            stop()


def test_what_is_published_while_nobody_is_subscribed_is_told_afterwards(
    proxy: TcpProxy, store: ResultStore, direct: ResultStore
) -> None:
    for _ in range(5):
        ids = [fresh() for _ in range(20)]
        told: set[str] = set()
        stop = store.listen(ids, lambda task_id, _, told=told: told.add(task_id))  # type: ignore[misc]
        proxy.refuse()
        for one in ids:
            put(direct, one)
        proxy.accept()
        wait_until(lambda told=told, ids=ids: told == set(ids), 20, "all are told")  # type: ignore[misc]
        stop()


def test_a_connection_that_says_nothing_more_is_given_up(
    proxy: TcpProxy, store: ResultStore, direct: ResultStore
) -> None:
    """As behind a router that has forgotten it: no reset comes, and what is published does not."""
    task_id = fresh()
    told: list[str] = []
    stop = store.listen([task_id], lambda task_id, _: told.append(task_id))
    proxy.deafen()
    put(direct, task_id)
    wait_until(lambda: told == [task_id], 30, "it is told by another connection")
    stop()


def test_many_threads_wait_for_many_results_while_the_connection_is_cut_again_and_again(
    proxy: TcpProxy, store: ResultStore, direct: ResultStore
) -> None:
    access = StoredResults(store)
    ids = [[fresh() for _ in range(40)] for _ in range(8)]
    values: list[int] = []
    problems: list[Exception] = []

    def wait(mine: list[str]) -> None:
        try:
            for one in mine:
                values.append(AsyncResult[int](one, access).get(30))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=wait, args=(mine,)) for mine in ids]
    for thread in threads:
        thread.start()
    for number, some in enumerate(zip(*ids, strict=True)):
        for one in some:
            put(direct, one)
        if number % 8 == 0:
            proxy.cut()
    for thread in threads:
        thread.join(60)
    assert (problems, values) == ([], [1] * 320)


def test_the_thread_ends_when_the_store_is_closed_and_another_use_starts_another(store: ResultStore) -> None:
    def threads() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name == "amqptasks-results"}

    for _ in range(3):
        before = threads()  # of other stores, which may be about to end
        stop = store.listen([fresh()], lambda *_: None)
        (new,) = threads() - before
        stop()
        store.close()
        new.join(5)
        assert not new.is_alive()
