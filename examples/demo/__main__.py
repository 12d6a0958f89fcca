"""``python -m examples.demo``: see ``scripts/demo``, which prepares what this needs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from amqptasks import AmqpTasksError
from amqptasks.testing.rabbitmq import NodeError
from examples.demo.broker import URL_VARIABLE, Broker, find_broker
from examples.demo.errors import DemoError, Interrupted
from examples.demo.letters import DeadLetters
from examples.demo.report import Report, as_json, show
from examples.demo.session import DEAD, Session, borrowed_queues, environment, prepare
from examples.demo.sink import MailSink
from examples.demo.worker import ARGUMENTS, Worker
from examples.shop import ledger, places

__all__ = ["main"]


def main() -> int:
    """Run the demo. Returns 0 when every number is right, 1 when one is not or the run failed, 130 after Ctrl-C."""
    options = _options()
    # Programs read stdout; people read the other one then.
    console = Console(stderr=options.json)
    _take_signals()
    try:
        with _folder(options.dir) as folder:
            return _run(options, folder, console)
    except Interrupted as signalled:
        console.print(f"Stopped by {signalled}; nothing is left running.")
        return 130
    except (DemoError, NodeError, AmqpTasksError) as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Run the example shop on a real RabbitMQ: a web access log, pictures, payments and mails.",
        epilog=f"{URL_VARIABLE} names a broker to use; without it a private node is started, and ended again.",
    )
    parser.add_argument("--keep", action="store_true", help="leave broker and worker running until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON on stdout")
    parser.add_argument("--dir", type=Path, help="keep log, database and pictures in this (empty or new) folder")
    return parser.parse_args()


def _take_signals() -> None:
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        # Once: a second Ctrl-C must not cut the cleaning up short and leave processes behind.
        if not stopping:
            stopping = True
            raise Interrupted(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        if any(chosen.iterdir()):
            raise DemoError(f"--dir {chosen}: the folder is not empty; numbers of an older run would be counted in")
        yield chosen.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="amqptasks-demo-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run(options: argparse.Namespace, folder: Path, console: Console) -> int:
    def say(text: str) -> None:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(text)}", soft_wrap=True, highlight=False)

    plan = prepare(folder)
    with find_broker(os.environ, say) as broker, MailSink() as sink:
        os.environ.update(environment(broker, folder, sink))
        ledger.create(places.database())
        with borrowed_queues(broker), Worker(folder / "worker.log", os.environ) as worker:
            say(f"amqptasks {' '.join(ARGUMENTS)}")
            worker.start()
            with DeadLetters(broker.url, DEAD) as dead:
                session = Session(plan, broker, dead, sink, worker, console)
                session.publish()
                say(f"{session.published} calls published, each confirmed, in {session.publish_seconds:.2f} s")
                seconds = session.watch()
                say(f"All of it is done after {seconds:.1f} s")
                if not options.keep:
                    say("Stopping the worker: SIGTERM")
                    session.stop_worker()
                report = session.report(seconds)
            _print(report, options, console)
            if options.keep:
                _keep(broker, folder, console)
            return 0 if report.ok else 1


def _print(report: Report, options: argparse.Namespace, console: Console) -> None:
    if options.json:
        sys.stdout.write(json.dumps(as_json(report), indent=2) + "\n")
        sys.stdout.flush()
    else:
        show(report, console, kept=options.keep)


def _keep(broker: Broker, folder: Path, console: Console) -> None:
    console.print(f"Still running: broker, worker and mail server. Files are in {folder}", soft_wrap=True)
    console.print("[bold]Ctrl-C[/] ends them all.")
    try:
        signal.pause()
    except Interrupted:
        console.print("Stopping.")


if __name__ == "__main__":
    sys.exit(main())
