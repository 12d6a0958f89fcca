"""Results in a database: PostgreSQL, MySQL or MariaDB, SQLite, through SQLAlchemy Core.

Two tables, made at the first use. Databases do not tell of changes in a way that all of them share, so whoever waits
looks again: soon at first, twice a second later.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGBLOB, VARCHAR
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from amqptasks.errors import ConfigError, StoreUnavailable
from amqptasks.results.store import ResultStore

__all__ = ["SqlStore"]

T = TypeVar("T")

_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
_VERSION = 1
_TIMEOUT, _STATEMENT_SECONDS = 5, 30
_BATCH = 500
_EXPIRE_EVERY, _EXPIRE_ROWS, _EXPIRE_BATCHES = 60.0, 1000, 10

_metadata = sa.MetaData()
_body = sa.LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb")
_id = sa.String(255).with_variant(VARCHAR(255, collation="utf8mb4_bin"), "mysql", "mariadb")
_results = sa.Table(
    "amqptasks_results",
    _metadata,
    sa.Column("task_id", _id, primary_key=True),
    sa.Column("ready", sa.Boolean, nullable=False),
    sa.Column("body", _body, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False, index=True),
)
_groups = sa.Table(
    "amqptasks_groups",
    _metadata,
    sa.Column("group_id", _id, primary_key=True),
    sa.Column("body", _body, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False, index=True),
)
_schema = sa.Table("amqptasks_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))


class SqlStore(ResultStore):
    """`ResultStore` on SQLAlchemy 2. ``postgresql://`` uses psycopg 3, ``mysql://`` PyMySQL."""

    poll_seconds: ClassVar[float] = 0.5

    def __init__(self, url: str, *, expires: float | None) -> None:
        super().__init__(url, expires=expires)
        try:
            parsed = make_url(url)
        except SQLAlchemyError:
            raise ConfigError("result.backend: the URL of the database cannot be read") from None
        self._url = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
        self._where = f"{parsed.host}:{parsed.port}/{parsed.database}" if parsed.host else str(parsed.database)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._next_expiry = time.monotonic() + _EXPIRE_EVERY
        self._ready = False
        self._engine = self._new_engine()

    def _new_engine(self) -> sa.Engine:
        name = self._url.get_backend_name()
        options: dict[str, Any] = {"pool_pre_ping": True, "hide_parameters": True}
        if name == "postgresql":
            arguments = {"connect_timeout": _TIMEOUT, "options": f"-c statement_timeout={_STATEMENT_SECONDS}s"}
        elif name in ("mysql", "mariadb"):
            seconds = _STATEMENT_SECONDS
            arguments = {"connect_timeout": _TIMEOUT, "read_timeout": seconds, "write_timeout": seconds}
        else:
            arguments = {"timeout": _STATEMENT_SECONDS}
        return sa.create_engine(self._url, connect_args=arguments, **options)

    # -- plumbing -------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            with self._connected().begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise self._unavailable(error) from error

    def _connected(self) -> sa.Engine:
        if self._pid != os.getpid():
            # Connections that were open before the fork are the parent's.
            self._lock = threading.Lock()
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        if not self._ready:
            with self._lock:
                if not self._ready:
                    self._create()
                    self._ready = True
        return self._engine

    def _create(self) -> None:
        for attempt in range(3):
            try:
                _metadata.create_all(self._engine)
                break
            except DBAPIError as error:
                # Another process makes the same tables now.
                if error.connection_invalidated or attempt == 2 or not _exists_already(error):
                    raise
                time.sleep(0.1)
        with self._engine.begin() as connection:
            found = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar()
        if found is None:
            with suppress(IntegrityError), self._engine.begin() as connection:
                connection.execute(_schema.insert().values(version=_VERSION))
        elif found > _VERSION:
            raise StoreUnavailable(
                f"the tables at {self._where} have version {found}; this amqptasks knows {_VERSION}: upgrade it"
            )

    def _unavailable(self, error: SQLAlchemyError) -> StoreUnavailable:
        cause = getattr(error, "orig", None) or error
        words = str(cause.args[-1] if getattr(cause, "args", None) else cause).strip().splitlines()
        text = words[0] if words else type(cause).__name__
        password = self._url.password
        if password:
            text = text.replace(str(password), "***")
        return StoreUnavailable(f"the result database at {self._where} cannot be used: {text}")

    def _oldest(self) -> float:
        return time.time() - self.expires if self.expires else 0.0

    # -- ResultStore ----------------------------------------------------------------------------------------------

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """Insert or update."""
        values = {"ready": ready, "body": encoded, "updated_at": time.time()}
        update = _results.update().where(_results.c.task_id == task_id).values(**values)
        if not ready:
            update = update.where(_results.c.ready.is_(False))
        self._upsert(update, _results.insert().values(task_id=task_id, **values))
        if self.expires and time.monotonic() > self._next_expiry:
            self._next_expiry = time.monotonic() + _EXPIRE_EVERY
            self.expire()

    def _upsert(self, update: sa.Update, insert: sa.Insert) -> None:
        """Update, else insert; a row that came in between is updated, unless the update leaves such a row alone."""

        def changed(connection: sa.Connection) -> bool:
            return bool(connection.execute(update).rowcount)

        if self._run(changed):
            return
        try:
            with self._connected().begin() as connection:
                connection.execute(insert)
        except IntegrityError:
            self._run(changed)
        except SQLAlchemyError as error:
            raise self._unavailable(error) from error

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """Select."""
        found: dict[str, bytes] = {}
        for start in range(0, len(task_ids), _BATCH):
            some = task_ids[start : start + _BATCH]
            query = sa.select(_results.c.task_id, _results.c.body).where(
                _results.c.task_id.in_(some), _results.c.updated_at > self._oldest()
            )
            # mypy cannot infer a lambda that has a default.
            rows = self._run(lambda connection, query=query: connection.execute(query).all())  # type: ignore[misc]
            found.update({row[0]: bytes(row[1]) for row in rows})
        return found

    def delete(self, task_ids: Sequence[str]) -> None:
        """Delete."""
        for start in range(0, len(task_ids), _BATCH):
            some = task_ids[start : start + _BATCH]
            query = _results.delete().where(_results.c.task_id.in_(some))
            # As above.
            self._run(lambda connection, query=query: connection.execute(query))  # type: ignore[misc]

    def put_group(self, group_id: str, encoded: bytes) -> None:
        """Insert or update."""
        values = {"body": encoded, "updated_at": time.time()}
        update = _groups.update().where(_groups.c.group_id == group_id).values(**values)
        self._upsert(update, _groups.insert().values(group_id=group_id, **values))

    def get_group(self, group_id: str) -> bytes | None:
        """Select."""
        query = sa.select(_groups.c.body).where(_groups.c.group_id == group_id, _groups.c.updated_at > self._oldest())
        found = self._run(lambda connection: connection.execute(query).scalar())
        return None if found is None else bytes(found)

    def delete_group(self, group_id: str) -> None:
        """Delete."""
        query = _groups.delete().where(_groups.c.group_id == group_id)
        self._run(lambda connection: connection.execute(query))

    def expire(self) -> int:
        """Delete old rows by the index, a thousand at a time, ten times at most."""
        if not self.expires:
            return 0
        deleted = 0
        for table, column in ((_results, _results.c.task_id), (_groups, _groups.c.group_id)):
            old = sa.select(column).where(table.c.updated_at <= self._oldest()).limit(_EXPIRE_ROWS)
            for _ in range(_EXPIRE_BATCHES):

                def batch(connection: sa.Connection, table: Any = table, column: Any = column, old: Any = old) -> int:
                    ids = list(connection.execute(old).scalars())
                    if ids:
                        connection.execute(table.delete().where(column.in_(ids)))
                    return len(ids)

                count = self._run(batch)
                deleted += count
                if count < _EXPIRE_ROWS:
                    break
        return deleted

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose(close=self._pid == os.getpid())


def _exists_already(error: DBAPIError) -> bool:
    text = str(error.orig).lower()
    return any(word in text for word in ("already exists", "duplicate", "unique", "deadlock", "locked"))
