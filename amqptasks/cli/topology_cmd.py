"""``amqptasks topology``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote, urlsplit

import click

from amqptasks.broker.admin import declare
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.topology import build_topology
from amqptasks.topology.entities import Binding, Topology
from amqptasks.topology.permissions import permissions

__all__ = ["topology_group"]


@click.group("topology")
def topology_group() -> None:
    """Exchanges, queues and bindings of the settings."""


@topology_group.command("show", epilog="\b\nExample:\n  amqptasks topology show --json | jq '.queues[].name'")
@click.option("--all", "whole", is_flag=True, help="With the delay ladder, which is the same for everybody.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def show(obj: CliContext, whole: bool, as_json: bool) -> None:
    """Show what the settings declare. The broker is not asked."""
    settings = load_cli_settings(obj)
    topology = build_topology(settings)
    ladder = f"{settings.topology.prefix}.delay."
    if as_json:
        click.echo(json.dumps(_plain(topology), ensure_ascii=False))
        return
    for exchange in topology.exchanges:
        if exchange.name.startswith(ladder) and not whole:
            continue
        bindings = [one for one in topology.bindings if one.source == exchange.name]
        click.secho(f"{exchange.name}", bold=True, nl=False)
        click.echo(f"  {exchange.type}")
        for number, binding in enumerate(bindings, 1):
            click.echo(f"  {'└' if number == len(bindings) else '├'} {_line(topology, binding)}")


def _line(topology: Topology, binding: Binding) -> str:
    key = binding.routing_key or "(any)"
    queue = topology.queue(binding.destination) if binding.destination_type == "queue" else None
    if queue is None:
        return f"{key} → exchange {binding.destination}"
    arguments = ", ".join(f"{name}={value}" for name, value in queue.arguments if name != "x-queue-type")
    return f"{key} → {queue.name}  {queue.kind}{'  ' + arguments if arguments else ''}"


def _plain(topology: Topology) -> dict[str, Any]:
    def one(entity: Any) -> dict[str, Any]:
        table = asdict(entity)
        table["arguments"] = dict(entity.arguments)
        table.pop("origin")
        return table

    return {
        "exchanges": [one(entity) for entity in topology.exchanges],
        "queues": [one(entity) for entity in topology.queues],
        "bindings": [one(entity) for entity in topology.bindings],
    }


@topology_group.command("apply", epilog="\b\nExample:\n  amqptasks --config prod.yaml topology apply")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def apply(obj: CliContext, as_json: bool) -> None:
    """Declare everything in the broker. What stands already stays; nothing is changed or deleted.

    A queue that exists with other arguments is an error that names queue, argument and both values.
    """
    settings = load_cli_settings(obj)
    topology = build_topology(settings)
    declare(topology, settings.broker)
    counts = {
        "exchanges": len(topology.exchanges),
        "queues": len(topology.queues),
        "bindings": len(topology.bindings),
    }
    if as_json:
        click.echo(json.dumps(counts))
    else:
        click.echo("declared: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


@topology_group.command(
    "permissions",
    epilog="\b\nExamples:\n  amqptasks topology permissions\n"
    "  amqptasks topology permissions --role worker --user shop-worker | sh",
)
@click.option("--role", type=click.Choice(["producer", "worker", "operator", "monitor"]), help="Only this one.")
@click.option("--user", metavar="NAME", help="The user that is to have the role; by default its name is the role's.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def show_permissions(obj: CliContext, role: str | None, user: str | None, as_json: bool) -> None:
    """Print the least permissions with which each role works, as rabbitmqctl commands."""
    if user is not None and role is None:
        raise click.UsageError("--user needs --role")
    settings = load_cli_settings(obj)
    found = permissions(build_topology(settings), settings.topology.prefix)
    chosen = {name: permission for name, permission in found.items() if role in (None, name)}
    if as_json:
        click.echo(json.dumps({name: asdict(permission) for name, permission in chosen.items()}))
        return
    vhost = unquote(urlsplit(settings.broker.url[0]).path.removeprefix("/")) or "/"
    for name, permission in chosen.items():
        who = user or name
        command = ["rabbitmqctl", "set_permissions", "-p", vhost, who]
        click.echo(shlex.join([*command, permission.configure, permission.write, permission.read]))
        if permission.tag:
            click.echo(shlex.join(["rabbitmqctl", "set_user_tags", who, permission.tag]))
