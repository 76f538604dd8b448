"""A task's records out of a hospital's files: one way in for every kind of task. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from client.data.records import Record
from client.data.series import series_columns, take_series
from client.data.tables import TableColumns, Taken, take_tables
from common.errors import Code, DataError
from common.outcomes import Classes, LabelSet
from common.study import Task
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.imaging import ImagingTask
from common.tasks.medication import MedicationTask
from common.tasks.prognosis import PrognosisTask
from common.tasks.tabular import TabularTask

__all__ = ["Names", "Received", "receive", "receive_inputs", "table_columns"]


@dataclass(frozen=True)
class Names:
    """A hospital's own names of a study's columns; None where the study's name holds."""

    patient: str | None = None
    text: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Received:
    """What was read.

    Attributes:
        records: those that are taken, in the order of the files.
        dropped: by patient, how many more the files hold.
        tally: what else was left out, by reason.
    """

    records: tuple[Record, ...]
    dropped: Mapping[str, int]
    tally: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def receive(
    task: Task, files: Sequence[Path], *, names: Names | None = None, site: str | None = None
) -> Received:
    """The records of several files, with what is to be predicted.

    Args:
        task: the study's.
        files: tables; what their rows name (images) lies beside them.
        names: the hospital's own names of columns.
        site: a column that says whose row it is.

    Raises:
        DataError: naming file and line.
    """
    return _receive(_Asked(task, tuple(files), names or Names(), site, answered=True))


def receive_inputs(
    task: Task, files: Sequence[Path], *, patient: str | None = None
) -> tuple[Record, ...]:
    """The records of files whose answer is not known; raises DataError naming file and line.

    patient None: the model's own patient column is not read, and every row is its own.
    """
    named = Names(patient=patient)
    return _receive(_Asked(task, tuple(files), named, None, answered=False)).records


def table_columns(
    task: DiagnosisTask | TabularTask | ImagingTask,
    *,
    names: Names | None = None,
    site: str | None = None,
) -> TableColumns:
    """The columns of a task whose records are rows of one table, by their names in the files."""
    asked = _Asked(task, (), names or Names(), site, answered=True)
    if isinstance(task, ImagingTask):
        return _image_columns(asked)
    return _note_columns(asked) if isinstance(task, DiagnosisTask) else _value_columns(asked)


@dataclass(frozen=True)
class _Asked:
    task: Any
    files: tuple[Path, ...]
    names: Names
    site: str | None
    answered: bool

    def patient(self) -> str | None:
        """The patient column; where nothing is to be learned, only one that was asked for."""
        own = self.task.columns.patient if self.answered else None
        return self.names.patient or own

    def labels(self) -> tuple[str, ...] | None:
        """The labels that may stand in the label column, which is read only with an answer."""
        outcome = self.task.outcome
        known = isinstance(outcome, Classes | LabelSet)
        return outcome.labels if known and self.answered else None


def _receive(asked: _Asked) -> Received:
    return _READS[type(asked.task)](asked)


def _tables(asked: _Asked, columns: TableColumns) -> Taken:
    return take_tables(asked.files, columns, labels=asked.labels())


def _notes(asked: _Asked) -> Received:
    taken = _tables(asked, _note_columns(asked))
    return Received(taken.records, taken.dropped)


def _note_columns(asked: _Asked) -> TableColumns:
    task: DiagnosisTask = asked.task
    label = asked.names.label or task.columns.label
    return TableColumns(
        asked.names.text or task.columns.text,
        asked.patient(),
        label if asked.answered else None,
        asked.site,
        most=task.max_notes if asked.answered else None,
    )


def _values(asked: _Asked) -> Received:
    taken = _tables(asked, _value_columns(asked))
    return Received(taken.records, taken.dropped)


def _value_columns(asked: _Asked) -> TableColumns:
    task: TabularTask = asked.task
    columns = TableColumns(
        None,
        asked.patient(),
        site=asked.site,
        numbers=tuple(feature.name for feature in task.features),
        codes=tuple(category.name for category in task.categories),
    )
    if asked.answered:
        columns = replace(
            columns,
            label=(asked.names.label or task.columns.label) if task.labels else None,
            number=None if task.number is None else task.number.column,
            time=None if task.survival is None else task.survival.time,
            event=None if task.survival is None else task.survival.event,
        )
    return columns


def _images(asked: _Asked) -> Received:
    """The table first; then pixels, so that a fault in the table is told at once."""
    from client.data.images import image_of, look_of

    taken, look = _tables(asked, _image_columns(asked)), look_of(asked.task)

    def seen(record: Record) -> Record:
        folder = Path(record.file).parent
        pixels = image_of(folder, record.text.strip(), look, where=record.where)
        return replace(record, text="", image=pixels)

    return Received(tuple(map(seen, taken.records)), taken.dropped)


def _image_columns(asked: _Asked) -> TableColumns:
    task: ImagingTask = asked.task
    return TableColumns(
        asked.names.text or task.columns.image,
        asked.patient(),
        (asked.names.label or task.columns.label) if asked.answered else None,
        asked.site,
        most=task.max_images if asked.answered else None,
    )


def _codes(asked: _Asked) -> Received:
    task: MedicationTask = asked.task
    given = (task.columns.codes, *((task.columns.drugs,) if asked.answered else ()))
    columns = TableColumns(
        None,
        asked.patient(),
        site=asked.site,
        codes=given,
        most=task.max_visits if asked.answered else None,
    )
    taken = _tables(asked, columns)
    known = frozenset(task.labels)

    def parted(record: Record) -> Record:
        codes, *drugs = (_parts(cell.split()) for cell in record.codes)
        labels = drugs[0] if drugs else ()
        _require_known(record, task.columns.drugs, labels, known)
        return replace(record, codes=codes, labels=labels)

    return Received(tuple(map(parted, taken.records)), taken.dropped)


def _series(asked: _Asked) -> Received:
    task: PrognosisTask = asked.task
    columns = series_columns(task, site=asked.site, target=asked.answered)
    columns = replace(
        columns,
        patient=asked.patient(),
        label=asked.names.label or columns.label if columns.label is not None else None,
        most=columns.most if asked.answered else None,
    )
    taken = take_series(asked.files, columns, labels=asked.labels())
    return Received(taken.records, taken.dropped, taken.tally.counts)


def _parts(words: Iterable[str]) -> tuple[str, ...]:
    """Each word once, in the order in which it first stands."""
    return tuple(dict.fromkeys(words))


def _require_known(
    record: Record, column: str, labels: Sequence[str], known: frozenset[str]
) -> None:
    if not known.issuperset(labels):
        raise DataError(
            Code.DATA_LABEL,
            f"{record.where}: column {column} has a label that is not in the study.",
        )


_READS: Final[Mapping[type, Callable[[_Asked], Received]]] = MappingProxyType(
    {
        DiagnosisTask: _notes,
        TabularTask: _values,
        ImagingTask: _images,
        MedicationTask: _codes,
        PrognosisTask: _series,
    }
)
