"""No test knows another's tasks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every app of a process has the shared tasks of it, and `shared_task` finds the app that was made last."""
    monkeypatch.setattr("amqptasks.app._shared", {})
    monkeypatch.setattr("amqptasks.app._last_app", None)
