"""From Celery's settings to these: what has a counterpart is written, and what has none is named."""

from amqptasks.conversion.convert import Converted, Note, convert
from amqptasks.conversion.module import read_module

__all__ = ["Converted", "Note", "convert", "read_module"]
