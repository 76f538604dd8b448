"""FHIR R4 as a bulk export leaves it: a folder of NDJSON files, one resource a line.

What a resource is stands in the line, not in the file's name. The lines are gone through twice:
first for patients, encounters and medications, then for what belongs to an encounter, so that
memory follows from the cohort. Nothing is ever fetched: an attachment that stands at an address
is counted, not read. Times with a zone become UTC; a date without a time is its first second, or
as an end its last.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import dataclasses
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, cast

from client.data.encounters import CodeSystem, Encounter, Tally
from client.data.readers.cohort import Cohort, Items, Stay, age_in_years, named
from client.data.readers.files import Table, Wanted
from client.data.tables import MAX_FIELD_BYTES
from common.errors import Code, DataError

__all__ = ["SYSTEMS", "FhirReader"]

SYSTEMS: Final[Mapping[str, CodeSystem]] = {
    "http://snomed.info/sct": "snomed",
    "urn:oid:2.16.840.1.113883.6.96": "snomed",
    "http://hl7.org/fhir/sid/icd-10-cm": "icd10",
    "http://hl7.org/fhir/sid/icd-10": "icd10",
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm": "icd10",
    "http://fhir.de/CodeSystem/dimdi/icd-10-gm": "icd10",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd10": "icd10",
    "urn:oid:2.16.840.1.113883.6.90": "icd10",
    "urn:oid:2.16.840.1.113883.6.3": "icd10",
    "http://hl7.org/fhir/sid/icd-9-cm": "icd9",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd9": "icd9",
    "urn:oid:2.16.840.1.113883.6.103": "icd9",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "rxnorm",
    "urn:oid:2.16.840.1.113883.6.88": "rxnorm",
    "http://hl7.org/fhir/sid/ndc": "ndc",
    "urn:oid:2.16.840.1.113883.6.69": "ndc",
    "http://www.whocc.no/atc": "atc",
    "urn:oid:2.16.840.1.113883.6.73": "atc",
    "http://loinc.org": "loinc",
    "urn:oid:2.16.840.1.113883.6.1": "loinc",
}
"""Coding systems by url. National lists of ICD-10 count as ICD-10; any other url is unknown."""

_SUFFIXES: Final = (".ndjson", ".ndjson.gz")
_MAX_FILES: Final = 10_000
_MAX_ID: Final = 256
_BUFFER_BYTES: Final = 1 << 17
_HEAD_BYTES: Final = 512
_DAY: Final = timedelta(days=1)
_SECOND: Final = timedelta(seconds=1)
_YEAR_DAYS: Final = 365.25

_FIRST: Final = re.compile(r'"resourceType"\s*:\s*"(?:Patient|Encounter|Medication)"')
_DOCUMENT: Final = re.compile(rb'"resourceType"\s*:\s*"(?:DocumentReference|DiagnosticReport)"')
_KIND: Final = re.compile(r"[A-Z][A-Za-z]{1,63}", re.ASCII)
_TIME: Final = re.compile(
    r"[0-9]{4}(?:-[0-9]{2}(?:-[0-9]{2}"
    r"(?:T[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?(?:Z|[-+][0-9]{2}:[0-9]{2})?)?)?)?",
    re.ASCII,
)
_DATE_CHARACTERS: Final = 10

_VOID: Final = frozenset({"entered-in-error", "cancelled"})
_VOID_ENCOUNTERS: Final = _VOID | {"planned"}
_VOID_CONDITIONS: Final = frozenset({"entered-in-error", "refuted"})
_VOID_DRUGS: Final = _VOID | {"draft", "not-done"}
_NO_ORDERS: Final = frozenset({"proposal", "plan", "option"})

_PLAIN: Final = frozenset({"text/plain"})
_HTML: Final = frozenset({"text/html", "application/xhtml+xml"})
_CHARSETS: Final = frozenset(
    {"utf-8", "ascii", "iso8859-1", "iso8859-15", "cp1252", "utf-16", "utf-16-le", "utf-16-be"}
)
_EXPIRED: Final = "exp"
_UCUM: Final = "http://unitsofmeasure.org"
_RECOMMENDED: Final = "Export the resource again as FHIR R4 (4.0.1), one resource a line."


class FhirReader:
    """Encounters out of a folder of FHIR R4 NDJSON (`*.ndjson`, `*.ndjson.gz`, any parts).

    A diagnosis or drug that is coded in several known systems yields one entry for each. A
    measurement is known by its code or name, whichever is wanted, else by its LOINC code. Of an
    encounter's documents plain text is read before HTML; a report is its presented form and its
    conclusion, else its narrative.

    Args:
        folder: where the files lie; files of other kinds are not looked at.
        wanted: what is collected of each encounter.
    """

    def __init__(self, folder: Path, *, wanted: Wanted) -> None:
        self._folder = folder
        self._wanted = wanted
        self._tally = Tally()

    @property
    def tally(self) -> Tally:
        """What was left out or changed so far; complete once `encounters` is used up."""
        return self._tally

    def encounters(self) -> Iterator[Encounter]:
        """Every encounter, in the order of the files' names and lines.

        Guarantee: a part stands at an encounter only where the resource names that encounter and
        the same patient; what names neither or another is counted.

        Raises:
            DataError: with file and line, for lines that are no resources of FHIR R4.
        """
        tally = self._tally = Tally()
        files = _files(self._folder)
        roll = _Roll(tally)
        for resource in _resources(files, Tally(), only=_FIRST):
            roll.take(resource)
        cohort = Cohort(Table(self._folder), self._wanted, tally)
        roll.settle(cohort)
        cohort.require_some()
        parts = _Parts(cohort, roll, self._wanted, tally)
        for resource in _resources(files, tally):
            parts.take(resource)
        parts.close()
        for encounter in cohort.encounters():
            yield dataclasses.replace(encounter, file=roll.files[encounter.encounter])


def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(_SUFFIXES))
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise DataError(Code.DATA_UNREADABLE, f"{folder}: cannot be listed ({reason}).") from None
    if not found:
        message = f"{folder}: holds no .ndjson or .ndjson.gz file."
        raise DataError(Code.DATA_UNREADABLE, message)
    if len(found) > _MAX_FILES:
        raise DataError(Code.DATA_FORMAT, f"{folder}: holds more than {_MAX_FILES} files.")
    return found


# ---- lines


def _resources(
    files: Iterable[Path], tally: Tally, *, only: re.Pattern[str] | None = None
) -> Iterator[_Element]:
    """Every resource; with `only`, those that may be what it looks for (escapes could hide it)."""
    for path in files:
        for line, text in _lines(path, tally):
            if text.isspace():
                continue
            if only is None or only.search(text) or "\\u" in text:
                yield _resource(path, line, text)


def _resource(path: Path, line: int, text: str) -> _Element:
    where = f"{path}:{line}"
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        message = f"{where}: is not well-formed JSON (one resource a line, finite numbers)."
        raise DataError(Code.DATA_FORMAT, message, remedy=_RECOMMENDED) from None
    kind = body.get("resourceType") if isinstance(body, dict) else None
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        message = f"{where}: is not a FHIR resource (resourceType)."
        raise DataError(Code.DATA_FORMAT, message, remedy=_RECOMMENDED)
    if kind == "Bundle":
        message = f"{where}: is a Bundle; a bulk export has one resource a line."
        raise DataError(Code.DATA_FORMAT, message, remedy=_RECOMMENDED)
    return _Element(str(path), line, kind, body)


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _lines(path: Path, tally: Tally) -> Iterator[tuple[int, str]]:
    """Lines of bounded length; a document that is longer is passed over and counted."""
    packed = path.name.lower().endswith(".gz")
    try:
        handle = cast("BinaryIO", (gzip.open if packed else open)(path, "rb"))
    except OSError as error:
        raise _unreadable(path, error.strerror or "it is damaged") from None
    line = 0
    buffered = cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", handle), _BUFFER_BYTES))
    with handle, buffered:
        while raw := _line(path, buffered):
            line += 1
            if len(raw) > MAX_FIELD_BYTES:
                if not _DOCUMENT.search(raw[:_HEAD_BYTES]):
                    raise DataError(Code.DATA_TOO_LONG, f"{path}:{line}: is longer than 4 MiB.")
                # Scans and films are put into documents; one of them must not end the reading.
                tally.add("documents longer than 4 MiB")
                while raw and not raw.endswith(b"\n"):
                    raw = _line(path, buffered)
                continue
            try:
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(Code.DATA_ENCODING, f"{path}:{line}: is not UTF-8.") from None


def _line(path: Path, handle: BinaryIO) -> bytes:
    try:
        return handle.readline(MAX_FIELD_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise _unreadable(path, "it is cut short or damaged") from None


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(Code.DATA_UNREADABLE, f"{path}: cannot be read ({reason}).")


# ---- elements


@dataclass(frozen=True, slots=True, repr=False)
class _Element:
    """A JSON object of a resource, and where it stands; what is there must be of its kind."""

    file: str
    line: int
    path: str
    body: Mapping[str, Any]

    def wrong(self, key: str, what: str, code: Code = Code.DATA_VALUE) -> DataError:
        """The error for a value that cannot be used; it names the place, not the content."""
        return DataError(code, f"{self.file}:{self.line}: {self.path}.{key} {what}.")

    def text(self, key: str) -> str | None:
        """A text without blanks around it; None where it is missing or blank. Raises DataError."""
        value = self.body.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key, "is not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(key, "holds half a character", Code.DATA_ENCODING) from None
        return value.strip() or None

    def word(self, key: str) -> str | None:
        """An id or a code: short text. Raises DataError."""
        value = self.text(key)
        if value is not None and len(value) > _MAX_ID:
            raise self.wrong(key, f"is longer than {_MAX_ID} characters")
        return value

    def element(self, key: str) -> _Element | None:
        """An object. Raises DataError."""
        value = self.body.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "is not an object")
        return _Element(self.file, self.line, f"{self.path}.{key}", value)

    def elements(self, key: str) -> list[_Element]:
        """A list of objects. Raises DataError."""
        value = self.body.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise self.wrong(key, "is not a list of objects")
        path = f"{self.path}.{key}"
        return [_Element(self.file, self.line, path, part) for part in value]

    def number(self, key: str) -> float | None:
        """A finite number. Raises DataError."""
        value = self.body.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "is not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(key, "is not a finite number")
        return number

    def flag(self, key: str) -> bool | None:
        """True or false. Raises DataError."""
        value = self.body.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "is neither true nor false")

    def time(self, key: str, tally: Tally, *, last: bool = False) -> datetime | None:
        """A time in UTC; None, counted, where not even the day is said.

        A date without a time is its first second, or with `last` its last. Raises DataError.
        """
        value = self.word(key)
        if value is None:
            return None
        if not _TIME.fullmatch(value):
            raise self.wrong(key, "is not a time as FHIR writes it")
        if len(value) < _DATE_CHARACTERS:
            tally.add("times that do not say the day (taken as unknown)")
            return None
        try:
            time = datetime.fromisoformat(value)
            if time.tzinfo is not None:
                return time.astimezone(UTC).replace(tzinfo=None)
        except (ValueError, OverflowError):
            raise self.wrong(key, "is not a time of the calendar") from None
        if len(value) == _DATE_CHARACTERS:
            return time + _DAY - _SECOND if last else time
        tally.add("times without a zone (taken as UTC)")
        return time

    def id(self) -> str:
        """The resource's id. Raises DataError."""
        value = self.word("id")
        if value is None:
            raise self.wrong("id", "is missing")
        return value


