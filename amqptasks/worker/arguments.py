"""A program's arguments, without the passwords that `-b URL` may hold: every user of a machine sees command lines.

`main` takes the arguments from here, and they are masked from then on: in the memory that `ps` reads, for this process
and its forks, in `sys.argv` and in `sys.orig_argv`. A program that is executed anew gets the masked command line, and
the arguments in its environment, which only its user can read.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from pathlib import Path

__all__ = ["handed_on", "take_arguments"]

_VARIABLE = "AMQPTASKS_ARGUMENTS"
#: Up to the last @ of a URL, as `config.mask_url` does, which is too heavy for ``--help``.
_PASSWORD = re.compile(rb"(://[^:/@\s\0]*:)((?:(?!://)[^\s\0])+)(?=@)")
#: Where /proc/self/stat says that the arguments begin and end (proc(5): arg_start, arg_end), after the program's name.
_START, _END = 45, 46

_taken: list[str] = []


def take_arguments() -> list[str]:
    """This program's arguments as they were given; to be called once, before anything else."""
    handed = os.environ.pop(_VARIABLE, None)
    arguments = sys.argv[1:] if handed is None else json.loads(handed)
    _taken[:] = arguments
    masked = [os.fsdecode(_masked(os.fsencode(one))) for one in arguments]
    for line in (sys.argv, sys.orig_argv):
        line[len(line) - len(masked) :] = masked
    _overwrite()
    return list(arguments)


def handed_on(*, without: str | None = None) -> dict[str, str]:
    """The environment in which a program is executed with this one's command line, or with one flag less."""
    left = [one for one in _taken if one != without]
    return {**os.environ, _VARIABLE: json.dumps(left)} if _taken else dict(os.environ)


def _masked(text: bytes) -> bytes:
    return _PASSWORD.sub(lambda found: found[1] + b"*" * len(found[2]), text)


def _overwrite() -> None:
    """Mask what `ps` shows. Linux only: elsewhere the command line stays as it is."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return
    start, size = int(fields[_START]), int(fields[_END]) - int(fields[_START])
    if start:
        ctypes.memmove(start, _masked(ctypes.string_at(start, size)), size)
