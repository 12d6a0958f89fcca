"""A disk that can be filled: a small file system in memory, mounted over a folder. Needs root on Linux."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["SmallDisk"]

_BALLAST = "ballast"


class SmallDisk:
    """A file system of `megabytes` over `folder`, which is made when it is not there. Use it as a context manager."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._size = megabytes

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size}m", "tmpfs", str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run("umount", "--lazy", str(self.folder))

    def fill(self, leave: int) -> None:
        """Take all but `leave` bytes, while others write there."""
        with (self.folder / _BALLAST).open("wb") as file:
            while (rest := self._free() - leave) > 0:
                try:
                    os.posix_fallocate(file.fileno(), 0, rest)
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # or else somebody was faster, and less is left
                        raise
                else:
                    return

    def _free(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    def clear(self) -> None:
        """Give back what `fill` took."""
        (self.folder / _BALLAST).unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
