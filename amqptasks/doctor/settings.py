"""What settings and application tell without a broker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel

from amqptasks.app import AmqpTasks
from amqptasks.builtin import is_builtin
from amqptasks.claims import claims_of
from amqptasks.config import Settings, mask_url
from amqptasks.doctor.findings import Finding, Level, counted
from amqptasks.errors import AmqpTasksError
from amqptasks.results.stores import open_store
from amqptasks.topology.build import BUILT_IN_EXCHANGES
from amqptasks.topology.entities import Topology

__all__ = ["check_application", "check_claims", "check_results", "check_routes", "check_settings"]

_LOCAL = ("localhost", "127.0.0.1", "::1", None)


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Settings that are valid, and unwise."""
    for url in settings.broker.url:
        parts = urlsplit(url)
        if parts.hostname not in _LOCAL and parts.scheme == "amqp" and settings.broker.tls is None:
            yield Finding(
                Level.WARNING,
                "tls",
                f"{mask_url(url)} is spoken to in the clear",
                "user, password and messages can be read on the way",
                f"broker: {{url: '{mask_url(_encrypted(url))}'}}",
            )
        if parts.hostname not in _LOCAL and parts.username in (None, "guest"):
            yield Finding(
                Level.WARNING,
                "user",
                f"the user at {parts.hostname} is guest",
                "RabbitMQ lets guest in from the same machine only, unless somebody has opened it to everybody",
                "rabbitmqctl add_user worker && amqptasks topology permissions --role worker --user worker | sh",
            )
    safe = [one for one in settings.serialization.accept_content if one != "pickle"]
    if "pickle" in settings.serialization.accept_content:
        yield Finding(
            Level.WARNING,
            "pickle",
            "workers decode pickle",
            "whoever may publish to a queue runs code in its workers",
            f"serialization: {{accept_content: [{', '.join(safe) or 'json'}]}}",
        )
    for name, queue in settings.queues.items():
        held = queue.prefetch if queue.prefetch is not None else settings.worker.prefetch
        slots = queue.concurrency or settings.worker.concurrency or 1
        if queue.max_priority is not None and isinstance(held, int) and held > 2 * slots:
            yield Finding(
                Level.WARNING,
                "priorities",
                f"queue {name} has priorities and a prefetch of {held}",
                "what a worker holds is out of the queue: an urgent task waits behind all of it",
                _yaml({"queues": {name: {"prefetch": "auto"}}}),
            )
        if not queue.dead_letter.enabled:
            yield Finding(
                Level.WARNING,
                "dead letters",
                f"queue {name} keeps no dead letters",
                "a task that fails for good is gone, but for a line in a log",
                _yaml({"queues": {name: {"dead_letter": {"enabled": True}}}}),
            )


def _yaml(data: Any) -> str:
    """One line for the YAML file."""
    return yaml.safe_dump(data, default_flow_style=True, width=10_000, allow_unicode=True).strip()


def _encrypted(url: str) -> str:
    """The same URL as amqps; its port is 5671 unless it was another than 5672 before."""
    head, at, rest = url.replace("amqp://", "amqps://", 1).rpartition("@")
    return head + at + rest.replace(":5672", ":5671", 1)


def check_routes(settings: Settings, topology: Topology) -> Iterator[Finding]:
    """Routes that lead to an exchange from which nothing leads on: each call raises Unroutable."""
    for index, rule in enumerate(settings.routes):
        exchange, queue = rule.exchange or settings.topology.prefix, rule.queue
        key = (queue or "") if rule.routing_key is None else rule.routing_key
        # What is bound to exchanges that every virtual host has, others may know.
        if rule.exchange is None or exchange in BUILT_IN_EXCHANGES or topology.routes(exchange, key):
            continue
        name = rule.match or rule.regex
        yield Finding(
            Level.ERROR,
            "routes",
            f"routes[{index}] ({name}) points nowhere: no queue is bound to exchange {exchange!r} for key {key!r}",
            "each call raises Unroutable",
            _yaml(
                {
                    "queues": {
                        queue or settings.topology.default_queue: {
                            "bindings": [{"exchange": exchange, "routing_key": key}]
                        }
                    }
                }
            ),
        )


