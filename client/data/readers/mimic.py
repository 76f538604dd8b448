"""MIMIC-III and MIMIC-IV folders: one encounter an admission.

Which of the two it is shows in the patients table. MIMIC-III lies flat in one folder; MIMIC-IV in
`hosp`, `icu` and (MIMIC-IV-Note) `note`. All dates are shifted by the data set's makers, each
patient's by one amount: differences within a patient mean something, the years do not.

Source: Johnson et al., MIMIC-III, Scientific Data 2016; MIMIC-IV, Scientific Data 2023.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from client.data.encounters import CodeSystem, Encounter, Tally
from client.data.readers.cohort import Cohort, Items, Stay, age_in_years
from client.data.readers.files import Folder, Table, Wanted, moment, number, told, wrong_cell
from common.errors import Code, DataError

__all__ = ["ICD9", "ICD10", "MimicReader"]

ICD9: Final = re.compile(r"[0-9]{3}\.?[0-9]{0,2}|V[0-9]{2}\.?[0-9]{0,2}|E[0-9]{3}\.?[0-9]?")
"""The shape of an ICD-9-CM diagnosis, with or without the dot."""
ICD10: Final = re.compile(r"[A-Z][0-9][0-9A-Z]\.?[0-9A-Z]{0,4}")
"""The shape of an ICD-10-CM diagnosis, with or without the dot."""

_THIRD: Final = 3
_SEX: Final = {"f": "female", "m": "male"}
_DIED: Final = {"0": False, "1": True}
_NOT_SET: Final = frozenset({"", "0"})
_RANK: Final = re.compile(r"[1-9][0-9]{0,5}")
_NDC: Final = re.compile(r"[0-9]{11}")
_DAYS_A_YEAR: Final = 365.2425
_SHAPES: Final[dict[str, tuple[CodeSystem, re.Pattern[str]]]] = {
    "9": ("icd9", ICD9),
    "10": ("icd10", ICD10),
}
_LABS: Final = "lab results"
_CHARTS: Final = "chart events"
# The kinds that MIMIC-III has, so that a study finds the same notes in both.
_NOTE_TABLES: Final = (("discharge", "Discharge summary"), ("radiology", "Radiology"))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the two versions call the same things."""

    code: str
    version: str | None
    drug_start: str
    drug_stop: str


_LAYOUTS: Final = {
    3: _Layout("icd9_code", None, "startdate", "enddate"),
    4: _Layout("icd_code", "icd_version", "starttime", "stoptime"),
}


@dataclass(frozen=True, slots=True)
class _Person:
    sex: str | None
    birth: datetime | None
    anchor: tuple[float, float] | None

    def age(self, start: datetime) -> float | None:
        """The age at `start`, as an encounter has it."""
        if self.birth is not None:
            return age_in_years((start - self.birth).days / _DAYS_A_YEAR)
        if self.anchor is not None and not math.isnan(sum(self.anchor)):
            age, year = self.anchor
            return age_in_years(age + start.year - year)
        return None


