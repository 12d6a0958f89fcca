"""A worker's own signals: what their handlers cannot do to the supervisor."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from amqptasks import AmqpTasks, signals
from amqptasks.worker import lifecycle as module
from amqptasks.worker.lifecycle import Lifecycle, WorkerInfo
from amqptasks.worker.notify import Notifier

WATCHED = (signals.worker_ready, signals.worker_shutting_down, signals.heartbeat_sent)


@pytest.fixture
def life() -> Iterator[Lifecycle]:
    before = {one: one.receivers for one in WATCHED}
    yield Lifecycle(WorkerInfo(AmqpTasks("shop", config={}), "w1@host", ("email",)), Notifier({}))
    for one, receivers in before.items():
        one.receivers = receivers


def test_handlers_that_hang_are_interrupted_one_by_one(life: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HANDLER_SECONDS", 0.1)
    ended: list[Any] = []

    def hangs(**kwargs: Any) -> None:
        try:
            time.sleep(60)
        except BaseException as error:
            ended.append(error)
            raise

    def hangs_too(**kwargs: Any) -> None:
        hangs()

    signals.worker_ready.connect(hangs)
    signals.worker_ready.connect(hangs_too)
    before = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    life.ready()
    assert time.monotonic() - started < 10
    assert [type(one) for one in ended] == [TimeoutError, TimeoutError]
    assert "worker_ready get 0.1 s" in str(ended[0])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_handler_that_exits_does_not_end_the_supervisor(life: Lifecycle) -> None:
    heard = []

    def leaves(sender: Any, **named: Any) -> None:
        heard.append((sender, named["sig"], named["how"], named["exitcode"]))
        raise SystemExit(3)

    signals.worker_shutting_down.connect(leaves)
    life.stopping(signal.SIGTERM, 0)
    life.stopping(signal.SIGQUIT, 1)
    assert heard == [("w1@host", "SIGTERM", "Warm", 0), ("w1@host", "SIGQUIT", "Cold", 1)]


def test_heartbeats_are_sent_while_all_queues_are_consumed_and_cost_nothing_unheard(life: Lifecycle) -> None:
    assert life.next_tick is None
    beats = []

    def beat(sender: Any, **kwargs: Any) -> None:
        beats.append(sender.queues)

    signals.heartbeat_sent.connect(beat)
    life.tick(consuming=True)
    assert beats == [], "not ready yet"
    assert life.next_tick is not None
    assert life.next_tick > time.monotonic()
    life.ready()
    life._beat_at = 0.0
    life.tick(consuming=False)
    assert beats == []
    life._beat_at = 0.0
    life.tick(consuming=True)
    life.tick(consuming=True)
    assert beats == [("email",)]
