"""``amqptasks dlq``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
from rich.console import Console
from rich.progress import Progress

from amqptasks.cli.context import CliContext
from amqptasks.cli.dlq_box import open_box
from amqptasks.cli.dlq_edit import edit_command
from amqptasks.cli.dlq_shown import show_groups, show_letter, tell
from amqptasks.deadletters import DeadLetters, Filter, Letter, Moved, Stopped
from amqptasks.doctor.findings import counted
from amqptasks.errors import AmqpTasksError, ConfigError, DecodeError, StoreUnavailable
from amqptasks.protocol.jsontypes import dumps

__all__ = ["dlq_group"]

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
#: A line of an export: RabbitMQ takes messages of 128 MiB at most, in base64.
_LONGEST_LINE = 256 << 20


class _Moment(click.ParamType[datetime]):
    """A time as ISO 8601, or an age: 90s, 15m, 2h, 7d."""

    name = "TIME"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        age = _AGE.fullmatch(value)
        if age:
            try:
                return datetime.now(UTC) - timedelta(seconds=float(age[1]) * _UNITS[age[2]])
            except OverflowError:
                self.fail(f"{value!r} is before the beginning of time")
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither an ISO 8601 time nor an age such as 90s, 15m, 2h, 7d")
        return moment if moment.tzinfo else moment.astimezone()


_UNROUTABLE = click.option(
    "--unroutable", is_flag=True, help="What nobody could route, in <prefix>.unroutable, instead."
)
_JSON = click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")


def _filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which letters are meant."""
    options = (
        click.option(
            "-Q", "--queues", metavar="NAMES", help="Work queues, or *.dlq queues, separated by commas (default: all)."
        ),
        _UNROUTABLE,
        click.option("--task", metavar="GLOB", help="Tasks whose name matches."),
        click.option("--reason", metavar="REASON", help="failed, retries_exhausted, time_limit, poison, expired …"),
        click.option("--exception", metavar="GLOB", help="Exceptions whose class name matches."),
        click.option("--since", type=_Moment(), help="Dead since then: ISO 8601, or an age such as 2h."),
        click.option("--until", type=_Moment(), help="Dead until then."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _where(box: DeadLetters, queues: str | None, unroutable: bool) -> list[str] | None:
    """The queues that are meant; None for all of the settings."""
    names = list(dict.fromkeys(one.strip() for one in (queues or "").split(",") if one.strip()))
    if queues is not None and not names:
        raise click.UsageError("-Q names no queue")
    return [*names, *([box.unroutable] if unroutable else [])] or None


def _which(box: DeadLetters, options: dict[str, Any], ids: tuple[str, ...] = ()) -> tuple[Filter, list[str] | None]:
    names = _where(box, options.pop("queues"), options.pop("unroutable"))
    return Filter(ids=frozenset(ids), **options), names


@click.group(
    "dlq",
    epilog="\b\nExamples:\n  amqptasks dlq list --since 2h\n  amqptasks dlq show 7f1c2b4e-…\n"
    "  amqptasks dlq replay -Q email --exception 'SMTP*' --rate 50\n"
    "  amqptasks dlq edit 7f1c2b4e-… --set kwargs.amount=9.99 --replay",
)
def dlq_group() -> None:
    """Dead letters: look at them, replay them, change them, keep them elsewhere, or delete them."""


dlq_group.add_command(edit_command)


@dlq_group.command("list")
@_filtered
@_JSON
@click.pass_obj
def list_command(obj: CliContext, /, as_json: bool, **options: Any) -> None:
    """Show dead letters by queue, task, reason, exception and line. None is moved."""
    box = open_box(obj)
    which, queues = _which(box, options)
    with _bar(as_json) as bar:
        task = bar.add_task("reading", total=None, visible=False)

        def progress(count: int, total: int) -> None:
            bar.update(task, completed=count, total=total, visible=True)

        groups = box.groups(which, queues, on_progress=progress)
    if as_json:
        click.echo(json.dumps([vars(one) for one in groups], default=_json))
    elif groups:
        show_groups(groups)
    else:
        click.echo("No dead letters.")


def _bar(as_json: bool) -> Progress:
    """How far it is, for people who wait; it leaves nothing behind."""
    return Progress(disable=as_json or not sys.stderr.isatty(), console=Console(stderr=True), transient=True)


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@dlq_group.command("show")
@click.argument("letter_id", metavar="ID")
@click.option("-Q", "--queues", metavar="NAMES", help="Look in these queues only.")
@_UNROUTABLE
@_JSON
@click.pass_obj
def show_command(obj: CliContext, letter_id: str, queues: str | None, unroutable: bool, as_json: bool) -> None:
    """Show one dead letter: call, error, traceback, how it came here, headers."""
    box = open_box(obj)
    letter = box.find(letter_id, _where(box, queues, unroutable))
    try:
        body = box.body(letter)
        call: dict[str, Any] = {"args": list(body.args), "kwargs": dict(body.kwargs)}
    except DecodeError as error:
        call = {"undecodable": str(error)}
    except StoreUnavailable as error:
        call = {"unavailable": str(error)}
    if not as_json:
        show_letter(letter, call)
        return
    try:
        call = json.loads(dumps(call))
    except (TypeError, ValueError, RecursionError):
        call = {name: str(value) for name, value in call.items()}
    click.echo(json.dumps({"id": letter.id, **letter.to_json(), **call}))


@dlq_group.command("replay")
@click.argument("ids", nargs=-1, metavar="[ID]…")
@_filtered
@click.option("--all", "every", is_flag=True, help="All letters: needed where neither id nor filter is given.")
@click.option("--to", metavar="QUEUE", help="Send them to this queue instead of their own.")
@click.option(
    "--rate", type=click.FloatRange(0.01), metavar="N", help="Letters a second (default: as fast as it goes)."
)
@click.option("--dry-run", is_flag=True, help="Only count.")
@_JSON
@click.pass_obj
def replay_command(
    obj: CliContext,
    /,
    ids: tuple[str, ...],
    every: bool,
    to: str | None,
    rate: float | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Send letters to their queues again, with their ids, attempts from the start.

    A letter is removed when its new message is confirmed. A run that is killed loses none; at most 500 letters, those
    on their way, are sent twice: run it again for the rest.
    """
    _chosen(ids, options, every)
    box = open_box(obj)
    which, queues = _which(box, options, ids)
    total = box.count(which, queues)
    if dry_run:
        text = f"{counted(total, 'letter')} match{'es' if total == 1 else ''}; none was replayed"
        click.echo(json.dumps({"matched": total}) if as_json else text)
        return
    went = 0

    def progress(count: int) -> None:
        nonlocal went
        went = count
        bar.update(task, completed=count)

    with _bar(as_json) as bar:
        task = bar.add_task("replaying", total=total)
        try:
            moved, stopped = _gone(lambda: box.replay(which, queues, to=to, rate=rate, on_progress=progress))
        except KeyboardInterrupt:
            click.echo(f"{counted(went, 'letter')} replayed until then", err=True)
            raise
    tell(moved, "replayed", as_json, stopped)
    if ids and not moved.moved:
        raise ConfigError("no dead letter has such an id; `amqptasks dlq list` shows ids")


def _gone(move: Callable[[], Moved]) -> tuple[Moved, str | None]:
    """What became of the letters, and what ended it half-way."""
    try:
        return move(), None
    except Stopped as stopped:
        return stopped.moved, str(stopped.__cause__)


def _chosen(ids: tuple[str, ...], options: dict[str, Any], every: bool) -> None:
    if not (ids or every or any(options.values())):
        raise click.UsageError("which letters? Give ids, a filter such as --task, or --all")


@dlq_group.command("export")
@_filtered
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="A file (default: stdout).")
@click.option("-j", "--json", "as_json", is_flag=True, help="How many, for programs; needs --output.")
@click.pass_obj
def export_command(obj: CliContext, /, output: TextIO, as_json: bool, **options: Any) -> None:
    """Write letters as JSON lines. They stay where they are."""
    if as_json and output.name in ("-", "<stdout>"):
        raise click.UsageError("--json: standard output has the letters: give --output too")
    box = open_box(obj)
    which, queues = _which(box, options)
    count, unreadable = 0, 0
    try:
        for letter in box.letters(which, queues):
            if letter.unreadable:
                unreadable += 1
                continue
            output.write(json.dumps(letter.to_json()) + "\n")
            count += 1
        output.flush()
    except AmqpTasksError as error:
        if not count:
            raise
        raise Stopped(Moved(count), error) from error
    except OSError as error:
        with suppress(OSError):
            output.close()  # or it would be said again when click closes it
        raise click.ClickException(f"after {counted(count, 'letter')}: writing {output.name}: {error}") from None
    if as_json:
        click.echo(json.dumps({"exported": count, "unreadable": unreadable}))
    else:
        click.echo(f"{counted(count, 'letter')} exported", err=True)
    if unreadable:
        raise click.ClickException(f"{counted(unreadable, 'letter')} left out: their headers cannot be read")


@dlq_group.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_JSON
@click.pass_obj
def import_command(obj: CliContext, file: Path, as_json: bool) -> None:
    """Put letters of an export into their dead-letter queues: all of the file, or nothing where a line is bad."""
    if not file.is_file():
        raise click.UsageError(f"{file} is no regular file: it is read twice, first to check it")
    box = open_box(obj)
    places = set()
    with file.open("rb") as lines:
        for number, letter in enumerate(_letters(file, lines), 1):
            try:
                box.check(letter)
            except ConfigError as error:
                raise ConfigError(f"{file}, line {number}: {error}") from None
            places.add(letter.stands_in)
    if places:
        box.count(queues=places)  # raises for one that is not there
    with file.open("rb") as lines:
        moved, stopped = _gone(lambda: box.import_(_letters(file, lines)))
    stay = ""
    if moved.failed:
        stay = f"are not in, lines {_ranges([place + 1 for place in moved.places])}: import these alone"
    if stopped is not None:
        following = moved.moved + len(moved.failed) + 1
        stay = f". {stay + '; and so' if stay else 'Not in'} are those from line {following} on"
    tell(moved, "imported", as_json, stopped, stay)


def _letters(file: Path, lines: BinaryIO) -> Iterator[Letter]:
    for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), 1):
        try:
            if line.startswith(b"\x1f\x8b"):
                raise ValueError("this is a gzip file; gunzip it first")
            yield Letter.from_json(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None


def _ranges(numbers: list[int]) -> str:
    """``3-5, 9``."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda one: one[1] - one[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@dlq_group.command("purge")
@click.argument("ids", nargs=-1, metavar="[ID]…")
@_filtered
@click.option("--all", "every", is_flag=True, help="All letters: needed where neither id nor filter is given.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs; needs --force.")
@click.pass_obj
def purge_command(
    obj: CliContext, /, ids: tuple[str, ...], every: bool, force: bool, as_json: bool, **options: Any
) -> None:
    """Delete letters for good. Those that die after the question was asked stay."""
    if as_json and not force:
        raise click.UsageError("--json cannot ask: give --force too")
    _chosen(ids, options, every)
    box = open_box(obj)
    which, queues = _which(box, options, ids)
    if force:
        moved, stopped = _gone(lambda: Moved(box.purge(which, queues)))
    else:
        asked, there = datetime.now(UTC), box.counts(which, queues)
        click.confirm(f"Delete {counted(sum(there.values()), 'letter')}? They cannot be brought back", abort=True)
        moved, stopped = _gone(lambda: Moved(box.purge(which, queues, counted=there, before=asked)))
    if as_json and stopped is None:
        click.echo(json.dumps({"deleted": moved.moved}))
    else:
        tell(moved, "deleted", as_json, stopped)
