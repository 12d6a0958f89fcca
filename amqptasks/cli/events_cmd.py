"""``amqptasks events``: what workers tell of themselves and of their tasks, as it happens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from amqptasks.broker.event_stream import listen
from amqptasks.cli.context import CliContext
from amqptasks.cli.event_board import Board, line
from amqptasks.cli.settings import load_cli_settings
from amqptasks.config import BrokerSettings
from amqptasks.errors import BrokerUnreachable

__all__ = ["events_command"]

_AGAIN_SECONDS = 1.0
Taker = Callable[[dict[str, Any]], None]


@click.command(
    "events",
    epilog="\b\nExamples:\n  amqptasks events --enable\n  amqptasks events --dump\n"
    "  amqptasks events --json | jq 'select(.type == \"task-failed\")'",
)
@click.option("-d", "--dump", is_flag=True, help="One line an event; so it is too where there is no terminal.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
@click.option("-E", "--enable", is_flag=True, help="Have all workers send events; `control disable_events` ends it.")
@click.pass_obj
def events_command(obj: CliContext, dump: bool, as_json: bool, enable: bool) -> None:
    """Show workers and tasks as they change, until Ctrl-C. Workers send events with -E, or when told to."""
    settings = load_cli_settings(obj).broker
    try:
        if as_json:
            _listen(settings, lambda event: print(json.dumps(event), flush=True), enable)
        elif dump or not sys.stdout.isatty():
            names: OrderedDict[str, str] = OrderedDict()
            _listen(settings, lambda event: print(line(event, names), flush=True), enable)
        else:
            _live(settings, enable)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        # Whoever read it has had enough. What is left must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _live(settings: BrokerSettings, enable: bool) -> None:
    board, console = Board(), Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown = 0.0

        def show() -> None:
            nonlocal shown
            if time.monotonic() - shown >= 0.25:
                shown = time.monotonic()
                live.update(board.render(console.height), refresh=True)

        _listen(settings, board.take, enable, show)


def _listen(settings: BrokerSettings, take: Taker, enable: bool, on_idle: Callable[[], None] = lambda: None) -> None:
    """Listen for ever; a connection that is lost is opened again. The first one has to succeed."""
    connected = False

    def ready() -> None:
        nonlocal connected
        if not connected:
            click.echo("Listening for events.", err=True)
        connected = True

    while True:
        try:
            listen(settings, take, on_ready=ready, on_idle=on_idle, enable=enable)
        except BrokerUnreachable as error:
            if not connected:
                raise
            click.echo(f"Connection lost, trying again: {error}", err=True)
            time.sleep(_AGAIN_SECONDS)