def _target(reference: _Element | None, kind: str) -> str | None:
    """The id that a reference names, or None where it names no resource of this kind.

    `Patient/ID`, also with a version or an address before it, and `urn:uuid:ID`; never followed.
    """
    text = None if reference is None else reference.text("reference")
    if text is None:
        return None
    if text.startswith("urn:uuid:"):
        return text.removeprefix("urn:uuid:") or None
    steps = text.split("/_history/", 1)[0].split("/")
    if len(steps) < 2 or steps[-2] != kind or "?" in text or not steps[-1]:  # noqa: PLR2004
        return None
    return steps[-1]


@dataclass(frozen=True, slots=True, repr=False)
class _Concept:
    """What a CodeableConcept says: known codings as (system, code, title), and its names."""

    known: tuple[tuple[CodeSystem, str, str], ...]
    codes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """Its text, else what its codings are called, else a code."""
        return next(iter((*self.names, *self.codes)), None)


def _concept(element: _Element | None) -> _Concept:
    if element is None:
        return _Concept((), (), ())
    text = element.text("text")
    known: dict[tuple[CodeSystem, str], str] = {}
    codes: list[str] = []
    names = [] if text is None else [text]
    for coding in element.elements("coding"):
        code, title = coding.word("code"), coding.text("display")
        url = coding.text("system")
        system = None if url is None else SYSTEMS.get(url)
        if code is not None:
            codes.append(code)
            if system is not None:
                known.setdefault((system, code), title or text or "")
        if title is not None:
            names.append(title)
    entries = tuple((system, code, title) for (system, code), title in known.items())
    return _Concept(entries, tuple(codes), tuple(names))


