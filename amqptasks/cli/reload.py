"""``amqptasks worker --reload``: a process above the worker that tells it of changed files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import click

from amqptasks.errors import ConfigError
from amqptasks.worker.arguments import handed_on
from amqptasks.worker.process import die_with_parent

__all__ = ["RELOAD_FLAG", "run_reloading"]

RELOAD_FLAG = "--reload"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)
#: Milliseconds: an editor writes several files at once; how often the worker's end is looked for.
_DEBOUNCE, _LOOK = 300, 200


def run_reloading(folder: Path) -> int:
    """Run this command without the flag, and send it SIGHUP when Python or YAML below `folder` changes.

    The worker then does what it does on any SIGHUP: it tries the new code, and goes on with the old where that fails.
    Signals are forwarded. Returns the worker's exit code.
    """
    try:
        import watchfiles  # noqa: PLC0415 - optional
    except ImportError:
        raise ConfigError("--reload needs the package watchfiles: pip install 'amqptasks[reload]'") from None
    # In a session of its own: Ctrl-C comes from here alone, once.
    worker = subprocess.Popen(  # noqa: S603 - this very command line
        [sys.executable, *sys.orig_argv[1:]],
        env=handed_on(without=RELOAD_FLAG),
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - this process has one thread so far
    )
    for number in _FORWARDED:
        signal.signal(number, lambda signum, _frame: worker.send_signal(signum))
    click.echo(f"Reloading when Python or YAML below {folder} changes.", err=True)
    changes = watchfiles.watch(
        folder,
        watch_filter=watchfiles.PythonFilter(extra_extensions=(".yaml", ".yml")),
        debounce=_DEBOUNCE,
        rust_timeout=_LOOK,
        yield_on_timeout=True,
        raise_interrupt=False,
        ignore_permission_denied=True,
    )
    for found in changes:
        if worker.poll() is not None:
            break
        if found:
            names = sorted({os.path.relpath(path, folder) for _, path in found})
            click.echo(f"Changed: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}", err=True)
            worker.send_signal(signal.SIGHUP)
    return worker.wait()
