"""The command line. Each command's module is imported when it is run, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from amqptasks import __version__
from amqptasks.cli.context import CliContext
from amqptasks.errors import AmqpTasksError, ConfigError
from amqptasks.worker.arguments import take_arguments

__all__ = ["cli", "main"]

#: command -> (module, name in it, short help)
_COMMANDS = {
    "worker": ("amqptasks.cli.worker_cmd", "worker_command", "Run tasks: one process group per queue."),
    "beat": ("amqptasks.cli.beat_cmd", "beat_command", "Send periodic calls; of any number, one leads."),
    "schedule": ("amqptasks.cli.schedule_cmd", "schedule_group", "Periodic calls: list, pause, resume, run now."),
    "call": ("amqptasks.cli.call_cmd", "call_command", "Call a task by name and print its id."),
    "result": ("amqptasks.cli.result_cmd", "result_command", "Show a task's result."),
    "revoke": ("amqptasks.cli.revoke_cmd", "revoke_command", "Have tasks not run any more, wherever they wait."),
    "inspect": ("amqptasks.cli.control_cmd", "inspect_command", "Ask running workers: active, reserved, stats …"),
    "control": ("amqptasks.cli.control_cmd", "control_command", "Change running workers: limits, queues, shutdown."),
    "queues": ("amqptasks.cli.queues_cmd", "queues_command", "Show what waits in the queues, who consumes, how fast."),
    "purge": ("amqptasks.cli.purge_cmd", "purge_command", "Delete the messages that wait in queues."),
    "status": ("amqptasks.cli.control_cmd", "status_command", "Show which workers answer."),
    "dlq": ("amqptasks.cli.dlq_cmd", "dlq_group", "Dead letters: list, show, replay, edit, export, import, purge."),
    "doctor": ("amqptasks.cli.doctor_cmd", "doctor_command", "Look for what is wrong with settings, app and broker."),
    "events": ("amqptasks.cli.events_cmd", "events_command", "Show workers and tasks as they change."),
    "report": ("amqptasks.cli.report_cmd", "report_command", "Print versions and settings, for a report of a problem."),
    "config": ("amqptasks.cli.config_cmd", "config_group", "Check, show or describe the configuration."),
    "import-celery": (
        "amqptasks.cli.import_celery_cmd",
        "import_celery_command",
        "Write the YAML of a celeryconfig.py.",
    ),
    "topology": ("amqptasks.cli.topology_cmd", "topology_group", "Exchanges, queues: show, plan, apply, migrate."),
    "routes": ("amqptasks.cli.routes_cmd", "routes_group", "Show where a task would go, and why."),
}


class _LazyGroup(click.Group):
    """Knows its commands by name and help; imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n  amqptasks -A shop.tasks:app worker -Q high_priority,email\n"
    "  amqptasks routes test payment.charge\n  amqptasks config check",
)
@click.option(
    "-A", "--app", metavar="MODULE:APP", help="The app; MODULE alone finds MODULE.amqptasks:app and MODULE:app."
)
@click.option("--config", metavar="FILE", help="The YAML file (default: $AMQPTASKS_CONFIG, ./config/amqptasks.yaml).")
@click.option("-b", "--broker", metavar="URL", help="AMQP URL; wins over the file and the environment.")
@click.option("--workdir", metavar="DIR", type=click.Path(exists=True, file_okay=False), help="Change to DIR first.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors.")
@click.version_option(__version__, prog_name="amqptasks")
@click.pass_context
def cli(
    ctx: click.Context, app: str | None, config: str | None, broker: str | None, workdir: str | None, verbose: bool
) -> None:
    """RabbitMQ-first task platform: confirmed publishes, manual acks, dead letters that stay in sight."""
    if workdir is not None:
        os.chdir(workdir)
    ctx.obj = CliContext(app=app, config=config, broker=broker, verbose=verbose)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 usage or bad configuration."""
    arguments = take_arguments()
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        code = cli.main(arguments, prog_name="amqptasks", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("Aborted.", err=True)
        code = 130
    except AmqpTasksError as error:
        if verbose:
            traceback.print_exc()
        click.secho(f"Error: {error}", fg="red" if sys.stderr.isatty() else None, err=True)
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code if isinstance(code, int) else 0)
