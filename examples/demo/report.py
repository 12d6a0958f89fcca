"""Says what a run came to: tables for people, JSON for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amqptasks.config import mask_url
from examples.demo.broker import Broker
from examples.demo.letters import DeadLetter
from examples.demo.results import Check
from examples.demo.worker import Ran

__all__ = ["Report", "as_json", "show"]


@dataclass(frozen=True, slots=True)
class Report:
    """All that is said of a run. Times are seconds."""

    broker: Broker
    published: int
    publish_seconds: float
    work_seconds: float
    refused_at_call: str
    log: dict[str, Any]
    revenue: str
    mails: int
    mails_repeated: int
    pictures: dict[str, tuple[int, int]]
    ran: list[Ran]
    letters: list[DeadLetter]
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every number is what it must be."""
        return all(check.ok for check in self.checks)


def as_json(report: Report) -> dict[str, Any]:
    """The numbers of a run, for programs."""
    return {
        "ok": report.ok,
        "broker": {
            "kind": report.broker.kind,
            "url": mask_url(report.broker.url),
            "management_url": report.broker.management_url and mask_url(report.broker.management_url),
        },
        "published": report.published,
        "publish_seconds": round(report.publish_seconds, 3),
        "work_seconds": round(report.work_seconds, 3),
        "refused_at_call": report.refused_at_call,
        "log": report.log,
        "revenue": report.revenue,
        "mails": {"delivered": report.mails, "repeated": report.mails_repeated},
        "pictures": report.pictures,
        "ran": [{**asdict(ran), "runs": ran.runs} for ran in report.ran],
        "dead_letters": [asdict(letter) for letter in report.letters],
        "checks": [{**asdict(check), "ok": check.ok} for check in report.checks],
    }


def show(report: Report, console: Console, *, kept: bool) -> None:
    """Print the tables. `kept`: the broker will still be there to be looked at."""
    console.print()
    console.print(_ran_table(report.ran))
    console.print()
    console.print(_letters_table(report.letters))
    console.print()
    _show_headers(report.letters, console)
    _show_where(report.broker, console, kept)
    _show_log(report, console)
    _show_checks(report.checks, console)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _ran_table(runs: list[Ran]) -> Table:
    table = _table("What ran where", "queue", "task", "ok", "retried", "dead", "busy", "pid × runs")
    for column in table.columns[2:6]:
        column.justify = "right"
    for ran in runs:
        processes = " ".join(f"{pid}×{count}" for pid, count in sorted(ran.by_process.items()))
        numbers = [str(number or "") for number in (ran.succeeded, ran.retried, ran.failed)]
        table.add_row(ran.queue, ran.task, *numbers, f"{ran.busy:.1f} s", processes)
    return table


def _letters_table(letters: list[DeadLetter]) -> Table:
    table = _table("Dead letters", "#", "queue", "task", "exception", "reason, attempts")
    table.columns[0].justify = "right"
    groups = Counter((one.queue, one.task, one.exception, f"{one.reason}, {one.attempts}") for one in letters)
    for group, count in sorted(groups.items()):
        table.add_row(str(count), *group)
    return table


def _show_headers(letters: list[DeadLetter], console: Console) -> None:
    example = next((one for one in letters if one.reason == "retries_exhausted"), None)
    if example is None:
        return
    console.print(f"[bold]One of them in {example.queue}[/], as the management UI shows it")
    for name, value in sorted(example.headers.items()):
        # The end of a traceback says it.
        text = str(value).strip().splitlines()[-1] if name == "x-task-traceback" else str(value)
        dots = "… " if name == "x-task-traceback" else ""
        console.print(f"  [cyan]{name:<26}[/]{dots}{escape(text)}", soft_wrap=True, highlight=False)
    console.print()


def _show_where(broker: Broker, console: Console, kept: bool) -> None:
    page = broker.queue_page("email.dlq")
    if page is None:
        return
    console.print(f"[bold]Management UI[/]  {page}  ({broker.login})", soft_wrap=True, highlight=False)
    if not kept:
        what = "The node ends now" if broker.own else "The demo takes its queues away now"
        console.print(f"  {what}; scripts/demo [bold]--keep[/] leaves it all there to look at.", highlight=False)
    console.print()


def _show_log(report: Report, console: Console) -> None:
    log = report.log
    statuses = ", ".join(f"{status} × {hits}" for status, hits in log["by_status"].items())
    lines = (
        ("Access log", f"{log['lines']} lines in {log['batches']} batches, {log['malformed']} malformed, {statuses}"),
        ("Revenue", f"{report.revenue} EUR, {report.mails} receipts mailed"),
        ("Pictures", f"{len(report.pictures)} files"),
        ("Refused", report.refused_at_call),
    )
    for name, text in lines:
        console.print(f"[bold]{name:<11}[/]{escape(text)}", soft_wrap=True, highlight=False)
    console.print()


def _show_checks(checks: list[Check], console: Console) -> None:
    wrong = [check for check in checks if not check.ok]
    if not wrong:
        text = f"✓ All {len(checks)} checks agree: what was sent is what is there."
        console.print(f"[green]{text}[/]", highlight=False)
    for check in wrong:
        expected, actual = _difference(check)
        console.print(f"[red]✗ {check.name}[/]: expected {escape(expected)}, got {escape(actual)}", highlight=False)


def _difference(check: Check) -> tuple[str, str]:
    expected, actual = check.expected, check.actual
    if isinstance(expected, dict) and isinstance(actual, dict):
        # Only what differs: some of these have hundreds of entries.
        keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        expected = {key: expected.get(key) for key in keys}
        actual = {key: actual.get(key) for key in keys}
    return f"{expected!r:.400}", f"{actual!r:.400}"
