"""Tables of a PostgreSQL database, read as a folder's tables are: streaming, and never written.

All tables are read in one transaction that may not write, so they tell of one moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.data.readers.files import Row, Table, as_text
from common.errors import Code, DataError
from common.keys import key_file

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy import Table as Described

__all__ = ["Database", "DatabaseTable"]

_DIALECT: Final = "postgresql"
_DRIVER: Final = "postgresql+psycopg"
_ROWS_AT_ONCE: Final = 4096
_CONNECT_S: Final = 30


class Database:
    """An open database, with the tables of one schema by lower-case name.

    Args:
        address: a file, readable by its owner alone, whose one line is the database's URL
            (`postgresql://user:password@host/name`).
        schema: where the tables lie; empty: the connection's own.

    Raises:
        DataError: the line is no URL of PostgreSQL, or nobody answers there; the message never
            repeats it.
        StorageError: others may read the file, or it is missing.
    """

    def __init__(self, address: Path, schema: str = "") -> None:
        from sqlalchemy import create_engine, inspect
        from sqlalchemy.exc import SQLAlchemyError

        self.root = address
        self._schema = schema or None
        engine = create_engine(_url(address), connect_args={"connect_timeout": _CONNECT_S})
        try:
            self._connection = engine.connect().execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            names = inspect(self._connection).get_table_names(self._schema)
        except SQLAlchemyError as error:
            raise _silent(address, error) from None
        self._names = {name.lower(): name for name in names}

    def table(self, name: str) -> Table | None:
        """The table of this name, in any case, or None where there is none. Raises DataError."""
        from sqlalchemy import MetaData
        from sqlalchemy import Table as Describe
        from sqlalchemy.exc import SQLAlchemyError

        own = self._names.get(name.lower())
        if own is None:
            return None
        try:
            described = Describe(
                own, MetaData(), schema=self._schema, autoload_with=self._connection
            )
        except SQLAlchemyError as error:
            raise _silent(self.root, error) from None
        return DatabaseTable(self.root / own, self._connection, described)

    def require(self, name: str) -> Table:
        """The table of this name. Raises DataError."""
        found = self.table(name)
        if found is None:
            message = f"{self.root}: the database has no table {name} that this user sees."
            raise DataError(Code.DATA_UNREADABLE, message)
        return found

    def close(self) -> None:
        """End the transaction and let go of the database."""
        self._connection.close()
        self._connection.engine.dispose()


@dataclass(frozen=True, slots=True)
class DatabaseTable(Table):
    """One table; its rows come in the order of its primary key, and a line is a row's number."""

    connection: Connection = field(repr=False)
    described: Described = field(repr=False)

    def columns(self) -> list[str]:
        """The names of its columns, in lower case."""
        return [column.name.lower() for column in self.described.columns]

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
        """Every row's wanted cells, the required columns first (see `Table.rows`).

        Raises DataError: a required column is missing, or the database is gone.
        """
        from sqlalchemy import select

        known = {column.name.lower(): column for column in self.described.columns}
        missing = next((name for name in required if name not in known), None)
        if missing is not None:
            message = f"{self.path}: there is no column {missing} among {len(known)}."
            raise DataError(Code.DATA_COLUMNS, message)
        wanted = (*required, *optional)
        there = [name for name in wanted if name in known]
        order = list(self.described.primary_key.columns) or [known[name] for name in there]
        query = select(*(known[name] for name in there)).order_by(*order)
        places = [there.index(name) if name in known else None for name in wanted]
        with self._asked() as connection:
            asked = connection.execution_options(yield_per=_ROWS_AT_ONCE)
            with closing(asked.execute(query)) as found:
                for line, row in enumerate(found, start=1):
                    yield line, self._cells(line, row, places)

    def _cells(
        self, line: int, row: Sequence[Any], places: Sequence[int | None]
    ) -> tuple[str, ...]:
        return tuple("" if at is None else as_text(self.path, line, row[at]) for at in places)

    @contextmanager
    def _asked(self) -> Iterator[Connection]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield self.connection
        except SQLAlchemyError as error:
            raise _silent(self.path, error) from None


def _url(address: Path) -> Any:
    """The URL in a file, for the driver that is installed here. Raises DataError, StorageError."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(key_file(address).decode("utf-8").strip())
    except (ArgumentError, UnicodeDecodeError, ValueError):
        raise _no_url(address) from None
    if url.get_backend_name() != _DIALECT:
        raise _no_url(address)
    return url.set(drivername=_DRIVER)


def _no_url(address: Path) -> DataError:
    return DataError(
        Code.DATA_FORMAT,
        f"{address}: holds no address of a PostgreSQL database.",
        remedy="Write one line: postgresql://USER:PASSWORD@HOST/NAME",
    )


def _silent(place: Path, error: Exception) -> DataError:
    """What a driver says may hold the address, a password or a cell: its kind alone is told."""
    return DataError(
        Code.DATA_UNREADABLE,
        f"{place}: the database cannot be read ({type(error).__name__}).",
        remedy="Try the same address with psql, as the same user.",
    )
