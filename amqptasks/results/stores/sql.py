"""Results in a database: PostgreSQL, MySQL or MariaDB, SQLite, through SQLAlchemy Core.

Two tables, made at the first use. Databases do not tell of changes in a way that all of them share, so whoever waits
looks again: soon at first, twice a second later.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGBLOB, VARCHAR
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from amqptasks.errors import ConfigError, StoreUnavailable
from amqptasks.results.store import ResultStore, gives_way

__all__ = ["SqlStore"]

T = TypeVar("T")

_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
_VERSION = 1
#: Seconds: for connecting, for one statement, for a lock on SQLite's file.
_TIMEOUT, _STATEMENT_SECONDS, _LOCKED_SECONDS = 5, 10, 30
_BATCH, _TRIES = 500, 20
_EXPIRE_EVERY, _EXPIRE_ROWS, _EXPIRE_SECONDS = 60.0, 1000, 5.0

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
            arguments = {"timeout": _LOCKED_SECONDS}
        engine = sa.create_engine(self._url, connect_args=arguments, **options)
        if engine.driver == "psycopg":
            _bound_waits(engine)
        return engine

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
        """Insert or update; a row that is ready is looked at before it is replaced."""
        values = {"ready": ready, "body": encoded, "updated_at": time.time()}
        own = _results.update().where(_results.c.task_id == task_id).values(**values)
        open_or_old = sa.or_(_results.c.ready.is_(False), _results.c.updated_at <= self._oldest())
        if not self._upsert(own.where(open_or_old), _results.insert().values(task_id=task_id, **values)) and ready:
            self._replace_ready(task_id, own)
        if self.expires and time.monotonic() > self._next_expiry:
            self._next_expiry = time.monotonic() + _EXPIRE_EVERY
            self.expire()

    def _replace_ready(self, task_id: str, own: sa.Update) -> None:
        stands = sa.select(_results.c.body).where(_results.c.task_id == task_id)
        for _ in range(_TRIES):
            old = self._run(lambda connection: connection.execute(stands).scalar())
            if old is None or not gives_way(bytes(old), ready=True):
                return
            # Compare and swap: another may write at the same time.
            update = own.where(_results.c.body == old)
            if self._run(lambda connection, update=update: connection.execute(update).rowcount):  # type: ignore[misc]  # mypy cannot infer a default
                return

    def _upsert(self, update: sa.Update, insert: sa.Insert) -> bool:
        """Update, else insert; a row that came in between is updated. Whether the update did not leave it alone."""

        def changed(connection: sa.Connection) -> bool:
            return bool(connection.execute(update).rowcount)

        if self._run(changed):
            return True
        try:
            with self._connected().begin() as connection:
                connection.execute(insert)
        except IntegrityError:
            return self._run(changed)
        except SQLAlchemyError as error:
            raise self._unavailable(error) from error
        return True

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """Select."""
        found: dict[str, bytes] = {}
        for start in range(0, len(task_ids), _BATCH):
            some = task_ids[start : start + _BATCH]
            query = sa.select(_results.c.task_id, _results.c.body).where(
                _results.c.task_id.in_(some), _results.c.updated_at > self._oldest()
            )
            # mypy cannot infer a lambda that has a default.
            rows = self._run(lambda connection, query=query: connection.execute(query).all())  # type: ignore[misc]  # mypy cannot infer a default
            found.update({row[0]: bytes(row[1]) for row in rows})
        return found

    def delete(self, task_ids: Sequence[str]) -> None:
        """Delete."""
        for start in range(0, len(task_ids), _BATCH):
            some = task_ids[start : start + _BATCH]
            query = _results.delete().where(_results.c.task_id.in_(some))
            # As above.
            self._run(lambda connection, query=query: connection.execute(query))  # type: ignore[misc]  # mypy cannot infer a default

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
        """Delete old rows by the index, a thousand at a time, for a few seconds at most."""
        if not self.expires:
            return 0
        deleted = 0
        until = time.monotonic() + _EXPIRE_SECONDS
        for table, column in ((_results, _results.c.task_id), (_groups, _groups.c.group_id)):
            old = sa.select(column).where(table.c.updated_at <= self._oldest()).limit(_EXPIRE_ROWS)
            while True:

                def batch(connection: sa.Connection, table: Any = table, column: Any = column, old: Any = old) -> int:
                    ids = list(connection.execute(old).scalars())
                    if ids:
                        connection.execute(table.delete().where(column.in_(ids)))
                    return len(ids)

                count = self._run(batch)
                deleted += count
                if count < _EXPIRE_ROWS or time.monotonic() > until:
                    break
        return deleted

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose(close=self._pid == os.getpid())


def _bound_waits(engine: sa.Engine) -> None:
    """Have psycopg give up on a server that does not answer.

    It has no timeout for that, nor has libpq. Those of the server and of TCP are of no use when it is frozen: its
    kernel goes on to acknowledge.
    """
    driver: Any = engine.dialect.loaded_dbapi

    class Connection(driver.Connection):  # type: ignore[misc]  # a driver that is loaded by name
        """Waits for one answer at a time, a little longer than the server works for it."""

        def wait(self, steps: Generator[int, int, T], *args: Any, **options: Any) -> T:
            found: T = super().wait(self._in_time(steps), *args, **options)
            return found

        def _in_time(self, steps: Generator[int, int, T]) -> Generator[int, int, T]:
            until = time.monotonic() + _STATEMENT_SECONDS + 2
            try:
                wish = next(steps)
                while True:
                    ready = yield wish
                    # psycopg says several times a second that nothing is ready.
                    if not ready and time.monotonic() > until:
                        self.pgconn.finish()
                        raise driver.OperationalError(f"no answer for {_STATEMENT_SECONDS + 2} s")
                    wish = steps.send(ready)
            except StopIteration as end:
                value: T = end.value
                return value

    @sa.event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        return Connection.connect(*arguments, **options)


def _exists_already(error: DBAPIError) -> bool:
    text = str(error.orig).lower()
    return any(word in text for word in ("already exists", "duplicate", "unique", "deadlock", "locked"))
