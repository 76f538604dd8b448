"""Tables of a folder, streamed: CSV or CSV.gz under any case of file and column names.

A file is a stranger: its lines are bounded before they are parsed, nothing in it is guessed, and
no message repeats what a cell says.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import math
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, Final, cast

from client.data.tables import MAX_FIELD_BYTES
from common.errors import Code, DataError

__all__ = [
    "Folder",
    "Item",
    "Row",
    "Table",
    "Wanted",
    "as_text",
    "moment",
    "number",
    "told",
    "wrong_cell",
]

_PARQUET: Final = ".parquet"
_BATCH: Final = 4096
_SUFFIXES: Final = (".csv.gz", ".csv", _PARQUET)
_MAX_COLUMNS: Final = 10_000
_MAX_FILES: Final = 10_000
_BUFFER_BYTES: Final = 1 << 17
_NOT_TEXT: Final = {
    b"\x1f\x8b": "a gzip file without .gz in its name",
    b"PK": "a zip or Excel file",
}

Row = tuple[int, tuple[str, ...]]
"""The line (1-based) on which a record begins, and the cells asked for."""


@dataclass(frozen=True, slots=True)
class Item:
    """A measurement to collect.

    name: as the source names it, in any case; it becomes `Measurement.item`, in this spelling.
    unit: numbers in any other unit are left out and counted, also those without a unit; case and
    spaces do not matter. None takes all, each with the unit that the source gives.
    """

    name: str
    unit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which parts of an encounter are collected; memory follows from this, not from the files.

    categories: kinds of notes, in any case; None takes all.
    items: measurements; None takes all.
    hours: measurements later than this after the encounter's start are left out; None takes all.
    most_notes, most_characters: of one encounter, the earliest; None takes all.
    most_entries: of one encounter's codes, of its drugs and of its measurements, the first in the
    file.
    admission_diagnosis: also the free text with which the patient was admitted, among `codes`
    under the system `name`.

    Guarantee: which of an encounter's entries are kept depends on that encounter's own alone.
    """

    notes: bool = False
    categories: tuple[str, ...] | None = None
    codes: bool = False
    admission_diagnosis: bool = False
    drugs: bool = False
    measurements: bool = False
    items: tuple[Item, ...] | None = None
    hours: float | None = None
    most_notes: int | None = None
    most_characters: int | None = None
    most_entries: int = 100_000

    def takes(self, category: str) -> bool:
        """Whether notes of this kind are wanted."""
        if self.categories is None:
            return True
        kind = category.casefold()
        return any(kind == name.strip().casefold() for name in self.categories)


def moment(cell: str) -> datetime | None:
    """The time that a cell names (ISO 8601, no zone), or None where it is empty.

    Raises ValueError for anything else.
    """
    cell = cell.strip()
    if not cell:
        return None
    value = datetime.fromisoformat(cell)
    if value.tzinfo is not None or cell[4:5] != "-":
        raise ValueError("a time zone, or no ISO date")
    return value


