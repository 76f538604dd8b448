"""A task's records out of a hospital's files: one way in for every kind of task. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from client.data.records import Record
from client.data.series import has_column, series_columns, take_series
from client.data.tables import TableColumns, Taken, take_tables
from client.knowledge.visits import unseen
from common.config import beside
from common.errors import Code, DataError
from common.outcomes import Classes, LabelSet
from common.study import Study, Task
from common.tasks.cases import CaseRules, SystemChoice
from common.tasks.custom import CustomTask
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.imaging import ImagingTask
from common.tasks.medication import MedicationTask
from common.tasks.multimodal import ImageInput, MultimodalTask
from common.tasks.prognosis import PrognosisTask
from common.tasks.tabular import RowTerms, TabularTask

if TYPE_CHECKING:
    from client.data.encounters import ImageEntry, Reader
    from client.data.images import Pixels
    from client.data.readers.files import Wanted

__all__ = [
    "Names",
    "Received",
    "System",
    "receive",
    "receive_cases",
    "receive_inputs",
    "receive_unanswered",
    "table_columns",
]


@dataclass(frozen=True)
class Names:
    """A hospital's own names of a study's columns; None where the study's name holds."""

    patient: str | None = None
    text: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class System:
    """A hospital's system: which reader knows its layout, and where its tables lie.

    Attributes:
        place: a folder; or, with `database`, the file that holds a database's address.
        schema: of the database.
        images: a folder of DICOM images of the same patients.
    """

    reader: str
    place: Path
    database: bool = False
    schema: str = ""
    images: Path | None = None

    @staticmethod
    def of(named: SystemChoice, config: Path) -> System:
        """As the file `config` names it."""
        place = beside(config, named.database or named.folder or "").absolute()
        images = None if named.images is None else beside(config, named.images).absolute()
        database = named.database is not None
        return System(named.reader, place, database, named.schema_ or "", images)

    def dump(self) -> tuple[str, ...]:
        """As plain text, for the trainer."""
        database, images = "database" if self.database else "", str(self.images or "")
        return self.reader, str(self.place), database, self.schema, images

    @staticmethod
    def load(fields: Sequence[str]) -> System:
        """The inverse of `dump`."""
        reader, place, database, schema, images = fields
        pictures = Path(images) if images else None
        return System(reader, Path(place), bool(database), schema, pictures)

    def inputs(self) -> list[Path]:
        """The files that a simulation's data lie in; none of a database."""
        places = [] if self.database else [self.place]
        places += [] if self.images is None else [self.images]
        return [p for place in places for p in sorted(place.rglob("*")) if p.is_file()]


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
    task: Task,
    files: Sequence[Path],
    *,
    names: Names | None = None,
    site: str | None = None,
    groups: Sequence[str] = (),
) -> Received:
    """The records of several files, with what is to be predicted.

    Args:
        task: the study's.
        files: tables; what their rows name (images) lies beside them.
        names: the hospital's own names of columns.
        site: a column that says whose row it is.
        groups: columns whose values are subgroups.

    Raises:
        DataError: naming file and line.
    """
    named = names or Names()
    return _receive(_Asked(task, tuple(files), named, site, answered=True, groups=tuple(groups)))


def receive_inputs(
    task: Task, files: Sequence[Path], *, patient: str | None = None
) -> tuple[Record, ...]:
    """The records of files whose answer is not known; raises DataError naming file and line.

    patient None: the model's own patient column is not read, and every row is its own.
    """
    named = Names(patient=patient)
    return _receive(_Asked(task, tuple(files), named, None, answered=False)).records


def receive_cases(study: Study, system: System) -> Received:
    """What of a hospital's system is a case of the study, by the study's own rules.

    The tally says what was left out or changed, by reason: by the reader, and by the rules.

    Raises:
        DataError: NO_CASES, the study has no such rules; CASES_EMPTY, nothing is a case; a table
            is missing or wrong, naming file and line.
    """
    if study.cases is None:
        raise DataError(Code.NO_CASES, f"{system.place}: the study {study.name} reads tables.")
    return _cases(study.task, study.cases, system, answered=True)


def receive_unanswered(task: Task | None, rules: CaseRules, system: System) -> Received:
    """The same of stays whose answer nobody has to know: every stay that the rules take.

    task None: of a saved text model, which does not say more.

    Raises DataError, as `receive_cases`.
    """
    return _cases(task, rules, system, answered=False)


