"""Remote control: requests in Celery's format, answered for the whole worker.

A request comes to the desk, which asks the supervisor, which asks the leaders: none of them runs tasks, so an answer
takes milliseconds however busy the executors are.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import structlog
import yaml

from amqptasks import __version__
from amqptasks.app import AmqpTasks
from amqptasks.builtin import is_builtin
from amqptasks.config import masked_dump, problem_report
from amqptasks.topology.build import queue_arguments
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.heart import Heart
from amqptasks.worker.requests import addressed, decoded, parts

__all__ = ["Answer", "Ask", "RemoteControl"]

#: What the supervisor answers: ``{"worker": …, "queues": {queue: what its leader answered}}``.
Answer = Mapping[str, Any]
#: (method, arguments, called with the supervisor's answer)
Ask = Callable[[str, dict[str, Any], Callable[[Answer], None]], None]
#: (routing key, body, headers)
Send = Callable[[str, bytes, dict[str, Any]], None]
_Reply = Callable[[Any], None]

_log = structlog.get_logger("amqptasks.worker")


class RemoteControl:
    """Answers remote control for one node. Belongs to the desk's loop.

    Args:
        node: the worker's name, ``name@host``.
        started: when the worker began (`time.time`).
        heart: tells monitors of the worker.
        events: whether events are sent, and the node's clock.
    """

    def __init__(self, app: AmqpTasks, node: str, started: float, ask: Ask, heart: Heart, events: EventSwitch) -> None:
        self._app = app
        self._node = node
        self._started = started
        self._line = ask
        self._heart = heart
        self._events = events
        self._methods: dict[str, Callable[..., None]] = {
            "ping": self._ping,
            "clock": self._tell_clock,
            "hello": self._hello,
            "conf": self._conf,
            "report": self._report,
            "registered": self._registered,
            "stats": self._stats,
            "active_queues": self._active_queues,
            "active": self._listed("active"),
            "reserved": self._listed("reserved"),
            # What is delayed waits in the broker, not here.
            "scheduled": lambda reply, **_ignored: reply([]),
            "query_task": self._query_task,
            "memsample": self._memsample,
            "time_limit": self._time_limit,
            "rate_limit": self._rate_limit,
            "revoked": self._revoked,
            "revoke": self._revoke,
            "revoke_by_stamped_headers": self._revoke_stamps,
            "terminate": lambda reply, **arguments: self._revoke(reply, **{**arguments, "terminate": True}),
            "pool_grow": lambda reply, n=1, **_ignored: self._pool(reply, int(n)),
            "pool_shrink": lambda reply, n=1, **_ignored: self._pool(reply, -int(n)),
            "autoscale": self._autoscale,
            "pool_restart": lambda reply, **_ignored: self._change(reply, "pool_restart", {}),
            "add_consumer": self._queue_changed("add_consumer"),
            "cancel_consumer": self._queue_changed("cancel_consumer"),
            "shutdown": self._shutdown,
            "enable_events": self._enable_events,
            "disable_events": self._disable_events,
            "heartbeat": self._heartbeat,
            # Elections are of Celery's gossip, which this worker does not speak: nobody waits for an answer.
            "election": lambda reply, **_ignored: None,
        }
        for alias, method in _ALIASES.items():
            self._methods[alias] = self._methods[method]

    def request(self, body: bytes, headers: Mapping[str, Any], send: Send) -> None:
        """A request has come, `send` publishes the answer. One that is unsound, for others or too late is ignored."""
        try:
            request = decoded(body)
            expires, clock = headers.get("expires"), headers.get("clock")
            if isinstance(clock, int):
                self._events.adjust(clock)
            if isinstance(expires, int | float) and 0 < expires < time.time():
                return
            if not addressed(request, self._node):
                return
            method, arguments, reply_to = parts(request)
        except ValueError as error:
            _log.warning("Remote control: a request that is none was ignored", error=str(error))
            return
        self._dispatch(method, arguments, lambda payload: self._answer(request, reply_to, payload, send))

    def _dispatch(self, method: str, arguments: dict[str, Any], reply: _Reply) -> None:
        handler = self._methods.get(method)
        if handler is None:
            reply({"error": f"unknown command {method!r}; this is amqptasks {__version__}"})
            return
        try:
            handler(reply, **arguments)
        except Exception as error:  # whatever a stranger sends must not end the desk
            _log.warning("Remote control: a request failed", method=method, error=repr(error))
            reply({"error": repr(error)})

    def _ask(self, reply: _Reply, method: str, arguments: dict[str, Any], then: Callable[[Answer], None]) -> None:
        """Ask the supervisor. What goes wrong with its answer is the reply."""

        def answered(answer: Answer) -> None:
            try:
                then(answer)
            except Exception as error:
                told = [part for part in answer["queues"].values() if isinstance(part, dict) and "error" in part]
                _log.warning("Remote control: a request failed", method=method, error=repr(error), told=told)
                reply(told[0] if told else {"error": repr(error)})

        self._line(method, arguments, answered)

    def _answer(self, request: Mapping[str, Any], reply_to: str | None, payload: Any, send: Send) -> None:
        if reply_to is None:
            return
        body = json.dumps({self._node: payload}, default=str).encode()
        send(reply_to, body, {"ticket": request.get("ticket"), "clock": self._events.tick()})

    # -- about the worker -----------------------------------------------------------------------------------------

    def _ping(self, reply: _Reply) -> None:
        reply({"ok": "pong"})

    def _tell_clock(self, reply: _Reply, **_ignored: Any) -> None:
        reply({"clock": self._events.clock})

    def _hello(self, reply: _Reply, from_node: str = "", revoked: Any = None, **_ignored: Any) -> None:
        if from_node != self._node:
            # Revokes travel through the broker, so that there are none to tell.
            reply({"revoked": {}, "clock": self._events.clock})

    def _conf(self, reply: _Reply, with_defaults: bool = False, **_ignored: Any) -> None:
        reply(masked_dump(self._app.settings, defaults=bool(with_defaults)))

    def _report(self, reply: _Reply, **_ignored: Any) -> None:
        report = {"node": self._node, **problem_report(self._app.settings)}
        reply({"ok": yaml.safe_dump(report, sort_keys=False, allow_unicode=True)})

    def _registered(
        self, reply: _Reply, taskinfoitems: Iterable[str] | None = None, builtins: bool = False, **_ignored: Any
    ) -> None:
        wanted = [name for name in taskinfoitems or ("rate_limit",) if isinstance(name, str) and name[:1] != "_"]
        lines = []
        for name, task in sorted(self._app.tasks.items()):
            if is_builtin(name) and not builtins:
                continue
            values = [(item, getattr(task.options, item, None)) for item in wanted]
            shown = " ".join(f"{item}={value}" for item, value in values if value is not None)
            lines.append(f"{name} [{shown}]" if shown else name)
        reply(lines)

    def _memsample(self, reply: _Reply, **_ignored: Any) -> None:
        reply(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f}MB")

    def _enable_events(self, reply: _Reply, **_ignored: Any) -> None:
        reply({"ok": "task events enabled" if self._heart.enable() else "task events already enabled"})

    def _disable_events(self, reply: _Reply, **_ignored: Any) -> None:
        reply({"ok": "task events disabled" if self._heart.disable() else "task events already disabled"})

    def _heartbeat(self, reply: _Reply, **_ignored: Any) -> None:
        self._heart.beat_once()
        reply({"ok": "heartbeat sent"})

    def _shutdown(self, reply: _Reply, **_ignored: Any) -> None:
        _log.warning("Got shutdown from remote")
        self._ask(reply, "shutdown", {}, lambda _answer: reply({"ok": "shutting down"}))

    # -- about its queues -----------------------------------------------------------------------------------------

    def _listed(self, method: str) -> Callable[..., None]:
        def listed(reply: _Reply, safe: bool = False, **_ignored: Any) -> None:
            def gathered(answer: Answer) -> None:
                reply([{**one, "hostname": self._node} for part in answer["queues"].values() for one in part])

            self._ask(reply, method, {"safe": bool(safe)}, gathered)

        return listed

    def _query_task(self, reply: _Reply, ids: Any = (), **_ignored: Any) -> None:
        def gathered(answer: Answer) -> None:
            found: dict[str, Any] = {}
            for part in answer["queues"].values():
                found.update({name: [state, {**info, "hostname": self._node}] for name, (state, info) in part.items()})
            reply(found)

        self._ask(reply, "query", {"ids": [ids] if isinstance(ids, str) else [str(one) for one in ids]}, gathered)

    def _active_queues(self, reply: _Reply, **_ignored: Any) -> None:
        self._ask(reply, "state", {}, lambda answer: reply([self._queue(name) for name in answer["queues"]]))

    def _queue(self, name: str) -> dict[str, Any]:
        settings = self._app.settings
        prefix = settings.topology.prefix
        arguments = dict(queue_arguments(prefix, name, settings.queues[name]))
        exchange = {
            "name": prefix, "type": "direct", "arguments": None, "durable": True, "passive": False,
            "auto_delete": False, "delivery_mode": 2, "no_declare": False,
        }  # fmt: skip
        return {
            "name": name, "exchange": exchange, "routing_key": name, "queue_arguments": arguments,
            "binding_arguments": None, "consumer_arguments": None, "durable": True, "exclusive": False,
            "auto_delete": False, "no_ack": False, "alias": None, "bindings": [], "no_declare": None,
            "expires": None, "message_ttl": arguments.get("x-message-ttl"), "max_length": arguments.get("x-max-length"),
            "max_length_bytes": arguments.get("x-max-length-bytes"), "max_priority": arguments.get("x-max-priority"),
        }  # fmt: skip

    def _stats(self, reply: _Reply, **_ignored: Any) -> None:
        self._ask(reply, "state", {}, lambda answer: reply(self._statistics(answer)))

    def _statistics(self, answer: Answer) -> dict[str, Any]:
        queues = answer["queues"]
        totals: dict[str, int] = {}
        for state in queues.values():
            for task, count in state["totals"].items():
                totals[task] = totals.get(task, 0) + count
        worker, broker = self._app.settings.worker, self._app.settings.broker
        url = urlsplit(broker.url[0])
        children = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "total": totals,
            "pid": answer["worker"]["pid"],
            "clock": str(self._events.clock),
            "uptime": int(time.time() - self._started),
            "pool": {
                "implementation": "amqptasks:" + ",".join(sorted({state["pool"] for state in queues.values()})),
                "max-concurrency": sum(state["concurrency"] for state in queues.values()),
                "processes": [pid for state in queues.values() for pid in state["executors"]],
                "max-tasks-per-child": worker.max_tasks_per_child or "N/A",
                "put-guarded-by-semaphore": False,
                "timeouts": [worker.soft_time_limit or 0, worker.time_limit or 0],
                "writes": {"total": sum(totals.values())},
            },
            "broker": {
                "hostname": url.hostname, "userid": url.username, "virtual_host": url.path.lstrip("/") or "/",
                "port": url.port or (5671 if url.scheme == "amqps" else 5672), "ssl": url.scheme == "amqps",
                "transport": "amqp", "transport_options": {}, "login_method": "PLAIN", "uri_prefix": None,
                "heartbeat": float(broker.heartbeat), "connect_timeout": broker.connection_timeout,
                "failover_strategy": "random", "alternates": [],
            },
            **_autoscaler(queues.values()),
            "prefetch_count": sum(state["prefetch"] for state in queues.values()),
            "rusage": {name[3:]: getattr(children, name) for name in dir(children) if name.startswith("ru_")},
            "groups": {
                name: {**state, **answer["worker"]["groups"].get(name, {}), "totals": None}
                for name, state in queues.items()
            },
            "desk": os.getpid(),
        }  # fmt: skip

    # -- changing it ----------------------------------------------------------------------------------------------

    def _queue_changed(self, method: str) -> Callable[..., None]:
        def changed(reply: _Reply, queue: str = "", **_ignored: Any) -> None:
            self._ask(reply, method, {"queue": str(queue)}, lambda answer: reply(answer["queues"][str(queue)]))

        return changed

    def _change(self, reply: _Reply, method: str, arguments: dict[str, Any]) -> None:
        """Ask every leader for a change; one that cannot makes the whole an error."""

        def changed(answer: Answer) -> None:
            said = list(answer["queues"].values())
            wrong = [one["error"] for one in said if "error" in one]
            reply({"error": "; ".join(wrong)} if wrong else said[0] if said else {"error": "no queue answered"})

        self._ask(reply, method, arguments, changed)

    def _time_limit(
        self,
        reply: _Reply,
        task_name: str = "",
        hard: float | None = None,
        soft: float | None = None,
        **_ignored: Any,
    ) -> None:
        if task_name not in self._app.tasks:
            reply({"error": "unknown task"})
            return
        limits = {"hard": _seconds(hard), "soft": _seconds(soft)}
        self._change(reply, "time_limit", {"task": task_name, **limits})

    def _pool(self, reply: _Reply, by: int) -> None:
        self._change(reply, "pool", {"by": by})

    def _autoscale(self, reply: _Reply, max: Any = None, min: Any = None, **_ignored: Any) -> None:
        bounds = {"most": None if max is None else int(max), "least": None if min is None else int(min)}
        self._change(reply, "autoscale", bounds)

    def _rate_limit(self, reply: _Reply, task_name: str = "", rate_limit: Any = None, **_ignored: Any) -> None:
        if task_name not in self._app.tasks:
            reply({"error": "unknown task"})
            return
        self._change(reply, "rate_limit", {"task": task_name, "rate_limit": rate_limit})

    def _revoke(
        self, reply: _Reply, task_id: Any = (), terminate: bool = False, signal: Any = None, **_ignored: Any
    ) -> None:
        ids = [task_id] if isinstance(task_id, str) else [str(one) for one in task_id or ()]
        arguments = {"ids": ids, "stamps": None, "terminate": bool(terminate), "signal": signal or "SIGTERM"}
        self._change(reply, "revoke", arguments)

    def _revoke_stamps(
        self, reply: _Reply, headers: Any = (), terminate: bool = False, signal: Any = None, **_ignored: Any
    ) -> None:
        arguments = {"ids": [], "stamps": headers, "terminate": bool(terminate), "signal": signal or "SIGTERM"}
        self._change(reply, "revoke", arguments)

    def _revoked(self, reply: _Reply, **_ignored: Any) -> None:
        self._ask(reply, "revoked", {}, lambda answer: reply(max(answer["queues"].values(), key=len, default=[])))


_ALIASES = {
    "dump_revoked": "revoked",
    "dump_conf": "conf",
    "dump_active": "active",
    "dump_reserved": "reserved",
    "dump_schedule": "scheduled",
    "dump_tasks": "registered",
}


def _autoscaler(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all queues whose pool follows the work, in Celery's words; nothing when there is none."""
    found = [state["autoscaler"] for state in states if state["autoscaler"]]
    return {"autoscaler": {key: sum(one[key] for one in found) for key in found[0]}} if found else {}


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"a limit must be a number of seconds above 0, not {value!r}")
    return number
