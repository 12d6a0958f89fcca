"""What the processes of a worker say to each other, where it is not what was expected."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from amqptasks import AmqpTasks
from amqptasks.worker.control import Channel, News
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.heart import Heart
from amqptasks.worker.pidbox import RemoteControl


@pytest.mark.parametrize("value", [datetime.now(UTC), object(), [{"a": {"b": datetime.now(UTC)}}]])
def test_what_cannot_be_told_is_told_as_an_error(value: Any) -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    ours.send(News.ANSWER, 7, [value])
    ours.send(News.READY)
    answer, ready = theirs.receive() or []
    assert answer[:2] == (News.ANSWER, 7)
    assert "cannot be told" in answer[2]["error"]
    assert ready == (News.READY,)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("method", ["active", "reserved", "query_task", "stats", "revoked", "revoke"])
def test_an_error_of_a_leader_is_the_answer(method: str) -> None:
    """The answer comes later than the request, from the loop: it must not end the desk."""
    later: list[Callable[[dict[str, Any]], None]] = []
    sent: list[Any] = []
    events = EventSwitch(on=False)
    control = RemoteControl(
        AmqpTasks("shop"), "shop@here", 0.0, lambda _method, _arguments, then: later.append(then),
        cast("Heart", None), events,
    )  # fmt: skip
    reply_to = {"exchange": "reply.celery.pidbox", "routing_key": "caller"}
    request = {"method": method, "arguments": {"ids": ["a"], "task_id": "a"}, "reply_to": reply_to}
    control.request(json.dumps(request).encode(), {}, lambda _key, body, _headers: sent.append(json.loads(body)))
    later.pop()({"worker": {"pid": 1, "groups": {}}, "queues": {"email": {"error": "it hurts"}}})
    assert sent == [{"shop@here": {"error": "it hurts"}}]