class MimicReader:
    """Reads a MIMIC-III or MIMIC-IV folder, whatever the case of its file and column names.

    Args:
        folder: holds the tables, .csv or .csv.gz; for MIMIC-IV the folder of `hosp`.
        wanted: what to collect. A name under `wanted.items` is a label of d_labitems (`Creatinine`,
            or `Creatinine (Blood)` where several specimens have it), of d_items (where the
            laboratory has it too: `Creatinine (chart)`), or an item id.

    Guarantee: memory is bounded by the admissions and what is wanted of them; big tables stream.

    What is made of the rows: notes marked as errors are dropped. A note without a time of day was
    written at the end of its day. Diagnoses carry no time, for they are coded after discharge.
    An admission that comes twice counts once. Rows of no admission, of an unknown one, or of
    another patient than the admission's are dropped; each is counted in `tally`.

    Raises:
        DataError: the folder is not MIMIC, or a table that is needed is missing.
    """

    def __init__(self, folder: Path, *, wanted: Wanted) -> None:
        self.tally = Tally()
        self._wanted = wanted
        self._folder = Folder.scan(folder, within=("hosp", "icu", "note"))
        self.version: Literal[3, 4] = self._version()
        self._layout = _LAYOUTS[self.version]

    def _version(self) -> Literal[3, 4]:
        table = self._folder.require("patients")
        names = table.columns()
        if "anchor_age" in names:
            return 4
        if "dob" in names:
            return 3
        raise DataError(
            Code.DATA_COLUMNS,
            f"{table.path}:1: there is no column dob (MIMIC-III) or anchor_age (MIMIC-IV) among "
            f"{len(names)}.",
            remedy="Name the columns as the data set's documentation does; case does not count.",
        )

    def encounters(self) -> Iterator[Encounter]:
        """Every admission, in the order of the admissions table. Raises DataError."""
        self.tally.counts.clear()
        cohort = self._admissions()
        if self._wanted.codes:
            self._diagnoses(cohort)
        if self._wanted.drugs:
            self._prescriptions(cohort)
        if self._wanted.measurements:
            self._measurements(cohort)
        if self._wanted.notes:
            self._notes(cohort)
        yield from cohort.encounters()

    def _patients(self) -> dict[str, _Person]:
        table = self._folder.require("patients")
        third = self.version == _THIRD
        ages = ("dob",) if third else ("anchor_age", "anchor_year")
        people: dict[str, _Person] = {}
        for line, (patient, gender, *age) in table.rows(("subject_id", "gender", *ages)):
            name = told(table, line, "subject_id", patient)
            if name in people:
                self.tally.add("patients that come again (the first is kept)")
                continue
            people[name] = _Person(
                sex=_SEX.get(gender.strip().casefold()),
                birth=_time(table, line, "dob", age[0]) if third else None,
                anchor=None if third else (number(age[0]), number(age[1])),
            )
        return people

    def _admissions(self) -> Cohort:
        people = self._patients()
        table = self._folder.require("admissions")
        cohort = Cohort(table, self._wanted, self.tally)
        needed = ("subject_id", "hadm_id", "admittime", "dischtime", "hospital_expire_flag")
        for line, cells in table.rows(needed, ("diagnosis",)):
            patient, encounter, begins, ends, died, diagnosis = cells
            start = _time(table, line, "admittime", begins)
            name = told(table, line, "subject_id", patient)
            person = people.get(name)
            age = None if person is None or start is None else person.age(start)
            stay = Stay(
                patient=name,
                encounter=told(table, line, "hadm_id", encounter),
                site=None,
                start=start,
                end=_time(table, line, "dischtime", ends),
                age=age,
                sex=None if person is None else person.sex,
                died=_DIED.get(died.strip()),
                line=line,
            )
            if not cohort.add(stay):
                continue
            if person is None:
                self.tally.add("admissions of a patient who is not among the patients (kept)")
            elif age is None:
                self.tally.add("ages that cannot be (left out)")
            if self._wanted.codes and self._wanted.admission_diagnosis and diagnosis.strip():
                text = diagnosis.strip()
                cohort.add_code(stay, "name", text, rank=None, time=start, title=text)
        cohort.require_some()
        return cohort

    def _titles(self) -> dict[tuple[str, str], str]:
        """What the dictionary of diagnoses says, by version and code; empty where it is absent."""
        table = self._folder.table("d_icd_diagnoses")
        if table is None:
            return {}
        code, version = self._layout.code, self._layout.version
        needed = (code, "long_title") if version is None else (code, "long_title", version)
        return {
            (cells[2].strip() if version else "9", cells[0].strip().upper()): cells[1].strip()
            for _, cells in table.rows(needed)
        }

    def _diagnoses(self, cohort: Cohort) -> None:
        titles = self._titles()
        table = self._folder.require("diagnoses_icd")
        needed = ["subject_id", "hadm_id", "seq_num", self._layout.code]
        if self._layout.version is not None:
            needed.append(self._layout.version)
        for patient, encounter, rank, cell, *rest in cohort.rows(table, needed):
            stay = cohort.find(encounter, "diagnoses", patient=patient)
            if stay is None:
                continue
            version = rest[0].strip() if rest else "9"
            code = cell.strip().upper()
            system = self._system(version, code, titles)
            if system is not None:
                title = titles.get((version, code), "")
                cohort.add_code(stay, system, code, rank=self._rank(rank), time=None, title=title)

    def _system(
        self, version: str, code: str, titles: dict[tuple[str, str], str]
    ) -> CodeSystem | None:
        """Which system the code is of, or None, counted, where it cannot be used."""
        system, shape = _SHAPES.get(version, (None, ICD9))
        if not code:
            self.tally.add("diagnoses without a code")
        elif system is None:
            self.tally.add("diagnoses whose ICD version is neither 9 nor 10")
        elif not shape.fullmatch(code):
            self.tally.add("diagnosis codes without the shape of their ICD version")
        elif not titles or (version, code) in titles:
            return system
        elif any((version, zeros + code) in titles for zeros in ("0", "00")):
            # 0389 is septicaemia and 389 is hearing loss: what a spreadsheet made of the code
            # cannot be told from what was meant.
            self.tally.add("diagnosis codes that lost their leading zeros")
        else:
            self.tally.add("diagnosis codes that the dictionary does not have (kept)")
            return system
        return None

    def _rank(self, cell: str) -> int | None:
        cell = cell.strip()
        if _RANK.fullmatch(cell):
            return int(cell)
        self.tally.add("diagnoses without a rank (kept)")
        return None

    def _prescriptions(self, cohort: Cohort) -> None:
        table = self._folder.require("prescriptions")
        begins, ends = self._layout.drug_start, self._layout.drug_stop
        needed = ("subject_id", "hadm_id", begins, ends, "drug", "ndc")
        for patient, encounter, start, stop, drug, ndc in cohort.rows(table, needed):
            stay = cohort.find(encounter, "prescriptions", patient=patient)
            if stay is None:
                continue
            try:
                first, last = moment(start), moment(stop)
            except ValueError:
                self.tally.add("prescriptions with a time that cannot be read")
                continue
            self._prescribe(cohort, stay, drug.strip(), ndc.strip(), first, last)

    def _prescribe(
        self,
        cohort: Cohort,
        stay: Stay,
        name: str,
        ndc: str,
        start: datetime | None,
        stop: datetime | None,
    ) -> None:
        system: CodeSystem = "ndc"
        code = ndc
        if not _NDC.fullmatch(ndc) or not ndc.strip("0"):
            if ndc.strip("0"):
                self.tally.add("drug codes that are not eleven digits (the name is kept)")
            else:
                self.tally.add("drugs without a code (the name is kept)")
            system, code = "name", name
        if not code:
            self.tally.add("drugs without a code and without a name")
            return
        cohort.add_drug(stay, system, code, name=name, start=start, stop=stop)

    def _measurements(self, cohort: Cohort) -> None:
        labs, charts = self._folder.table("labevents"), self._folder.table("chartevents")
        if labs is None and charts is None:
            self._folder.require_any("labevents", "chartevents")
        names = _Dictionary(self._folder, labs=labs is not None, charts=charts is not None)
        items = Items(self._wanted, self.tally)
        found = names.resolve(items.names)
        if labs is not None and (items.names is None or found[_LABS]):
            self._events(cohort, labs, _LABS, found[_LABS], items)
        if charts is not None and (items.names is None or found[_CHARTS]):
            self._events(cohort, charts, _CHARTS, found[_CHARTS], items)
        items.close()

    def _events(
        self, cohort: Cohort, table: Table, what: str, names: dict[str, str], items: Items
    ) -> None:
        needed = ("itemid", "subject_id", "hadm_id", "charttime", "valuenum", "valueuom")
        every = items.names is None
        for itemid, patient, encounter, time, value, unit, error in cohort.rows(
            table, needed, ("error",)
        ):
            item = names.get(itemid.strip())
            if item is None:
                if every:
                    self.tally.add(f"{what} of an item that the dictionary does not have")
                continue
            stay = cohort.find(encounter, what, patient=patient)
            if stay is None:
                continue
            if _flagged(error):
                self.tally.add(f"{what} marked as errors")
                continue
            amount = number(value)
            if math.isnan(amount):
                self.tally.add(f"{what} without a number")
                continue
            try:
                when = moment(time)
            except ValueError:
                self.tally.add(f"{what} with a time that cannot be read")
                continue
            if items.accepts(item, unit):
                cohort.add_number(stay, item, unit.strip(), value=amount, time=when)

    def _notes(self, cohort: Cohort) -> None:
        if self.version == _THIRD:
            self._noteevents(cohort)
            return
        wanted = [pair for pair in _NOTE_TABLES if self._wanted.takes(pair[1])]
        if not wanted:
            self.tally.add("note categories wanted that MIMIC-IV does not have")
            return
        present = self._folder.require_any(*(name for name, _ in wanted))
        for name, kind in wanted:
            table = self._folder.table(name)
            if table in present and table is not None:
                for patient, encounter, time, text in cohort.rows(
                    table, ("subject_id", "hadm_id", "charttime", "text")
                ):
                    self._note(cohort, (patient, encounter), kind, ("", time), text)

    def _noteevents(self, cohort: Cohort) -> None:
        table = self._folder.require("noteevents")
        needed = ("subject_id", "hadm_id", "category", "iserror", "text")
        for patient, encounter, category, error, text, day, time in cohort.rows(
            table, needed, ("chartdate", "charttime")
        ):
            kind = category.strip()
            if not self._wanted.takes(kind):
                continue
            if _flagged(error):
                self.tally.add("notes marked as errors")
                continue
            self._note(cohort, (patient, encounter), kind, (day, time), text)

    def _note(
        self,
        cohort: Cohort,
        whose: tuple[str, str],
        kind: str,
        when: tuple[str, str],
        text: str,
    ) -> None:
        stay = cohort.find(whose[1], "notes", patient=whose[0])
        if stay is None:
            return
        if not text.strip():
            self.tally.add("notes without text")
            return
        try:
            time = moment(when[1]) or _end_of_day(moment(when[0]))
        except ValueError:
            self.tally.add("notes with a time that cannot be read")
            return
        cohort.add_note(stay, kind, time, text)


