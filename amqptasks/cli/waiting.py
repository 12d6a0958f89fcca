"""Waiting for a result at the command line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from amqptasks.errors import ResultTimeout
from amqptasks.protocol import jsontypes
from amqptasks.results import AsyncResult
from amqptasks.states import EXCEPTION_STATES

__all__ = ["show_result", "wait_for"]

_LOOK_SECONDS = 0.1


def wait_for(result: AsyncResult[Any], timeout: float | None) -> None:
    """Wait until the task has ended, with a bar on terminals for what `update_state(meta={"done": …, "of": …})` says.

    Raises `ResultTimeout`.
    """
    until = None if timeout is None else time.monotonic() + timeout
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(result.id, total=None)
        while not result.ready():
            info = result.info
            if isinstance(info, dict) and isinstance(info.get("done"), int | float):
                progress.update(bar, completed=info["done"], total=info.get("of"), description=result.state)
            if until is not None and time.monotonic() >= until:
                raise ResultTimeout(f"task {result.id} is {result.state} after {timeout:g} s")
            try:
                result.get(_LOOK_SECONDS, propagate=False)
            except ResultTimeout:
                continue


def show_result(result: AsyncResult[Any], *, as_json: bool, traceback: bool) -> bool:
    """Print what is known. Returns whether the task has not failed."""
    state, value = result.state, result.get(0, propagate=False) if result.ready() else result.info
    failed = state in EXCEPTION_STATES
    if as_json:
        shown = repr(value) if failed else json.loads(jsontypes.dumps(value))
        table = {"id": result.id, "state": state, "result": shown, "date_done": result.date_done}
        click.echo(json.dumps({**table, "traceback": result.traceback}, ensure_ascii=False))
    elif failed:
        click.echo(f"{state}: {value!r}", err=True)
    elif result.ready():
        click.echo(jsontypes.dumps(value).decode())
    else:
        click.echo(f"{state}: {jsontypes.dumps(value).decode()}" if value is not None else state)
    if traceback and result.traceback and not as_json:
        click.echo(result.traceback, err=True)
    return not failed
