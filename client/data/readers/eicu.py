"""eICU folders: one encounter a unit stay, with the hospital that it was in.

eICU tells times as minutes from the admission to the unit, and no dates. Every stay here begins
at one public moment, `EPOCH`; times within a stay mean something, between stays they do not.

Source: Pollard et al., The eICU Collaborative Research Database, Scientific Data 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from client.data.encounters import CodeSystem, Encounter, Tally
from client.data.readers.cohort import OLDEST, Cohort, Items, Stay, age_in_years, named
from client.data.readers.files import Folder, Table, Wanted, number, told, wrong_cell
from client.data.readers.mimic import ICD9, ICD10

__all__ = ["EPOCH", "EicuReader"]

EPOCH: Final = datetime(2000, 1, 1)  # noqa: DTZ001 - offsets have no zone
"""When every stay begins, for want of dates."""

_STAY: Final = "patientunitstayid"
_SEX: Final = {"female": "female", "male": "male"}
_DIED: Final = {"alive": False, "expired": True}
_RANKS: Final = {"primary": 1, "major": 2, "other": 3}
_MOST_MINUTES: Final = 200 * 366 * 24 * 60


@dataclass(frozen=True, slots=True)
class _NoteTable:
    """A table of charted text: one line a row. `kind` stands where no column tells it."""

    name: str
    kind: str
    kind_column: str | None
    when: str
    path: str
    value: str
    text: str


# The offset at which a line was entered, where the table has it: that is when it was written.
_NOTE_TABLES: Final = (
    _NoteTable("note", "", "notetype", "noteenteredoffset", "notepath", "notevalue", "notetext"),
    _NoteTable(
        "pasthistory",
        "Past history",
        None,
        "pasthistoryenteredoffset",
        "pasthistorypath",
        "pasthistoryvalue",
        "pasthistoryvaluetext",
    ),
    _NoteTable(
        "physicalexam",
        "Physical exam",
        None,
        "physicalexamoffset",
        "physicalexampath",
        "physicalexamvalue",
        "physicalexamtext",
    ),
)

_VITALS: Final = {
    "vitalperiodic": (
        "temperature", "sao2", "heartrate", "respiration", "cvp", "etco2", "systemicsystolic",
        "systemicdiastolic", "systemicmean", "pasystolic", "padiastolic", "pamean", "st1", "st2",
        "st3", "icp",
    ),
    "vitalaperiodic": (
        "noninvasivesystolic", "noninvasivediastolic", "noninvasivemean", "paop", "cardiacoutput",
        "cardiacinput", "svr", "svri", "pvr", "pvri",
    ),
}  # fmt: skip


class EicuReader:
    """Reads an eICU folder, whatever the case of its file and column names.

    Args:
        folder: holds the tables, .csv or .csv.gz.
        wanted: what to collect. A name under `wanted.items` is a column of vitalPeriodic or
            vitalAperiodic, or else a labname (`Temperature (lab)` where both have the name).
            Vital signs carry no unit, and none is asked of them.

    Guarantee: memory is bounded by the stays and what is wanted of them; big tables stream. The
    unit of privacy is `uniquepid`, also of a patient who was in two hospitals (counted).

    What is made of the rows: a stay begins at `EPOCH` and `died` tells of the hospital, not the
    unit. Notes are the lines that were entered at one time in one kind of note; the kinds are
    eICU's and `Past history` and `Physical exam`. An icd9code cell lists ICD-9 and then ICD-10
    codes; a diagnosis without a code is kept by its name. Priorities Primary, Major and Other are
    ranks 1, 2 and 3. Cancelled orders are dropped. A stay that comes twice counts once. Each is
    counted in `tally`.

    Raises:
        DataError: the folder is not eICU, or a table that is needed is missing.
    """

    def __init__(self, folder: Path, *, wanted: Wanted) -> None:
        self.tally = Tally()
        self._wanted = wanted
        self._folder = Folder.scan(folder)
        self._folder.require("patient")

    def encounters(self) -> Iterator[Encounter]:
        """Every unit stay, in the order of the patient table. Raises DataError."""
        self.tally.counts.clear()
        cohort = self._stays()
        if self._wanted.codes:
            self._diagnoses(cohort)
        if self._wanted.drugs:
            self._medication(cohort)
        if self._wanted.measurements:
            self._measurements(cohort)
        if self._wanted.notes:
            self._notes(cohort)
        yield from cohort.encounters()

    def _stays(self) -> Cohort:
        table = self._folder.require("patient")
        cohort = Cohort(table, self._wanted, self.tally)
        needed = (
            _STAY, "uniquepid", "hospitalid", "gender", "age", "hospitaldischargestatus",
            "unitdischargeoffset",
        )  # fmt: skip
        whose: dict[str, str] = {}
        hospitals: dict[str, str] = {}
        moved: set[str] = set()
        for line, cells in table.rows(needed, ("patienthealthsystemstayid", "apacheadmissiondx")):
            encounter, patient, hospital, gender, age, died, ends, visit, diagnosis = cells
            name = told(table, line, "uniquepid", patient)
            stay = Stay(
                patient=name,
                encounter=told(table, line, _STAY, encounter),
                site=told(table, line, "hospitalid", hospital),
                start=EPOCH,
                end=_end(table, line, ends),
                age=_age(age),
                sex=_SEX.get(gender.strip().casefold()),
                died=_DIED.get(died.strip().casefold()),
                line=line,
            )
            visit = visit.strip()
            if visit and whose.setdefault(visit, name) != name:
                message = "gives one hospital stay to two patients"
                raise wrong_cell(table, line, "patienthealthsystemstayid", message)
            if not cohort.add(stay):
                continue
            if hospitals.setdefault(name, stay.site or "") != stay.site:
                moved.add(name)
            if stay.age is None:
                self.tally.add("ages that cannot be read (left out)")
            if self._wanted.codes and self._wanted.admission_diagnosis and diagnosis.strip():
                text = diagnosis.strip()
                cohort.add_code(stay, "name", text, rank=None, time=EPOCH, title=text)
        cohort.require_some()
        if moved:
            self.tally.add("patients who were in several hospitals (kept)", len(moved))
        return cohort

    def _diagnoses(self, cohort: Cohort) -> None:
        table = self._folder.require("diagnosis")
        needed = (_STAY, "diagnosisoffset", "diagnosisstring", "icd9code", "diagnosispriority")
        for encounter, offset, name, cell, priority in cohort.rows(table, needed):
            stay = cohort.find(encounter, "diagnoses")
            if stay is None:
                continue
            try:
                time = _moment(offset)
            except ValueError:
                self.tally.add("diagnoses with a time that cannot be read")
                continue
            rank = _RANKS.get(priority.strip().casefold())
            if rank is None:
                self.tally.add("diagnoses without a rank (kept)")
            title = name.strip()
            codes = self._codes(cell)
            if not codes and not title:
                self.tally.add("diagnoses without a code and without a name")
                continue
            if not codes:
                self.tally.add("diagnoses without a code (the name is kept)")
                codes = [("name", title)]
            for system, code in codes:
                cohort.add_code(stay, system, code, rank=rank, time=time, title=title)

    def _codes(self, cell: str) -> list[tuple[CodeSystem, str]]:
        """The codes of a cell; what has the shape of both systems follows the cell's order."""
        found: list[tuple[CodeSystem, str]] = []
        tenth = False
        for part in cell.split(","):
            code = part.strip().upper()
            if not code:
                continue
            ninth = ICD9.fullmatch(code) is not None
            if not ninth and ICD10.fullmatch(code) is None:
                self.tally.add("diagnosis codes without the shape of ICD-9 or ICD-10")
                continue
            tenth = not ninth or (tenth and ICD10.fullmatch(code) is not None)
            found.append(("icd10" if tenth else "icd9", code))
        return found

    def _medication(self, cohort: Cohort) -> None:
        table = self._folder.require("medication")
        needed = (_STAY, "drugname", "drugstartoffset", "drugstopoffset", "drugordercancelled")
        for encounter, drug, start, stop, cancelled, hicl in cohort.rows(
            table, needed, ("drughiclseqno",)
        ):
            stay = cohort.find(encounter, "drugs")
            if stay is None:
                continue
            if cancelled.strip().casefold() == "yes":
                self.tally.add("drugs whose order was cancelled")
                continue
            name, sequence = drug.strip(), hicl.strip()
            if not name and not sequence:
                self.tally.add("drugs without a code and without a name")
                continue
            try:
                first, last = _moment(start), _moment(stop)
            except ValueError:
                self.tally.add("drugs with a time that cannot be read")
                continue
            if not name:
                self.tally.add("drugs known by their HICL number alone (kept)")
            code = name or f"HICL {sequence}"
            cohort.add_drug(stay, "name", code, name=name, start=first, stop=last)

    def _measurements(self, cohort: Cohort) -> None:
        self._folder.require_any("lab", *_VITALS)
        items = Items(self._wanted, self.tally)
        lab = self._folder.table("lab")
        asked = None if self._wanted.items is None else named(self._wanted.items)
        names = None if asked is None else _lab_names(asked)
        if lab is not None and (names is None or names):
            self._labs(cohort, lab, names, items)
        for name, columns in _VITALS.items():
            table = self._folder.table(name)
            called = _vital_names(columns, asked)
            if table is not None and called:
                self._vitals(cohort, table, called, items)
        items.close()

    def _labs(
        self, cohort: Cohort, table: Table, names: dict[str, str] | None, items: Items
    ) -> None:
        needed = (_STAY, "labname", "labresult", "labresultoffset", "labmeasurenamesystem")
        for encounter, labname, value, offset, unit in cohort.rows(table, needed):
            label = labname.strip()
            item = f"{label} (lab)" if names is None else names.get(label.casefold())
            if item is None:
                continue
            stay = cohort.find(encounter, "lab results")
            if stay is None:
                continue
            amount = number(value)
            if math.isnan(amount):
                self.tally.add("lab results without a number")
                continue
            try:
                time = _moment(offset)
            except ValueError:
                self.tally.add("lab results with a time that cannot be read")
                continue
            if items.accepts(item, unit):
                cohort.add_number(stay, item, unit.strip(), value=amount, time=time)

    def _vitals(self, cohort: Cohort, table: Table, called: dict[str, str], items: Items) -> None:
        for encounter, offset, *cells in cohort.rows(
            table, (_STAY, "observationoffset"), tuple(called)
        ):
            stay = cohort.find(encounter, "vital signs")
            if stay is None:
                continue
            try:
                time = _moment(offset)
            except ValueError:
                self.tally.add("vital signs with a time that cannot be read")
                continue
            for item, cell in zip(called.values(), cells, strict=True):
                if not cell.strip():
                    continue
                amount = number(cell)
                if math.isnan(amount):
                    self.tally.add("vital signs without a number")
                    continue
                items.saw(item)
                cohort.add_number(stay, item, "", value=amount, time=time)

    def _notes(self, cohort: Cohort) -> None:
        self._folder.require_any(*(shape.name for shape in _NOTE_TABLES))
        for shape in _NOTE_TABLES:
            table = self._folder.table(shape.name)
            if table is None or not (shape.kind_column or self._wanted.takes(shape.kind)):
                continue
            needed = (_STAY, shape.when, shape.path, shape.value, shape.text)
            kinds = () if shape.kind_column is None else (shape.kind_column,)
            for encounter, when, path, value, text, *rest in cohort.rows(table, (*needed, *kinds)):
                kind = rest[0].strip() if rest else shape.kind
                if self._wanted.takes(kind):
                    said = _line_of(path.strip(), value.strip(), text.strip())
                    self._note(cohort, encounter, kind, when, said)

    def _note(self, cohort: Cohort, encounter: str, kind: str, when: str, text: str) -> None:
        stay = cohort.find(encounter, "lines of notes")
        if stay is None:
            return
        if not text:
            self.tally.add("lines of notes without text")
            return
        try:
            time = _moment(when)
        except ValueError:
            self.tally.add("lines of notes with a time that cannot be read")
            return
        cohort.add_note(stay, kind, time, text, key=(kind, time))


