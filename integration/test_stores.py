"""The same behaviour of every result store, on its real server."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import celery
import celery.result
import pytest

from amqptasks import (
    AsyncResult,
    ConfigError,
    GroupResult,
    RemoteError,
    ResultTimeout,
    SerializationError,
    StoreUnavailable,
)
from amqptasks.protocol.results import ResultMeta, decode_result, encode_result
from amqptasks.results.access import StoredResults
from amqptasks.results.store import ResultStore
from amqptasks.results.stores import open_store
from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.store_servers import MONGODB, SERVERS, server_of

KINDS = [*SERVERS, "sqlite", *(["mongodb"] if MONGODB else [])]

TABLES = "amqptasks_results, amqptasks_groups, amqptasks_schema"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Any) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/results.db"
    return MONGODB or "" if kind == "mongodb" else server_of(kind).url


@pytest.fixture
def store(url: str) -> Iterator[ResultStore]:
    made = open_store(url, expires=3600)
    yield made
    if made.poll_seconds:
        wait_until(lambda: not _lookers(), 10, "nobody looks into it any more")
    made.close()


def _lookers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "amqptasks-results"]


@contextmanager
def meanwhile(seconds: float, what: Callable[[], object]) -> Iterator[None]:
    """`what` begins so much later on another thread, and has ended before the store is closed."""
    timer = threading.Timer(seconds, what)
    timer.start()
    yield
    timer.join()


def encoded(task_id: str = "a", status: str = "SUCCESS", result: Any = 1) -> bytes:
    return encode_result(ResultMeta(task_id, status, result))


def fresh() -> str:
    return os.urandom(8).hex()


def test_what_was_put_is_there_until_it_is_deleted(store: ResultStore) -> None:
    first, second, third = fresh(), fresh(), fresh()
    store.put(first, encoded(first, result="ü" * 250_000), ready=True)
    store.put(second, encoded(second, "PROGRESS", {"done": 1}), ready=False)
    found = store.get([first, second, third])
    assert set(found) == {first, second}
    assert decode_result(found[first]).result == "ü" * 250_000
    store.put(second, encoded(second, "PROGRESS", {"done": 2}), ready=False)
    store.put(second, encoded(second, result=5), ready=True)
    assert decode_result(store.get([second])[second]).result == 5
    store.delete([first, second, third])
    assert store.get([first, second]) == {}
    assert store.get([]) == {}


def test_what_is_ready_is_not_replaced_by_what_is_not(store: ResultStore) -> None:
    for status in ("SUCCESS", "FAILURE", "REVOKED"):
        task_id = fresh()
        store.put(task_id, encoded(task_id, status, ValueError("x") if status != "SUCCESS" else 1), ready=True)
        store.put(task_id, encoded(task_id, "PROGRESS", {}), ready=False)
        assert decode_result(store.get([task_id])[task_id]).status == status


def test_a_success_is_final_and_a_failure_gives_way_to_what_runs_again(store: ResultStore) -> None:
    """A duplicate that fails changes nothing; a dead letter that is sent again does."""
    task_id = fresh()

    def put(status: str, value: Any) -> tuple[str, str]:
        store.put(task_id, encoded(task_id, status, value), ready=True)
        meta = decode_result(store.get([task_id])[task_id])
        return meta.status, str(meta.result)

    assert put("REVOKED", ValueError("r")) == ("REVOKED", "r")
    assert put("FAILURE", ValueError("a")) == ("FAILURE", "a")
    assert put("FAILURE", ValueError("b")) == ("FAILURE", "b")
    assert put("SUCCESS", 1) == ("SUCCESS", "1")
    for status, value in (("FAILURE", ValueError("duplicate")), ("SUCCESS", 2), ("REVOKED", ValueError("late"))):
        assert put(status, value) == ("SUCCESS", "1")


def test_many_writers_of_one_result_leave_a_success(store: ResultStore) -> None:
    for _ in range(5):
        task_id = fresh()
        written = [("PROGRESS", {}), ("FAILURE", ValueError("x")), ("SUCCESS", 1), ("FAILURE", ValueError("y"))] * 3

        def put(one: tuple[str, Any], task_id: str = task_id) -> None:
            store.put(task_id, encoded(task_id, *one), ready=one[0] != "PROGRESS")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, written))
        assert decode_result(store.get([task_id])[task_id]).status == "SUCCESS"


def test_a_thousand_results_at_once(store: ResultStore) -> None:
    ids = [fresh() for _ in range(1000)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: store.put(one, encoded(one, result=one), ready=True), ids))
    found = store.get(ids)
    assert {task_id: decode_result(body).result for task_id, body in found.items()} == {one: one for one in ids}
    store.delete(ids)
    assert store.get(ids) == {}


def test_strange_ids_are_ids(store: ResultStore) -> None:
    for task_id in ("with blanks and\nlines " + fresh(), "x" * 200 + fresh(), "ünï/cøde:" + fresh()):
        store.put(task_id, encoded("a"), ready=True)
        assert set(store.get([task_id])) == {task_id}
        assert store.get([task_id.upper()]) == {}


def test_results_expire(url: str) -> None:
    store = open_store(url, expires=2)
    task_id, group_id = fresh(), fresh()
    store.put(task_id, encoded(task_id), ready=True)
    store.put_group(group_id, b"{}")
    assert store.get([task_id])
    time.sleep(4.1)
    assert store.get([task_id]) == {}
    assert store.get_group(group_id) is None
    store.expire()
    store.close()


def test_groups_are_kept(store: ResultStore) -> None:
    access = StoredResults(store)
    group = GroupResult(fresh(), [AsyncResult(fresh(), access), AsyncResult(fresh(), access)])
    assert store.get_group(group.id) is None
    group.save()
    again = GroupResult.restore(group.id, access)
    assert again == group
    assert [one.id for one in again.results] == [one.id for one in group.results]
    group.delete()
    assert GroupResult.restore(group.id, access) is None


def _in_child(store: ResultStore, task_id: str, parent: str, done: Any) -> None:
    assert store.get([parent])
    store.put(task_id, encoded(task_id, result="from the child"), ready=True)
    done.set()
    store.close()


def test_a_store_that_was_used_survives_a_fork(store: ResultStore) -> None:
    parent, child = fresh(), fresh()
    store.put(parent, encoded(parent), ready=True)
    context = multiprocessing.get_context("fork")
    done = context.Event()
    process = context.Process(target=_in_child, args=(store, child, parent, done))
    process.start()
    assert done.wait(20)
    process.join(20)
    assert process.exitcode == 0
    assert set(store.get([parent, child])) == {parent, child}
    assert decode_result(store.get([child])[child]).result == "from the child"


@pytest.mark.timing
def test_who_waits_is_told_soon(store: ResultStore, kind: str) -> None:
    access = StoredResults(store)
    soon = 0.3 if kind == "redis" else 1.5
    for pause in (0.0, 0.3):
        result: AsyncResult[int] = AsyncResult(fresh(), access)
        assert result.state == "PENDING"
        put_at = []

        def put(result: AsyncResult[int] = result, put_at: list[float] = put_at) -> None:
            put_at.append(time.monotonic())
            store.put(result.id, encoded(result.id, "PROGRESS", {"done": 1}), ready=False)
            store.put(result.id, encoded(result.id, result=7), ready=True)

        with meanwhile(pause, put):
            assert result.get(10) == 7
            assert time.monotonic() - put_at[0] < soon
    with pytest.raises(ResultTimeout):
        AsyncResult(fresh(), access).get(timeout=0.2)
    many = [AsyncResult[int](fresh(), access) for _ in range(50)]
    with meanwhile(0.1, lambda: [store.put(one.id, encoded(one.id), ready=True) for one in many]):
        assert GroupResult(fresh(), many, access=access).get(10) == [1] * 50


def test_one_listener_that_raises_ends_nobody_elses_waiting(store: ResultStore) -> None:
    """As when its event loop is closed."""
    access = StoredResults(store)
    bad, named = fresh(), fresh()

    def raises(_meta: ResultMeta) -> None:
        raise RuntimeError("Event loop is closed")

    waiting: AsyncResult[int] = AsyncResult(fresh(), access)
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(waiting.get(20)))
    thread.start()
    stop = access.listen([bad], raises)
    store.put(bad, encoded(bad), ready=True)
    error = b'{"task_id": "t", "status": "FAILURE", "result": {"exc_type": "a\\u0000b", "exc_message": ["m"]}}'
    store.put(named, error, ready=True)
    with pytest.raises(RemoteError, match="m"):
        AsyncResult[int](named, access).get(10)
    store.put(waiting.id, encoded(waiting.id, result=7), ready=True)
    thread.join(20)
    assert values == [7]
    after: AsyncResult[int] = AsyncResult(fresh(), access)
    with meanwhile(0.2, lambda: store.put(after.id, encoded(after.id, result=8), ready=True)):
        assert after.get(20) == 8
    stop()


def _waits_in_child(access: StoredResults, task_id: str, found: Any) -> None:
    found.put(AsyncResult[int](task_id, access).get(20))


def test_a_child_waits_for_itself_though_its_parent_waits(store: ResultStore) -> None:
    access = StoredResults(store)
    stop = access.listen([fresh()], lambda meta: None)
    wait_until(lambda: threading.active_count() > 1, 10, "the parent waits")
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    task_id = fresh()
    child = context.Process(target=_waits_in_child, args=(access, task_id, found))
    child.start()
    store.put(task_id, encoded(task_id, result=9), ready=True)
    assert found.get(timeout=20) == 9
    child.join(20)
    stop()


def test_a_server_that_is_not_there_is_told_in_time_and_without_its_password(kind: str) -> None:
    if kind in ("sqlite", "mongodb"):
        url = "sqlite:////nowhere/at/all.db" if kind == "sqlite" else f"mongodb://u:s3cret@127.0.0.1:{free_port()}/x"
    else:
        server = server_of(kind)
        url = server.url.replace(str(server.port), str(free_port()))
    store = open_store(url, expires=10)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        store.put("a", encoded(), ready=True)
    assert time.monotonic() - started < 8
    assert "s3cret" not in str(caught.value)
    assert "nowhere" in str(caught.value) or "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize("kind", ["redis", "postgresql", "mysql"], indirect=True)
def test_a_wrong_password_is_told_without_it(kind: str) -> None:
    store = open_store(server_of(kind).url.replace("s3cret", "hidden-word"), expires=10)
    with pytest.raises(StoreUnavailable) as caught:
        store.get(["a"])
    assert "hidden-word" not in str(caught.value)
    assert "password" in str(caught.value).lower() or "denied" in str(caught.value).lower()


def _is_waited_for(store: Any, access: Any, task_id: str) -> bool:
    """Whether somebody is told of it from now on."""
    if hasattr(store, "_news"):
        topic = store._news._topics.get(task_id)
        return topic is not None and topic.settled.is_set()
    return any(task_id in ids for ids, *_ in list(access._poller._waiting.values()))


@pytest.mark.parametrize("kind", list(SERVERS), indirect=True)
def test_after_a_restart_of_the_server_the_same_store_works(kind: str, store: ResultStore) -> None:
    task_id, server = fresh(), server_of(kind)
    access = StoredResults(store)
    store.put(task_id, encoded(task_id), ready=True)
    waiting: AsyncResult[int] = AsyncResult(fresh(), access)
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(waiting.get(30)))
    thread.start()
    wait_until(lambda: _is_waited_for(store, access, waiting.id), 10, "it waits")
    time.sleep(0.3)  # and has looked once
    server.stop(signal.SIGKILL) if kind == "memcached" else server.stop()
    with pytest.raises(StoreUnavailable):
        store.put(task_id, encoded(task_id), ready=True)
    server.start()
    until = time.monotonic() + 15
    while True:
        try:
            store.put(waiting.id, encoded(waiting.id, result=9), ready=True)
            break
        except StoreUnavailable:
            assert time.monotonic() < until
            time.sleep(0.2)
    thread.join(20)
    assert values == [9]
    if kind != "memcached":
        assert task_id in store.get([task_id])


@contextmanager
def frozen(kind: str) -> Iterator[None]:
    server_of(kind).freeze()
    try:
        yield
    finally:
        server_of(kind).thaw()


@pytest.mark.fault
@pytest.mark.parametrize("kind", list(SERVERS), indirect=True)
def test_a_server_that_is_frozen_is_told_in_time(kind: str, url: str) -> None:
    """Its connections stay, and its kernel acknowledges what comes."""
    used, fresh_one = open_store(url, expires=3600), open_store(url, expires=3600)
    task_id = fresh()
    used.put(task_id, encoded(task_id), ready=True)
    with ThreadPoolExecutor(2) as pool, frozen(kind):
        started = time.monotonic()
        asked = [
            pool.submit(used.put, task_id, encoded(task_id, result=2), ready=True),
            pool.submit(fresh_one.get, [task_id]),
        ]
        for one in asked:
            with pytest.raises(StoreUnavailable):
                one.result(40)
        assert time.monotonic() - started < 30
    wait_until(lambda: set(used.get([task_id])) == {task_id}, 20, "it is used again")
    assert set(fresh_one.get([task_id])) == {task_id}
    used.close()
    fresh_one.close()


def _reads_in_child(store: ResultStore, ids: list[str], right: Any) -> None:
    right.value = all(set(store.get([one])) == {one} for one in ids * 10)


def test_parent_and_child_read_their_own_answers(store: ResultStore) -> None:
    """They ask at the same time, on connections of their own."""
    ids = [fresh() for _ in range(50)]
    for one in ids:
        store.put(one, encoded(one), ready=True)
    context = multiprocessing.get_context("fork")
    right = context.Value("b", False)
    child = context.Process(target=_reads_in_child, args=(store, ids[::-1], right))
    child.start()
    assert all(set(store.get([one])) == {one} for one in ids * 10)
    child.join(20)
    assert (child.exitcode, right.value) == (0, True)


def test_an_item_that_memcached_does_not_take_is_told() -> None:
    store = open_store(server_of("memcached").url, expires=10)
    with pytest.raises(SerializationError, match="item limit"):
        store.put("big", b"x" * 2_000_000, ready=True)
    store.close()


def test_old_rows_are_deleted_in_batches(tmp_path: Any) -> None:
    store = open_store(f"sqlite:///{tmp_path}/results.db", expires=3600)
    for number in range(2500):
        store.put(str(number), encoded(str(number)), ready=True)
    with sqlite3.connect(tmp_path / "results.db") as connection:
        connection.execute("UPDATE amqptasks_results SET updated_at = 1.0")
    connection.close()
    store.put("fresh", encoded("fresh"), ready=True)
    assert store.expire() == 2500
    assert store.expire() == 0
    assert set(store.get(["1", "fresh"])) == {"fresh"}
    store.close()


def test_many_old_rows_are_deleted_at_once(tmp_path: Any) -> None:
    """More than a minute's worth of a fast task: what is not deleted in time grows without end."""
    url = f"sqlite:///{tmp_path}/results.db"
    store: Any = open_store(url, expires=3600)
    store.put("fresh", encoded("fresh"), ready=True)
    with sqlite3.connect(tmp_path / "results.db") as connection:
        rows = ((str(number), False, b"{}", 1.0) for number in range(25_000))
        connection.executemany("INSERT INTO amqptasks_results VALUES (?, ?, ?, ?)", rows)
    connection.close()
    assert store.expire() == 25_000
    assert set(store.get(["fresh"])) == {"fresh"}
    store.close()


