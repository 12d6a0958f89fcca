"""Results in MongoDB.

Its server stands in no package archive that tests can use, so the tests of this store run only where
``AMQPTASKS_TEST_MONGODB_URL`` is set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import pymongo
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from amqptasks.errors import StoreUnavailable
from amqptasks.results.store import ResultStore, gives_way

__all__ = ["MongoStore"]

T = TypeVar("T")
_TIMEOUT_MS = 5000


class MongoStore(ResultStore):
    """`ResultStore` on pymongo. The database is the URL's, or ``amqptasks``."""

    poll_seconds: ClassVar[float] = 0.3

    def __init__(self, url: str, *, expires: float | None) -> None:
        super().__init__(url, expires=expires)
        self._where = urlsplit(url).netloc.rpartition("@")[2]
        self._pid = 0
        self._client: Any = None

    def _database(self) -> Any:
        if self._pid != os.getpid():  # pymongo's client does not survive a fork
            self._client = pymongo.MongoClient(
                self.url, serverSelectionTimeoutMS=_TIMEOUT_MS, connectTimeoutMS=_TIMEOUT_MS, socketTimeoutMS=30_000
            )
            self._pid = os.getpid()
            database = self._client.get_default_database("amqptasks")
            for name in ("amqptasks_results", "amqptasks_groups"):
                database[name].create_index("expires_at", expireAfterSeconds=0)
        return self._client.get_default_database("amqptasks")

    def _run(self, work: Callable[[Any], T]) -> T:
        try:
            return work(self._database())
        except (PyMongoError, OSError) as error:
            text = error.details.get("errmsg", "") if isinstance(error, OperationFailure) and error.details else error
            raise StoreUnavailable(f"MongoDB at {self._where} cannot be used: {text}") from error

    def _row(self, encoded: bytes, **more: Any) -> dict[str, Any]:
        until = datetime.now(UTC) + timedelta(seconds=self.expires) if self.expires else None
        return {"$set": {"body": encoded, "expires_at": until, "updated_at": time.time(), **more}}

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """Upsert; where one stands that does not give way, that makes a duplicate key."""
        kept = "done" if ready else "ready"
        query: dict[str, Any] = {"_id": task_id, kept: {"$ne": True}}
        row = self._row(encoded, ready=ready, done=ready and not gives_way(encoded, ready=True))

        def write(database: Any) -> None:
            try:
                database.amqptasks_results.update_one(query, row, upsert=True)
            except DuplicateKeyError:
                # Or two came at once: then this one updates.
                database.amqptasks_results.update_one(query, row)

        self._run(write)

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """find."""
        rows = self._run(lambda database: list(database.amqptasks_results.find({"_id": {"$in": list(task_ids)}})))
        return {row["_id"]: bytes(row["body"]) for row in rows if self._is_fresh(row)}

    def _is_fresh(self, row: dict[str, Any]) -> bool:
        # The server deletes once a minute only.
        return not self.expires or row["updated_at"] > time.time() - self.expires

    def delete(self, task_ids: Sequence[str]) -> None:
        """delete_many."""
        self._run(lambda database: database.amqptasks_results.delete_many({"_id": {"$in": list(task_ids)}}))

    def put_group(self, group_id: str, encoded: bytes) -> None:
        """Upsert."""
        self._run(lambda db: db.amqptasks_groups.update_one({"_id": group_id}, self._row(encoded), upsert=True))

    def get_group(self, group_id: str) -> bytes | None:
        """find_one."""
        row = self._run(lambda database: database.amqptasks_groups.find_one({"_id": group_id}))
        return bytes(row["body"]) if row is not None and self._is_fresh(row) else None

    def delete_group(self, group_id: str) -> None:
        """delete_one."""
        self._run(lambda database: database.amqptasks_groups.delete_one({"_id": group_id}))

    def close(self) -> None:
        """Close all connections."""
        client, self._client, self._pid = self._client, None, 0
        if client is not None:
            client.close()
