"""``amqptasks config``."""

from __future__ import annotations

import json

import click
import yaml

from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.config import find_config, masked_dump, settings_schema

__all__ = ["config_group"]


@click.group("config")
def config_group() -> None:
    """Check, show or describe the configuration."""


@config_group.command("check")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def check(obj: CliContext, as_json: bool) -> None:
    """Validate file, environment and flags. Exit 2 with one line per problem."""
    settings = load_cli_settings(obj)
    file = find_config(obj.config)
    counts = {
        "queues": len(settings.queues),
        "exchanges": len(settings.exchanges),
        "routes": len(settings.routes),
        "tasks": len(settings.tasks),
        "schedules": len(settings.schedule),
    }
    if as_json:
        click.echo(json.dumps({"ok": True, "file": None if file is None else str(file), **counts}))
        return
    parts = ", ".join(f"{count} {name.removesuffix('s') if count == 1 else name}" for name, count in counts.items())
    click.echo(f"{file or 'defaults (no file)'}: ok: {parts}")


@config_group.command("show")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
@click.pass_obj
def show(obj: CliContext, as_json: bool) -> None:
    """Print the effective settings, secrets masked."""
    data = masked_dump(load_cli_settings(obj))
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


@config_group.command("schema")
def schema() -> None:
    """Print the JSON Schema of the file, for editors."""
    click.echo(json.dumps(settings_schema(), indent=2, ensure_ascii=False))
