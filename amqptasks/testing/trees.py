"""Other versions of RabbitMQ, each in a Debian tree of its own that is made once and kept.

The tree comes from Debian's archive with ``debootstrap`` and runs in a ``chroot``, so this needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SUITES", "Tree", "TreeError", "broker_tree"]

#: Version of RabbitMQ -> Debian suite that has it.
SUITES = {"4.0": "trixie", "4.3": "sid"}
_MIRROR = "http://deb.debian.org/debian"


class TreeError(RuntimeError):
    """The tree cannot be had here. The message says why."""


@dataclass(frozen=True)
class Tree:
    """A root directory with RabbitMQ in it, and the user that runs it."""

    root: Path
    uid: int
    gid: int

    def command(self, folder: Path, *command: str) -> list[str]:
        """The command inside the tree, in a mount namespace of its own where `folder` has the same path as outside."""
        inside = f"{self.root}{folder}"
        script = f"mkdir -p {inside} && mount --rbind {folder} {inside} && mount -t proc proc {self.root}/proc && "
        script += f'exec chroot --userspec={self.uid}:{self.gid} {self.root} "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *command]

    def forget(self, folder: Path) -> None:
        """Take away the place where the folder was mounted."""
        inside = Path(f"{self.root}{folder}")
        if inside.exists():
            inside.rmdir()


def broker_tree(version: str) -> Tree:
    """The tree of a version of `SUITES`, made when it is not there (under a minute, 400 MB). Raises `TreeError`.

    Trees are kept in ``$AMQPTASKS_TREES``, by default ``~/.cache/amqptasks/rabbitmq``.
    """
    if version not in SUITES:
        raise TreeError(f"there is no tree for RabbitMQ {version!r}; there are {', '.join(SUITES)}")
    home = Path(os.environ.get("AMQPTASKS_TREES") or Path.home() / ".cache" / "amqptasks" / "rabbitmq")
    root = home / version
    if not root.is_dir():
        _make(root, SUITES[version])
    for line in (root / "etc/passwd").read_text().splitlines():
        name, _, uid, gid, *_ = line.split(":")
        if name == "rabbitmq":
            return Tree(root, int(uid), int(gid))
    raise TreeError(f"{root} has no user rabbitmq: delete it, and it is made anew")


def _make(root: Path, suite: str) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TreeError(f"a tree of Debian {suite} is made by root on Debian; start that broker yourself and name it")
    if shutil.which("debootstrap") is None:
        _run("apt-get", "install", "-y", "--no-install-recommends", "debootstrap")
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        packages = "--include=rabbitmq-server,ca-certificates"
        _run("debootstrap", "--variant=minbase", packages, suite, str(draft), _MIRROR)
        # Some suites come without; the node's name needs it.
        (draft / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        draft.replace(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _run(*command: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TreeError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-2000:]}")
