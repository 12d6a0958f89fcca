"""``amqptasks routes``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app, load_cli_settings
from amqptasks.config import Settings
from amqptasks.discovery import import_tasks
from amqptasks.routing import RouteMatch, Router

__all__ = ["routes_group"]


@click.group("routes")
def routes_group() -> None:
    """Show where a task would go, and why."""


@dataclass(slots=True)
class _Own:
    """What the task itself says, and where it is said."""

    queue: str | None = None
    priority: int | None = None
    queue_from: str = ""
    priority_from: str = ""


@routes_group.command("test", epilog="\b\nExample:\n  amqptasks routes test payment.charge")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def test(obj: CliContext, name: str, as_json: bool) -> None:
    """Tell rule, queue, exchange, routing key and priority for a task called NAME.

    The first rule of `routes` wins, then the task's own queue, then the default queue. The task's own options are those
    of the `tasks` section and, with -A, of the code.
    """
    app = load_app(obj) if obj.app is not None else None
    settings = load_cli_settings(obj) if app is None else app.settings
    own = _own(app, settings, name)
    match = Router(settings).explain(name, task_queue=own.queue, task_priority=own.priority)
    route = match.route
    if as_json:
        rule = None if match.rule is None else match.rule.model_dump(exclude_none=True)
        found = {"task": name, "source": match.source, "rule": rule, "index": match.index, **asdict(route)}
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    rows = [
        ("task", name),
        ("rule", _rule(match, own, settings)),
        ("queue", route.queue or "(as the exchange decides)"),
        ("exchange", route.exchange),
        ("key", route.routing_key or "(empty)"),
        ("priority", _priority(match, own)),
    ]
    click.echo("\n".join(f"{title:<9}{value}" for title, value in rows))


def _own(app: AmqpTasks | None, settings: Settings, name: str) -> _Own:
    own = _Own()
    if app is not None:
        import_tasks(app)
        task = app.tasks.get(name)
        if task is None:
            click.echo(f"note: {app.name} has no task called {name!r}; the settings alone decide", err=True)
        else:
            own = _Own(task.declared_options.queue, task.declared_options.priority, "the code", "the code")
    for place, key, value in _of_the_settings(settings, name):
        if key == "queue":
            own.queue, own.queue_from = value, place
        else:
            own.priority, own.priority_from = value, place
    return own


def _of_the_settings(settings: Settings, name: str) -> Iterator[tuple[str, str, Any]]:
    for pattern, task in settings.tasks.items():
        if fnmatchcase(name, pattern):
            for key in ("queue", "priority"):
                if key in task.model_fields_set:
                    yield f"tasks.{pattern}", key, getattr(task, key)


def _rule(match: RouteMatch, own: _Own, settings: Settings) -> str:
    if match.rule is not None:
        kind = f"match {match.rule.match!r}" if match.rule.match is not None else f"regex {match.rule.regex!r}"
        return f"routes[{match.index}]: {kind}"
    if match.source == "task":
        return f"none of {len(settings.routes)} matches: queue of {own.queue_from}"
    return f"none of {len(settings.routes)} matches: the default queue"


def _priority(match: RouteMatch, own: _Own) -> str:
    if match.route.priority is None:
        return "-"
    by_rule = match.rule is not None and match.rule.priority is not None
    return str(match.route.priority) + ("" if by_rule else f" (of {own.priority_from})")
