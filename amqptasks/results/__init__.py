"""Results: handles of what was sent, and where results are kept."""

from amqptasks.results.async_result import AsyncResult, Expected, GroupResult, ResultSet, from_handle

__all__ = ["AsyncResult", "Expected", "GroupResult", "ResultSet", "from_handle"]