# ---- the first time through: patients, encounters, medications


@dataclass(frozen=True, slots=True, repr=False)
class _Person:
    born: datetime | None
    sex: str | None
    dead: bool | None
    died: datetime | None
    died_on_day: bool


class _Roll:
    """Patients, encounters and medications, by id."""

    def __init__(self, tally: Tally) -> None:
        self.files: dict[str, str] = {}
        self.medications: dict[str, _Concept] = {}
        self.ranks: dict[str, tuple[str, int | None]] = {}
        self.reasons: dict[str, tuple[str, ...]] = {}
        self.left_out: set[str] = set()
        self._people: dict[str, tuple[_Person, str]] = {}
        self._stays: dict[str, Stay] = {}
        self._parents: dict[str, str] = {}
        self._tally = tally

    def take(self, resource: _Element) -> None:
        """Take what belongs here and pass over the rest. Raises DataError."""
        if resource.path == "Patient":
            self._patient(resource)
        elif resource.path == "Encounter":
            self._encounter(resource)
        elif resource.path == "Medication":
            self._medication(resource)

    def settle(self, cohort: Cohort) -> None:
        """Give every encounter its patient's facts, and hand it to the cohort."""
        self._count_circles()
        for name, stay in self._stays.items():
            known = self._people.get(stay.patient)
            if known is None:
                self._tally.add("encounters of an unknown patient")
                self.left_out.add(name)
                continue
            person = known[0]
            stay.sex = person.sex
            stay.age = self._age(person, stay)
            stay.died = _died_here(person, stay)
            cohort.add(stay)
        self._stays = {}
        self._people = {}
        self._parents = {}

    def _patient(self, resource: _Element) -> None:
        name = resource.id()
        sex = resource.word("gender")
        died = resource.time("deceasedDateTime", self._tally)
        said = resource.body.get("deceasedDateTime")
        dead = True if said is not None else resource.flag("deceasedBoolean")
        person = _Person(
            born=self._born(resource),
            sex=sex if sex in {"female", "male"} else None,
            dead=dead,
            died=died,
            died_on_day=isinstance(said, str) and len(said.strip()) == _DATE_CHARACTERS,
        )
        where = f"{resource.file}:{resource.line}"
        first = self._people.setdefault(name, (person, where))
        if first[1] != where:
            self._again(resource, same=first[0] == person, first=first[1])

    def _again(self, resource: _Element, *, same: bool, first: str) -> None:
        if not same:
            what = f"is that of {first}, which says something else of it"
            raise resource.wrong("id", what)
        self._tally.add(f"{resource.path.lower()}s that come again (the first is kept)")

    def _born(self, resource: _Element) -> datetime | None:
        value = resource.word("birthDate")
        if value is None:
            return None
        if not _TIME.fullmatch(value) or len(value) > _DATE_CHARACTERS:
            raise resource.wrong("birthDate", "is not a date as FHIR writes it")
        if len(value) == _DATE_CHARACTERS:
            return resource.time("birthDate", self._tally)
        self._tally.add("birth dates without a day (the middle is taken)")
        year, month = int(value[:4]), int(value[5:7] or 0)
        try:
            return datetime(year, month or 7, 15 if month else 1)  # noqa: DTZ001 - dates have no zone
        except ValueError:
            raise resource.wrong("birthDate", "is not a date of the calendar") from None

    def _encounter(self, resource: _Element) -> None:
        name = resource.id()
        if isinstance(resource.body.get("class"), list):
            what = "is a list, as in FHIR R5; R4 is read here"
            raise resource.wrong("class", what, Code.DATA_FORMAT)
        patient = _target(resource.element("subject"), "Patient")
        if resource.word("status") in _VOID_ENCOUNTERS:
            self.left_out.add(name)
            self._tally.add("encounters that did not take place, or are entered in error")
            return
        if patient is None:
            self.left_out.add(name)
            self._tally.add("encounters without a patient")
            return
        period = resource.element("period")
        stay = Stay(
            patient=patient,
            encounter=name,
            site=_provider(resource.element("serviceProvider")),
            start=None if period is None else period.time("start", self._tally),
            end=None if period is None else period.time("end", self._tally, last=True),
            age=None,
            sex=None,
            died=_disposition(resource),
            line=resource.line,
        )
        first = self._stays.get(name)
        if first is not None:
            place = f"{self.files[name]}:{first.line}"
            facts = (stay.patient, stay.start, stay.end, stay.site, stay.died)
            known = (first.patient, first.start, first.end, first.site, first.died)
            self._again(resource, same=facts == known, first=place)
            return
        self._stays[name] = stay
        self.files[name] = resource.file
        self._link(resource, name)

    def _link(self, resource: _Element, name: str) -> None:
        """Note which conditions it ranks, why the patient came, and what it is part of."""
        for entry in resource.elements("diagnosis"):
            condition = _target(entry.element("condition"), "Condition")
            rank = entry.number("rank")
            if condition is not None:
                self.ranks[condition] = (name, None if rank is None else int(rank))
        reasons = [_concept(entry).name for entry in resource.elements("reasonCode")]
        told = tuple(reason for reason in reasons if reason is not None)
        if told:
            self.reasons[name] = told
        parent = _target(resource.element("partOf"), "Encounter")
        if parent is not None:
            self._parents[name] = parent

    def _medication(self, resource: _Element) -> None:
        self.medications[resource.id()] = _concept(resource.element("code"))

    def _count_circles(self) -> None:
        """Count encounters that are part of themselves; partOf decides nothing here."""
        sound: set[str] = set()
        for name in self._parents:
            way: dict[str, None] = {}
            step: str | None = name
            while step is not None and step not in sound and step not in way:
                way[step] = None
                step = self._parents.get(step)
            if step is not None and step in way:
                self._tally.add("circles of encounters that are part of themselves (kept)")
            sound.update(way)

    def _age(self, person: _Person, stay: Stay) -> float | None:
        if person.born is None or stay.start is None:
            return None
        years = (stay.start - person.born).total_seconds() / 86_400 / _YEAR_DAYS
        # A birth is a date without a zone: a newborn's first day may begin before it.
        if -1 / _YEAR_DAYS <= years < 0:
            years = 0.0
        age = age_in_years(years)
        if age is None:
            self._tally.add("impossible ages (taken as unknown)")
        return age


