"""``amqptasks topology``."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote, urlsplit

import click

from amqptasks.broker.admin import declare, remove_bindings
from amqptasks.broker.management import ManagementApi
from amqptasks.broker.policies import Policy, losses
from amqptasks.broker.versions import accepted_arguments
from amqptasks.cli.context import CliContext
from amqptasks.cli.export_cmd import export_command
from amqptasks.cli.migrate_cmd import migrate_command
from amqptasks.cli.settings import load_cli_settings, load_declared
from amqptasks.config import Settings
from amqptasks.topology import build_topology
from amqptasks.topology.delays import LADDER_LEVELS
from amqptasks.topology.entities import Binding, Topology
from amqptasks.topology.graph import dot, mermaid
from amqptasks.topology.permissions import permissions
from amqptasks.topology.plan import Change, compare

__all__ = ["topology_group"]


@click.group("topology")
def topology_group() -> None:
    """Exchanges, queues and bindings of the settings."""


topology_group.add_command(export_command)
topology_group.add_command(migrate_command)


@topology_group.command(
    "show",
    epilog="\b\nExamples:\n  amqptasks topology show --json | jq '.queues[].name'\n"
    "  amqptasks topology show --format dot | dot -Tsvg > topology.svg",
)
@click.option(
    "--format", "form", type=click.Choice(["tree", "mermaid", "dot"]), default="tree", help="Text, or a graph's source."
)
@click.option("--all", "whole", is_flag=True, help="With the delay ladder, which is the same for everybody.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def show(obj: CliContext, form: str, whole: bool, as_json: bool) -> None:
    """Show what the settings declare. The broker is not asked."""
    settings, topology = load_declared(obj)
    ladder = f"{settings.topology.prefix}.delay."
    if as_json:
        click.echo(json.dumps(_plain(topology), ensure_ascii=False))
        return
    if form != "tree":
        draw = mermaid if form == "mermaid" else dot
        click.echo(draw(topology, "" if whole else ladder), nl=False)
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
        # Neither is in the broker.
        table.pop("origin")
        table.pop("defaults", None)
        return table

    return {
        "exchanges": [one(entity) for entity in topology.exchanges],
        "queues": [one(entity) for entity in topology.queues],
        "bindings": [one(entity) for entity in topology.bindings],
    }


@topology_group.command(
    "plan",
    epilog="\b\nExamples:\n  amqptasks topology plan\n"
    "  amqptasks topology plan --json | jq '.changes[] | select(.action == \"change\")'",
)
@click.option("--foreign", is_flag=True, help="Also what belongs to others.")
@click.option("--all", "whole", is_flag=True, help="Each part of the delay ladder, also where all of it is missing.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def plan(obj: CliContext, foreign: bool, whole: bool, as_json: bool) -> None:
    """Compare the settings with the broker. Exit 0: the same; 2: they differ; 1: failed. Needs the management API."""
    settings, topology = load_declared(obj)
    with ManagementApi(settings.broker, purpose="`topology plan`") as api:
        changes, policies = _changes(api, topology), api.policies()
    differences = [change for change in changes if change.differs]
    own = {name: policy for name, policy in policies.items() if topology.queue(name) is not None}
    if as_json:
        shown = [
            {
                "action": one.action,
                "kind": one.kind,
                "name": one.name,
                "detail": one.detail,
                **_mended_by(one, settings),
            }
            for one in (changes if foreign else differences)
        ]
        effective = {
            name: {
                "policy": one.name,
                "operator_policy": one.operator,
                **one.definition,
                "loses": _losses(topology, name, one),
            }
            for name, one in own.items()
        }
        click.echo(json.dumps({"same": not differences, "changes": shown, "policies": effective}, ensure_ascii=False))
    else:
        _show_plan(changes if foreign else differences, settings, whole)
        for name, one in own.items():
            values = ", ".join(f"{key}={value}" for key, value in one.definition.items())
            click.echo(f"  policy  queue     {name}  {one.names}: {values}")
            for key, text in _losses(topology, name, one).items():
                click.secho(f"          {key}: {text}", fg="yellow" if sys.stdout.isatty() else None)
    if differences:
        raise SystemExit(2)


def _missing_ladder(changes: list[Change], prefix: str) -> frozenset[Change] | None:
    """What makes the delay ladder, where none of it stands: a hundred lines that are the same for everybody."""
    found = [one for one in changes if one.name.startswith(prefix) and one.action in ("create", "bind")]
    levels = [one for one in found if one.kind == "queue" and one.name.removeprefix(prefix).isdigit()]
    return frozenset(found) if len(levels) == LADDER_LEVELS else None


def _counted(changes: Iterable[Change]) -> str:
    kinds = Counter(one.kind for one in changes)
    return ", ".join(f"{kinds[kind]} {kind}s" for kind in ("exchange", "queue", "binding"))


def _changes(api: ManagementApi, topology: Topology) -> list[Change]:
    server = api.server()
    sent = {queue.name: accepted_arguments(queue, server) for queue in topology.queues}
    return compare(topology, api.topology(), sent)


_SIGNS = {
    "create": ("+", "green"), "bind": ("+", "green"), "unbind": ("-", "red"), "change": ("!", "yellow"),
    "foreign": ("?", "bright_black"),
}  # fmt: skip


def _mended_by(change: Change, settings: Settings) -> dict[str, str]:
    """The command that replaces a queue."""
    migrates = change.kind == "queue" and change.name.removesuffix(".dlq") in settings.queues
    if change.action != "change" or not migrates:
        return {}
    return {"command": shlex.join(["amqptasks", "topology", "migrate", change.name])}


def _losses(topology: Topology, name: str, policy: Policy) -> dict[str, str]:
    queue = topology.queue(name)
    return {} if queue is None else losses(queue, policy.definition)


def _show_plan(changes: list[Change], settings: Settings, whole: bool) -> None:
    ladder = None if whole else _missing_ladder(changes, f"{settings.topology.prefix}.delay.")
    lines = []
    if ladder is not None:
        lines.append((*_SIGNS["create"], f"create  the delay ladder  {_counted(ladder)}; --all shows each"))
    for change in changes:
        if ladder is None or change not in ladder:
            detail = f"  {change.detail}" if change.detail else ""
            lines.append((*_SIGNS[change.action], f"{change.action:<8}{change.kind:<9} {change.name}{detail}"))
    for sign, color, text in lines:
        click.secho(f"{sign} {text}", fg=color if sys.stdout.isatty() else None)
    counts = Counter(change.action for change in changes)
    summary = ", ".join(f"{counts[action]} to {action}" for action in ("create", "bind", "unbind", "change"))
    if not any(change.differs for change in changes):
        click.echo("The broker is as declared.")
        return
    click.echo(f"\n{summary}")
    if counts["create"] or counts["bind"]:
        click.echo("`amqptasks topology apply` creates and binds.")
    if counts["unbind"]:
        click.echo("`amqptasks topology apply --unbind` also removes bindings that nothing declares.")
    commands = [_mended_by(change, settings) for change in changes if change.action == "change"]
    for command in filter(None, commands):
        click.echo(f"`{command['command']}` replaces the queue; its messages stay.")
    if not all(commands):
        click.echo(
            "AMQP freezes arguments: what else is marked ! must be deleted, once it is empty, and declared again."
        )


@topology_group.command("apply", epilog="\b\nExample:\n  amqptasks --config prod.yaml topology apply")
@click.option("--unbind", is_flag=True, help="Also remove bindings of declared queues that are not declared.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before removing.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs; needs --yes with --unbind.")
@click.pass_obj
def apply(obj: CliContext, unbind: bool, yes: bool, as_json: bool) -> None:
    """Declare everything in the broker. What stands already stays; nothing is deleted.

    A queue that exists with other arguments is an error that names queue, argument and both values. With --unbind,
    bindings that were declared once and are not any more are removed; this needs the management API.
    """
    if unbind and as_json and not yes:
        raise click.UsageError("--json cannot ask: give --yes too")
    settings, topology = load_declared(obj)
    declare(topology, settings.broker)
    if unbind:
        _unbind(settings, topology, yes)
    counts = {
        "exchanges": len(topology.exchanges),
        "queues": len(topology.queues),
        "bindings": len(topology.bindings),
    }
    if as_json:
        click.echo(json.dumps(counts))
    else:
        click.echo("declared: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def _unbind(settings: Settings, topology: Topology, yes: bool) -> None:
    with ManagementApi(settings.broker, purpose="`topology apply --unbind`") as api:
        stale = [one for one in _changes(api, topology) if one.action == "unbind" and one.binding is not None]
    if not stale:
        return
    for change in stale:
        click.echo(f"- {change.name}", err=True)
    if not yes:
        click.confirm("Remove these bindings? Their messages take another way, or none", abort=True)
    remove_bindings(settings.broker, [one.binding for one in stale if one.binding is not None])


@topology_group.command(
    "permissions",
    epilog="\b\nExamples:\n  amqptasks topology permissions\n"
    "  amqptasks topology permissions --role worker --user shop-worker | sh",
)
@click.option("--role", type=click.Choice(["producer", "worker", "beat", "operator", "monitor"]), help="Only this one.")
@click.option("--user", metavar="NAME", help="The user that is to have the role; by default its name is the role's.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")
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
