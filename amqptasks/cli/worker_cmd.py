"""``amqptasks worker``."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import click

from amqptasks import __version__, signals
from amqptasks.app import AmqpTasks
from amqptasks.beat.calls import checked_entries
from amqptasks.beat.process import BEAT_TITLE, BeatSetup, run_beat
from amqptasks.cli.context import CliContext
from amqptasks.cli.daemon import daemon_options, launch
from amqptasks.cli.http_option import http_option
from amqptasks.cli.pool_options import PoolOptions, pool_options
from amqptasks.cli.reload import RELOAD_FLAG, run_reloading
from amqptasks.cli.settings import load_app
from amqptasks.config import Settings, mask_url
from amqptasks.discovery import import_tasks
from amqptasks.events import BeatPulse, Bus
from amqptasks.observability.logs import configure_logging, subscribe_logs
from amqptasks.observability.sentry import subscribe_sentry
from amqptasks.worker.control import Channel
from amqptasks.worker.daemon import DaemonOptions, Launch
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.executor import ExecutorSetup, run_executor
from amqptasks.worker.greenlets import Inherited, inherited
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.lifecycle import Lifecycle, WorkerInfo, subscribe_process_signals
from amqptasks.worker.listening import Listening, listen
from amqptasks.worker.notify import Notifier
from amqptasks.worker.process import set_title
from amqptasks.worker.startup import Interrupted, wait_for_broker
from amqptasks.worker.supervisor import Supervisor
from amqptasks.worker.takeover import Adopted, adopt, is_trial

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
@click.option("-P", "--pool", metavar="POOL", help="process (prefork), thread (threads), asyncio, gevent or solo.")
@click.option(
    "-n", "--hostname", metavar="NAME@%h", help="Node name; %h is the host, %n its first part, %d its domain."
)
@click.option(
    "-l", "--loglevel", type=click.Choice(_LEVELS, case_sensitive=False), help="Log level (default: the file's, info)."
)
@click.option("--prefetch", type=_Prefetch(), help="Messages held unacknowledged per queue, or auto.")
@http_option
@click.option("-E", "--task-events", is_flag=True, help="Send events for monitors such as `amqptasks events`, Flower.")
@click.option("--grace-period", type=click.FloatRange(0), metavar="S", help="Seconds that running tasks get to finish.")
@click.option("-B", "--beat", "with_beat", is_flag=True, help="Be a scheduler too; any number of workers may.")
@click.option(RELOAD_FLAG, is_flag=True, help="Take new code and settings when files here change; to develop with.")
@pool_options
@daemon_options
@click.pass_context
def worker_command(
    ctx: click.Context,
    queues: str | None,
    concurrency: int | None,
    pool: str | None,
    hostname: str | None,
    loglevel: str | None,
    prefetch: int | Literal["auto"] | None,
    http: str | None,
    grace_period: float | None,
    task_events: bool,
    with_beat: bool,
    reload: bool,
    limits: PoolOptions,
    daemon: DaemonOptions,
) -> int:
    """Run tasks from queues: one supervisor, and for each queue a leader and its executors.

    SIGTERM or Ctrl-C finishes what runs and exits 0; a second one gives what runs back at once. SIGHUP starts the
    code and settings anew without a pause, SIGUSR1 writes the stacks of all processes into the log.
    """
    executor = inherited()
    if executor is not None:
        return _executor(ctx.obj, executor, limits, loglevel)
    if reload:
        if daemon.detach:
            raise click.UsageError("--reload is to develop with, in the foreground: not with --detach")
        return run_reloading(Path.cwd())
    node = _node_name(hostname)
    start = launch(daemon, node)
    app = load_app(ctx.obj)
    app.configure(worker=limits.worker)
    settings = app.settings
    worker = WorkerInfo(app, node, tuple(_names(queues) or settings.queues))
    signals.celeryd_init.send(sender=node, instance=worker, conf=settings, options=ctx.params)
    bus = _bus(settings, loglevel, start.logfile)
    signals.import_modules.send(sender=app)
    import_tasks(app)
    plan = partial(limits.plan, settings, concurrency=concurrency, pool=pool, prefetch=prefetch)
    plans = plan(worker.queues)
    beat = _beat(app, bus, node) if with_beat else None
    if is_trial():
        _ = app.calls  # keys and stores that cannot be
        app.declare()
        return 0
    signals.celeryd_after_setup.send(sender=node, instance=worker, conf=settings)
    grace = settings.worker.grace_period if grace_period is None else grace_period
    serving = _Serving(worker, bus, start, lambda queue: plan([queue])[0], grace, task_events, beat)
    return serving.run(plans, http or settings.worker.http)


@dataclass(frozen=True, slots=True)
class _Serving:
    """A worker that is about to run. `plan`: of a queue that is added later."""

    worker: WorkerInfo
    bus: Bus
    start: Launch
    plan: Callable[[str], GroupPlan]
    grace_period: float
    task_events: bool
    beat: Callable[[socket.socket], int] | None

    def run(self, plans: list[GroupPlan], http: str | None) -> int:
        """Show what runs, wait for the broker, and run it. Returns the exit code."""
        app, node, adopted = self.worker.app, self.worker.hostname, adopt()
        listening = listen(http, adopted.listening)
        click.echo(_banner(app, app.settings, plans, node, listening), err=True)
        self.start.complete()
        lifecycle = Lifecycle(self.worker, Notifier())
        lifecycle.starting()
        stopped = _wait(app, node, lifecycle, adopted, listening)
        if stopped is not None and not adopted.leaders:
            return 0
        return Supervisor(
            app,
            self.bus,
            plans,
            hostname=node,
            grace_period=self.grace_period,
            plan=self.plan,
            listening=listening,
            task_events=self.task_events or app.settings.worker.send_task_events,
            adopted=adopted,
            lifecycle=lifecycle,
            beat=self.beat,
        ).run([] if stopped is None else [stopped])


def _wait(app: AmqpTasks, node: str, lifecycle: Lifecycle, adopted: Adopted, listening: Listening | None) -> int | None:
    """Wait for the broker. Returns the signal that asked to stop, if one did."""
    try:
        waiting = None if adopted.leaders else listening
        wait_for_broker(app, node, waiting, lambda: lifecycle.tick(consuming=False))
    except Interrupted as stop:
        if not adopted.leaders:
            click.echo(f"Stopped by {stop} before the broker was reached.", err=True)
            lifecycle.stopped()
        return stop.number
    return None


def _executor(obj: CliContext, this: Inherited, limits: PoolOptions, level: str | None) -> int:
    """Be an executor of a worker that runs already: see `worker/greenlets.py`."""
    app = load_app(obj)
    app.configure(worker=limits.worker)
    bus = _bus(app.settings, level, None)
    signals.import_modules.send(sender=app)
    import_tasks(app)
    events = EventSwitch(file=this.events)
    setup = ExecutorSetup(app, bus, this.queue, this.hostname, "gevent", this.concurrency, events)
    return run_executor(setup, *this.open())


def _bus(settings: Settings, level: str | None, logfile: Path | None) -> Bus:
    """The bus of events, with everybody who listens."""
    writer = configure_logging(settings.logging, level=level, logfile=logfile)
    bus = Bus()
    subscribe_logs(bus, writer, settings.logging, level=level)
    subscribe_sentry(bus, settings.sentry)
    subscribe_process_signals(bus)
    return bus


def _beat(app: AmqpTasks, bus: Bus, node: str) -> Callable[[socket.socket], int]:
    """A scheduler, as a process beside the leaders. Raises `ConfigError` for an entry that cannot be sent."""
    setup = BeatSetup(app, bus, checked_entries(app), node)

    def run(control: socket.socket) -> int:
        set_title(BEAT_TITLE)
        signals.beat_embedded_init.send(sender=app)
        channel = Channel(control)
        bus.subscribe(BeatPulse, channel.tell_pulse)
        return run_beat(setup, control, ready=channel.tell_ready)

    return run


def _names(text: str | None) -> list[str]:
    return [one.strip() for one in (text or "").split(",") if one.strip()]


def _node_name(pattern: str | None) -> str:
    host = socket.gethostname()
    short, _, domain = host.partition(".")
    name = (pattern or "amqptasks@%h").replace("%h", host).replace("%n", short).replace("%d", domain)
    return name if "@" in name else f"{name}@{host}"


def _banner(app: AmqpTasks, settings: Settings, plans: list[GroupPlan], node: str, listening: Listening | None) -> str:
    lines = [f" amqptasks {__version__}  {node}", f"  app     {app.name}"]
    lines += [f"  broker  {mask_url(url)}" for url in settings.broker.url]
    if listening is not None:
        lines += [f"  http    {listening.address}"]
    if app.calls.keys is not None:
        lines.append(f"  signed  {app.calls.keys}")
    lines += ["", "[queues]"]
    lines += [f"  . {plan.queue:<20} {plan}" for plan in plans]
    lines += ["", "[tasks]"]
    lines += [f"  . {name}" for name in sorted(app.tasks)] or ["  (none: is `include` complete?)"]
    return "\n".join([*lines, ""])