def number(cell: str) -> float:
    """The finite number that a cell holds, or NaN where it holds none."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in cell and cell.isascii() else math.nan


def told(table: Table, line: int, column: str, cell: str) -> str:
    """What a cell says that may not be empty. Raises DataError."""
    name = cell.strip()
    if not name:
        raise wrong_cell(table, line, column, "is empty")
    return name


def wrong_cell(table: Table, line: int, column: str, what: str) -> DataError:
    """The error for a cell that cannot be used; it names the place, not the content."""
    return DataError(Code.DATA_VALUE, f"{table.path}:{line}: column {column} {what}.")


@dataclass(frozen=True, slots=True)
class Folder:
    """The tables of a folder and of some of its subfolders, by lower-case name."""

    root: Path
    tables: Mapping[str, tuple[Path, ...]]

    @classmethod
    def scan(cls, root: Path, *, within: Sequence[str] = ()) -> Folder:
        """Look for tables in `root` and in the subfolders named `within`, in any case.

        Raises DataError.
        """
        found: dict[str, tuple[Path, ...]] = {}
        for path in _files(root, within):
            name = path.name.lower()
            suffix = next((end for end in _SUFFIXES if name.endswith(end)), None)
            if suffix is not None:
                stem = name.removesuffix(suffix)
                found[stem] = (*found.get(stem, ()), path)
        return cls(root, found)

    def table(self, name: str) -> Table | None:
        """The table of this name, or None where there is none.

        Raises:
            DataError: there are two, and which of them counts is not for us to say.
        """
        paths = self.tables.get(name.lower(), ())
        if not paths:
            return None
        if len(paths) > 1:
            message = f"{paths[0]}: the table {name} is there twice ({paths[1].name})."
            remedy = "Keep one of the two files, and move the other out of the folder."
            raise DataError(Code.DATA_FORMAT, message, remedy=remedy)
        return Table(paths[0])

    def require(self, name: str) -> Table:
        """The table of this name. Raises DataError."""
        return self.require_any(name)[0]

    def require_any(self, *names: str) -> list[Table]:
        """Those of the tables that are there. Raises DataError where none is."""
        found = [table for name in names if (table := self.table(name)) is not None]
        if found:
            return found
        close = difflib.get_close_matches(names[0].lower(), self.tables, n=1)
        hint = f" (did you mean to rename {self.tables[close[0]][0].name}?)" if close else ""
        message = (
            f"{self.root}: holds no table {' or '.join(names)}, .csv, .csv.gz or .parquet{hint}."
        )
        remedy = "Copy the table into the folder, or do not ask for what stands in it."
        raise DataError(Code.DATA_UNREADABLE, message, remedy=remedy)


def _files(root: Path, within: Sequence[str]) -> list[Path]:
    try:
        here = sorted(root.iterdir())
        folders = [path for path in here if path.name.lower() in within and path.is_dir()]
        listed = [*here, *(path for folder in folders for path in sorted(folder.iterdir()))]
        found = [path for path in listed if path.is_file()]
    except OSError as error:
        raise DataError(
            Code.DATA_UNREADABLE, f"{root}: cannot be listed ({error.strerror or 'it is damaged'})."
        ) from None
    if len(found) > _MAX_FILES:
        raise DataError(Code.DATA_FORMAT, f"{root}: holds more than {_MAX_FILES} files.")
    return found


@dataclass(frozen=True, slots=True)
class Table:
    """One file, CSV (packed or not) or Parquet; every cell is text, a missing one is empty."""

    path: Path

    def columns(self) -> list[str]:
        """The names of its columns, in lower case. Raises DataError."""
        with self._records() as records:
            return self._header(records)

    @contextmanager
    def _records(self) -> Iterator[Iterator[tuple[int, list[str]]]]:
        """The header, then every record, each with its line (its row, counted so, in Parquet)."""
        if self.path.name.lower().endswith(_PARQUET):
            yield _parquet(self.path)
        else:
            with _opened(self.path) as lines:
                yield _records(self.path, lines)

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
        """Every record's wanted cells, the required columns first.

        An optional column that is not there yields empty cells; other columns are not looked at.

        Raises:
            DataError: a required column is missing, or with the line, a record is ragged or too
                long, or the file is not UTF-8, not CSV or cut short.
        """
        with self._records() as records:
            names = self._header(records)
            pick = self._picker(names, required, optional)
            width = len(names)
            for line, cells in records:
                if len(cells) != width:
                    message = f"has {len(cells)} fields, but the header has {width}."
                    raise DataError(Code.DATA_RAGGED, f"{self.path}:{line}: {message}")
                cells.append("")
                yield line, pick(cells)

    def _header(self, records: Iterator[tuple[int, list[str]]]) -> list[str]:
        first = next(records, None)
        if first is None:
            raise DataError(Code.DATA_EMPTY, f"{self.path}: is empty.")
        names = [name.strip().lower() for name in first[1]]
        if len(names) > _MAX_COLUMNS:
            message = f"{self.path}:{first[0]}: has more than {_MAX_COLUMNS} columns."
            raise DataError(Code.DATA_FORMAT, message)
        return names

    def _picker(
        self, names: Sequence[str], required: Sequence[str], optional: Sequence[str]
    ) -> Callable[[list[str]], tuple[str, ...]]:
        """Picks the wanted cells out of a row that ends with one empty cell more."""
        missing = next((name for name in required if name not in names), None)
        if missing is not None:
            raise self._no_column(names, missing)
        wanted = (*required, *optional)
        twice = next((name for name in wanted if names.count(name) > 1), None)
        if twice is not None:
            message = f"{self.path}:1: column {twice} is there twice (case does not count)."
            raise DataError(Code.DATA_COLUMNS, message)
        absent = len(names)
        places = [names.index(name) if name in names else absent for name in wanted]
        if len(places) == 1:
            only = places[0]
            return lambda cells: (cells[only],)
        return operator.itemgetter(*places)

    def _no_column(self, names: Sequence[str], missing: str) -> DataError:
        close = difflib.get_close_matches(missing, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            hint = " (are the fields separated by something else than a comma?)"
        return DataError(
            Code.DATA_COLUMNS,
            f"{self.path}:1: there is no column {missing} among {len(names)}{hint}.",
            remedy="Name the columns as the data set's documentation does; case does not count.",
        )


def _records(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the line on which it begins."""
    csv.field_size_limit(MAX_FIELD_BYTES)
    reader = csv.reader(lines, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            message = f"{path}:{line}: has a field longer than 4 MiB."
            raise DataError(Code.DATA_TOO_LONG, message) from None
        message = f"{path}:{line}: is not well-formed CSV (a quote or a line end is wrong)."
        raise DataError(Code.DATA_FORMAT, message) from None


def _parquet(path: Path) -> Iterator[tuple[int, list[str]]]:
    """A Parquet file as CSV would have it: its columns' names first, on line 1."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield 1, list(file.schema_arrow.names)
            line = 1
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    line += 1
                    yield line, [as_text(path, line, value) for value in row]
    except (OSError, pa.ArrowException) as error:
        message = f"{path}: is not a whole Parquet file ({type(error).__name__})."
        raise DataError(Code.DATA_UNREADABLE, message) from None


def as_text(path: Path, line: int, value: object) -> str:
    """A value as a CSV file of the same table would write it. Raises DataError."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, str | int | float | date | Decimal):
        return str(value)
    message = f"{path}:{line}: has a cell that is neither text, a number nor a time."
    raise DataError(Code.DATA_VALUE, message)


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    """The file's lines, of bounded length; closed at the end."""
    packed = path.name.lower().endswith(".gz")
    try:
        handle = cast("io.RawIOBase", gzip.open(path, "rb") if packed else path.open("rb"))  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or "it is damaged"
        message = f"{path}: cannot be read ({reason})."
        raise DataError(Code.DATA_UNREADABLE, message) from None
    # Its own buffer around gzip: a line then costs no call into Python code.
    buffered = io.BufferedReader(handle, _BUFFER_BYTES)
    with handle, buffered:
        yield _lines(path, buffered)


def _lines(path: Path, handle: BinaryIO) -> Iterator[str]:
    """Lines of bounded length: a 200 MB line is refused after 4 MiB of it."""
    line = 0
    while raw := _line(path, handle, line + 1):
        line += 1
        if len(raw) > MAX_FIELD_BYTES:
            raise DataError(Code.DATA_TOO_LONG, f"{path}:{line}: is longer than 4 MiB.")
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _not_text(path, line, raw) from None
        if "\0" in text:
            message = f"{path}:{line}: holds a NUL byte, which no text has."
            raise DataError(Code.DATA_FORMAT, message)
        yield text


def _line(path: Path, handle: BinaryIO, line: int) -> bytes:
    try:
        return handle.readline(MAX_FIELD_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        message = f"{path}:{line}: cannot be read from here on (it is cut short or damaged)."
        raise DataError(Code.DATA_UNREADABLE, message) from None


def _not_text(path: Path, line: int, raw: bytes) -> DataError:
    kind = next((kind for start, kind in _NOT_TEXT.items() if raw.startswith(start)), None)
    if line == 1 and kind is not None:
        return DataError(Code.DATA_FORMAT, f"{path}: is {kind}.")
    return DataError(Code.DATA_ENCODING, f"{path}:{line}: is not UTF-8.")
