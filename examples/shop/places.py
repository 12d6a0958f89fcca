"""Where the shop keeps its things. Read at each use: a task module must not depend on when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["database", "home", "images", "mail_server", "sheet"]


def home() -> Path:
    """The folder of database and images: ``$SHOP_HOME``, or ``.demo/shop`` below the current one."""
    return Path(os.environ.get("SHOP_HOME", ".demo/shop"))


def database() -> Path:
    """The SQLite file."""
    return home() / "shop.sqlite3"


def images() -> Path:
    """The folder of originals and thumbnails."""
    return home() / "images"


def sheet() -> Path:
    """The sheet with all pictures."""
    return home() / "sheet.jpg"


def mail_server() -> tuple[str, int]:
    """Host and port of the SMTP server: ``$SHOP_SMTP``, by default ``127.0.0.1:8025``."""
    host, _, port = os.environ.get("SHOP_SMTP", "127.0.0.1:8025").rpartition(":")
    return host, int(port)
