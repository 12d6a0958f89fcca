"""``amqptasks doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app, load_cli_settings
from amqptasks.discovery import import_tasks
from amqptasks.doctor import Finding, Level, Patient, examine
from amqptasks.doctor.findings import counted
from amqptasks.errors import ConfigError
from amqptasks.topology import build_topology
from amqptasks.topology.build import exact_limits

__all__ = ["doctor_command"]

_SIGNS = {
    Level.OK: ("✓", "green"), Level.INFO: ("·", "cyan"), Level.UNKNOWN: ("?", "magenta"),
    Level.WARNING: ("!", "yellow"), Level.ERROR: ("✗", "red"),
}  # fmt: skip


@click.command("doctor", epilog="\b\nExamples:\n  amqptasks doctor\n  amqptasks doctor --strict --json > findings.json")
@click.option("--strict", is_flag=True, help="Warnings are failures, too.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def doctor_command(obj: CliContext, strict: bool, as_json: bool) -> None:
    """Look for what is wrong, or will be: settings, application, results, broker, queues. Exit 1 when something is."""
    findings = list(examine(_patient(obj)))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in findings], ensure_ascii=False))
    else:
        for one in findings:
            _show(one)
        click.echo(f"\n{_summary(findings)}")
    failing = (Level.ERROR, Level.WARNING) if strict else (Level.ERROR,)
    if any(one.level in failing for one in findings):
        raise SystemExit(1)


def _summary(findings: list[Finding]) -> str:
    bad = sum(one.level in (Level.WARNING, Level.ERROR) for one in findings)
    unknown = sum(one.level is Level.UNKNOWN for one in findings)
    said = f"{counted(bad, 'finding')}." if bad else "Nothing wrong was found." if unknown else "All is well."
    return f"{said} {counted(unknown, 'check')} could not be made." if unknown else said


def _patient(obj: CliContext) -> Patient:
    settings = load_cli_settings(obj)
    plain = build_topology(settings, exact_limits(settings))
    if settings.app is None:
        return Patient(settings, plain)
    try:
        app = load_app(obj)
        import_tasks(app)
    except ConfigError as error:
        return Patient(settings, plain, problem=str(error))
    return Patient(app.settings, app.topology, app)


def _show(one: Finding) -> None:
    sign, color = _SIGNS[one.level]
    head = f"{sign} {one.check:<16} {one.what}"
    click.secho(head, fg=color if sys.stdout.isatty() else None)
    if one.why:
        click.echo(f"  {'':<16} {one.why}")
    if one.mend:
        click.echo(f"  {'':<16} → {one.mend}")
