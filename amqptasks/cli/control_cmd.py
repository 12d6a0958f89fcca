"""``amqptasks inspect``, ``control`` and ``status``: remote control of running workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import click

from amqptasks.broker.broadcast import broadcast
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings

__all__ = ["control_command", "inspect_command", "status_command"]


def _number(text: str) -> float | None:
    if text.lower() in ("none", ""):
        return None
    return float(text)


def _yes(text: str) -> bool:
    return text.lower() in ("true", "yes", "on", "1")


@dataclass(frozen=True)
class _Command:
    """A command: what it does, its arguments in order, and whether the last one takes all that is left."""

    help: str
    arguments: tuple[tuple[str, Callable[[str], Any]], ...] = ()
    required: int = 0
    variadic: bool = False


_INSPECT = {
    "ping": _Command("whether workers answer"),
    "active": _Command("tasks that run now"),
    "reserved": _Command("tasks that a worker holds and has not started"),
    "scheduled": _Command("always empty: delayed tasks wait in the broker"),
    "registered": _Command("tasks that a worker knows: [ATTRIBUTE…]", (("taskinfoitems", str),), variadic=True),
    "stats": _Command("counts, pools, processes, broker"),
    "active_queues": _Command("queues that are consumed"),
    "conf": _Command("settings that were set, secrets masked; with the defaults: true", (("with_defaults", _yes),)),
    "report": _Command("versions and settings, for a report of a problem"),
    "revoked": _Command("ids of tasks that will not run, 10 000 at most"),
    "query_task": _Command("where tasks are: ID…", (("ids", str),), required=1, variadic=True),
    "clock": _Command("the logical clock"),
    "memsample": _Command("resident memory of the desk"),
}
_CONTROL = {
    "time_limit": _Command(
        "set a task's limits: TASK SOFT [HARD]", (("task_name", str), ("soft", _number), ("hard", _number)), required=2
    ),
    "rate_limit": _Command(
        "set a task's rate limit, 0 for none: TASK 10/m", (("task_name", str), ("rate_limit", str)), required=2
    ),
    "revoke": _Command("have tasks not run any more: ID…", (("task_id", str),), required=1, variadic=True),
    "revoke_by_stamped_headers": _Command(
        "the same for all tasks with a stamp: NAME=VALUE…", (("headers", str),), required=1, variadic=True
    ),
    "terminate": _Command(
        "end tasks that run, too: SIGNAL ID…", (("signal", str), ("task_id", str)), required=2, variadic=True
    ),
    "pool_grow": _Command("run more tasks at once, per queue: [N]", (("n", int),)),
    "pool_shrink": _Command("run fewer tasks at once, per queue: [N]", (("n", int),)),
    "autoscale": _Command("new bounds of pools that follow the work: MAX [MIN]", (("max", int), ("min", int)), 1),
    "pool_restart": _Command("replace every executor when it has finished"),
    "add_consumer": _Command("consume a queue of the settings: QUEUE", (("queue", str),), required=1),
    "cancel_consumer": _Command("stop consuming a queue: QUEUE", (("queue", str),), required=1),
    "enable_events": _Command("have workers tell monitors of tasks, and that they are there"),
    "disable_events": _Command("have workers be silent again"),
    "heartbeat": _Command("have workers tell monitors once that they are there"),
    "shutdown": _Command("finish what runs, and end"),
}


def _epilog(commands: Mapping[str, _Command], example: str) -> str:
    width = max(map(len, commands))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in commands.items()]
    return "\b\nCommands:\n" + "\n".join(rows) + f"\n\n\b\nExamples:\n{example}"


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object, for programs."),
        click.option("-t", "--timeout", type=click.FloatRange(0.05), default=1.0, show_default=True, metavar="S",
                     help="Seconds to wait for answers."),
        click.option("-d", "--destination", metavar="NODES", help="Only these workers, separated by commas."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(
    "inspect",
    epilog=_epilog(_INSPECT, "  amqptasks inspect active\n  amqptasks inspect query_task 7f1c… -d shop@web1 --json"),
)
@click.argument("method")
@click.argument("arguments", nargs=-1)
@_options
@click.pass_obj
def inspect_command(
    obj: CliContext, method: str, arguments: tuple[str, ...], destination: str | None, timeout: float, as_json: bool
) -> None:
    """Ask running workers about what they do. Exit 1 when none answers."""
    _run(obj, _INSPECT, method, arguments, destination, timeout, as_json)


@click.command(
    "control",
    epilog=_epilog(
        _CONTROL, "  amqptasks control time_limit shop.charge 20 30\n  amqptasks control cancel_consumer email"
    ),
)
@click.argument("method")
@click.argument("arguments", nargs=-1)
@_options
@click.pass_obj
def control_command(
    obj: CliContext, method: str, arguments: tuple[str, ...], destination: str | None, timeout: float, as_json: bool
) -> None:
    """Change what running workers do. Exit 1 when none answers, or one refuses."""
    _run(obj, _CONTROL, method, arguments, destination, timeout, as_json)


@click.command("status", epilog="\b\nExample:\n  amqptasks status --timeout 3")
@_options
@click.pass_obj
def status_command(obj: CliContext, destination: str | None, timeout: float, as_json: bool) -> None:
    """Show which workers answer. Exit 1 when none does."""
    answers = _ask(obj, "ping", {}, destination, timeout)
    if as_json:
        click.echo(json.dumps(answers))
    else:
        for node in sorted(answers):
            click.echo(f"{node}: {click.style('OK', fg='green') if sys.stdout.isatty() else 'OK'}")
        click.echo(f"\n{len(answers)} node{'' if len(answers) == 1 else 's'} online.")
    if not answers:
        raise SystemExit(1)


def _ask(
    obj: CliContext, method: str, arguments: Mapping[str, Any], destination: str | None, timeout: float
) -> dict[str, Any]:
    nodes = [one.strip() for one in destination.split(",") if one.strip()] if destination else None
    return broadcast(load_cli_settings(obj).broker, method, arguments, destination=nodes, timeout=timeout)


def _run(
    obj: CliContext,
    commands: Mapping[str, _Command],
    method: str,
    given: Sequence[str],
    destination: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    command = commands.get(method)
    if command is None:
        near = get_close_matches(method, commands, 1)
        raise click.UsageError(
            f"{method!r} is not a command here; " + (f"did you mean {near[0]!r}?" if near else ", ".join(commands))
        )
    answers = _ask(obj, method, _arguments(method, command, given), destination, timeout)
    if as_json:
        click.echo(json.dumps(answers))
    else:
        for node, payload in sorted(answers.items()):
            _show(node, payload)
    if not answers:
        click.echo(f"Error: no worker answered within {timeout:g} s", err=True)
    if not answers or any(isinstance(payload, dict) and "error" in payload for payload in answers.values()):
        raise SystemExit(1)


def _arguments(method: str, command: _Command, given: Sequence[str]) -> dict[str, Any]:
    names = command.arguments
    if len(given) < command.required:
        raise click.UsageError(f"{method}: {command.help}")
    if len(given) > len(names) and not command.variadic:
        raise click.UsageError(f"{method}: {given[len(names)]!r} is one argument too many; {command.help}")
    arguments: dict[str, Any] = {}
    try:
        for index, (name, convert) in enumerate(names):
            if command.variadic and index == len(names) - 1:
                arguments[name] = [convert(one) for one in given[index:]]
            elif index < len(given):
                arguments[name] = convert(given[index])
    except ValueError as error:
        raise click.UsageError(f"{method}: {error}; {command.help}") from None
    return {name: value for name, value in arguments.items() if value != []}


def _show(node: str, payload: Any) -> None:
    if isinstance(payload, dict) and payload.keys() <= {"ok", "error"}:
        said = payload.get("error", payload.get("ok"))
        word = "Error: " if "error" in payload else ""
        click.echo(f"-> {node}: {word}{said}")
        return
    click.echo(f"-> {node}:")
    if isinstance(payload, list) and not payload:
        click.echo("    - empty -")
    elif isinstance(payload, list) and all(isinstance(one, str) for one in payload):
        for one in payload:
            click.echo(f"    * {one}")
    else:
        text = json.dumps(payload, indent=2, ensure_ascii=False)
        click.echo("\n".join(f"    {line}" for line in text.splitlines()))
