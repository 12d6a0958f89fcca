"""``amqptasks schedule``: periodic calls, asked of the beat that leads. The app is not imported."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from amqptasks.beat.commands import command_envelope
from amqptasks.beat.signatures import entry_signature
from amqptasks.broker.inquiry import ask
from amqptasks.cli.arguments import json_of
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.errors import AmqpTasksError
from amqptasks.periodic import checked_table
from amqptasks.schedules import zone_named

__all__ = ["schedule_group"]

_timeout = click.option(
    "--timeout", "-t", type=click.FloatRange(0.1), default=5.0, metavar="S", help="Seconds to wait for the beat."
)
_json = click.option("--json", "-j", "as_json", is_flag=True, help="For programs.")


class NoBeat(AmqpTasksError):
    """No beat has answered."""


@click.group("schedule", epilog="\b\nExamples:\n  amqptasks schedule list\n  amqptasks schedule pause nightly-report")
def schedule_group() -> None:
    """Periodic calls: what is due next; pause, resume, run now, add, remove. A beat must be running."""


@schedule_group.command("list")
@_json
@_timeout
@click.pass_obj
def list_command(obj: CliContext, as_json: bool, timeout: float) -> None:
    """Show each entry with its last run and its next five."""
    table = _ask(obj, "list", None, timeout)
    if as_json:
        click.echo(json.dumps(table, ensure_ascii=False))
        return
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "schedule", "task", "last run", "next"):
        shown.add_column(column, overflow="fold", no_wrap=column in ("last run", "next"))
    for one in table["entries"]:
        state = "disabled" if not one["enabled"] else "paused" if one["paused"] else ""
        zone = one["timezone"]
        following = state or "\n".join(_shown(moment, zone) for moment in one["next"]) or "never"
        schedule = f"{one['schedule']} ({zone})" if zone else one["schedule"]
        name = f"{one['name']} (added)" if one["added"] else one["name"]
        shown.add_row(name, schedule, one["task"], _shown(one["last_run"], zone), following)
    # Where nobody knows how wide the page is, nothing is folded.
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    click.echo(f"Led by {table['leader']['host']}, process {table['leader']['pid']}.")


@schedule_group.command("pause")
@click.argument("name")
@_json
@_timeout
@click.pass_obj
def pause_command(obj: CliContext, name: str, as_json: bool, timeout: float) -> None:
    """Send entry NAME no more, until it is resumed. Beats that start later keep to it."""
    table = _ask(obj, "pause", name, timeout)
    _say(table, as_json, f"{name} {'was paused already' if table['was_paused'] else 'is paused'}.")


@schedule_group.command("resume")
@click.argument("name")
@_json
@_timeout
@click.pass_obj
def resume_command(obj: CliContext, name: str, as_json: bool, timeout: float) -> None:
    """Send entry NAME again, from its next time on. What was due meanwhile is not made up for."""
    table = _ask(obj, "resume", name, timeout)
    _say(table, as_json, f"{name} {'is resumed' if table['was_paused'] else 'was not paused'}.")


@schedule_group.command("run")
@click.argument("name")
@_json
@_timeout
@click.pass_obj
def run_command(obj: CliContext, name: str, as_json: bool, timeout: float) -> None:
    """Send entry NAME now, besides its schedule, paused or not; print the task's id."""
    table = _ask(obj, "run", name, timeout)
    _say(table, as_json, str(table["task_id"]))


@schedule_group.command(
    "add",
    epilog="\b\nExamples:\n  amqptasks schedule add warm-cache --task shop.warm --every 30s\n"
    "  amqptasks schedule add report --task shop.report --crontab '0 6 * * mon-fri' --args '[7]' --queue media",
)
@click.argument("name")
@click.option("--task", required=True, metavar="TASK", help="Name of the task.")
@click.option("--every", metavar="DURATION", help="Interval: 30, 30s, 5m, 1h30m.")
@click.option("--crontab", "--cron", "cron", metavar="FIELDS", help="Five fields: minute hour day month weekday.")
@click.option("--timezone", metavar="ZONE", help="Zone of the crontab (default: that of the beat's settings).")
@click.option("--args", "-a", default="[]", metavar="JSON", help="Positional arguments, a list.")
@click.option("--kwargs", "-k", default="{}", metavar="JSON", help="Named arguments, an object.")
@click.option("--queue", metavar="QUEUE", help="The queue, before any route.")
@click.option("--priority", type=int, metavar="N", help="The message's priority.")
@click.option("--expires", metavar="DURATION", help="A call that has waited longer does not run any more.")
@click.option("--catch-up", metavar="skip|one|all", help="Runs missed while no beat ran (default: one for all).")
@_json
@_timeout
@click.pass_obj
def add_command(
    obj: CliContext,
    /,
    name: str,
    task: str,
    args: str,
    kwargs: str,
    as_json: bool,
    timeout: float,
    **given: Any,
) -> None:
    """Add entry NAME, or change it when it was added before. The broker keeps it; no beat is restarted.

    Entries of the settings and of the code are changed there.
    """
    options = {key: value for key in ("queue", "priority", "expires") if (value := given.pop(key)) is not None}
    entry = {"task": task, "args": json_of(list, "--args", args), "kwargs": json_of(dict, "--kwargs", kwargs)}
    entry |= {"options": options} if options else {}
    entry |= {key: value for key, value in given.items() if value is not None}
    # What is wrong whoever looks at it needs no beat to say so.
    entry = checked_table(name, entry)
    signed = entry_signature(load_cli_settings(obj).security.keyring(), name, entry)
    table = _ask(obj, "add", name, timeout, {"entry": entry, "signed": signed})
    if table["warning"]:
        click.echo(f"Warning: {table['warning']}", err=True)
    following = table["entry"]["next"]
    soon = f"next {_shown(following[0], table['entry']['timezone'])}" if following else "paused, as it was"
    done = "is added" if table["was"] is None else f"is changed, from {table['was']}"
    _say(table, as_json, f"{name} {done}: {table['entry']['schedule']}; {soon}.")


@schedule_group.command("remove")
@click.argument("name")
@_json
@_timeout
@click.pass_obj
def remove_command(obj: CliContext, name: str, as_json: bool, timeout: float) -> None:
    """Remove entry NAME, which was added by command."""
    table = _ask(obj, "remove", name, timeout)
    still = " The settings or the code have one of this name, which goes on." if table["still"] else ""
    _say(table, as_json, f"{name} is removed.{still}")


def _ask(obj: CliContext, verb: str, name: str | None, timeout: float, added: dict[str, Any] | None = None) -> Any:
    settings = load_cli_settings(obj)
    prefix = settings.topology.prefix
    envelope = command_envelope(prefix, verb, name, seconds=timeout, added=added)
    body = ask(settings.broker, envelope, prefix=prefix, seconds=timeout)
    if body is None:
        raise NoBeat(f"no beat has answered within {timeout:g} s: is one running (`amqptasks beat`, `worker -B`)?")
    table = json.loads(body)
    if "error" in table:
        raise AmqpTasksError(table["error"])
    return table


def _say(table: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(table, ensure_ascii=False) if as_json else text)


def _shown(moment: str | None, zone: str | None) -> str:
    """A moment on the clock of the entry; of this machine, where it has none."""
    if moment is None:
        return "-"
    clock = zone_named(zone) if zone else None
    return datetime.fromisoformat(moment).astimezone(clock).strftime("%Y-%m-%d %H:%M:%S %Z")
