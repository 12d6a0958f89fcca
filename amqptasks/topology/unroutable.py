"""Where messages that nobody could route were going: ``<prefix>.unroutable`` keeps them as they were sent. Pure.

They came by the alternate exchange of the dead-letter exchange, whose keys are work queues, or of the delay ladder,
whose keys end in the target (`topology.delays`).
"""

from __future__ import annotations

from amqptasks.topology.delays import EXCHANGE_MARK, LADDER_LEVELS, delay_key, exchange_target, undelayed_key
from amqptasks.topology.delays import unroutable_exchange as unroutable_queue

__all__ = ["address", "destination", "unroutable_queue"]


def destination(prefix: str, exchange: str, key: str) -> tuple[str, str]:
    """Exchange and key of what lives again, from those that a message came with."""
    bare = undelayed_key(key)
    laddered = exchange.startswith(f"{prefix}.delay.") or exchange == unroutable_queue(prefix)
    if bare == key or not laddered:
        return prefix, key
    word = key.split(".", LADDER_LEVELS)[LADDER_LEVELS].partition(".")[0]
    if not word.startswith(EXCHANGE_MARK):
        return prefix, bare
    return word[1:].replace("%2E", ".").replace("%25", "%"), bare


def address(prefix: str, exchange: str, key: str) -> tuple[str, str]:
    """Where to publish what shall stand there again; `destination` of it is the same as before."""
    known = key if exchange in ("", prefix) else delay_key(0, exchange_target(exchange, key))
    return unroutable_queue(prefix), known
