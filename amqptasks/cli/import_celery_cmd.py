"""``amqptasks import-celery``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from amqptasks.config import load_settings
from amqptasks.conversion import Converted, Note, convert, read_module
from amqptasks.errors import ConfigError

__all__ = ["import_celery_command"]

_TITLES = {
    "lost": "Not taken over",
    "look": "Taken over, but look at it",
    "already": "Needs no setting here",
}


@click.command(
    "import-celery",
    epilog="\b\nExamples:\n  amqptasks import-celery celeryconfig.py\n"
    "  amqptasks import-celery shop/celeryconfig.py -o config/amqptasks.yaml\n"
    "  amqptasks --config config/amqptasks.yaml routes test payment.charge",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write there (default: stdout).")
@click.option("-f", "--force", is_flag=True, help="Replace a FILE that is there.")
@click.option("--json", "as_json", is_flag=True, help="Settings and notes as one JSON object.")
def import_celery_command(file: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Write the YAML that does what the Celery settings in FILE do, a module such as celeryconfig.py.

    FILE is run, as Celery does it, and must find what it imports. Each setting without a counterpart is named on
    stderr, and in the YAML's head. Exit 1 when the result is not valid as it stands.
    """
    if output is not None and output.exists() and not force:
        raise click.ClickException(f"{output} is there already; --force replaces it")
    found = convert(read_module(file))
    problems = _problems(found.document)
    if as_json:
        notes = [asdict(note) for note in found.notes]
        text = json.dumps({"settings": found.document, "notes": notes, "problems": problems}, indent=2) + "\n"
    else:
        text = _yaml(file.name, found)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch(mode=0o600)  # the URLs in it may hold passwords
        output.write_text(text, encoding="utf-8")
    if not as_json:
        for line in _lines(found.notes):
            click.echo(line, err=True)
    if problems:
        raise click.ClickException("the result is not valid yet:\n" + "\n".join(problems))


def _problems(document: dict[str, Any]) -> list[str]:
    try:
        load_settings(data=document, environ={})
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _yaml(source: str, found: Converted) -> str:
    head = [f"From {source} by amqptasks import-celery.", *_lines(found.notes)]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head)
    body = yaml.safe_dump(_escaped(found.document), sort_keys=False, allow_unicode=True, width=120)
    return f"{comment}\n{body}"


def _escaped(value: Any) -> Any:
    """``$`` is special in the file."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _lines(notes: list[Note]) -> list[str]:
    lines = []
    for kind, title in _TITLES.items():
        chosen = [note for note in notes if note.kind == kind]
        if chosen:
            lines += [f"{title}:", *(f"  {note.key}: {note.text}" for note in chosen)]
    return lines
