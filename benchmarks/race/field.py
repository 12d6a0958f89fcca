"""Who races."""

from __future__ import annotations

from benchmarks.race.system import System
from benchmarks.race.systems import amqp_tasks, bare_pika, celery_peer, dramatiq_peer, faststream_peer, taskiq_peer

__all__ = ["SYSTEMS", "chosen"]

_FILES = (amqp_tasks, celery_peer, dramatiq_peer, taskiq_peer, faststream_peer, bare_pika)
SYSTEMS: tuple[System, ...] = tuple(system for file in _FILES for system in file.SYSTEMS)


def chosen(names: str | None) -> list[System]:
    """The systems that a list with commas names; all without one. Raises ValueError for a name that nobody has."""
    if names is None:
        return list(SYSTEMS)
    known = {system.name.replace(" ", "-"): system for system in SYSTEMS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no system is named {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]
