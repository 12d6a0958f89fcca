"""``amqptasks beat``."""

from __future__ import annotations

import signal
import socket
from functools import partial

import click
import structlog

from amqptasks import __version__, signals
from amqptasks.app import AmqpTasks
from amqptasks.beat.calls import checked_entries
from amqptasks.beat.process import BeatSetup, run_beat_here
from amqptasks.cli.context import CliContext
from amqptasks.cli.daemon import daemon_options, launch
from amqptasks.cli.http_option import http_option
from amqptasks.cli.settings import load_app, settings_now
from amqptasks.config import mask_url
from amqptasks.discovery import import_tasks
from amqptasks.errors import ConfigError
from amqptasks.events import Bus
from amqptasks.observability.logs import configure_logging, subscribe_logs
from amqptasks.observability.sentry import subscribe_sentry
from amqptasks.periodic import Entry
from amqptasks.worker.beat_probes import BeatProbes
from amqptasks.worker.daemon import DaemonOptions
from amqptasks.worker.listening import Listening, listen
from amqptasks.worker.startup import Interrupted, wait_for_broker

__all__ = ["beat_command"]

_log = structlog.get_logger("amqptasks.beat")
_LEVELS = ("debug", "info", "warning", "error", "critical")


@click.command(
    "beat",
    epilog="\b\nExamples:\n  amqptasks -A shop.tasks:app beat\n  amqptasks -A shop.tasks:app worker -B",
)
@click.option(
    "-l", "--loglevel", type=click.Choice(_LEVELS, case_sensitive=False), help="Log level (default: the file's, info)."
)
@http_option
@daemon_options
@click.pass_obj
def beat_command(obj: CliContext, loglevel: str | None, http: str | None, daemon: DaemonOptions) -> int:
    """Send the periodic calls of `schedule:` and of the code.

    Any number of beats may run: the broker chooses one, and another when that one is gone. SIGTERM or Ctrl-C exits 0,
    SIGHUP takes up the file's `schedule:` as it is now.
    """
    node = socket.gethostname()
    start = launch(daemon, f"beat@{node}")
    app = load_app(obj)
    settings = app.settings
    writer = configure_logging(settings.logging, level=loglevel, logfile=start.logfile)
    bus = Bus()
    subscribe_logs(bus, writer, settings.logging, level=loglevel)
    subscribe_sentry(bus, settings.sentry)
    import_tasks(app)
    entries = checked_entries(app)
    listening = listen(http, name="--http")
    click.echo(_banner(app, entries, listening), err=True)
    start.complete()
    if listening is not None:
        BeatProbes(node, listening, bus).start()
    edits: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: edits.append(number))
    try:
        wait_for_broker(app)
    except Interrupted as signal_name:
        click.echo(f"Stopped by {signal_name} before the broker was reached.", err=True)
        return 0
    if edits and (edited := _reload(app)) is not None:
        entries = edited
    signals.beat_init.send(sender=app)
    return run_beat_here(BeatSetup(app, bus, entries, node, partial(_reload, app)))


def _reload(app: AmqpTasks) -> list[Entry] | None:
    """The entries of the settings as the file and the environment have them now; None, and a line of log, when they
    cannot be used.
    """
    try:
        edited = {"schedule": settings_now(app).schedule}  # all else was built upon already
        entries = checked_entries(app, app.settings.model_copy(update=edited))
    except ConfigError as error:
        _log.error("SIGHUP: the settings are not usable; going on with the schedule as it was", error=str(error))
        return None
    _log.info("SIGHUP: going on with the schedule as it is in the settings now", entries=len(entries))
    return entries


def _banner(app: AmqpTasks, entries: list[Entry], listening: Listening | None) -> str:
    lines = [f" amqptasks {__version__}  beat", f"  app     {app.name}"]
    lines += [f"  broker  {mask_url(url)}" for url in app.settings.broker.url]
    if listening is not None:
        lines.append(f"  http    {listening.address}")
    lines += ["", "[schedule]"]
    for entry in entries:
        off = "" if entry.enabled else "  (disabled)"
        lines.append(f"  . {entry.name:<30} {entry.schedule!r:<30} {entry.task}{off}")
    if not entries:
        lines.append("  (nothing: `schedule:` in the YAML file, or app.add_periodic_task)")
    return "\n".join([*lines, ""])
