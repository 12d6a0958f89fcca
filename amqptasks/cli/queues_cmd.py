"""``amqptasks queues``: what waits, who consumes, how fast, for how long."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from amqptasks.broker.management import ManagementApi
from amqptasks.broker.queue_figures import QueueFigures, figures_by_amqp, figures_by_api
from amqptasks.cli.context import CliContext
from amqptasks.cli.queue_board import table
from amqptasks.cli.settings import load_cli_settings
from amqptasks.config import Settings
from amqptasks.errors import BrokerUnreachable, ConfigError
from amqptasks.topology import build_topology, dead_letter_queue, unroutable_exchange
from amqptasks.topology.build import exact_limits
from amqptasks.topology.delays import LADDER_LEVELS, level_name

__all__ = ["queues_command"]

#: The broker's own statistics are five seconds old; a glance that costs it less is as good.
_EVERY_SECONDS = 2.5
_WITHOUT_API = (
    "Asked by AMQP: unacknowledged messages, rates, ages and delayed messages are known to the management API only. "
    "Set broker.management_url"
)
_ASSUMED = "oldest: worked out from the last hour's samples, as if what came first went first. in/s, out/s: a minute's."
Asker = Callable[[], list[QueueFigures]]


@click.command(
    "queues",
    epilog="\b\nExamples:\n  amqptasks queues\n  amqptasks queues --all\n"
    "  amqptasks queues --json | jq '.queues[] | select(.ready > 1000) | .name'",
)
@click.option("-Q", "--queues", "names", metavar="NAMES", help="These queues only, separated by commas.")
@click.option("-a", "--all", "every", is_flag=True, help="Every queue of the virtual host, also other people's.")
@click.option("--once", is_flag=True, help="Show it once; so it is too where there is no terminal.")
@click.option("-j", "--json", "as_json", is_flag=True, help="For programs. What is not known is null.")
@click.pass_obj
def queues_command(obj: CliContext, names: str | None, every: bool, once: bool, as_json: bool) -> None:
    """Show what waits in each queue, who consumes, how fast, for how long. No message is touched.

    Without broker.management_url, AMQP tells how many messages are ready and how many consume, and no more.
    """
    if names is not None and every:
        raise click.UsageError("-Q and --all exclude each other")
    settings = load_cli_settings(obj)
    wanted = _split(names) if names is not None else None if every else _own(settings)
    if settings.broker.management_url is None:
        if wanted is None:
            raise ConfigError("--all needs the management API: AMQP does not list queues. Set broker.management_url")
        _run(lambda: figures_by_amqp(settings.broker, wanted), [], once, as_json, _WITHOUT_API)
        return
    with ManagementApi(settings.broker, purpose="`queues`") as api:
        ladder = [] if names is not None or every else _ladder(settings)
        asked = None if wanted is None else [*wanted, *ladder]
        # Which tasks have a limit, their code may say, which is not asked here: the broker has their queues.
        also = () if names is not None or every else _waiting_rooms(settings)
        _run(lambda: figures_by_api(api, asked, also, ageless=ladder), ladder, once, as_json, _ASSUMED)


def _run(ask: Asker, ladder: list[str], once: bool, as_json: bool, note: str) -> None:
    try:
        if as_json:
            click.echo(json.dumps(_plain(*_split_off_ladder(ladder, ask())), ensure_ascii=False))
        elif once or not sys.stdout.isatty():
            console = Console(width=None if sys.stdout.isatty() else 200)
            console.print(_screen(ladder, ask(), note, console.width))
        else:
            _live(ask, ladder, note)
    except KeyboardInterrupt:
        return


def _live(ask: Asker, ladder: list[str], note: str) -> None:
    queues = ask()  # the first answer must come: what is wrong is told as an error
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        trouble = ""
        while True:
            below = Text.assemble(("Ctrl-C ends.  ", "dim"), (trouble, "red"))
            live.update(Group(_screen(ladder, queues, note, console.width), below), refresh=True)
            time.sleep(_EVERY_SECONDS)
            try:
                queues, trouble = ask(), ""
            except BrokerUnreachable as error:
                trouble = f"As of before; asked again in a moment: {error}"


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(one.strip() for one in names.split(",") if one.strip()))


def _own(settings: Settings) -> list[str]:
    """The queues that people look at: work, dead letters, what waits for its turn, what nobody could route."""
    prefix = settings.topology.prefix
    declared = [queue.name for queue in build_topology(settings, exact_limits(settings)).queues]
    work = [
        name
        for queue, given in settings.queues.items()
        for name in ([queue, dead_letter_queue(queue)] if given.dead_letter.enabled else [queue])
    ]
    waiting = [name for name in declared if name.startswith(_waiting_rooms(settings))]
    return [*work, *waiting, unroutable_exchange(prefix)]


def _waiting_rooms(settings: Settings) -> tuple[str, ...]:
    """How queues are called in which tasks wait for their turn, or for room in a queue with a length limit."""
    prefix = settings.topology.prefix
    return f"{prefix}.rate.", f"{prefix}.due."


def _ladder(settings: Settings) -> list[str]:
    return [level_name(settings.topology.prefix, level) for level in range(LADDER_LEVELS)]


def _split_off_ladder(ladder: list[str], queues: list[QueueFigures]) -> tuple[list[QueueFigures], int | None]:
    """The queues that are shown one by one, and how many messages the delay ladder holds, if it is asked."""
    held = [one for one in queues if one.name in ladder]
    # What waits there for a queue that is full is neither ready nor unacknowledged.
    return [one for one in queues if one not in held], sum(one.messages or 0 for one in held) if held else None


def _screen(ladder: list[str], queues: list[QueueFigures], note: str, width: int) -> Group:
    shown, delayed = _split_off_ladder(ladder, queues)
    lines = [] if delayed is None else [Text(f"\n{delayed} delayed messages on the ladder")]
    return Group(table(shown, width), *lines, Text(f"\n{note}", style="dim"))


def _plain(queues: list[QueueFigures], delayed: int | None) -> dict[str, Any]:
    return {
        "queues": [
            {**asdict(one), "exists": one.ready is not None, "seconds_to_empty": one.seconds_to_empty} for one in queues
        ],
        "delayed": delayed,
    }
