"""Measurements by the hour: long tables, joined by stay, become one record for each stay.

A file with the time column has a row for each stay and moment; any other has one for each stay
(age, outcome, which hospital). Files are read in parts and put on the grid at once: memory follows
from the stays and the study's hours, not from the files. Columns are judged as a whole, because a
hospital's long table has a hundred times the rows of its notes. No torch.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from client.data.encounters import Tally
from client.data.records import Record
from client.data.tables import MAX_FIELD_BYTES, UNTOLD
from common.errors import Code, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.tasks.prognosis import PrognosisTask

__all__ = ["SeriesColumns", "TakenSeries", "has_column", "series_columns", "take_series"]

Unit = Literal["days", "hours", "minutes", "seconds"]

_SECONDS: Final[Mapping[str, float]] = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_NUMBER: Final = r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?$"
_MISSING: Final = ("", "?")
_CELLS: Final = 1 << 21  # read at a time
_BLOCK_BYTES: Final = MAX_FIELD_BYTES

NO_TARGET: Final = "stays of which nothing is known that is to be predicted"
NO_HOURS: Final = "stays without a row in the hours that the model sees"
BEFORE: Final = "rows from before the stay"
AFTER: Final = "rows from after the hours that the model sees"
UNKNOWN: Final = "rows of stays that are not in the table of stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesColumns:
    """Which column holds what, and how much is taken.

    `features` are in the order of a record's series; each is a column of the files by the hour, or
    of those by the stay, where it counts as measured in the first hour. patient None: every stay is
    a patient of its own. label and number None: nothing is to be predicted (or, one of them). site
    None: the files belong to one site. `most` is how many stays of a patient are taken. `groups`
    are columns whose values are subgroups; their cells may be empty.
    """

    stay: str
    time: str
    unit: Unit = "hours"
    features: tuple[str, ...]
    hours: int
    patient: str | None = None
    label: str | None = None
    number: str | None = None
    site: str | None = None
    most: int | None = None
    groups: tuple[str, ...] = ()

    def facts(self) -> tuple[str, ...]:
        """The columns that say one thing about a stay."""
        given = (self.patient, self.label, self.number, self.site)
        return tuple(name for name in given if name is not None)


@dataclass(frozen=True)
class TakenSeries:
    """The records that are taken, how many more stays a patient has, and what was left out."""

    records: tuple[Record, ...]
    dropped: Mapping[str, int]
    tally: Tally


def series_columns(
    task: PrognosisTask, *, site: str | None = None, target: bool = True
) -> SeriesColumns:
    """The columns that a study reads; without `target`, those that prediction needs."""
    number = None if task.number is None else task.number.column
    return SeriesColumns(
        stay=task.columns.stay,
        time=task.columns.time,
        unit=task.columns.unit,
        features=tuple(feature.name for feature in task.features),
        hours=task.hours,
        patient=task.columns.patient,
        label=task.columns.label if target and task.labels else None,
        number=number if target else None,
        site=site,
        most=task.max_stays,
    )


def has_column(path: Path, name: str) -> bool:
    """Whether a file that can hold series has this column; others have none. Raises DataError."""
    lower = path.name.lower()
    kind = next((k for k in ("csv.gz", "csv", "parquet") if lower.endswith("." + k)), None)
    if kind is None or not path.is_file():
        return False
    with _blamed(path):
        return name in (_parquet_names(path) if kind == "parquet" else _csv_names(path, kind))


def take_series(
    paths: Sequence[Path], columns: SeriesColumns, *, labels: Sequence[str] | None
) -> TakenSeries:
    """The stays of several files, in the order in which they first stand there.

    Of several values of one feature in one hour the last in the files counts.

    Shapes: a record's series is (T, F) float32, NaN where nothing was measured; T <= columns.hours
        ends with the stay's last hour that has a row.
    Guarantee: which of a patient's stays are taken depends on that patient's stays alone.

    Raises:
        DataError: with file and record, for whatever cannot be used.
    """
    files = [_File.open(path, columns) for path in paths]
    _complete(files, columns)
    grid = _Grid(columns, labels)
    hourly = [file for file in files if file.hourly]
    for file in files:
        if not file.hourly:
            grid.add_stays(file)
    grid.known = bool(grid.stays)
    for file in hourly:
        grid.add_hours(file)
    return grid.taken()


# ---------------------------------------------------------------------- files


@dataclass(frozen=True)
class _File:
    """A file, and the columns of it that are wanted."""

    path: Path
    kind: Literal["csv", "csv.gz", "parquet"]
    names: tuple[str, ...]
    wanted: tuple[str, ...]
    hourly: bool

    @classmethod
    def open(cls, path: Path, columns: SeriesColumns) -> _File:
        """Read the header. Raises DataError."""
        name = path.name.lower()
        kind = next((k for k in ("csv.gz", "csv", "parquet") if name.endswith("." + k)), None)
        if kind is None:
            message = f"{path}: is not a kind of file that is read here (.csv, .csv.gz, .parquet)."
            raise DataError(Code.DATA_FORMAT, message)
        if not path.is_file():
            raise DataError(Code.DATA_UNREADABLE, f"{path}: there is no such file.")
        with _blamed(path):
            names = _parquet_names(path) if kind == "parquet" else _csv_names(path, kind)
        said = (*columns.facts(), *columns.groups)
        every = (columns.stay, columns.time, *columns.features, *said)
        wanted = tuple(name for name in dict.fromkeys(every) if name in names)
        for one in wanted:
            if names.count(one) > 1:
                raise DataError(Code.DATA_COLUMNS, f"{path}:1: column {one} is there twice.")
        if columns.stay not in wanted:
            raise _no_column(path, columns.stay, names)
        return cls(path, kind, names, wanted, columns.time in wanted)  # type: ignore[arg-type]

    def parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number of the first record, and the wanted columns, part by part."""
        first = 1 if self.kind == "parquet" else 2  # a text file's first line is the header
        with _blamed(self.path):
            for batch in self._parquet() if self.kind == "parquet" else self._csv():
                yield first, {name: batch.column(name) for name in self.wanted}
                first += batch.num_rows

    def _parquet(self) -> Iterator[Any]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as table:
            rows = max(1, _CELLS // len(self.wanted))
            yield from table.iter_batches(rows, columns=list(self.wanted), use_threads=False)

    def _csv(self) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow import csv as reader

        ragged: list[Any] = []

        def note(row: Any) -> str:
            ragged.append(row)
            return "error"

        packed = "gzip" if self.kind == "csv.gz" else None
        try:
            with (
                pa.input_stream(str(self.path), compression=packed) as stream,
                reader.open_csv(
                    stream,
                    reader.ReadOptions(
                        use_threads=False,
                        block_size=_BLOCK_BYTES,
                        column_names=list(self.names),
                        skip_rows=1,
                    ),
                    reader.ParseOptions(invalid_row_handler=note),
                    reader.ConvertOptions(
                        include_columns=list(self.wanted),
                        column_types=dict.fromkeys(self.wanted, pa.string()),
                        strings_can_be_null=False,
                    ),
                ) as batches,
            ):
                yield from batches
        except pa.ArrowInvalid:
            if not ragged:
                raise
            row = ragged[0]
            at = "" if row.number is None else f":{row.number}"
            message = f"has {row.actual_columns} fields, but the header has {row.expected_columns}."
            raise DataError(Code.DATA_RAGGED, f"{self.path}{at}: {message}") from None


def _csv_names(path: Path, kind: str) -> tuple[str, ...]:
    opened = gzip.open if kind == "csv.gz" else open
    with opened(path, "rb") as handle:
        line = handle.readline(MAX_FIELD_BYTES + 1)
    if len(line) > MAX_FIELD_BYTES:
        raise DataError(Code.DATA_TOO_LONG, f"{path}:1: is longer than 4 MiB.")
    try:
        names = next(csv.reader([line.decode("utf-8-sig")], strict=True), [])
    except UnicodeDecodeError:
        raise DataError(Code.DATA_ENCODING, f"{path}:1: is not UTF-8.") from None
    except csv.Error:
        raise DataError(Code.DATA_FORMAT, f"{path}:1: is not well-formed CSV.") from None
    if not names:
        raise DataError(Code.DATA_EMPTY, f"{path}: is empty.")
    return tuple(name.strip() for name in names)


def _parquet_names(path: Path) -> tuple[str, ...]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        return tuple(table.schema_arrow.names)


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Whatever breaks inside is the file's fault. No message repeats what stands in it."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        raise DataError(Code.DATA_ENCODING, f"{path}: is not UTF-8.") from None
    except pa.ArrowException as error:
        told = str(error)
        if "UTF8" in told or "UTF-8" in told:
            raise DataError(Code.DATA_ENCODING, f"{path}: is not UTF-8.") from None
        if "straddl" in told:
            message = f"{path}: has a line longer than 4 MiB."
            raise DataError(Code.DATA_TOO_LONG, message) from None
        message = f"{path}: is not a whole, well-formed file ({type(error).__name__})."
        raise DataError(Code.DATA_FORMAT, message) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.errno else "it is damaged"
        message = f"{path}: cannot be read ({reason})."
        raise DataError(Code.DATA_UNREADABLE, message) from None


def _no_column(path: Path, name: str, names: Sequence[str]) -> DataError:
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" (did you mean {lower[close[0]]}?)" if close else ""
    message = f"{path}:1: there is no column {name} among {len(names)}{hint}."
    return DataError(Code.DATA_COLUMNS, message)


def _complete(files: Sequence[_File], columns: SeriesColumns) -> None:
    """Check that the files together hold what is wanted. Raises DataError."""
    if not files:
        raise DataError(Code.DATA_EMPTY, "no file is given.")
    if not any(file.hourly for file in files):
        raise _no_column(files[0].path, columns.time, files[0].names)
    for name in (*columns.features, *columns.facts(), *columns.groups):
        where = [file for file in files if name in file.wanted]
        if not where:
            names = list(dict.fromkeys(other for file in files for other in file.names))
            raise _no_column(files[0].path, name, names)
        if name in columns.features and len({file.hourly for file in where}) > 1:
            message = f"{where[0].path}:1: column {name} is also in {where[-1].path.name}, "
            message += "once by the hour and once by the stay."
            raise DataError(Code.DATA_COLUMNS, message)


# ---------------------------------------------------------------------- the grid


@dataclass(slots=True)
class _Stay:
    """One stay: where it was first read, its place on the grid, and what is said of it."""

    at: int
    where: tuple[str, int]
    facts: dict[str, str | float] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    hours: int = 0


class _Grid:
    """Stays by their ids, and their hours."""

    def __init__(self, columns: SeriesColumns, labels: Sequence[str] | None) -> None:
        import numpy as np

        self._columns = columns
        self._labels = None if labels is None else {label: label for label in labels}
        self._values: NDArray[np.float32] = np.empty(
            (0, columns.hours, len(columns.features)), np.float32
        )
        self._tally = Tally()
        self.stays: dict[str, _Stay] = {}
        self.known = False
        """Whether the tables of stays name every stay that counts."""

    def add_stays(self, file: _File) -> None:
        """Read a file with a row for each stay. Raises DataError."""
        import numpy as np

        places = self._places(file)
        seen: set[str] = set()
        for first, part in file.parts():
            cells = _Cells(file, first, part)
            names = cells.texts(self._columns.stay)
            for row, name in enumerate(names):
                if name in seen:
                    raise cells.wrong(row, self._columns.stay, "names a stay for the second time")
                seen.add(name)
            stays = [self._stay(name, cells, row) for row, name in enumerate(names)]
            self._note(cells, np.arange(len(stays)), stays)
            at = np.array([stay.at for stay in stays], np.int64)
            for name, place in places.items():
                values = cells.numbers(name)
                there = ~np.isnan(values)
                self._values[at[there], 0, place] = values[there]

    def add_hours(self, file: _File) -> None:
        """Read a file with a row for each stay and moment. Raises DataError."""
        import numpy as np

        places = self._places(file)
        columns = self._columns
        for first, part in file.parts():
            cells = _Cells(file, first, part)
            names, rows, which = cells.distinct(columns.stay)
            stays = [
                None if self.known and name not in self.stays else self._stay(name, cells, row)
                for name, row in zip(names, rows, strict=True)
            ]
            at = np.array([-1 if stay is None else stay.at for stay in stays], np.int64)[which]
            hour = np.floor(cells.seconds(columns.time, columns.unit) / _SECONDS["hours"])
            for reason, out in (
                (UNKNOWN, at < 0),
                (BEFORE, (at >= 0) & (hour < 0)),
                (AFTER, (at >= 0) & (hour >= columns.hours)),
            ):
                if out.any():
                    self._tally.add(reason, int(out.sum()))
            chosen = np.flatnonzero((at >= 0) & (hour >= 0) & (hour < columns.hours))
            hours = hour[chosen].astype(np.int64)
            for name, place in places.items():
                values = cells.numbers(name)[chosen]
                there = ~np.isnan(values)
                self._values[at[chosen[there]], hours[there], place] = values[there]
            latest = np.zeros(len(stays), np.int64)
            np.maximum.at(latest, which[chosen], hours + 1)
            for stay, reached in zip(stays, latest, strict=True):
                if stay is not None:
                    stay.hours = max(stay.hours, int(reached))
            self._note(cells, which, stays)

    def _places(self, file: _File) -> dict[str, int]:
        """The features that the file holds, by name, and their places in a series."""
        return {n: at for at, n in enumerate(self._columns.features) if n in file.wanted}

    def _stay(self, name: str, cells: _Cells, row: int) -> _Stay:
        import numpy as np

        found = self.stays.get(name)
        if found is not None:
            return found
        at = len(self.stays)
        if at == len(self._values):
            more = np.full((max(1024, at // 2), *self._values.shape[1:]), np.nan, np.float32)
            self._values = np.concatenate([self._values, more])
        found = _Stay(at, (str(cells.file.path), cells.first + int(row)))
        self.stays[name] = found
        return found

    def _note(self, cells: _Cells, which: NDArray[np.int64], stays: Sequence[_Stay | None]) -> None:
        """Keep what the part says of its stays; nothing may be said in two ways."""
        import numpy as np

        for column in self._columns.facts():
            if column not in cells.part:
                continue
            told: Sequence[str | float]
            if column == self._columns.number:
                found, coded = np.unique(cells.numbers(column), return_inverse=True)
                told = found.tolist()
            else:
                told, _, coded = cells.distinct(column)
            pairs, rows = np.unique(which * len(told) + coded, return_index=True)
            for pair, row in zip(pairs.tolist(), rows.tolist(), strict=True):
                stay, value = stays[pair // len(told)], told[pair % len(told)]
                if stay is None:
                    continue
                kept = stay.facts.setdefault(column, self._fact(cells, row, column, value))
                if kept != value:
                    raise cells.wrong(row, column, "says two things of one stay")
        for column in self._columns.groups:
            if column in cells.part:
                self._group(column, cells, which, stays)

    def _group(
        self, column: str, cells: _Cells, which: NDArray[np.int64], stays: Sequence[_Stay | None]
    ) -> None:
        """Keep the subgroup that the part says of its stays; an empty cell says none."""
        for row, value in enumerate(cells.part[column].to_pylist()):
            stay = stays[int(which[row])]
            told = "" if value is None else _told(value)
            if stay is None or not told:
                continue
            if stay.groups.setdefault(column, told) != told:
                raise cells.wrong(row, column, "says two things of one stay")

    def _fact(self, cells: _Cells, row: int, column: str, value: str | float) -> str | float:
        if isinstance(value, float):
            if math.isnan(value):
                raise cells.wrong(row, column, "is empty")
            return value
        if column != self._columns.label or self._labels is None or value in self._labels:
            return value
        close = difflib.get_close_matches(value[:200], self._labels, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        what = f"has a label that is not in the study{hint}"
        message = f"{cells.file.path}:{cells.first + row}: column {column} {what}."
        raise DataError(Code.DATA_LABEL, message)

    def taken(self) -> TakenSeries:
        """The records. Raises DataError where there is none."""
        columns = self._columns
        records: list[Record] = []
        counts: Counter[tuple[str, str | None]] = Counter()
        dropped: Counter[str] = Counter()
        targets = [name for name in (columns.label, columns.number) if name is not None]
        for name, stay in self.stays.items():
            if any(target not in stay.facts for target in targets):
                self._tally.add(NO_TARGET)
                continue
            if not stay.hours:
                self._tally.add(NO_HOURS)
                continue
            record = self._record(name, stay)
            whose = (record.patient, record.site)
            counts[whose] += 1
            if columns.most is not None and counts[whose] > columns.most:
                dropped[record.patient] += 1
                continue
            records.append(record)
        if not records:
            path = next(iter(self.stays.values())).where[0] if self.stays else "the files"
            raise DataError(Code.DATA_EMPTY, f"{path}: no stay can be used.")
        return TakenSeries(tuple(records), dropped, self._tally)

    def _record(self, name: str, stay: _Stay) -> Record:
        columns = self._columns
        file, line = stay.where
        patient = name if columns.patient is None else stay.facts.get(columns.patient)
        if patient is None:
            message = f"{file}:{line}: no file says whose stay this is."
            raise DataError(Code.DATA_VALUE, message)
        label = None if columns.label is None else str(stay.facts[columns.label])
        number = math.nan if columns.number is None else float(stay.facts[columns.number])
        site = None if columns.site is None else stay.facts.get(columns.site)
        if columns.site is not None and site is None:
            raise DataError(Code.DATA_VALUE, f"{file}:{line}: no file says where this stay was.")
        return Record(
            str(patient),
            "",
            label,
            None if site is None else str(site),
            file,
            line,
            encounter=name,
            number=number,
            series=self._values[stay.at, : stay.hours],
            groups=tuple(f"{one}:{stay.groups.get(one, UNTOLD)}" for one in columns.groups),
        )


def _told(cell: object) -> str:
    """A subgroup's name as a text file would have it: 64 and not 64.0."""
    whole = isinstance(cell, float) and cell.is_integer()
    return str(int(cell) if whole else cell).strip()  # type: ignore[call-overload]


# ---------------------------------------------------------------------- cells


class _Cells:
    """Some records of a file, by column, as plain values."""

    def __init__(self, file: _File, first: int, part: dict[str, Any]) -> None:
        self.file = file
        self.first = first
        self.part = part

    def wrong(self, row: int, column: str, what: str) -> DataError:
        """The error for a cell; it names the place, not the content."""
        return DataError(
            Code.DATA_VALUE, f"{self.file.path}:{self.first + row}: column {column} {what}."
        )

    def distinct(self, column: str) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
        """Every text that occurs, the first record with it, and for each record which it is."""
        import numpy as np
        import pyarrow as pa

        cells = self.part[column]
        if not pa.types.is_dictionary(cells.type):
            cells = cells.dictionary_encode()
        if cells.null_count:
            raise self.wrong(int(np.argmax(cells.is_null())), column, "is empty")
        coded = np.asarray(cells.indices, np.int64)
        used, rows, which = np.unique(coded, return_index=True, return_inverse=True)
        values = cells.dictionary.take(pa.array(used)).to_pylist()
        texts = [self._text(int(row), column, v) for row, v in zip(rows, values, strict=True)]
        # Two cells may be one text (spaces at the ends).
        unique: dict[str, int] = {}
        same = np.array([unique.setdefault(text, len(unique)) for text in texts], np.int64)
        first = np.full(len(unique), len(coded), np.int64)
        np.minimum.at(first, same, rows)
        return list(unique), first, same[which]

    def texts(self, column: str) -> list[str]:
        """Every record's text."""
        found, _, which = self.distinct(column)
        return [found[at] for at in which]

    def _text(self, row: int, column: str, cell: Any) -> str:
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        if isinstance(cell, bool | float) or not isinstance(cell, str | int):
            raise self.wrong(row, column, "is neither text nor a whole number")
        text = str(cell).strip()
        if not text:
            raise self.wrong(row, column, "is empty")
        return text

    def numbers(self, column: str) -> NDArray[np.float64]:
        """Every record's number, NaN where the cell is empty or a question mark."""
        import numpy as np
        import pyarrow as pa

        cells = self.part[column]
        kind = cells.type
        if pa.types.is_dictionary(kind):
            cells, kind = cells.dictionary_decode(), kind.value_type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            cells = self._parsed(column, cells)
        elif not (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_decimal(kind)
            or pa.types.is_null(kind)
        ):
            raise self.wrong(0, column, "is not a number")
        else:
            cells = cells.cast(pa.float64(), safe=False)
        found = np.asarray(cells.to_numpy(zero_copy_only=False), np.float64)
        with np.errstate(over="ignore"):  # what float32 cannot hold is no measurement
            endless = np.isinf(found.astype(np.float32))
        if endless.any():
            raise self.wrong(int(endless.argmax()), column, "is not a finite number")
        return found

    def _parsed(self, column: str, cells: Any) -> Any:
        import numpy as np
        import pyarrow as pa
        from pyarrow import compute

        texts = compute.utf8_trim_whitespace(cells)
        empty = compute.is_in(texts, value_set=pa.array(_MISSING, texts.type))
        texts = compute.if_else(empty, pa.scalar(None, texts.type), texts)
        fits = compute.fill_null(compute.match_substring_regex(texts, _NUMBER), True)  # noqa: FBT003
        wrong = ~np.asarray(fits.to_numpy(zero_copy_only=False), bool)
        if wrong.any():
            raise self.wrong(int(wrong.argmax()), column, "is not a number")
        return compute.cast(texts, pa.float64())

    def seconds(self, column: str, unit: Unit) -> NDArray[np.float64]:
        """Every record's time since the start of its stay."""
        import numpy as np
        import pyarrow as pa

        cells = self.part[column]
        if pa.types.is_duration(cells.type):
            if cells.null_count:
                raise self.wrong(int(np.argmax(cells.is_null())), column, "is empty")
            ticks = np.asarray(cells.cast(pa.int64()).to_numpy(), np.float64)
            return ticks / {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[cells.type.unit]
        if pa.types.is_temporal(cells.type):
            raise self.wrong(0, column, "is a date; the time since the start of the stay is needed")
        found = self.numbers(column)
        if np.isnan(found).any():
            raise self.wrong(int(np.isnan(found).argmax()), column, "is empty")
        return found * _SECONDS[unit]
