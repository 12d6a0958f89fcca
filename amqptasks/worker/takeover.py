"""New code without a pause: the supervisor replaces its own program and keeps its children.

On SIGHUP a trial process loads the new code and settings as a start would. When it succeeds, the supervisor executes
its command line again, in the same process: a service manager sees the same pid, and the leaders, children of that
pid, run on. The new program adopts them, starts leaders of its own, and drains the old ones once the new consume.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from amqptasks.worker.arguments import handed_on
from amqptasks.worker.board import Boards
from amqptasks.worker.children import Child
from amqptasks.worker.listening import Listening

__all__ = ["Adopted", "adopt", "is_again", "is_trial", "run_trial", "take_over"]

_TRIAL, _ADOPT = "AMQPTASKS_TRIAL_START", "AMQPTASKS_ADOPTED"
#: A start that takes longer is none.
_TRIAL_SECONDS = 120
#: Held back while no program is there to act on them.
_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Adopted:
    """What the old program of this process left."""

    leaders: tuple[Child, ...] = ()
    boards: Boards = field(default_factory=Boards)
    listening: Listening | None = None

    @property
    def descriptors(self) -> frozenset[int]:
        """Those that are the worker's, and not the application's."""
        channels = {one.channel.fileno() for one in self.leaders if one.channel is not None}
        return self.boards.descriptors | channels


def is_trial() -> bool:
    """Whether this process only tries whether the worker would start."""
    return os.environ.get(_TRIAL) == "1"


def is_again() -> bool:
    """Whether this process has replaced its own program, or tries whether it may."""
    return is_trial() or _ADOPT in os.environ


def run_trial() -> NoReturn:
    """In a child: start the command line anew, as a trial. One that hangs ends by SIGALRM, which outlives the exec."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_TRIAL_SECONDS)
    os.execve(sys.executable, sys.orig_argv, {**handed_on(), _TRIAL: "1"})  # noqa: S606 - this very command line


def take_over(leaders: Iterable[Child], boards: Boards, listening: Listening | None) -> NoReturn:
    """Replace this process's program by its command line, started anew; `leaders` go on under it."""
    kept = []
    for leader in leaders:
        if leader.pid and leader.channel is not None and leader.board is not None:
            leader.channel.flush()
            os.set_inheritable(leader.channel.fileno(), True)
            kept.append([leader.name, leader.pid, leader.channel.fileno(), leader.board.descriptor])
        else:
            boards.free(leader.board)
    left = {
        "leaders": kept,
        "boards": boards.hand_over(),
        "http": None if listening is None else listening.hand_over(),
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    os.execve(sys.executable, sys.orig_argv, {**handed_on(), _ADOPT: json.dumps(left)})  # noqa: S606 - as above


def adopt() -> Adopted:
    """What the old program of this process left; nothing at a first start."""
    text = os.environ.pop(_ADOPT, None)
    if text is None:
        return Adopted()
    left = json.loads(text)
    boards = Boards(left["boards"])
    leaders = tuple(
        Child.adopted(queue, pid, descriptor, boards.adopt(queue, board))
        for queue, pid, descriptor, board in left["leaders"]
    )
    return Adopted(leaders, boards, Listening.adopted(*left["http"]) if left["http"] is not None else None)
