"""Results: handles of what was sent, and where results are kept."""

from amqptasks.results.async_result import AsyncResult, GroupResult, ResultSet, from_handle

__all__ = ["AsyncResult", "GroupResult", "ResultSet", "from_handle"]