def _provider(reference: _Element | None) -> str | None:
    """Which hospital: the organisation's id, else the identifier it is looked up by."""
    if reference is None:
        return None
    found = _target(reference, "Organization")
    if found is not None:
        return found
    query = reference.text("reference") or ""
    if "?identifier=" in query:
        return query.rsplit("|", 1)[-1].rsplit("=", 1)[-1] or None
    identifier = reference.element("identifier")
    named_by = None if identifier is None else identifier.word("value")
    return named_by or reference.text("display")


def _disposition(resource: _Element) -> bool | None:
    """Whether the encounter ended with the patient's death, where it says how it ended."""
    hospitalization = resource.element("hospitalization")
    if hospitalization is None:
        return None
    codes = _concept(hospitalization.element("dischargeDisposition")).codes
    return any(code.lower() == _EXPIRED for code in codes) if codes else None


def _died_here(person: _Person, stay: Stay) -> bool | None:
    """Whether the patient died in this encounter."""
    if stay.died or person.dead is None or stay.start is None or stay.end is None:
        return stay.died
    if not person.dead:
        return False
    if person.died is None:
        return stay.died
    if person.died_on_day:
        return stay.start.date() <= person.died.date() <= stay.end.date()
    return stay.start <= person.died <= stay.end


# ---- the second time through: what belongs to an encounter


