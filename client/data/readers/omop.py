"""OMOP CDM 5.3 and 5.4: a folder of tables, Parquet or CSV, one file each, or a database.

What a concept id stands for is told by the table `concept`; it is gone through once, for the ids
that the cohort's rows have, so that memory follows from these and not from the vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Final

from client.data.encounters import CodeSystem, Encounter, Tally
from client.data.readers.cohort import Cohort, Items, Stay, age_in_years, named
from client.data.readers.database import Database
from client.data.readers.files import Folder, Table, Wanted, moment, number, told, wrong_cell
from common.errors import Code, DataError

__all__ = ["VOCABULARIES", "OmopReader"]

VOCABULARIES: Final[Mapping[str, CodeSystem]] = {
    "snomed": "snomed",
    "icd9cm": "icd9",
    "icd10": "icd10",
    "icd10cm": "icd10",
    "icd10gm": "icd10",
    "icd10cn": "icd10",
    "kcd7": "icd10",
    "rxnorm": "rxnorm",
    "rxnorm extension": "rxnorm",
    "ndc": "ndc",
    "atc": "atc",
    "loinc": "loinc",
}
"""Code systems by `vocabulary_id`, in lower case. Any other is known by its name alone."""

_NONE: Final = frozenset({"", "0"})
_SEX: Final = {"8507": "male", "8532": "female"}
# Concepts of condition_status: the diagnosis that the stay was for.
_PRINCIPAL: Final = frozenset({"32902", "32903", "32908"})
_MIDDLE: Final = (7, 1)
_DAYS_A_YEAR: Final = 365.2425
_END_OF_DAY: Final = timedelta(days=1) - timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class _Concept:
    name: str
    vocabulary: str
    code: str


@dataclass(frozen=True, slots=True)
class _Events:
    """A table of things that happened, and what its columns are called."""

    table: str
    what: str
    concepts: tuple[str, ...]
    source: str
    day: str
    moment: str


_CONDITIONS: Final = _Events(
    "condition_occurrence", "conditions", ("condition_source_concept_id", "condition_concept_id"),
    "condition_source_value", "condition_start_date", "condition_start_datetime",
)  # fmt: skip
_DRUGS: Final = _Events(
    "drug_exposure", "drugs", ("drug_source_concept_id", "drug_concept_id"),
    "drug_source_value", "drug_exposure_start_date", "drug_exposure_start_datetime",
)  # fmt: skip
_MEASUREMENTS: Final = _Events(
    "measurement", "measurements", ("measurement_concept_id", "unit_concept_id"),
    "measurement_source_value", "measurement_date", "measurement_datetime",
)  # fmt: skip
_NOTES: Final = _Events(
    "note", "notes", ("note_class_concept_id",), "note_title", "note_date", "note_datetime"
)


class OmopReader:
    """Reads a folder of OMOP tables, whatever the case of its file and column names.

    Args:
        source: a folder that holds person, visit_occurrence, concept and what is wanted, as
            .parquet, .csv or .csv.gz; or a database that does, as tables.
        wanted: what to collect. A name under `wanted.items` is a concept's code (LOINC `2160-0`),
            its name, or what the source called it.

    Guarantee: memory is bounded by the visits and what is wanted of them; big tables stream. The
    unit of privacy is `person_id`, the hospital `care_site_id`.

    What is made of the rows: a condition or drug yields its source's code and its standard one,
    each where its vocabulary is known, else its name. A time that is a date, or midnight, is the
    end of that day, the start of a visit its beginning: nothing seems to be known before it was.
    Whoever has a row in `death` within a visit died in it; without that table nobody can tell.

    Raises:
        DataError: a table that is needed is missing.
    """

    def __init__(self, source: Path | Database, *, wanted: Wanted) -> None:
        self.tally = Tally()
        self._wanted = wanted
        self._folder = Folder.scan(source) if isinstance(source, Path) else source
        for name in ("person", "visit_occurrence"):
            self._folder.require(name)
        self._concepts: dict[str, _Concept] = {}

    def encounters(self) -> Iterator[Encounter]:
        """Every visit, in the order of the table. Raises DataError."""
        self.tally.counts.clear()
        cohort = self._visits()
        chosen = [
            events
            for events, wanted in (
                (_CONDITIONS, self._wanted.codes),
                (_DRUGS, self._wanted.drugs),
                (_MEASUREMENTS, self._wanted.measurements),
                (_NOTES, self._wanted.notes),
            )
            if wanted
        ]
        self._concepts = self._known(chosen)
        for events in chosen:
            _TAKERS[events.table](self, cohort, self._folder.require(events.table))
        yield from cohort.encounters()

    # -------------------------------------------------------------------------- concepts

    def _known(self, chosen: Iterable[_Events]) -> dict[str, _Concept]:
        """The concepts that the wanted tables name."""
        asked: set[str] = set()
        for events in chosen:
            table = self._folder.require(events.table)
            for _, cells in table.rows((), events.concepts):
                asked.update(cell.strip() for cell in cells)
        asked -= _NONE
        if not asked:
            return {}
        needed = ("concept_id", "concept_name", "vocabulary_id", "concept_code")
        found = {
            name.strip(): _Concept(title.strip(), vocabulary.strip().lower(), code.strip())
            for _, (name, title, vocabulary, code) in self._folder.require("concept").rows(needed)
            if name.strip() in asked
        }
        if len(found) < len(asked):
            self.tally.add("concepts that the table concept does not have", len(asked - set(found)))
        return found

    def _entries(
        self, what: str, ids: Iterable[str], source: str
    ) -> list[tuple[CodeSystem, str, str]]:
        """(system, code, title) of a row: of every known vocabulary, else its name alone."""
        concepts = [
            self._concepts[name] for cell in ids if (name := cell.strip()) in self._concepts
        ]
        found: dict[tuple[CodeSystem, str], str] = {}
        for concept in concepts:
            system = VOCABULARIES.get(concept.vocabulary)
            if system is not None and concept.code:
                found.setdefault((system, concept.code), concept.name)
        if found:
            return [(system, code, title) for (system, code), title in found.items()]
        name = next((concept.name for concept in concepts if concept.name), source.strip())
        if not name:
            self.tally.add(f"{what} without a code")
            return []
        self.tally.add(f"{what} coded in no known system (kept by name)")
        return [("name", name, name)]

    # ---------------------------------------------------------------------------- visits

    def _visits(self) -> Cohort:
        people, deaths = self._people(), self._deaths()
        table = self._folder.require("visit_occurrence")
        cohort = Cohort(table, self._wanted, self.tally)
        needed = ("visit_occurrence_id", "person_id", "visit_start_date")
        others = ("visit_start_datetime", "visit_end_date", "visit_end_datetime", "care_site_id")
        for line, (visit, person, day, start, last, end, site) in table.rows(needed, others):
            name = told(table, line, "visit_occurrence_id", visit)
            patient = told(table, line, "person_id", person)
            known = people.get(patient)
            if known is None:
                self.tally.add("visits of an unknown person")
                continue
            first = _time(table, line, "visit_start_datetime", start)
            first = first or _time(table, line, "visit_start_date", day)
            final = self._moment(table, line, (last, end), ("visit_end_date", "visit_end_datetime"))
            sex, born = known
            cohort.add(
                Stay(
                    patient=patient,
                    encounter=name,
                    site=site.strip() if site.strip() not in _NONE else None,
                    start=first,
                    end=final,
                    age=self._age(born, first),
                    sex=sex,
                    died=_died(deaths, patient, first, final),
                    line=line,
                )
            )
        cohort.require_some()
        return cohort

    def _people(self) -> dict[str, tuple[str | None, datetime | None]]:
        table = self._folder.require("person")
        needed = ("person_id", "gender_concept_id", "year_of_birth")
        found: dict[str, tuple[str | None, datetime | None]] = {}
        for line, (person, gender, year, month, day) in table.rows(
            needed, ("month_of_birth", "day_of_birth")
        ):
            name = told(table, line, "person_id", person)
            if name in found:
                message = f"{table.path}:{line}: column person_id names a person a second time."
                raise DataError(Code.DATA_VALUE, message)
            found[name] = (_SEX.get(gender.strip()), self._born(table, line, (year, month, day)))
        return found

    def _born(self, table: Table, line: int, cells: tuple[str, str, str]) -> datetime | None:
        year, month, day = (cell.strip() for cell in cells)
        if not year:
            self.tally.add("persons without a year of birth")
            return None
        if not month:
            self.tally.add("births without a month (the middle of the year is taken)")
        try:
            return datetime(  # noqa: DTZ001 - the times of OMOP have no zone
                int(year), int(month or _MIDDLE[0]), int(day or _MIDDLE[1])
            )
        except (ValueError, OverflowError):
            raise wrong_cell(table, line, "year_of_birth", "is part of no date") from None

    def _age(self, born: datetime | None, start: datetime | None) -> float | None:
        if born is None or start is None:
            return None
        years = (start - born).days / _DAYS_A_YEAR
        age = age_in_years(max(years, 0.0) if years > -1 else years)
        if age is None:
            self.tally.add("impossible ages (taken as unknown)")
        return age

    def _deaths(self) -> dict[str, datetime] | None:
        table = self._folder.table("death")
        if table is None:
            self.tally.add("tables of deaths that are not there (who died is unknown)")
            return None
        found: dict[str, datetime] = {}
        for line, (person, day) in table.rows(("person_id", "death_date")):
            when = _time(table, line, "death_date", day)
            if when is None:
                self.tally.add("deaths without a date")
            else:
                found[person.strip()] = when
        return found

    # ---------------------------------------------------------------------------- events

    def _moment(
        self, table: Table, line: int, cells: tuple[str, str], columns: tuple[str, str]
    ) -> datetime | None:
        """A time, from a date and a time of which either may be empty; see the class."""
        day, exact = (
            _time(table, line, column, cell) for cell, column in zip(cells, columns, strict=True)
        )
        if exact is not None and exact.time() != time():
            return exact
        known = exact or day
        return None if known is None else datetime.combine(known, time()) + _END_OF_DAY

    def _rows(
        self, cohort: Cohort, table: Table, events: _Events, *others: str
    ) -> Iterator[tuple[Stay, datetime | None, tuple[str, ...], str, tuple[str, ...]]]:
        """(visit, time, concept ids, what the source says, further cells) of each row."""
        needed = ("person_id", "visit_occurrence_id")
        optional = (events.day, events.moment, *events.concepts, events.source, *others)
        last = 4 + len(events.concepts)
        empty = True
        for line, cells in table.rows(needed, optional):
            empty = False
            visit = "" if cells[1].strip() in _NONE else cells[1]
            stay = cohort.find(visit, events.what, patient=cells[0])
            if stay is None:
                continue
            columns = (events.day, events.moment)
            when = self._moment(table, line, (cells[2], cells[3]), columns)
            yield stay, when, cells[4:last], cells[last], cells[last + 1 :]
        if empty:
            self.tally.add("tables that hold no record")

    def _conditions(self, cohort: Cohort, table: Table) -> None:
        rows = self._rows(cohort, table, _CONDITIONS, "condition_status_concept_id")
        for stay, when, ids, source, (status,) in rows:
            rank = 1 if status.strip() in _PRINCIPAL else None
            for system, code, title in self._entries("conditions", ids, source):
                cohort.add_code(stay, system, code, rank=rank, time=when, title=title)

    def _drugs(self, cohort: Cohort, table: Table) -> None:
        ends = ("drug_exposure_end_date", "drug_exposure_end_datetime")
        for stay, start, ids, source, (day, exact) in self._rows(cohort, table, _DRUGS, *ends):
            stop = self._moment(table, 0, (day, exact), ends)
            for system, code, title in self._entries("drugs", ids, source):
                cohort.add_drug(stay, system, code, name=title, start=start, stop=stop)

    def _measurements(self, cohort: Cohort, table: Table) -> None:
        items, names = Items(self._wanted, self.tally), named(self._wanted.items)
        rows = self._rows(cohort, table, _MEASUREMENTS, "value_as_number", "unit_source_value")
        for stay, when, ids, source, (cell, written) in rows:
            concept = self._concepts.get(ids[0].strip())
            spellings = [source.strip()]
            if concept is not None:
                spellings = [concept.code, concept.name, *spellings]
            if items.names is None:
                item = next((name for name in spellings if name), None)
            else:
                found = (names.get(name.casefold()) for name in spellings)
                item = next((name for name in found if name is not None), None)
            if item is None:
                continue
            value = number(cell.strip())
            if value != value:  # noqa: PLR0124 - NaN
                self.tally.add("measurements without a number")
                continue
            known = self._concepts.get(ids[1].strip())
            unit = known.code if known is not None else written.strip()
            if items.accepts(item, unit):
                cohort.add_number(stay, item, unit, value=value, time=when)
        items.close()

    def _notes(self, cohort: Cohort, table: Table) -> None:
        for stay, when, ids, title, (text,) in self._rows(cohort, table, _NOTES, "note_text"):
            concept = self._concepts.get(ids[0].strip())
            spellings = [name for name in (title.strip(), concept.name if concept else "") if name]
            kind = next((name for name in spellings if self._wanted.takes(name)), None)
            if kind is None and (spellings or self._wanted.categories is not None):
                continue
            if not text.strip():
                self.tally.add("notes without text")
                continue
            cohort.add_note(stay, kind or "", when, text)


_TAKERS: Final = {
    "condition_occurrence": OmopReader._conditions,  # noqa: SLF001 - this module's own
    "drug_exposure": OmopReader._drugs,  # noqa: SLF001 - this module's own
    "measurement": OmopReader._measurements,  # noqa: SLF001 - this module's own
    "note": OmopReader._notes,  # noqa: SLF001 - this module's own
}


def _time(table: Table, line: int, column: str, cell: str) -> datetime | None:
    try:
        return moment(cell)
    except ValueError:
        raise wrong_cell(table, line, column, "is no date or time without a zone") from None


def _died(
    deaths: Mapping[str, datetime] | None,
    patient: str,
    start: datetime | None,
    end: datetime | None,
) -> bool | None:
    if deaths is None or start is None or end is None:
        return None
    when = deaths.get(patient)
    return when is not None and start.date() <= when.date() <= end.date()
