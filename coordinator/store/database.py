"""The ledger: what was decided and what arrived, one row for each, in SQLite or any database that
SQLAlchemy speaks.

A row is written before anybody is told. Big things (updates, versions, blobs) are files, named in the rows.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    Table,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy import text as text_of
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from rankfleet.federated.errors import ConfigError

from ..config import CoordinatorConfig
from . import tables

Row = Mapping[str, Any]
"""A row of the ledger, by column."""
DatabaseAway = OperationalError
"""Raised by every question and change while the database does not answer."""


def url_of(config: CoordinatorConfig) -> str:
    """The database of a coordinator."""
    return config.database or f"sqlite:///{config.home / 'ledger.db'}"


class Store:
    """One connection, one writer. Every method is one transaction."""

    def __init__(self, url: str) -> None:
        try:
            # A connection that a database's restart has ended is noticed before it is used.
            self.engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except NoSuchModuleError as error:
            raise ConfigError(
                f"no driver for the database: {error}",
                "pip install 'rankfleet[postgres]'; postgresql+psycopg://…",
            ) from None
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the database's driver is not installed: {error}", "pip install 'rankfleet[postgres]'"
            ) from None
        except ArgumentError:
            raise ConfigError(
                "`database` is not understood",
                "sqlite:///FILE or postgresql+psycopg://user:password@host/name",
            ) from None
        if url.startswith("sqlite"):
            event.listen(self.engine, "connect", _durable)
        try:
            self._up_to_date()
        except OperationalError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            raise ConfigError(
                f"the ledger at {where} cannot be opened: {error.orig}",
                "is the database running, and may we use it?",
            ) from None

    def _up_to_date(self) -> None:
        """Tables as this version wants them: new ones are made, columns that came later are added. Raises
        ConfigError."""
        there = inspect(self.engine)
        known = {name: {c["name"] for c in there.get_columns(name)} for name in there.get_table_names()}
        if (
            tables.facts.name in known
            and (row := self.row(tables.facts, name="schema")) is not None
            and int(row["value"]) > tables.SCHEMA
        ):
            raise ConfigError(
                f"the ledger has schema {row['value']}, this version knows {tables.SCHEMA}",
                "a newer coordinator wrote it: install that version",
            )
        tables.meta.create_all(self.engine)
        with self.engine.begin() as tx:
            for table in tables.meta.sorted_tables:
                for column in table.columns if table.name in known else ():
                    if column.name not in known[table.name]:
                        kind = column.type.compile(self.engine.dialect)
                        tx.execute(text_of(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"))
                        if isinstance(column.default, ScalarElementColumnDefault):
                            tx.execute(update(table).values({column: column.default.arg}))
        self.put(tables.facts, {"name": "schema"}, value=str(tables.SCHEMA))

    def epoch(self) -> int:
        """When this coordinator's life began, in seconds; higher after every restore."""
        row = self.row(tables.facts, name="epoch")
        if row is None:
            self.put(tables.facts, {"name": "epoch"}, value=str(int(time.time())))
            return self.epoch()
        return int(row["value"])

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def rows(self, table: Table, *columns: str, since: int | None = None, **where: Any) -> list[Row]:
        """Rows in primary-key order; `columns` of them, or all; with `since`, those of that round and
        later ones."""
        wanted: list[Any] = [table.c[name] for name in columns] or [table]
        query = (
            select(*wanted)
            .where(*(table.c[k] == v for k, v in where.items()))
            .order_by(*table.primary_key.columns)
        )
        if since is not None:
            query = query.where(table.c.round >= since)
        with self.engine.connect() as connection:
            return [dict(r) for r in connection.execute(query).mappings()]

    def row(self, table: Table, **where: Any) -> Row | None:
        """The one row, or None."""
        found = self.rows(table, **where)
        return found[0] if found else None

    def add(self, table: Table, **values: Any) -> None:
        """Insert one row."""
        with self.engine.begin() as connection:
            connection.execute(insert(table).values(**values))

    def change(self, table: Table, where: Mapping[str, Any], **values: Any) -> int:
        """Update rows; returns how many."""
        with self.engine.begin() as connection:
            done = connection.execute(
                update(table).where(*(table.c[k] == v for k, v in where.items())).values(**values)
            )
            return int(done.rowcount)

    def remove(self, table: Table, **where: Any) -> None:
        """Delete rows."""
        with self.engine.begin() as connection:
            connection.execute(delete(table).where(*(table.c[k] == v for k, v in where.items())))

    def put(self, table: Table, key: Mapping[str, Any], **values: Any) -> None:
        """Insert the row, or replace the one with its key."""
        with self.engine.begin() as connection:
            connection.execute(delete(table).where(*(table.c[k] == v for k, v in key.items())))
            connection.execute(insert(table).values(**key, **values))

    def tell(self, job: str, device: str, text: str) -> None:
        """A line in the log of events, as `coordinator rounds` shows it."""
        self.add(tables.events, at=time.time(), job=job, device=device, text=text)


def _durable(connection: Any, record: Any) -> None:
    """WAL, and every commit on disk before it is answered."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def text(value: Any) -> str:
    """JSON for a text column."""
    return json.dumps(value, sort_keys=True)


def read(value: str) -> Any:
    """The inverse of `text`."""
    return json.loads(value)
