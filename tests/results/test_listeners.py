"""One listener that raises is its own trouble: nobody else waits in vain for it."""

from __future__ import annotations

import json
import threading
import time

import pytest

from amqptasks import AsyncResult, RemoteError
from amqptasks.protocol.results import ResultMeta, decode_result, encode_result
from amqptasks.results.access import StoredResults
from amqptasks.results.inbox import ReplyInbox
from amqptasks.results.stores import open_store


def raises(_meta: ResultMeta) -> None:
    raise RuntimeError("Event loop is closed")


def encoded(task_id: str, value: int) -> bytes:
    return encode_result(ResultMeta(task_id, "SUCCESS", value))


def asked(result: AsyncResult[int]) -> tuple[threading.Thread, list[int]]:
    """A thread that waits, and where it puts the value."""
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(result.get(20)))
    thread.start()
    return thread, values


def test_a_reply_reaches_everybody_though_one_listener_raises() -> None:
    inbox = ReplyInbox()
    inbox.expect("a")
    heard: list[str] = []
    inbox.listen(["a"], raises)
    inbox.listen(["a"], lambda meta: heard.append(meta.status))
    inbox.receive(ResultMeta("a", "SUCCESS", 1), 9)
    assert heard[-1] == "SUCCESS"
    assert AsyncResult[int]("a", inbox).get(0) == 1
    lost = ReplyInbox()
    lost.expect("b")
    lost.listen(["b"], raises)
    lost.listen(["b"], lambda meta: heard.append("told"))
    lost.gone("the queue expired", for_ever=False)
    assert heard[-1] == "told"


def test_who_waits_at_a_store_that_is_polled_is_told_though_one_listener_raises(tmp_path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/results.db", expires=60)
    access = StoredResults(store)
    stops = [access.listen(["bad"], raises)]
    thread, values = asked(AsyncResult("good", access))
    store.put("bad", encoded("bad", 1), ready=True)
    stops.append(access.listen(["bad"], raises))  # known already: told at once
    while not any("good" in ids for ids, *_ in list(access._poller._waiting.values())):
        assert thread.is_alive()
        time.sleep(0.001)
    store.put("good", encoded("good", 7), ready=True)
    thread.join(20)
    assert values == [7]
    for stop in stops:
        stop()
    store.close()


@pytest.mark.parametrize("name", ["a\0b", "a.\0", "", "x" * 100_000])
def test_an_exception_of_any_name_is_an_error_to_raise(name: str) -> None:
    table = {"task_id": "t", "status": "FAILURE", "result": {"exc_type": name, "exc_message": ["m"]}}
    meta = decode_result(json.dumps(table).encode())
    assert isinstance(meta.result, RemoteError)
    assert (meta.status, meta.result.args) == ("FAILURE", ("m",))
