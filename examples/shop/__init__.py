"""The shop: ``-A examples.shop:app``.

The worker imports the task modules that ``include`` in ``examples/amqptasks.yaml`` lists; this module stays light, so
that a web application can import `app` and a task without the rest.
"""

from __future__ import annotations

from pathlib import Path

from amqptasks import AmqpTasks

__all__ = ["app"]

app = AmqpTasks("shop", config=Path(__file__).parent.parent / "amqptasks.yaml")
