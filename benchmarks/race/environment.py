"""The race's own virtual environment: the peers in the versions that were compared, beside amqptasks' dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

__all__ = ["PEERS", "ROOT", "enter", "environment_folder"]

ROOT = Path(__file__).resolve().parents[2]
#: The peers and what they need to run at their best. A newer version is a change to the race: measure it again.
PEERS = (
    "celery==5.7.0",
    "dramatiq==2.2.1",
    "taskiq==0.13.0",
    "taskiq-aio-pika==0.6.1",
    "taskiq-redis==1.2.4",
    "faststream[rabbit,cli]==0.7.8",
    "pika==1.4.4",
    "aio-pika==10.2.1",
    "redis==8.1.0",
    "uvloop==0.23.0",
    "matplotlib==3.11.2",
    "py-spy==0.4.3",
)


def environment_folder(named: str | None) -> Path:
    """Where it is: `named`, or in the cache of this user."""
    if named:
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "amqptasks" / "race"


def enter(folder: Path, module: str) -> None:
    """Run `module` again with this command's arguments in the environment, which is made where it is not as it should.

    Returns where that is the environment already.
    """
    # The peers are installed, and so compiled. Where the environment forbids to write bytecode, amqptasks, which runs
    # from its sources here, would be compiled at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    if Path(sys.prefix) == folder:
        return
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = "\n".join([*PEERS, *own])
    stamp = folder / ".requirements"
    if not stamp.exists() or stamp.read_text() != wanted:
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, *PEERS, *own], check=True)
        stamp.write_text(wanted)
    # Of the folder where the commands are, so that `-m benchmarks…` is found; nothing of amqptasks is installed.
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.execv(python, [str(python), "-m", module, *sys.argv[1:]])