def _moment(cell: str) -> datetime | None:
    """When an offset in minutes is, or None where it is empty. Raises ValueError."""
    if not cell.strip():
        return None
    minutes = number(cell)
    if not abs(minutes) <= _MOST_MINUTES:
        raise ValueError("not an offset in minutes")
    return EPOCH + timedelta(minutes=minutes)


def _end(table: Table, line: int, cell: str) -> datetime | None:
    try:
        return _moment(cell)
    except ValueError:
        message = "is no offset in minutes"
        raise wrong_cell(table, line, "unitdischargeoffset", message) from None


def _age(cell: str) -> float | None:
    text = "".join(cell.split())
    if text == ">89":
        return OLDEST
    years = number(text)
    return None if math.isnan(years) else age_in_years(years)


def _line_of(path: str, value: str, text: str) -> str:
    """A charted line as words: where it stands, its value, and the text where that says more.

    The first two parts of a path are the same for every line of a kind.
    """
    where = path.removesuffix(value).rstrip("/").split("/", 2)[-1]
    said = value if "".join(value.split()) == "".join(text.split()) else f"{value} {text}".strip()
    return f"{where}: {said}" if said else ""


def _lab_names(wanted: Mapping[str, str]) -> dict[str, str]:
    """The labnames to look for, in lower case, and how each is called."""
    vitals = {column for columns in _VITALS.values() for column in columns}
    return {
        label.removesuffix(" (lab)"): name for label, name in wanted.items() if label not in vitals
    }


def _vital_names(columns: Sequence[str], wanted: Mapping[str, str] | None) -> dict[str, str]:
    """The columns to read, and how each is called."""
    if wanted is None:
        return {column: column for column in columns}
    return {column: wanted[column] for column in columns if column in wanted}