def _cases(task: Task | None, rules: CaseRules, system: System, *, answered: bool) -> Received:
    from client.data.cases import CaseMaker, records_of, wanted_of

    make = CaseMaker(rules, answered=answered, picture=_picture(task))
    with _reader(system, wanted_of(rules)) as plain:
        reader = plain if rules.image == "none" else _pictured(plain, system)
        records = tuple(records_of(reader.encounters(), make))
    tally = Counter(reader.tally.counts) + Counter(make.tally.counts)
    if isinstance(task, ImagingTask):
        seen = tuple(record for record in records if record.image is not None)
        tally[NO_IMAGE] += len(records) - len(seen)
        records = seen
    if not records:
        message = f"{system.place}: no encounter there is a case of this study."
        raise DataError(Code.CASES_EMPTY, message)
    tally.update({f"{kind} replaced in texts": count for kind, count in make.replaced.items()})
    if isinstance(task, MedicationTask):
        tally += unseen(task, records)
    return Received(records, {}, +tally)


NO_IMAGE: Final = "encounters without an image that may be seen"


def _picture(task: Task | None) -> Callable[[ImageEntry], Pixels] | None:
    """What reads an image as the task looks at it; None where it looks at none."""
    looks = task.image if isinstance(task, MultimodalTask) else task
    if not isinstance(looks, ImagingTask | ImageInput):
        return None
    from client.data.images import look_of, read_image

    look = look_of(looks)
    return lambda entry: read_image(entry.path, look)


def _pictured(reader: Reader, system: System) -> Reader:
    from client.data.pictured import PicturedReader

    if system.images is None:
        raise DataError(
            Code.NO_CASES,
            f"{system.place}: the study reads an image of each stay, and no folder of images is "
            "named.",
            remedy="Name it beside the system: images: FOLDER.",
        )
    return PicturedReader(reader, system.images)


@contextmanager
def _reader(system: System, wanted: Wanted) -> Iterator[Reader]:
    from client.data.readers.database import Database
    from client.data.readers.eicu import EicuReader
    from client.data.readers.fhir import FhirReader
    from client.data.readers.mimic import MimicReader
    from client.data.readers.omop import OmopReader

    if system.database:
        database = Database(system.place, system.schema)
        try:
            yield OmopReader(database, wanted=wanted)
        finally:
            database.close()
        return
    if not system.place.is_dir():
        raise DataError(Code.DATA_UNREADABLE, f"{system.place}: is not a folder.")
    readers: Mapping[str, Callable[..., Reader]] = {
        "eicu": EicuReader,
        "fhir": FhirReader,
        "mimic": MimicReader,
        "omop": OmopReader,
    }
    yield readers[system.reader](system.place, wanted=wanted)


def table_columns(
    task: DiagnosisTask | TabularTask | ImagingTask | MultimodalTask | CustomTask,
    *,
    names: Names | None = None,
    site: str | None = None,
) -> TableColumns:
    """The columns of a task whose records are rows of one table, by their names in the files."""
    asked = _Asked(task, (), names or Names(), site, answered=True)
    if isinstance(task, MultimodalTask):
        return _mixed_columns(asked)
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
    groups: tuple[str, ...] = ()

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
    columns = replace(columns, groups=asked.groups)
    return take_tables(asked.files, columns, labels=asked.labels())


def _notes(asked: _Asked) -> Received:
    taken = _tables(asked, _note_columns(asked))
    if not (asked.answered and asked.task.several):
        return Received(taken.records, taken.dropped)
    column = asked.names.label or asked.task.columns.label
    known = frozenset(asked.task.labels)

    def parted(record: Record) -> Record:
        told = (part.strip() for part in record.codes[0].split(";"))
        labels = _parts(part for part in told if part)
        _require_known(record, column, labels, known)
        return replace(record, codes=(), labels=labels)

    return Received(tuple(map(parted, taken.records)), taken.dropped)


def _note_columns(asked: _Asked) -> TableColumns:
    """With several labels, their column is read as a code: it may be empty."""
    task: DiagnosisTask = asked.task
    label = (asked.names.label or task.columns.label) if asked.answered else None
    return TableColumns(
        asked.names.text or task.columns.text,
        asked.patient(),
        None if task.several else label,
        asked.site,
        codes=(label,) if task.several and label is not None else (),
        most=task.max_notes if asked.answered else None,
    )


def _values(asked: _Asked) -> Received:
    taken = _tables(asked, _value_columns(asked))
    return Received(taken.records, taken.dropped)


