"""What every reader yields: one stay or visit of one patient, whatever system it came from.

A reader (client/data/readers) knows a format; it does not know the study. What a study makes of
encounters (its text, its label, its measurements) is decided in one place for all formats
(client/data/cases.py). No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

__all__ = [
    "CodeEntry",
    "CodeSystem",
    "DrugEntry",
    "Encounter",
    "ImageEntry",
    "Measurement",
    "Note",
    "Reader",
    "Tally",
]

CodeSystem = Literal["icd9", "icd10", "snomed", "rxnorm", "ndc", "atc", "loinc", "name"]
"""Where a code comes from; `name` is free text that no system defines."""


@dataclass(frozen=True, slots=True, repr=False)
class Note:
    """A clinical text: when it was written (None where the source does not say), and its kind."""

    text: str
    kind: str
    time: datetime | None


@dataclass(frozen=True, slots=True, repr=False)
class CodeEntry:
    """A diagnosis. `rank` 1 is the principal one; `time` is when it was recorded."""

    system: CodeSystem
    code: str
    rank: int | None
    time: datetime | None
    title: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class DrugEntry:
    """A prescription or administration; codes as the source has them, never guessed."""

    system: CodeSystem
    code: str
    name: str
    start: datetime | None
    stop: datetime | None


@dataclass(frozen=True, slots=True, repr=False)
class Measurement:
    """One number: what was measured (the source's own name or code), its unit, and when."""

    item: str
    value: float
    unit: str
    time: datetime | None


@dataclass(frozen=True, slots=True, repr=False)
class ImageEntry:
    """Where an image lies; pixels are read when they are needed (client/data/images.py)."""

    path: Path
    time: datetime | None


@dataclass(frozen=True, slots=True, repr=False)
class Encounter:
    """One stay or visit.

    `patient` is the unit of privacy. `age` is in years at `start`; ages that the source hides
    ("> 89") are 90. `sex` is `female`, `male`, or None for whatever else. `died` is None where the
    source does not say. `file` and `line` (1-based) say where the encounter begins.
    """

    patient: str
    encounter: str
    site: str | None
    start: datetime | None
    end: datetime | None
    age: float | None
    sex: str | None
    died: bool | None
    file: str
    line: int
    notes: tuple[Note, ...] = ()
    codes: tuple[CodeEntry, ...] = ()
    drugs: tuple[DrugEntry, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    images: tuple[ImageEntry, ...] = ()

    @property
    def where(self) -> str:
        """`file:line`, for messages: never what stands there."""
        return f"{self.file}:{self.line}"

    def __repr__(self) -> str:
        """The place alone, so that no log or traceback shows a patient."""
        return f"Encounter({self.where})"


@dataclass(slots=True)
class Tally:
    """What a reader left out or changed, by reason, in the words of its documentation.

    Reasons are fixed texts of the reader, never content of a record.
    """

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, count: int = 1) -> None:
        """Count `count` more."""
        self.counts[reason] += count


class Reader(Protocol):
    """A format: encounters out of a hospital's files or database."""

    @property
    def tally(self) -> Tally:
        """What was dropped or repaired so far; complete once `encounters` is used up."""
        ...

    def encounters(self) -> Iterator[Encounter]:
        """Every encounter, in a fixed order.

        Guarantee: memory is bounded by the wanted parts of the cohort, not by the files' size.

        Raises DataError naming file, line (or table and key) and fix.
        """
        ...