def test_many_processes_make_the_tables_at_once(tmp_path: Any) -> None:
    for kind in ("postgresql", "sqlite"):
        url = f"sqlite:///{tmp_path}/new.db" if kind == "sqlite" else server_of(kind).url
        if kind == "postgresql":
            import sqlalchemy as sa

            engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg"))
            with engine.begin() as connection:
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {TABLES}"))
            engine.dispose()
        context = multiprocessing.get_context("fork")
        with context.Pool(6) as pool:
            assert pool.map(_first_use, [url] * 12, chunksize=1) == [True] * 12


def _first_use(url: str) -> bool:
    store = open_store(url, expires=60)
    task_id = fresh()
    store.put(task_id, encoded(task_id), ready=True)
    found = bool(store.get([task_id]))
    store.close()
    return found


# --- Redis and Celery ------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs() -> celery.Celery:
    return celery.Celery("theirs", broker="memory://", backend=server_of("redis").url, set_as_current=False)


@pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")  # Celery's use of redis-py
def test_celery_reads_our_results_and_we_read_celerys(theirs: celery.Celery) -> None:
    store = open_store(server_of("redis").url, expires=60)
    ours, failed = fresh(), fresh()
    store.put(ours, encoded(ours, result={"a": [1]}), ready=True)
    store.put(failed, encoded(failed, "FAILURE", ValueError("b")), ready=True)
    assert celery.result.AsyncResult(ours, app=theirs).get(timeout=5) == {"a": [1]}
    with pytest.raises(ValueError, match="b"):
        celery.result.AsyncResult(failed, app=theirs).get(timeout=5)
    access = StoredResults(store)
    done, broken = fresh(), fresh()
    theirs.backend.store_result(done, {"b": 2}, "SUCCESS")
    theirs.backend.store_result(broken, theirs.backend.prepare_exception(KeyError("c")), "FAILURE", traceback="T")
    assert AsyncResult[Any](done, access).get(5) == {"b": 2}
    with pytest.raises(KeyError, match="c"):
        AsyncResult[Any](broken, access).get(5)
    waiting: AsyncResult[Any] = AsyncResult(fresh(), access)
    with meanwhile(0.2, lambda: theirs.backend.store_result(waiting.id, 3, "SUCCESS")):
        assert waiting.get(5) == 3
    store.close()


