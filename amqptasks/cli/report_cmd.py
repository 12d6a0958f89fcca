"""``amqptasks report``."""

from __future__ import annotations

import json

import click
import yaml

from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.config import problem_report

__all__ = ["report_command"]


@click.command("report", epilog="\b\nExamples:\n  amqptasks report\n  amqptasks inspect report    # of running workers")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def report_command(obj: CliContext, as_json: bool) -> None:
    """Print what a report of a problem should begin with: versions, platform, settings. Secrets are masked.

    The broker is not asked; `amqptasks doctor` tells its version, and what is wrong with it.
    """
    report = problem_report(load_cli_settings(obj))
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False, default=str))
    else:
        click.echo(yaml.safe_dump(report, sort_keys=False, allow_unicode=True), nl=False)
