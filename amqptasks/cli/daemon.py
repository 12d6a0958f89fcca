"""The flags of programs that run in the background, and their start."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from amqptasks.worker.daemon import DaemonOptions, Launch
from amqptasks.worker.takeover import is_again, is_trial

__all__ = ["daemon_options", "launch"]


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags; the command gets them as `daemon`, a `DaemonOptions`."""

    @click.option("--pidfile", metavar="FILE", help="Write the pid there; refuse to start when its process lives.")
    @click.option(
        "--logfile", "-f", metavar="FILE", help="Log there instead of to stderr. %n, %h, %d, %p are expanded."
    )
    @click.option("--detach", "-D", is_flag=True, help="Go on in the background once everything is checked.")
    @click.option("--umask", metavar="OCTAL", type=_Octal(), help="Permissions that new files do not get.")
    @click.option("--uid", metavar="USER", help="Become this user (root only).")
    @click.option("--gid", metavar="GROUP", help="Become this group (root only).")
    @wraps(command)
    def with_options(
        *args: Any,
        pidfile: str | None,
        logfile: str | None,
        detach: bool,
        umask: int | None,
        uid: str | None,
        gid: str | None,
        **named: Any,
    ) -> Any:
        options = DaemonOptions(pidfile, logfile, detach, umask, uid, gid)
        return command(*args, daemon=options, **named)

    return with_options


def launch(options: DaemonOptions, node: str) -> Launch:
    """Begin the start; it ends with the command. Call `complete` on it when all that can be wrong is checked."""
    again = is_again()
    if is_trial():
        options = DaemonOptions()  # the files are the running worker's
    return click.get_current_context().with_resource(Launch(options, node, again=again))


class _Octal(click.ParamType[int]):
    name = "OCTAL"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = int(value, 8)
        except ValueError:
            number = -1
        if not 0 <= number <= 0o777:
            self.fail(f"{value!r} is no octal number from 0 to 777")
        return number
