"""What a leader answers when the desk asks: about what it holds and runs, and to what should change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from amqptasks.broker.consumer import Consumer
from amqptasks.broker.link import Link
from amqptasks.protocol.revokes import checked_ids, checked_stamps
from amqptasks.worker.attendants import Attendants
from amqptasks.worker.autoscale import Autoscaler
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.event_feed import EventFeed
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.tally import Tally
from amqptasks.worker.timelimits import TimeLimits

__all__ = ["Inspection"]

#: Larger bodies are not decoded to be looked at.
_MAX_SHOWN = 65536
#: So many tasks are told of at most, so that an answer fits a message.
_MAX_TASKS = 1000
_MAX_SLOTS = 10_000

_MAX_REVOKED = 10_000

_log = structlog.get_logger("amqptasks.worker")


class Inspection:
    """Answers a leader's questions. Belongs to its loop; no answer waits for anything."""

    def __init__(
        self,
        plan: GroupPlan,
        dispatcher: Dispatcher,
        consumer: Consumer,
        link: Link,
        tally: Tally,
        limits: TimeLimits,
        attendants: Attendants,
    ) -> None:
        self._feed: EventFeed | None = None
        self._scaler: Autoscaler | None = None
        self._attendants = attendants
        self._plan = plan
        self._dispatcher = dispatcher
        self._consumer = consumer
        self._link = link
        self._tally = tally
        self._limits = limits
        self._methods: dict[str, Callable[..., Any]] = {
            "state": self._state,
            "health": self._health,
            "active": self._active,
            "reserved": self._reserved,
            "query": self._query,
            "time_limit": self._time_limit,
            "pool": self._pool,
            "pool_restart": self._pool_restart,
            "autoscale": self._autoscale,
            "revoked": lambda: attendants.revokes.revoked_ids()[-_MAX_REVOKED:],
            "revoke": self._revoke,
            "rate_limit": self._rate_limit,
        }

    def watch(self, feed: EventFeed, scaler: Autoscaler | None) -> None:
        """Show the feed what runs, tell how many events it sent, and what the autoscaler may do."""
        self._scaler = scaler
        self._feed = feed
        feed.running = self._dispatcher.running

    def answer(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """The answer, as plain values."""
        try:
            return self._methods[method](**arguments)
        except Exception as error:  # a question must not end the leader
            _log.exception("Cannot answer", queue=self._plan.queue, method=method)
            return {"error": repr(error)}

    # -- looking --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        dispatcher, plan = self._dispatcher, self._plan
        return {
            "connected": self._link.connection is not None and bool(self._link.connection.is_open),
            "consuming": self._consumer.consuming,
            "node": self._link.node,
            "pool": plan.pool,
            "concurrency": dispatcher.concurrency,
            "prefetch": self._consumer.prefetch,
            "executors": [one.pid for one in dispatcher.executors],
            "held": dispatcher.busy,
            "running": len(dispatcher.running()),
            "waiting": len(dispatcher.waiting),
            "runtime": dispatcher.runtime,
            "totals": self._tally.totals(),
            "autoscaler": self._bounds(),
            "events": {"sent": feed.sent, "dropped": feed.dropped} if (feed := self._feed) else {},
        }

    def _bounds(self) -> dict[str, int] | None:
        if self._scaler is None:
            return None
        most, least = self._scaler.most, self._scaler.least
        return {"max": most, "min": least, "current": self._dispatcher.concurrency, "qty": self._dispatcher.engaged}

    def _health(self) -> dict[str, Any]:
        """What probes and metrics need, asked every second."""
        dispatcher, connection = self._dispatcher, self._link.connection
        running = len(dispatcher.running())
        self._tally.restarted(dispatcher.restarts)
        return {
            "connected": connection is not None and bool(connection.is_open),
            "consuming": self._consumer.consuming,
            "paused": self._consumer.paused,
            "blocked": self._tally.publish_blocked,
            "prefetch": self._consumer.prefetch,
            "concurrency": dispatcher.concurrency,
            "executors": [one.pid for one in dispatcher.executors],
            "running": running,
            "waiting": dispatcher.busy - running + len(dispatcher.waiting),
            "newest": self._tally.newest,
        }

    def _active(self, safe: bool = False) -> list[dict[str, Any]]:
        return [self._info(one, safe, pid, ran) for one, pid, ran in self._dispatcher.running()[:_MAX_TASKS]]

    def _reserved(self, safe: bool = False) -> list[dict[str, Any]]:
        running = {delivery for delivery, _, _ in self._dispatcher.running()}
        held = [*self._dispatcher.held(), *self._dispatcher.waiting]
        return [self._info(one, safe) for one in held if one not in running][:_MAX_TASKS]

    def _query(self, ids: list[str]) -> dict[str, Any]:
        wanted = set(ids)
        found: dict[str, Any] = {}
        for delivery, pid, ran in self._dispatcher.running():
            task_id = str(delivery.headers.get("id"))
            if task_id in wanted:
                found[task_id] = ["active", self._info(delivery, False, pid, ran)]
        for delivery in (*self._dispatcher.held(), *self._dispatcher.waiting):
            task_id = str(delivery.headers.get("id"))
            if task_id in wanted:
                found.setdefault(task_id, ["reserved", self._info(delivery, False)])
        return found

    def _info(self, delivery: Delivery, safe: bool, pid: int | None = None, ran: float = 0.0) -> dict[str, Any]:
        headers, incoming = delivery.headers, delivery.incoming
        args, kwargs = self._arguments(delivery, safe)
        name = _plain(headers.get("task"))
        return {
            "id": _plain(headers.get("id")),
            "name": name,
            "args": args,
            "kwargs": kwargs,
            "type": name,
            "hostname": None,
            "time_start": None if pid is None else time.time() - ran,
            "acknowledged": False,
            "delivery_info": {
                "exchange": incoming.exchange,
                "routing_key": incoming.routing_key,
                "priority": incoming.properties.priority,
                "redelivered": incoming.redelivered,
            },
            "worker_pid": pid,
        }

    def _arguments(self, delivery: Delivery, safe: bool) -> tuple[Any, Any]:
        headers, incoming = delivery.headers, delivery.incoming
        shown = _plain(headers.get("argsrepr")), _plain(headers.get("kwargsrepr"))
        plain = incoming.properties.content_type == "application/json" and headers.get("compression") is None
        if safe or not plain or len(incoming.body) > _MAX_SHOWN:
            return shown
        try:
            args, kwargs, _embed = json.loads(incoming.body)
        except (ValueError, TypeError, RecursionError):
            return shown
        return args, kwargs

    # -- changing -------------------------------------------------------------------------------------------------

    def _time_limit(self, task: str, hard: float | None, soft: float | None) -> dict[str, str]:
        self._limits.change(task, hard, soft)
        _log.info("New time limits", queue=self._plan.queue, task=task, soft=soft, hard=hard)
        return {"ok": "time limits set successfully"}

    def _pool(self, by: int) -> dict[str, str]:
        now = self._dispatcher.concurrency
        if self._scaler is not None:
            return {"error": f"{self._plan.queue}: its pool follows the work; change the bounds with autoscale"}
        if self._plan.pool == "solo":
            return {"error": f"{self._plan.queue}: pool solo runs one task at a time"}
        if not 1 <= now + by <= _MAX_SLOTS:
            return {"error": f"{self._plan.queue}: {now} tasks at once and {by:+} is not within 1 and {_MAX_SLOTS}"}
        self._dispatcher.resize(now + by)
        _log.info("Pool resized", queue=self._plan.queue, concurrency=self._dispatcher.concurrency)
        return {"ok": f"pool will {'grow' if by >= 0 else 'shrink'}"}

    def _autoscale(self, most: int | None, least: int | None) -> dict[str, str]:
        if self._scaler is None:
            return {"error": f"{self._plan.queue}: autoscale is not on; start the worker with --autoscale MAX,MIN"}
        most, least = most or self._scaler.most, self._scaler.least if least is None else least
        if not 1 <= least <= most <= _MAX_SLOTS:
            return {"error": f"{self._plan.queue}: max {most} and min {least} are not 1 <= min <= max <= {_MAX_SLOTS}"}
        self._scaler.most, self._scaler.least = most, least
        _log.info("New bounds of autoscale", queue=self._plan.queue, max=most, min=least)
        return {"ok": f"autoscale now max={most} min={least}"}

    def _pool_restart(self) -> dict[str, str]:
        self._dispatcher.roll()
        return {"ok": "every executor is replaced when it has finished what it runs"}

    def _revoke(self, ids: list[str], stamps: Any, terminate: bool, signal: str | int) -> dict[str, str]:
        try:
            keys = checked_ids(ids) if stamps is None else checked_stamps(stamps)
            self._attendants.revokes.revoke(keys, terminate, signal)
        except ValueError as error:
            return {"error": str(error)}
        return {"ok": f"tasks {', '.join(ids)} flagged as revoked" if stamps is None else f"headers {stamps} revoked"}

    def _rate_limit(self, task: str, rate_limit: str | float | None) -> dict[str, str]:
        try:
            rate = self._attendants.set_rate(task, rate_limit)
        except ValueError as error:
            return {"error": str(error)}
        _log.info("New rate limit", queue=self._plan.queue, task=task, rate_limit=rate_limit)
        return {"ok": "new rate limit set successfully" if rate else "rate limit disabled successfully"}


def _plain(value: object) -> str | int | float | None:
    """A header as it can be told on: strangers send timestamps, decimals and tables, too."""
    return value if value is None or isinstance(value, str | int | float) else f"{value!r:.1000}"
