"""``amqptasks dlq edit``: other arguments for a dead letter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from amqptasks.cli.context import CliContext
from amqptasks.cli.dlq_box import open_box
from amqptasks.cli.dlq_shown import tell
from amqptasks.deadletters import Filter, Letter
from amqptasks.errors import DecodeError
from amqptasks.protocol.jsontypes import dumps, loads

__all__ = ["edit_command"]


@click.command("edit")
@click.argument("letter_id", metavar="ID")
@click.option("--set", "changes", multiple=True, metavar="PATH=JSON", help='args.0=7, kwargs.name="x"; many times.')
@click.option("--replay", is_flag=True, help="Replay it at once.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def edit_command(obj: CliContext, letter_id: str, changes: tuple[str, ...], replay: bool, as_json: bool) -> None:
    """Change a letter's arguments, in $EDITOR or by --set. They must fit the task, so the app is needed (-A).

    What JSON does not have is written as in messages: {"__type__": "datetime", "__value__": "2026-07-01T09:00:00"}.
    """
    box = open_box(obj, app=True)
    letter = box.find(letter_id)
    body = box.body(letter)
    args, kwargs = list(body.args), dict(body.kwargs)
    if changes:
        for change in changes:
            _set(args, kwargs, change)
    else:
        args, kwargs = _in_editor(letter, args, kwargs)
    box.edit(letter_id, args, kwargs)
    if not replay:
        click.echo(json.dumps({"edited": letter_id}) if as_json else f"{letter_id}: edited")
        return
    if not as_json:
        click.echo(f"{letter_id}: edited")
    tell(box.replay(Filter(ids=frozenset({letter_id})), [letter.stands_in]), "replayed", as_json)


def _set(args: list[Any], kwargs: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    kind, _, name = path.partition(".")
    try:
        json.loads(text)
    except ValueError:
        value: Any = text  # a word without quotes is meant as a text
    else:
        value = _read(text, f"--set {change}")
    if equals and kind == "kwargs" and name:
        kwargs[name] = value
    elif equals and kind == "args" and name.isdecimal() and int(name) < len(args):
        args[int(name)] = value
    else:
        at = f"args.N=VALUE (N from 0 to {len(args) - 1}) or " if args else ""
        raise click.UsageError(f"--set {change}: write {at}kwargs.NAME=VALUE")


def _read(text: str, where: str) -> Any:
    try:
        return loads(text.encode())
    except (DecodeError, UnicodeEncodeError) as error:
        raise click.UsageError(f"{where}: {error}") from None


def _in_editor(letter: Letter, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    shown = {"args": [_plain(letter, one) for one in args], "kwargs": {k: _plain(letter, v) for k, v in kwargs.items()}}
    text = click.edit(json.dumps(shown, indent=2, ensure_ascii=False), extension=".json")
    if text is None:
        raise click.Abort
    problem = f"{letter.id}: not edited, this is not an object with args and kwargs"
    try:
        data = json.loads(text)
        new_args, new_kwargs = list(data["args"]), dict(data["kwargs"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise click.UsageError(f"{problem}: {error!r}") from None
    kept = dict(enumerate(args))
    shown_args: Mapping[Any, Any] = dict(enumerate(shown["args"]))
    return (
        [_value(one, number, shown_args, kept, problem) for number, one in enumerate(new_args)],
        {name: _value(one, name, shown["kwargs"], kwargs, problem) for name, one in new_kwargs.items()},
    )


def _plain(letter: Letter, value: Any) -> Any:
    try:
        return json.loads(dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{letter.id}: its arguments cannot be written as JSON ({error}); use --set") from None


def _value(new: Any, key: Any, shown: Any, kept: Any, problem: str) -> Any:
    """What was not touched stays what it was, whatever JSON makes of it."""
    if key in kept and json.dumps(shown[key]) == json.dumps(new):
        return kept[key]
    return _read(json.dumps(new), problem)
