"""Replacing a queue whose arguments AMQP has frozen, while publishers and workers go on."""

from amqptasks.migration.migration import Migration, Report
from amqptasks.migration.state import Look, Step

__all__ = ["Look", "Migration", "Report", "Step"]
