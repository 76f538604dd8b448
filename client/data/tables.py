"""Reads notes and numbers from CSV, Parquet and NDJSON, and names mistakes by file and line.

A file is a stranger: its lines are bounded before they are parsed, nothing in it is guessed,
and no message repeats what a cell says.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from client.data.records import Record
from common.errors import Code, DataError

__all__ = [
    "MAX_FIELD_BYTES",
    "TableColumns",
    "Taken",
    "file_sha256",
    "read_table",
    "read_tables",
    "take_tables",
]

MAX_FIELD_BYTES: Final = 4 * 1024 * 1024
_MAX_COLUMNS: Final = 10_000
_PARQUET_BATCH_ROWS: Final = 4096
_READERS: Final = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson", ".parquet": "parquet"}

_NUMBER: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)
UNTOLD: Final = "unknown"
"""The subgroup of whoever has an empty cell."""

_MISSING: Final = frozenset({"", "?"})

Row = tuple[int, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class TableColumns:
    """Which column holds what, and how much of it is taken.

    text None: the file has no notes. patient None: every row is its own patient. label None: the
    file is read to be predicted. site None: the file belongs to one site. `numbers` are numeric
    columns, in the order of a record's values; `codes` are text, which may be empty, in the order
    of its codes. `number`, or `time` with `event` (1 or 0), is what is to be predicted. `most` is
    how many records of one patient are taken; None takes all.
    """

    text: str | None
    patient: str | None = None
    label: str | None = None
    site: str | None = None
    numbers: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    number: str | None = None
    time: str | None = None
    event: str | None = None
    most: int | None = None
    groups: tuple[str, ...] = ()

    def told(self) -> tuple[str, ...]:
        """The columns that hold text, the note first."""
        given = (self.text, self.patient, self.label, self.site)
        return tuple(name for name in given if name is not None)

    def wanted(self) -> tuple[str, ...]:
        """The columns to look for: text, numbers, codes, what is to be predicted, subgroups."""
        return (*self.told(), *self.numbers, *self.codes, *self.predicted(), *self.groups)

    def predicted(self) -> tuple[str, ...]:
        """The numeric columns of what is to be predicted."""
        return tuple(name for name in (self.number, self.time, self.event) if name is not None)


@dataclass(frozen=True)
class Taken:
    """The records that are taken, and by patient how many more the files hold."""

    records: tuple[Record, ...]
    dropped: Mapping[str, int]


def take_tables(
    paths: Sequence[Path], columns: TableColumns, *, labels: Sequence[str] | None
) -> Taken:
    """The records of several files, in order, of each patient the first `columns.most`.

    Every record is checked, also one that is not taken. Raises DataError.

    Guarantee: which of a patient's records are taken depends on that patient's records alone
    (their order in the files), so nobody else's coming or going changes it; and a patient with
    any number of records takes bounded memory.
    """
    taken: list[Record] = []
    counts: Counter[tuple[str, str | None]] = Counter()
    dropped: Counter[str] = Counter()
    for path in paths:
        for record in _records(path, columns, labels):
            # Counted at each site by itself: a patient at two sites stays in sight of whoever
            # divides the records, and is refused there.
            whose = (record.patient, record.site)
            if columns.most is not None and counts[whose] >= columns.most:
                dropped[record.patient] += 1
                continue
            counts[whose] += 1
            taken.append(record)
    return Taken(tuple(taken), dropped)


def read_tables(
    paths: Sequence[Path], columns: TableColumns, *, labels: Sequence[str] | None
) -> tuple[Record, ...]:
    """The records that `take_tables` takes. Raises DataError."""
    return take_tables(paths, columns, labels=labels).records


def read_table(
    path: Path, columns: TableColumns, *, labels: Sequence[str] | None
) -> tuple[Record, ...]:
    """The records of one file, of each patient the first `columns.most`.

    Args:
        path: a .csv, .ndjson, .jsonl (each also .gz) or .parquet file.
        columns: which column holds what.
        labels: the study's labels, or None where the label column is not read.

    Raises:
        DataError: with file and line, for whatever cannot be used; no such record is left out.
    """
    return read_tables([path], columns, labels=labels)


def _records(path: Path, columns: TableColumns, labels: Sequence[str] | None) -> Iterator[Record]:
    rows = _rows(path, columns)
    make = _RecordMaker(str(path), columns, labels)
    empty = True
    try:
        for line, cells in rows:
            empty = False
            yield make(line, cells)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if empty:
        raise DataError(Code.DATA_EMPTY, f"{path}: holds no record.")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises DataError."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


class _RecordMaker:
    """Turns the wanted cells of a row into a checked record."""

    def __init__(self, file: str, columns: TableColumns, labels: Sequence[str] | None) -> None:
        self._file = file
        self._columns = columns
        self._labels = None if labels is None else {label: label for label in labels}

    def __call__(self, line: int, cells: Sequence[Any]) -> Record:
        columns = self._columns
        told = columns.told()
        last = len(cells) - len(columns.groups)
        cells, grouped = cells[:last], cells[last:]
        values = {
            name: self._text(line, name, cell)
            for name, cell in zip(told, cells[: len(told)], strict=True)
        }
        own = f"{self._file}#{line}"
        first, second = len(told) + len(columns.numbers), len(columns.numbers) + len(columns.codes)
        target = dict(zip(columns.predicted(), cells[len(told) + second :], strict=True))
        return Record(
            patient=own if columns.patient is None else values[columns.patient].strip(),
            text="" if columns.text is None else values[columns.text],
            label=None if columns.label is None else self._label(line, values[columns.label]),
            site=None if columns.site is None else values[columns.site].strip(),
            file=self._file,
            line=line,
            values=tuple(
                self._number(line, name, cell)
                for name, cell in zip(columns.numbers, cells[len(told) : first], strict=True)
            ),
            codes=tuple(
                self._code(line, name, cell)
                for name, cell in zip(columns.codes, cells[first : len(told) + second], strict=True)
            ),
            number=self._target(line, columns.number or columns.time, target),
            event=self._event(line, columns.event, target),
            groups=tuple(
                f"{name}:{self._code(line, name, cell) or UNTOLD}"
                for name, cell in zip(columns.groups, grouped, strict=True)
            ),
        )

    def _target(self, line: int, name: str | None, target: Mapping[str, Any]) -> float:
        """The number to predict, or the time to an event: it must be there."""
        if name is None:
            return math.nan
        value = self._number(line, name, target[name])
        if math.isnan(value):
            raise DataError(Code.DATA_VALUE, f"{self._file}:{line}: column {name} is empty.")
        return value

    def _event(self, line: int, name: str | None, target: Mapping[str, Any]) -> bool | None:
        if name is None:
            return None
        value = self._target(line, name, target)
        if value not in {0.0, 1.0}:
            raise DataError(Code.DATA_VALUE, f"{self._file}:{line}: column {name} is not 1 or 0.")
        return value == 1.0

    def _code(self, line: int, name: str, cell: Any) -> str:
        """A cell as text, and empty where it is missing."""
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return ""
        return self._text(line, name, cell).strip()

    def _number(self, line: int, name: str, cell: Any) -> float:
        """A finite number, or NaN where the cell is empty or a question mark."""
        where = f"{self._file}:{line}: column {name}"
        if cell is None or (isinstance(cell, str) and cell.strip() in _MISSING):
            return math.nan
        if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
            raise DataError(Code.DATA_VALUE, f"{where} is not a number.")
        if isinstance(cell, str) and not _NUMBER.fullmatch(cell.strip()):
            raise DataError(Code.DATA_VALUE, f"{where} is not a number.")
        try:
            number = float(cell)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise DataError(Code.DATA_VALUE, f"{where} is not a finite number.")
        return number

    def _text(self, line: int, name: str, cell: Any) -> str:
        where = f"{self._file}:{line}: column {name}"
        if isinstance(cell, float) and not math.isfinite(cell):
            raise DataError(Code.DATA_VALUE, f"{where} is not a finite number.")
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        if isinstance(cell, bool) or not isinstance(cell, (str, int, float, type(None))):
            raise DataError(Code.DATA_VALUE, f"{where} is neither text nor a number.")
        value = "" if cell is None else str(cell)
        if not value.strip():
            raise DataError(Code.DATA_VALUE, f"{where} is empty.")
        if len(value) > MAX_FIELD_BYTES:
            raise DataError(Code.DATA_TOO_LONG, f"{where} is longer than 4 MiB.")
        return value

    def _label(self, line: int, value: str) -> str:
        name = value.strip()
        if self._labels is None or name in self._labels:
            return name if self._labels is None else self._labels[name]
        close = difflib.get_close_matches(name[:200], self._labels, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DataError(
            Code.DATA_LABEL,
            f"{self._file}:{line}: column {self._columns.label} has a label that is not in the "
            f"study{hint}.",
        )


def _rows(path: Path, columns: TableColumns) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    kind = _READERS.get(suffixes[-2] if packed and len(suffixes) > 1 else (suffixes or [""])[-1])
    if kind is None or (packed and kind == "parquet"):
        raise DataError(Code.DATA_FORMAT, f"{path}: is not a kind of file that is read here.")
    if not path.is_file():
        raise DataError(Code.DATA_UNREADABLE, f"{path}: there is no such file.")
    if kind == "parquet":
        return _parquet_rows(path, columns)
    return (_csv_rows if kind == "csv" else _ndjson_rows)(path, columns, packed=packed)


def _csv_rows(path: Path, columns: TableColumns, *, packed: bool) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD_BYTES)
    with _open(path, packed=packed) as handle:
        reader = csv.reader(_lines(path, handle), strict=True)
        rows = _csv_records(path, reader)
        header = next(rows, None)
        if header is None:
            raise DataError(Code.DATA_EMPTY, f"{path}: is empty.")
        names = [name.strip() for name in header[1]]
        places = _places(path, names, columns)
        for line, cells in rows:
            if len(cells) != len(names):
                raise DataError(
                    Code.DATA_RAGGED,
                    f"{path}:{line}: has {len(cells)} fields, but the header has {len(names)}.",
                )
            yield line, [cells[place] for place in places]


def _csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                message = f"{path}:{line}: has a field longer than 4 MiB."
                raise DataError(Code.DATA_TOO_LONG, message) from None
            message = f"{path}:{line}: is not well-formed CSV (a quote or a line end is wrong)."
            raise DataError(Code.DATA_FORMAT, message) from None
        if cells:
            yield line, cells


def _ndjson_rows(path: Path, columns: TableColumns, *, packed: bool) -> Iterator[Row]:
    wanted = columns.wanted()
    with _open(path, packed=packed) as handle:
        for line, text in enumerate(_lines(path, handle), start=1):
            if not text.strip():
                continue
            entry = _json_object(path, line, text)
            if any(name not in entry for name in wanted):
                _places(path, list(entry), columns, line=line)
            yield line, [entry[name] for name in wanted]


def _json_object(path: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        message = f"{path}:{line}: is not well-formed JSON (one object a line, finite numbers)."
        raise DataError(Code.DATA_FORMAT, message) from None
    if not isinstance(entry, dict):
        raise DataError(Code.DATA_FORMAT, f"{path}:{line}: is not a JSON object.")
    return entry


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _parquet_rows(path: Path, columns: TableColumns) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            _places(path, table.schema_arrow.names, columns)
            wanted = columns.wanted()
            line = 0
            batches = table.iter_batches(_PARQUET_BATCH_ROWS, columns=list(dict.fromkeys(wanted)))
            for batch in batches:
                cells = [batch.column(name).to_pylist() for name in wanted]
                for row in zip(*cells, strict=True):
                    line += 1
                    yield line, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        message = f"{path}: is not a whole Parquet file ({type(error).__name__})."
        raise DataError(Code.DATA_FORMAT, message) from None


def _open(path: Path, *, packed: bool) -> BinaryIO | gzip.GzipFile:
    try:
        return gzip.open(path, "rb") if packed else path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _lines(path: Path, handle: BinaryIO | gzip.GzipFile) -> Iterator[str]:
    """Lines of bounded length: a 200 MB line is refused after 4 MiB of it."""
    line = 0
    while raw := handle.readline(MAX_FIELD_BYTES + 1):
        line += 1
        if len(raw) > MAX_FIELD_BYTES:
            raise DataError(Code.DATA_TOO_LONG, f"{path}:{line}: is longer than 4 MiB.")
        try:
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(Code.DATA_ENCODING, f"{path}:{line}: is not UTF-8.") from None


def _places(path: Path, names: Sequence[str], columns: TableColumns, *, line: int = 1) -> list[int]:
    if len(names) > _MAX_COLUMNS:
        raise DataError(Code.DATA_FORMAT, f"{path}:{line}: has more than {_MAX_COLUMNS} columns.")
    for name in columns.wanted():
        found = names.count(name)
        if found == 1:
            continue
        if found > 1:
            raise DataError(Code.DATA_COLUMNS, f"{path}:{line}: column {name} is there twice.")
        lower = {other.lower(): other for other in names}
        close = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f" (did you mean {lower[close[0]]}?)" if close else ""
        message = f"{path}:{line}: there is no column {name} among {len(names)}{hint}."
        raise DataError(Code.DATA_COLUMNS, message)
    return [names.index(name) for name in columns.wanted()]


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
    return DataError(Code.DATA_UNREADABLE, f"{path}: cannot be read ({reason}).")
