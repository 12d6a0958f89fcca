"""How much waits in the broker, asked of its management API in the background and never because somebody scrapes.

One request for all queues of the virtual host, without statistics (RabbitMQ, HTTP API, `disable_stats`), so that it
costs the broker little and works where statistics are turned off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from amqptasks.broker.management import ManagementApi
from amqptasks.config import Settings
from amqptasks.topology.build import dead_letter_queue, due_queue
from amqptasks.topology.delays import LADDER_LEVELS, level_name, unroutable_exchange

__all__ = ["Depths"]

POLL_SECONDS = 15.0

_log = structlog.get_logger("amqptasks.worker")
Sample = tuple[str, float, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the API said last: (ready, unacknowledged, all) by queue."""

    at: float
    ok: bool
    queues: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class Depths:
    """Asks every 15 s on a thread of its own. `samples` may be called from any."""

    def __init__(self, settings: Settings) -> None:
        self._api = ManagementApi(settings.broker, purpose="how much waits in queues")
        prefix = settings.topology.prefix
        self._work = {name: settings.queues[name].max_priority is not None for name in settings.queues}
        self._ladder = [level_name(prefix, level) for level in range(LADDER_LEVELS)]
        self._ladder += [due_queue(prefix, name) for name in settings.queues]
        self._unroutable = unroutable_exchange(prefix)
        self._began = time.monotonic()
        self._answer = _Answer(self._began, ok=False)
        #: When a queue was seen empty last; `time.monotonic`.
        self._empty: dict[str, float] = {}
        self._warned = False

    def start(self) -> None:
        """Ask from now on."""
        threading.Thread(target=self._run, name="depths", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.poll()
            time.sleep(POLL_SECONDS)

    def poll(self) -> None:
        """Ask once."""
        try:
            queues = self._ask()
        except Exception as error:  # whatever a server says: the next one may be better
            self._answer = _Answer(self._answer.at, ok=False, queues=self._answer.queues)
            if not self._warned:
                self._warned = True
                _log.warning("Cannot ask the management API", error=str(error))
            return
        self._warned = False
        now = time.monotonic()
        for name, (ready, _, _) in queues.items():
            if not ready:
                self._empty[name] = now
        self._answer = _Answer(now, ok=True, queues=queues)

    def _ask(self) -> dict[str, tuple[int, int, int]]:
        found = self._api.get("queues/{vhost}?disable_stats=true&enable_queue_totals=true")
        known = {*self._work, *map(dead_letter_queue, self._work), *self._ladder, self._unroutable}
        return {queue["name"]: _counts(queue) for queue in found if queue["name"] in known}

    def samples(self, newest: Mapping[str, float | None]) -> Iterator[Sample]:
        """(metric, value, labels). `newest`: when the message was published that came last, by queue."""
        answer, now = self._answer, time.monotonic()
        yield "amqptasks_broker_poll_ok", float(answer.ok), ()
        yield "amqptasks_broker_poll_age_seconds", now - answer.at, ()
        if not answer.queues:
            return
        for queue, priorities in self._work.items():
            found = answer.queues.get(queue)
            if found is not None:
                yield "celery_queue_length", found[0], (queue,)
                yield "amqptasks_queue_ready", found[0], (queue,)
                yield "amqptasks_queue_unacknowledged", found[1], (queue,)
                # What is urgent overtakes: the last message says nothing about the oldest one.
                last = None if priorities else newest.get(queue)
                yield "amqptasks_queue_oldest_age_seconds", self._age(queue, found[0], last, now), (queue,)
            letters = answer.queues.get(dead_letter_queue(queue))
            if letters is not None:
                yield "amqptasks_dlq_messages", letters[2], (queue,)
        delayed = [answer.queues[name][2] for name in self._ladder if name in answer.queues]
        if delayed:
            yield "amqptasks_delayed_messages", sum(delayed), ()
        if self._unroutable in answer.queues:
            yield "amqptasks_unroutable_messages", answer.queues[self._unroutable][2], ()

    def _age(self, queue: str, ready: int, newest: float | None, now: float) -> float:
        if not ready:
            return 0.0
        ages = [now - self._empty[queue]] if queue in self._empty else []
        if newest is not None:
            ages.append(max(0.0, time.time() - newest))
        return min(ages, default=now - self._began)


def _counts(queue: Mapping[str, Any]) -> tuple[int, int, int]:
    ready, held = int(queue.get("messages_ready", 0)), int(queue.get("messages_unacknowledged", 0))
    return ready, held, int(queue.get("messages", ready + held))
