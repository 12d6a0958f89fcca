"""``amqptasks topology migrate``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from amqptasks.broker.management import ManagementApi
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_declared
from amqptasks.doctor.findings import counted
from amqptasks.errors import AmqpTasksError
from amqptasks.migration import Migration, Step

__all__ = ["migrate_command"]

_PURPOSE = (
    "`topology migrate` asks which arguments and bindings a queue has and how many of its messages workers hold, which "
    "AMQP does not tell: it"
)


class _Display:
    """Steps as lines on stderr; on a terminal, with a bar for the messages."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
            TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.fields[waiting]}"),
            console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, waiting="", visible=False)
        self._waiting = ""

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: Step, text: str) -> None:
        self._waiting = ""
        if not self._quiet:
            self._bar.console.print(f"{step.value:<8} {text}", highlight=False, soft_wrap=True)
        self._bar.reset(self._task, description=step.value, total=None, waiting="", visible=step in _MOVING)

    def progress(self, moved: int, total: int, waiting: str) -> None:
        self._bar.update(self._task, completed=moved, total=max(total, 1), waiting=waiting)
        if waiting and waiting != self._waiting and not self._quiet and self._bar.disable:
            click.echo(f"         {waiting}", err=True)
        self._waiting = waiting


_MOVING = (Step.DRAIN, Step.SETTLE, Step.REFILL)


@click.command(
    "migrate",
    epilog="\b\nExamples:\n  amqptasks topology migrate email --dry-run\n  amqptasks topology migrate email\n"
    "  amqptasks topology migrate email --rollback",
)
@click.argument("queue", metavar="QUEUE")
@click.option("--rollback", is_flag=True, help="Back to what the queue was, while a migration of it is not finished.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs; needs --yes or --dry-run.")
@click.pass_obj
def migrate_command(obj: CliContext, queue: str, rollback: bool, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Replace a queue whose arguments differ from the settings, with all its messages.

    Publishers and workers go on. A run that is killed or fails loses nothing: run it again, and it goes on where it
    stopped; at most the messages that were on their way run twice. Needs the management API.
    """
    if as_json and not (yes or dry_run):
        raise click.UsageError("--json cannot ask: give --yes or --dry-run too")
    settings, topology = load_declared(obj)
    with ManagementApi(settings.broker, purpose=_PURPOSE) as api, _Display(quiet=as_json) as display:
        migration = Migration(
            settings, topology, queue, api, rollback=rollback, tell=display.step, progress=display.progress
        )
        told = _told(migration, queue)
        if migration.nothing_to_do:
            missing = migration.missing()
            text = f"queue {queue!r} is as declared: nothing to migrate"
            if missing:
                text += f". Missing in the broker: {_some(missing)}; `amqptasks topology apply` makes it"
            _finish(as_json, {**told, "state": "same", "missing": missing}, text)
            return
        if dry_run:
            _finish(as_json, {**told, "state": "differs"}, _described(migration, told))
            return
        if not yes:
            click.echo(_described(migration, told), err=True)
            click.confirm("Replace the queue?", abort=True, err=True)
        began = time.monotonic()
        try:
            report = migration.run()
        except (AmqpTasksError, KeyboardInterrupt):
            if migration.under_way:
                click.echo("Stopped half-way. Run it again to go on, or with --rollback to go back", err=True)
            raise
    told |= {
        "state": "rolled back" if rollback else "migrated",
        "moved_away": report.parked,
        "moved_back": report.returned,
    }
    told["seconds"] = round(time.monotonic() - began, 1)
    what = "what it was" if rollback else "as declared"
    moved = f"{counted(report.parked, 'message')} moved away, {report.returned} moved back"
    _finish(as_json, told, f"queue {queue!r} is {what}: {moved}")


def _told(migration: Migration, queue: str) -> dict[str, Any]:
    look = migration.first_look
    return {
        "queue": queue,
        "under_way": look.parked is not None,
        "changes": migration.differences,
        "messages": look.depth(queue),
        "parked": look.depth(look.parked.name) if look.parked is not None else 0,
        "bindings": [f"{one.source} — {one.routing_key or '(any)'}" for one in (*look.bound, *look.diverted)],
    }


def _described(migration: Migration, told: dict[str, Any]) -> str:
    what = f"{counted(told['messages'], 'message')}, {counted(len(told['bindings']), 'binding')}"
    lines = [f"queue {told['queue']!r}: {what}"]
    if told["under_way"]:
        lines.append(f"  a migration is under way; parked: {counted(told['parked'], 'message')}")
    lines += [f"  ! {change}" for change in told["changes"]]
    lines += [f"  {number}. {text}" for number, text in enumerate(migration.steps(), 1)]
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _finish(as_json: bool, told: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(told, ensure_ascii=False) if as_json else text)