def _value_columns(asked: _Asked) -> TableColumns:
    task: RowTerms = asked.task
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
    tally: Counter[str] = Counter()

    def parted(record: Record) -> Record:
        codes, *given = (_parts(cell.split()) for cell in record.codes)
        labels = tuple(drug for drug in chain(*given) if drug in known)
        tally[UNLISTED_DRUGS] += sum(map(len, given)) - len(labels)
        return replace(record, codes=codes, labels=labels)

    records = tuple(map(parted, taken.records))
    if asked.answered and not any(record.labels for record in records):
        message = f"no row's column {task.columns.drugs} has a drug of task.labels."
        raise DataError(Code.DATA_LABEL, message)
    return Received(records, taken.dropped, +(tally + unseen(task, records)))


UNLISTED_DRUGS: Final = "drugs that the study does not list"


def _series(asked: _Asked) -> Received:
    task: PrognosisTask = asked.task
    columns = series_columns(task, site=asked.site, target=asked.answered)
    columns = replace(
        columns,
        patient=asked.patient(),
        label=asked.names.label or columns.label if columns.label is not None else None,
        most=columns.most if asked.answered else None,
        groups=asked.groups,
    )
    taken = take_series(asked.files, columns, labels=asked.labels())
    return Received(taken.records, taken.dropped, taken.tally.counts)


def _mixed(asked: _Asked) -> Received:
    """The table first, then the hours, then pixels. An empty cell is a missing input."""
    task: MultimodalTask = asked.task
    alone = task.as_prognosis()
    hourly: list[Path] = []
    if task.series is not None:
        hourly = [file for file in asked.files if has_column(file, task.series.time)]
    tables = replace(asked, files=tuple(file for file in asked.files if file not in hourly))
    if not tables.files:
        raise DataError(Code.DATA_EMPTY, "no file is given that has a row for each case.")
    taken = _tables(tables, _mixed_columns(tables))
    stays: dict[str, Record] = {}
    if alone is not None and hourly:
        found = take_series(hourly, series_columns(alone, target=False), labels=None)
        stays = {record.encounter: record for record in found.records}
    records, used = _joined(task, taken.records, stays)
    tally = {UNKNOWN_STAYS: len(stays) - used} if len(stays) > used else {}
    return Received(records, taken.dropped, tally)


UNKNOWN_STAYS: Final = "stays with hours that no row of the tables names, or takes"


def _mixed_columns(asked: _Asked) -> TableColumns:
    """Notes, images and stays are read as codes, which may be empty."""
    task: MultimodalTask = asked.task
    numbers = task.numbers
    return TableColumns(
        None,
        asked.patient(),
        (asked.names.label or task.columns.label) if asked.answered and task.labels else None,
        asked.site,
        numbers=() if numbers is None else tuple(one.name for one in numbers.features),
        codes=(
            *_cells_of(task, asked.names),
            *(() if numbers is None else (one.name for one in numbers.categories)),
        ),
        number=task.number.column if asked.answered and task.number is not None else None,
        most=task.max_records if asked.answered else None,
    )


def _cells_of(task: MultimodalTask, names: Names) -> tuple[str, ...]:
    """The columns of a row's note, image and stay, where the task has them, in this order."""
    return (
        *(() if task.text is None else (names.text or task.text.column,)),
        *(() if task.image is None else (task.image.column,)),
        *(() if task.series is None else (task.series.stay,)),
    )


def _joined(
    task: MultimodalTask, records: Sequence[Record], stays: Mapping[str, Record]
) -> tuple[tuple[Record, ...], int]:
    """The records with their images and hours, and how many of the stays they use."""
    from client.data.images import image_of, look_of

    seen: dict[str, Record] = {}

    def whole(record: Record) -> Record:
        left = list(record.codes)
        text = left.pop(0) if task.text is not None else ""
        image = series = None
        if task.image is not None:
            given, name = task.image, left.pop(0)
            if name:
                folder = Path(record.file).parent
                image = image_of(folder, name, look_of(given), where=record.where)
        stay = left.pop(0) if task.series is not None else ""
        if stay and seen.setdefault(stay, record) is not record:
            message = f"{record.where}: names the stay of another row ({seen[stay].where})."
            raise DataError(Code.DATA_VALUE, message)
        if stay in stays:
            series = stays[stay].series
        return replace(
            record, text=text, image=image, series=series, encounter=stay, codes=tuple(left)
        )

    done = tuple(map(whole, records))
    return done, len(seen.keys() & stays.keys())


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
        CustomTask: _values,
        ImagingTask: _images,
        MedicationTask: _codes,
        PrognosisTask: _series,
        MultimodalTask: _mixed,
    }
)
