"""What ``amqptasks events`` shows: one line an event, or a table of workers and tasks that is kept up to date."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["Board", "line"]

#: Tasks and workers that are remembered; beyond, the ones that were silent for longest are forgotten.
_MOST_TASKS, _MOST_WORKERS = 1000, 200
_WORDS = {"worker-online": "started", "worker-heartbeat": "heartbeat", "worker-offline": "shutdown"}
_RANK = {"sent": 0, "received": 1, "started": 2}
_LAST = 3
_COLOURS = {
    "succeeded": "green", "failed": "red", "retried": "yellow", "started": "cyan", "revoked": "magenta",
    "rejected": "magenta",
}  # fmt: skip


def _printable(value: Any, limit: int = 200) -> str:
    """Text from strangers, without characters that steer a terminal."""
    text = "".join(one if one.isprintable() else " " for one in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _moment(event: Mapping[str, Any]) -> float:
    value = event.get("timestamp")
    return float(value) if isinstance(value, int | float) and 0 < value < 1e11 else time.time()


def line(event: Mapping[str, Any], names: OrderedDict[str, str]) -> str:
    """One event as ``celery events --dump`` shows it. `names` keeps what tasks are called, for their later events."""
    fields = {key: value for key, value in event.items() if key not in ("type", "hostname", "timestamp", "uuid")}
    kind = event["type"].lower()
    what = ""
    if kind.startswith("task-"):
        task_id = str(event.get("uuid"))
        if "name" in event:
            shown = f"{event['name']}({task_id}) args={fields.pop('args', '')} kwargs={fields.pop('kwargs', '')}"
            del fields["name"]
            names[task_id] = shown
            if len(names) > _MOST_TASKS:
                names.popitem(last=False)
        what = names.get(task_id, task_id)
    when = datetime.fromtimestamp(_moment(event), UTC)
    rest = ", ".join(f"{key}={fields[key]}" for key in sorted(fields))
    text = f"{event['hostname']} [{when}] {_WORDS.get(kind, kind.replace('-', ' '))}: {what} {rest}"
    return _printable(text, 4000)


@dataclass
class _Worker:
    heard: float = 0.0
    frequency: float = 60.0
    offline: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        if self.offline:
            return "offline"
        silent = time.monotonic() - self.heard
        return "online" if silent <= 2 * self.frequency else f"silent {silent:.0f} s"


@dataclass
class _Task:
    state: str = ""
    moment: float = 0.0
    node: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


class Board:
    """Workers and tasks as events told of them."""

    def __init__(self) -> None:
        self._workers: OrderedDict[str, _Worker] = OrderedDict()
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self.count = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Note an event."""
        self.count += 1
        group, _, what = event["type"].lower().partition("-")
        if what != "sent":
            self._worker(event, group, what)
        if group == "task" and isinstance(event.get("uuid"), str):
            self._task(event, what)

    def _worker(self, event: Mapping[str, Any], group: str, what: str) -> None:
        node = event["hostname"]
        worker = self._workers.setdefault(node, _Worker())
        self._workers.move_to_end(node)
        worker.heard = time.monotonic()
        if group == "worker":
            worker.offline = what == "offline"
            worker.fields.update(event)
            frequency = event.get("freq")
            if isinstance(frequency, int | float) and 0 < frequency < 3600:
                worker.frequency = float(frequency)
        if len(self._workers) > _MOST_WORKERS:
            self._workers.popitem(last=False)

    def _task(self, event: Mapping[str, Any], what: str) -> None:
        task = self._tasks.setdefault(event["uuid"], _Task())
        self._tasks.move_to_end(event["uuid"])
        if len(self._tasks) > _MOST_TASKS:
            self._tasks.popitem(last=False)
        moment = _moment(event)
        task.fields.update(event)
        if moment < task.moment and _RANK.get(what, _LAST) <= _RANK.get(task.state, _LAST):
            return  # the broker delivered it late
        task.state, task.moment = what, moment
        if what != "sent":
            task.node = event["hostname"]

    # -- showing --------------------------------------------------------------------------------------------------

    def render(self, height: int) -> RenderableType:
        """The tables, for a screen of so many lines."""
        shown = max(1, min(len(self._workers), height // 3))
        rows = max(1, height - shown - 9)
        return Group(self._worker_table(shown), self._task_table(rows), Text("Ctrl-C ends.", style="dim"))

    def _worker_table(self, rows: int) -> Table:
        table = Table(title=f"workers: {len(self._workers)}", title_justify="left", expand=True)
        for name in ("worker", "status", "active", "processed", "load", "version"):
            table.add_column(name, no_wrap=True, justify="right" if name in ("active", "processed") else "left")
        for node, worker in sorted(self._workers.items())[:rows]:
            load = worker.fields.get("loadavg")
            table.add_row(
                Text(_printable(node)),
                Text(worker.status, style="green" if worker.status == "online" else "red"),
                Text(_printable(worker.fields.get("active", ""))),
                Text(_printable(worker.fields.get("processed", ""))),
                Text(_printable(" ".join(map(str, load)) if isinstance(load, list) else "")),
                Text(_printable(f"{worker.fields.get('sw_ident', '')} {worker.fields.get('sw_ver', '')}")),
            )
        return table

    def _task_table(self, rows: int) -> Table:
        table = Table(title=f"tasks, the latest first; {self.count} events", title_justify="left", expand=True)
        for name, ratio in (("time", 0), ("state", 0), ("task", 3), ("id", 3), ("worker", 2), ("run", 0), ("what", 4)):
            table.add_column(name, no_wrap=True, ratio=ratio or None)
        for task_id, task in list(reversed(self._tasks.items()))[:rows]:
            fields = task.fields
            runtime = fields.get("runtime")
            call = f"{fields.get('args', '')} {fields.get('kwargs', '')}"
            ended = fields.get("result") if task.state == "succeeded" else fields.get("exception")
            table.add_row(
                f"{datetime.fromtimestamp(task.moment):%H:%M:%S}",
                Text(_printable(task.state, 12), style=_COLOURS.get(task.state, "")),
                Text(_printable(fields.get("name") or "")),
                Text(_printable(task_id)),
                Text(_printable(task.node)),
                f"{runtime:.3f}" if isinstance(runtime, int | float) else "",
                Text(_printable(call if ended is None else ended)),
            )
        return table
