"""The file of what an application heard. Without handlers of its own, so that tests may import it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["FILE", "heard", "write"]

FILE = "AMQPTASKS_TEST_HEARD"


def write(name: str, **fields: Any) -> None:
    """One line, whole, from any process."""
    line = json.dumps({"signal": name, "pid": os.getpid(), **fields}, default=str) + "\n"
    descriptor = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def heard(file: Path) -> list[dict[str, Any]]:
    """What was written so far, without a line of which only a part stands there."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
