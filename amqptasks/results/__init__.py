"""Handles of published tasks."""

from amqptasks.results.async_result import AsyncResult

__all__ = ["AsyncResult"]
