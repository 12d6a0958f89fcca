"""The seed of a run: `AMQPTASKS_TEST_SEED` replays one that a test has printed."""

from __future__ import annotations

import os
import random

__all__ = ["VARIABLE", "run_seed"]

VARIABLE = "AMQPTASKS_TEST_SEED"


def run_seed() -> int:
    """The seed that the environment names, or a new one."""
    return int(os.environ.get(VARIABLE) or random.SystemRandom().randrange(1 << 30))
