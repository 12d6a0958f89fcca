"""``amqptasks routes``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.routing import RouteMatch, Router

__all__ = ["routes_group"]


@click.group("routes")
def routes_group() -> None:
    """Show where a task would go, and why."""


@routes_group.command("test", epilog="\b\nExample:\n  amqptasks routes test payment.charge")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def test(obj: CliContext, name: str, as_json: bool) -> None:
    """Tell rule, queue, exchange, routing key and priority for a task called NAME.

    What the code says of the task (`queue=`) is not looked at; rules come before it anyway.
    """
    match = Router(load_cli_settings(obj)).explain(name)
    if as_json:
        rule = None if match.rule is None else match.rule.model_dump(exclude_none=True)
        click.echo(json.dumps({"task": name, "rule": rule, "index": match.index, **asdict(match.route)}))
        return
    route = match.route
    rows = [
        ("task", name),
        ("rule", _rule(match)),
        ("queue", route.queue or "(as the exchange decides)"),
        ("exchange", route.exchange),
        ("key", route.routing_key),
        ("priority", "-" if route.priority is None else route.priority),
    ]
    click.echo("\n".join(f"{title:<9}{value}" for title, value in rows))


def _rule(match: RouteMatch) -> str:
    if match.rule is None:
        return "none matches: the default queue (or the task's own `queue=`)"
    kind = f"match {match.rule.match!r}" if match.rule.match is not None else f"regex {match.rule.regex!r}"
    return f"routes[{match.index}]: {kind}"