def check_application(app: AmqpTasks | None, problem: str | None, named: str | None = None) -> Iterator[Finding]:
    """Whether the application can be imported, and whether settings and tasks know each other. `named`: by -A."""
    if app is None:
        module = (named or "module:app").partition(":")[0]
        yield Finding(
            Level.ERROR if problem else Level.INFO,
            "application",
            problem or "no app is named: its tasks are not checked",
            "a worker could not start" if problem else "routes, options and schedules are checked against tasks",
            f"python -c 'import {module}'" if problem else "app: module:app",
        )
        return
    names = [name for name in app.tasks if not is_builtin(name)]
    if not names:
        package = (named or "").partition(":")[0].partition(".")[0]
        mend = f"include: [{package or 'package'}.tasks]"
        yield Finding(Level.WARNING, "application", "the app has no tasks", "every message is unknown", mend)
        return
    yield Finding(Level.OK, "application", f"{app.name}: {counted(len(names), 'task')}")
    yield from _routes(app, names)
    tasks: Mapping[str, Any] = app.settings.tasks
    for pattern, options in tasks.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            yield Finding(
                Level.WARNING,
                "tasks",
                f"tasks.{pattern!r} matches no task",
                "its options have no effect",
                _yaml({"tasks": {_nearest(pattern, names): _given(options)}}),
            )
    for name, entry in app.settings.schedule.items():
        if entry.task not in app.tasks:
            yield Finding(
                Level.WARNING,
                "schedule",
                f"schedule.{name} calls {entry.task}, which the app does not have",
                "each tick becomes a dead letter, unless another app's workers know it",
                _yaml({"schedule": {name: {**_given(entry), "task": _nearest(entry.task, names)}}}),
            )


def _given(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude_unset=True)


def _nearest(name: str, names: list[str]) -> str:
    return get_close_matches(name, names, 1, cutoff=0.0)[0]


def _routes(app: AmqpTasks, names: list[str]) -> Iterator[Finding]:
    used: set[int] = set()
    unmatched = []
    for name in names:
        match = app.router.explain(name, task_queue=app.tasks[name].options.queue)
        if match.index is not None:
            used.add(match.index)
        if match.source == "default":
            unmatched.append(name)
    for index, rule in enumerate(app.settings.routes):
        if index not in used:
            yield Finding(
                Level.WARNING,
                "routes",
                f"routes[{index}] ({rule.match or rule.regex}) matches no task",
                "a rule before it takes them, or the pattern is wrong",
                f"amqptasks routes test {_nearest(rule.match or rule.regex or '', names)}",
            )
    if unmatched and app.settings.routes:
        shown = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
        yield Finding(
            Level.INFO,
            "routes",
            f"{counted(len(unmatched), 'task')} without a route, in the default queue: {shown}",
            "they share it with everything else",
            f"routes: [{{match: '{unmatched[0]}', queue: {app.settings.topology.default_queue}}}]",
        )


def check_results(settings: Settings) -> Iterator[Finding]:
    """Whether the result store answers."""
    backend = settings.result.backend
    if backend == "none" or backend.startswith("rpc://"):
        yield Finding(Level.OK, "results", "kept nowhere" if backend == "none" else "replies over AMQP")
        return
    try:
        store = open_store(backend, expires=settings.result.expires or None)
        try:
            store.get(["amqptasks-doctor"])
        finally:
            store.close()
    except AmqpTasksError as error:
        yield Finding(
            Level.ERROR,
            "results",
            str(error),
            "tasks whose results are wanted wait until it is back",
            "result: {backend: 'rpc://'}",
        )
    else:
        yield Finding(Level.OK, "results", f"{mask_url(backend)} answers")


def check_claims(settings: Settings) -> Iterator[Finding]:
    """Whether the store of large bodies takes one and gives it back."""
    try:
        claims = claims_of(settings)
        if claims is None:
            return
        claims.check()
        if claims.is_local and Path(claims.root).is_mount():
            yield Finding(
                Level.WARNING,
                "claim check",
                f"{claims.root} is a mount point",
                "when it is not mounted, tasks are dead-lettered for bodies that are not gone, and others are lost",
                f"claim_check: {{url: 'file://{claims.root}/bodies'}}",
            )
            return
    except AmqpTasksError as error:
        why = "calls with large arguments are refused, and tasks that have them wait until it is back"
        yield Finding(Level.ERROR, "claim check", str(error), why, "claim_check: {url: 'file:///a/directory/of/all'}")
    else:
        yield Finding(Level.OK, "claim check", f"large bodies can be kept in {claims}")