def test_the_parts_of_celerys_chords_are_complete_for_one_who_adds_them() -> None:
    store: Any = open_store(server_of("redis").url, expires=60)
    group_id = fresh()
    store._client.set(f"celery-taskset-meta-{group_id}.s", 200)

    def add(index: int) -> list[bytes] | None:
        found: list[bytes] | None = store.add_chord_part(group_id, index, json.dumps([1, str(index)]).encode())
        return found

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(add, [*range(150), *range(100)]))
        assert first == [None] * 250
        complete = [one for one in pool.map(add, range(150, 200)) if one is not None]
    assert len(complete) == 1
    assert [json.loads(one)[1] for one in complete[0]] == [str(index) for index in range(200)]
    store.close()


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_a_url_that_is_no_store_is_told() -> None:
    with pytest.raises(ConfigError, match=r"rdis:// is no result store; did you mean redis://\?"):
        open_store("rdis://x", expires=1)
    with pytest.raises(ConfigError, match="Stores: "):
        open_store("ftp://x", expires=1)


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "memcached", "sqlite"], indirect=True)
def test_no_thread_looks_into_a_store_that_is_closed(url: str) -> None:
    """What it looked for would leave a connection open behind."""
    for _ in range(5):
        store = open_store(url, expires=60)
        access = StoredResults(store)
        access.listen([fresh()], lambda _meta: None)
        (thread,) = _lookers()
        access.close()
        assert not thread.is_alive()
        # And the next one who waits is looked for again.
        result: AsyncResult[int] = AsyncResult(fresh(), access)
        with meanwhile(0.05, lambda result=result, store=store: store.put(result.id, encoded(result.id), ready=True)):
            assert result.get(10) == 1
        access.close()
