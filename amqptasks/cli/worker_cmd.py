"""``amqptasks worker``."""

from __future__ import annotations

import socket
from typing import Literal

import click

from amqptasks import __version__
from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app
from amqptasks.config import Settings, mask_url
from amqptasks.events import Bus
from amqptasks.observability.logs import configure_logging, subscribe_logs
from amqptasks.observability.sentry import subscribe_sentry
from amqptasks.worker.group import GroupPlan, plan_groups
from amqptasks.worker.supervisor import Interrupted, Supervisor, wait_for_broker

__all__ = ["worker_command"]

_LEVELS = ("debug", "info", "warning", "error", "critical")


class _Prefetch(click.ParamType[int | Literal["auto"]]):
    name = "N|auto"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= 65535:
            self.fail(f"{value!r} is neither auto nor a number from 1 to 65535")
        return number


@click.command(
    "worker",
    epilog="\b\nExamples:\n  amqptasks -A shop.tasks:app worker -Q high_priority,email\n"
    "  amqptasks worker -Q media -c 4 -l debug\n  amqptasks worker -Q api -P asyncio -c 500",
)
@click.option("-Q", "--queues", metavar="NAMES", help="Queues to consume, separated by commas (default: all declared).")
@click.option("-c", "--concurrency", type=click.IntRange(1), help="Tasks at once, per queue (default: CPU cores).")
@click.option("-P", "--pool", metavar="POOL", help="process (also prefork), asyncio or solo.")
@click.option(
    "-n", "--hostname", metavar="NAME@%h", help="Node name; %h is the host, %n its first part, %d its domain."
)
@click.option(
    "-l", "--loglevel", type=click.Choice(_LEVELS, case_sensitive=False), help="Log level (default: the file's, info)."
)
@click.option("--prefetch", type=_Prefetch(), help="Messages held unacknowledged per queue, or auto.")
@click.option("--grace-period", type=click.FloatRange(0), metavar="S", help="Seconds that running tasks get to finish.")
@click.pass_obj
def worker_command(
    obj: CliContext,
    queues: str | None,
    concurrency: int | None,
    pool: str | None,
    hostname: str | None,
    loglevel: str | None,
    prefetch: int | Literal["auto"] | None,
    grace_period: float | None,
) -> int:
    """Run tasks from queues: one supervisor, and for each queue a leader and its executors.

    SIGTERM or Ctrl-C finishes what runs and exits 0; a second one gives what runs back at once.
    """
    app = load_app(obj)
    settings = app.settings
    writer = configure_logging(settings.logging, level=loglevel)
    bus = Bus()
    subscribe_logs(bus, writer, settings.logging, level=loglevel)
    subscribe_sentry(bus, settings.sentry)
    app.import_tasks()
    chosen = [one.strip() for one in queues.split(",") if one.strip()] if queues else list(settings.queues)
    plans = plan_groups(settings, chosen, concurrency=concurrency, pool=pool, prefetch=prefetch)
    node = _node_name(hostname)
    click.echo(_banner(app, settings, plans, node), err=True)
    try:
        wait_for_broker(app)
    except Interrupted as signal_name:
        click.echo(f"Stopped by {signal_name} before the broker was reached.", err=True)
        return 0
    grace = settings.worker.grace_period if grace_period is None else grace_period
    return Supervisor(app, bus, plans, hostname=node, grace_period=grace).run()


def _node_name(pattern: str | None) -> str:
    host = socket.gethostname()
    short, _, domain = host.partition(".")
    name = (pattern or "amqptasks@%h").replace("%h", host).replace("%n", short).replace("%d", domain)
    return name if "@" in name else f"{name}@{host}"


def _banner(app: AmqpTasks, settings: Settings, plans: list[GroupPlan], node: str) -> str:
    lines = [f" amqptasks {__version__}  {node}", f"  app     {app.name}"]
    lines += [f"  broker  {mask_url(url)}" for url in settings.broker.url]
    lines += ["", "[queues]"]
    lines += [f"  . {plan.queue:<20} {plan}" for plan in plans]
    lines += ["", "[tasks]"]
    lines += [f"  . {name}" for name in sorted(app.tasks)] or ["  (none: is `include` complete?)"]
    silent = _not_yet(app, settings, plans)
    if silent:
        lines += ["", "[accepted, but without effect in this version]", *(f"  . {one}" for one in silent)]
    return "\n".join([*lines, ""])


def _not_yet(app: AmqpTasks, settings: Settings, plans: list[GroupPlan]) -> list[str]:
    """Settings that are understood and checked, and that this version does not act on: nobody should rely on them."""
    found = [f"rate_limit of {name}" for name, task in sorted(app.tasks.items()) if task.options.rate_limit]
    for plan in plans:
        queue = settings.queues[plan.queue]
        for key in ("max_tasks_per_child", "max_memory_per_child"):
            if getattr(queue, key) is not None or getattr(settings.worker, key) is not None:
                found.append(f"{key} of queue {plan.queue}")
    if settings.worker.http is not None:
        found.append("worker.http")
    if settings.schedule:
        found.append("schedule")
    return found