class _Dictionary:
    """What d_labitems and d_items call the items, for those tables that are there."""

    def __init__(self, folder: Folder, *, labs: bool, charts: bool) -> None:
        self._labs: dict[str, tuple[str, str]] = {}
        self._charts: dict[str, str] = {}
        if labs:
            rows = folder.require("d_labitems").rows(("itemid", "label"), ("fluid",))
            for _, (item, label, fluid) in rows:
                self._labs[item.strip()] = (label.strip(), fluid.strip())
        if charts:
            rows = folder.require("d_items").rows(("itemid", "label"), ("linksto",))
            for _, (item, label, table) in rows:
                if table.strip().casefold() in {"", "chartevents"}:
                    self._charts[item.strip()] = label.strip()

    def resolve(self, wanted: tuple[str, ...] | None) -> dict[str, dict[str, str]]:
        """By table, the ids of the wanted items, and how each is called.

        Raises:
            DataError: no dictionary has the item, or several specimens have it.
        """
        found: dict[str, dict[str, str]] = {_LABS: {}, _CHARTS: {}}
        if wanted is None:
            found[_LABS] = {item: _lab_name(*names) for item, names in self._labs.items()}
            found[_CHARTS] = {item: f"{label} (chart)" for item, label in self._charts.items()}
            return found
        for name in wanted:
            labs = self._in_laboratory(name)
            charts = [] if labs else self._in_charts(name)
            if not labs and not charts:
                raise self._unknown(name)
            for table, ids in ((_LABS, labs), (_CHARTS, charts)):
                for item in ids:
                    found[table].setdefault(item, name)
        return found

    def _in_laboratory(self, name: str) -> list[str]:
        plain = name.strip().casefold()
        if name.strip() in self._labs:
            return [name.strip()]
        full = [item for item, pair in self._labs.items() if _lab_name(*pair).casefold() == plain]
        if full:
            return full
        short = [item for item, (label, _) in self._labs.items() if label.casefold() == plain]
        fluids = {self._labs[item][1].casefold() for item in short}
        if len(fluids) > 1:
            raise DataError(
                Code.DATA_COLUMNS,
                f"{name}: {len(fluids)} specimens have a measurement of this name.",
                remedy=f"Add the specimen as d_labitems has it, for example `{name} (Blood)`.",
            )
        return short

    def _in_charts(self, name: str) -> list[str]:
        plain = name.strip().casefold()
        if name.strip() in self._charts:
            return [name.strip()]
        return [
            item
            for item, label in self._charts.items()
            if plain in {label.casefold(), f"{label} (chart)".casefold()}
        ]

    def _unknown(self, name: str) -> DataError:
        known = {label.casefold(): label for label in self._charts.values()}
        for label, fluid in self._labs.values():
            full = _lab_name(label, fluid)
            known.update({label.casefold(): label, full.casefold(): full})
        # So near to what the study says that showing it tells nothing of the file.
        close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.8)
        hint = f" (did you mean {known[close[0]]}?)" if close else ""
        return DataError(
            Code.DATA_COLUMNS,
            f"{name}: no dictionary of measurements has an item of this name{hint}.",
            remedy="Name a label or an item id of d_labitems or d_items.",
        )


def _lab_name(label: str, fluid: str) -> str:
    return f"{label} ({fluid})" if fluid else label


def _flagged(cell: str) -> bool:
    """Whether a row is marked as an error: by anything but nothing and zero."""
    return cell.strip().removesuffix(".0") not in _NOT_SET


def _end_of_day(day: datetime | None) -> datetime | None:
    # A note of an unknown hour must not pass for one written before what happened that day.
    return None if day is None else day.replace(hour=23, minute=59, second=59)


def _time(table: Table, line: int, column: str, cell: str) -> datetime | None:
    try:
        return moment(cell)
    except ValueError:
        raise wrong_cell(table, line, column, "is no date and time") from None