class _Parts:
    """Puts each resource to the encounter that it names."""

    def __init__(self, cohort: Cohort, roll: _Roll, wanted: Wanted, tally: Tally) -> None:
        self._cohort = cohort
        self._roll = roll
        self._wanted = wanted
        self._tally = tally
        self._seen: set[bytes] = set()
        self._items = Items(wanted, tally)
        self._names = named(wanted.items)
        self._takers: dict[str, Callable[[_Element], None]] = {}
        if wanted.notes:
            self._takers |= {"DocumentReference": self._document, "DiagnosticReport": self._report}
        if wanted.codes:
            self._takers["Condition"] = self._condition
        if wanted.drugs:
            self._takers["MedicationRequest"] = self._drug
            self._takers["MedicationAdministration"] = self._drug
        if wanted.measurements:
            self._takers["Observation"] = self._observation
        if wanted.admission_diagnosis:
            self._takers["Encounter"] = self._reasons

    def take(self, resource: _Element) -> None:
        """Take a resource of a wanted kind. Raises DataError."""
        taker = self._takers.get(resource.path)
        if taker is not None:
            taker(resource)
        elif resource.path not in _KINDS:
            self._tally.add("resources of a kind that is not read")

    def close(self) -> None:
        """Count what was wanted and never came."""
        if self._wanted.measurements:
            self._items.close()

    def _stay(self, resource: _Element, what: str, encounters: Sequence[_Element]) -> Stay | None:
        """The encounter of a resource that is there for the first time; None, counted, else."""
        name = resource.word("id")
        if name is not None and self._is_repeated(resource.path, name):
            self._tally.add(f"{what} that come again (the first is kept)")
            return None
        named_by = [_target(reference, "Encounter") for reference in encounters]
        found = next((target for target in named_by if target is not None), None)
        if found is None and resource.path == "Condition" and name in self._roll.ranks:
            found = self._roll.ranks[name][0]
        if found is None and encounters:
            self._tally.add(f"{what} whose encounter cannot be resolved")
            return None
        if found in self._roll.left_out:
            self._tally.add(f"{what} of an encounter that is left out")
            return None
        subject = resource.element("subject")
        patient = _target(subject, "Patient")
        if patient is None:
            self._tally.add(f"{what} without a patient")
            return None
        return self._cohort.find(found or "", what, patient=patient)

    def _is_repeated(self, kind: str, name: str) -> bool:
        # Eight bytes an id: a million observations are to fit.
        mark = hashlib.blake2b(f"{kind}/{name}".encode(), digest_size=8).digest()
        if mark in self._seen:
            return True
        self._seen.add(mark)
        return False

    def _condition(self, resource: _Element) -> None:
        what = "conditions"
        status = _concept(resource.element("verificationStatus")).codes
        if not _VOID_CONDITIONS.isdisjoint(status):
            self._tally.add(f"{what} entered in error or refuted")
            return
        stay = self._stay(resource, what, _one(resource.element("encounter")))
        if stay is None:
            return
        concept = _concept(resource.element("code"))
        entries = self._entries(concept, what)
        time = resource.time("recordedDate", self._tally) or resource.time(
            "onsetDateTime", self._tally
        )
        ranked, rank = self._roll.ranks.get(resource.word("id") or "", ("", None))
        for system, code, title in entries:
            self._cohort.add_code(
                stay,
                system,
                code,
                rank=rank if ranked == stay.encounter else None,
                time=time,
                title=title,
            )

    def _entries(self, concept: _Concept, what: str) -> Sequence[tuple[CodeSystem, str, str]]:
        """The codings of known systems; else the name alone, counted; else nothing, counted."""
        if concept.known:
            return concept.known
        if concept.name is None:
            self._tally.add(f"{what} without a code")
            return ()
        self._tally.add(f"{what} coded in no known system (kept by name)")
        return (("name", concept.name, concept.name),)

    def _reasons(self, resource: _Element) -> None:
        name = resource.id()
        told = self._roll.reasons.pop(name, ())
        stay = None
        if told and name not in self._roll.left_out:
            stay = self._cohort.find(name, "reasons for an encounter")
        if stay is not None:
            for reason in told:
                self._cohort.add_code(
                    stay, "name", reason, rank=None, time=stay.start, title=reason
                )

    def _drug(self, resource: _Element) -> None:
        request = resource.path == "MedicationRequest"
        what = "medication requests" if request else "medication administrations"
        if resource.word("status") in _VOID_DRUGS or resource.flag("doNotPerform"):
            self._tally.add(f"{what} cancelled, not done or entered in error")
            return
        if resource.word("intent") in _NO_ORDERS:
            self._tally.add(f"{what} that are no orders")
            return
        if "medication" in resource.body:
            raise resource.wrong("medication", "is of FHIR R5; R4 is read here", Code.DATA_FORMAT)
        stay = self._stay(
            resource, what, _one(resource.element("encounter" if request else "context"))
        )
        if stay is None:
            return
        concept = self._medication(resource, what)
        if concept is None:
            return
        start, stop = self._course(resource, request=request)
        for system, code, title in self._entries(concept, what):
            self._cohort.add_drug(
                stay, system, code, name=title or concept.name or "", start=start, stop=stop
            )

    def _medication(self, resource: _Element, what: str) -> _Concept | None:
        concept = resource.element("medicationCodeableConcept")
        if concept is not None:
            return _concept(concept)
        reference = resource.element("medicationReference")
        text = None if reference is None else reference.text("reference")
        if text is not None and text.startswith("#"):
            for inner in resource.elements("contained"):
                if inner.text("resourceType") == "Medication" and inner.word("id") == text[1:]:
                    return _concept(inner.element("code"))
        found = self._roll.medications.get(_target(reference, "Medication") or "")
        if found is None:
            self._tally.add(f"{what} whose drug cannot be resolved")
        return found

    def _course(
        self, resource: _Element, *, request: bool
    ) -> tuple[datetime | None, datetime | None]:
        """From when until when, as far as the resource says so."""
        if request:
            dispense = resource.element("dispenseRequest")
            period = None if dispense is None else dispense.element("validityPeriod")
            stop = None if period is None else period.time("end", self._tally, last=True)
            return resource.time("authoredOn", self._tally), stop
        period = resource.element("effectivePeriod")
        if period is None:
            return resource.time("effectiveDateTime", self._tally), None
        return period.time("start", self._tally), period.time("end", self._tally, last=True)

    def _document(self, resource: _Element) -> None:
        what = "documents"
        if not _VOID.isdisjoint({resource.word("status"), resource.word("docStatus")}):
            self._tally.add(f"{what} entered in error or cancelled")
            return
        kind = self._category(resource.element("type"))
        if kind is None:
            return
        context = resource.element("context")
        encounters = [] if context is None else context.elements("encounter")
        stay = self._stay(resource, what, encounters)
        if stay is None:
            return
        contents = [content.element("attachment") for content in resource.elements("content")]
        text = self._attached([part for part in contents if part is not None], what)
        if text is not None:
            time = resource.time("date", self._tally)
            self._cohort.add_note(stay, kind, time, text)

    def _report(self, resource: _Element) -> None:
        what = "reports"
        if resource.word("status") in _VOID:
            self._tally.add(f"{what} entered in error or cancelled")
            return
        kind = self._category(resource.element("code"))
        if kind is None:
            return
        stay = self._stay(resource, what, _one(resource.element("encounter")))
        if stay is None:
            return
        forms = resource.elements("presentedForm")
        form = self._attached(forms, f"forms of {what}") if forms else None
        said = [part for part in (form, resource.text("conclusion")) if part]
        if not said:
            narrative = resource.element("text")
            div = None if narrative is None else narrative.text("div")
            told = "" if div is None else _words(div)
            said = [told] if told else []
        if not said:
            self._tally.add(f"{what} without text")
            return
        # When it was handed on, not what it is about: that is when it could be known.
        time = resource.time("issued", self._tally) or self._effective(resource)
        self._cohort.add_note(stay, kind, time, "\n".join(said))

    def _effective(self, resource: _Element) -> datetime | None:
        for key in ("effectiveDateTime", "effectiveInstant"):
            time = resource.time(key, self._tally)
            if time is not None:
                return time
        period = resource.element("effectivePeriod")
        return None if period is None else period.time("start", self._tally)

    def _category(self, element: _Element | None) -> str | None:
        """What kind of note this is; None where that kind is not wanted.

        Its name, or whichever of its names and codes is asked for.
        """
        concept = _concept(element)
        spellings = (*concept.names, *concept.codes)
        if self._wanted.categories is None:
            return concept.name or ""
        return next((name for name in spellings if self._wanted.takes(name)), None)

    def _attached(self, attachments: Sequence[_Element], what: str) -> str | None:
        """The text of an attachment, plain before HTML; None, counted, where there is none."""
        read = False
        for kinds in (_PLAIN, _HTML):
            for attachment in attachments:
                kind, charset = _content_type(attachment)
                data = attachment.text("data")
                if kind not in kinds or data is None:
                    continue
                read = True
                text = _decoded(attachment, data, charset)
                text = _words(text) if kinds is _HTML else text
                if text.strip():
                    return text
        if read:
            self._tally.add(f"{what} whose text is empty")
        elif any("url" in attachment.body for attachment in attachments):
            self._tally.add(f"{what} that stand at an address (nothing is fetched)")
        elif any("data" in attachment.body for attachment in attachments):
            self._tally.add(f"{what} that are neither plain text nor HTML")
        else:
            self._tally.add(f"{what} without an attachment")
        return None

    def _observation(self, resource: _Element) -> None:
        what = "observations"
        if resource.word("status") in _VOID:
            self._tally.add(f"{what} entered in error or cancelled")
            return
        components = resource.elements("component")
        measured = [resource, *components] if _has_value(resource) else components or [resource]
        wanted = [(part, item) for part in measured if (item := self._item(part)) is not None]
        if not wanted:
            return
        stay = self._stay(resource, what, _one(resource.element("encounter")))
        if stay is None:
            return
        time = self._effective(resource) or resource.time("issued", self._tally)
        for part, item in wanted:
            self._measured(stay, part, item, time)

    def _item(self, part: _Element) -> str | None:
        """What is measured: as the wanted item spells it, else its LOINC code, else its name."""
        concept = _concept(part.element("code"))
        if self._wanted.items is None:
            if concept.name is None:
                self._tally.add("observations without a code")
            loinc = next((code for system, code, _ in concept.known if system == "loinc"), None)
            return loinc or concept.name
        spellings = (*concept.codes, *concept.names)
        return next(
            (self._names[name.casefold()] for name in spellings if name.casefold() in self._names),
            None,
        )

    def _measured(self, stay: Stay, part: _Element, item: str, time: datetime | None) -> None:
        quantity = part.element("valueQuantity")
        if quantity is None:
            value, unit = part.number("valueInteger"), ""
        else:
            value, unit = quantity.number("value"), _unit(quantity)
            if quantity.word("comparator") is not None:
                self._tally.add("measurements below or above a bound (the bound is kept)")
        if value is None:
            self._tally.add("observations without a number")
        elif self._items.accepts(item, unit):
            self._cohort.add_number(stay, item, unit, value=value, time=time)


_KINDS: Final = frozenset(
    {
        "Condition",
        "DiagnosticReport",
        "DocumentReference",
        "Encounter",
        "Medication",
        "MedicationAdministration",
        "MedicationRequest",
        "Observation",
        "Patient",
    }
)


def _one(element: _Element | None) -> list[_Element]:
    return [] if element is None else [element]


def _has_value(element: _Element) -> bool:
    return any(key.startswith("value") for key in element.body)


def _unit(quantity: _Element) -> str:
    """The unit's UCUM code where it has one, else as it is written."""
    ucum = quantity.word("code") if quantity.text("system") == _UCUM else None
    return ucum or quantity.word("unit") or quantity.word("code") or ""


def _content_type(attachment: _Element) -> tuple[str, str | None]:
    kind, *parameters = (attachment.word("contentType") or "").split(";")
    charset = None
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip("\"'")
    return kind.strip().lower(), charset


def _decoded(attachment: _Element, data: str, charset: str | None) -> str:
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise attachment.wrong("data", "is not base64") from None
    try:
        name = codecs.lookup(charset or "utf-8").name
    except (LookupError, ValueError):
        name = ""
    if name not in _CHARSETS:
        what = "names a character set that is not read here"
        raise attachment.wrong("contentType", what, Code.DATA_ENCODING)
    try:
        return raw.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError:
        what = "is not text in the character set named (UTF-8 where none is)"
        raise attachment.wrong("data", what, Code.DATA_ENCODING) from None


class _Text(HTMLParser):
    """Collects what a page says, a line for each block; scripts and styles say nothing."""

    _SILENT: Final = frozenset({"script", "style", "head", "template"})
    _INLINE: Final = frozenset(
        {"a", "abbr", "b", "code", "em", "font", "i", "mark", "small", "span", "strong", "sub"}
        | {"sup", "tt", "u"}
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in self._SILENT:
            self._silent += 1
        elif tag not in self._INLINE:
            self._pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag not in self._INLINE:
            self._pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._pieces.append(data)

    def said(self) -> str:
        """What was collected, blanks drawn together and empty lines left out."""
        lines = (" ".join(line.split()) for line in "".join(self._pieces).splitlines())
        return "\n".join(line for line in lines if line)


def _words(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    parser.close()
    return parser.said()
