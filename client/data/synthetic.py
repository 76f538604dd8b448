"""Invented notes of five invented hospitals, for the demo and the tests. No real patient.

Five causes of breathlessness share most of their signs. A patient's signs are drawn from the
true diagnosis; notes then report some, deny others, tell family and past history that names the
wrong disease, guess wrongly, and are coded wrongly now and then: nobody can score 100 %.
Hospitals differ in case mix and in how they write. The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from client.data.records import Record
from common.errors import Code, StorageError

__all__ = ["HOSPITALS", "LABELS", "Hospital", "generate", "write_csv"]

LABELS: Final = (
    "pneumonia",
    "heart failure",
    "copd exacerbation",
    "pulmonary embolism",
    "asthma",
)
MARK: Final = "SYNTHETIC"
COLUMNS: Final = ("patient", "hospital", "label", "text", "origin")

_MISCODED: Final = 0.04
_SECOND_NOTE: Final = 0.12
_PAST_TOLD: Final = 0.45
_PAST_IS_TRUE: Final = 0.3
_FAMILY_TOLD: Final = 0.3
_GUESSED: Final = 0.2
_LASTING: Final = ("asthma", "copd exacerbation")
_NAMES: Final = {
    "pneumonia": ("pneumonia", "a chest infection", "CAP", "PNA"),
    "heart failure": ("heart failure", "congestive heart failure", "CHF", "HFrEF"),
    "copd exacerbation": ("COPD", "chronic bronchitis", "COPD", "AECOPD"),
    "pulmonary embolism": ("a pulmonary embolism", "blood clots in the lung", "PE", "PE"),
    "asthma": ("asthma", "bronchial asthma", "asthma", "BA"),
}

# a finding: its chance in % for each label, then how it is said in words, in short, in numbers
_FINDINGS: Final[tuple[tuple[tuple[int, ...], tuple[str, str, str]], ...]] = (
    ((45, 45, 45, 45, 45), ("shortness of breath", "SOB", "RR {rr}")),
    ((60, 15, 55, 8, 45), ("a cough", "cough", "cough {days} d")),
    ((75, 4, 40, 4, 6), ("purulent sputum", "cough with green sputum", "sputum ++")),
    ((85, 3, 14, 8, 4), ("fever and chills", "fever, chills", "temp {fever} C")),
    ((40, 5, 4, 65, 4), ("chest pain on breathing in", "pleuritic pain", "chest pain {pain}/10")),
    ((2, 2, 3, 2, 70), ("pollen and dust as triggers", "allergic trigger", "pollen IgE {ige}")),
    ((2, 4, 3, 65, 2), ("one swollen and tender calf", "unilat calf swelling", "calf +3 cm")),
    ((6, 3, 60, 2, 70), ("a need for steroids and nebulisers", "steroids, nebs", "steroids iv")),
    ((4, 85, 12, 8, 2), ("swelling of both ankles", "leg edema bilat", "leg edema 2+")),
    ((4, 80, 10, 4, 6), ("breathlessness when lying flat", "orthopnea", "orthopnea, 3 pillows")),
    ((5, 60, 10, 14, 2), ("raised neck veins", "JVD", "JVP {jvp} cm")),
    ((55, 60, 14, 8, 3), ("crackles at the lung bases", "basal crackles", "crackles 1/3")),
    ((6, 8, 85, 4, 92), ("wheezing over both lungs", "wheeze", "wheeze, PEF {pef} %")),
    ((18, 22, 92, 12, 4), ("decades of heavy smoking", "heavy smoker", "smoker {pack} py")),
    ((2, 2, 20, 2, 70), ("quick relief from an inhaler", "relief by inhaler", "FEV1 +{rev} %")),
    ((3, 4, 3, 60, 2), ("recent surgery and bed rest", "recent surgery", "surgery {days} d ago")),
    ((5, 10, 6, 75, 6), ("a sudden onset within minutes", "sudden onset", "sudden onset")),
    ((15, 20, 12, 60, 18), ("a racing heart", "tachycardia", "HR {hr}")),
    ((80, 5, 8, 8, 2), ("a new shadow on the chest film", "CXR infiltrate", "CXR infiltrate")),
    ((4, 75, 8, 6, 2), ("a large heart on the chest film", "CXR cardiomegaly", "CTR 0.{ctr}")),
    ((4, 4, 75, 3, 12), ("overinflated lungs", "CXR hyperinflation", "hyperinflated, RV {rv} %")),
    ((60, 10, 25, 15, 6), ("high inflammation markers", "CRP high", "CRP {crp}")),
    ((6, 80, 8, 20, 2), ("a high natriuretic peptide", "BNP high", "BNP {bnp}")),
    ((14, 14, 8, 85, 3), ("a raised D-dimer", "D-dimer pos", "D-dimer {dd}")),
    ((8, 8, 60, 6, 12), ("carbon dioxide retention", "CO2 retention", "pCO2 {co2}")),
    ((4, 2, 3, 2, 60), ("attacks since childhood", "attacks since childhood", "onset age {child}")),
    ((25, 20, 30, 30, 14), ("a low oxygen saturation", "hypoxia", "SpO2 {sat} %")),
    ((70, 4, 25, 4, 2), ("a need for antibiotics", "abx started", "antibiotics iv")),
    ((3, 80, 4, 5, 1), ("relief by a diuretic", "furosemide iv", "furosemide {fur} mg")),
    ((2, 8, 2, 70, 1), ("a need for blood thinners", "heparin started", "heparin iv")),
)  # fmt: skip
_NUMBERS: Final = {
    "rr": (22, 36), "days": (2, 9), "fever": (38, 40), "pain": (4, 9), "jvp": (6, 12),
    "pef": (35, 65), "fev": (35, 62), "pack": (25, 70), "ige": (220, 900), "rev": (14, 35),
    "hr": (102, 138), "ctr": (55, 68), "rv": (150, 210), "crp": (45, 260), "bnp": (600, 4200),
    "dd": (2, 9), "co2": (48, 74), "child": (4, 12), "fur": (20, 80), "sat": (82, 91),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hospital:
    """An invented hospital: its name, its patients, its case mix by label, how it writes."""

    name: str
    patients: int
    mix: tuple[float, ...]
    style: str


HOSPITALS: Final = (
    Hospital("Northgate General", 190, (0.28, 0.24, 0.18, 0.14, 0.16), "verbose"),
    Hospital("St Brigid Heart Centre", 170, (0.14, 0.44, 0.10, 0.26, 0.06), "brief"),
    Hospital("Lakeside Lung Clinic", 150, (0.18, 0.08, 0.38, 0.08, 0.28), "numeric"),
    Hospital("Elm Valley District", 140, (0.36, 0.18, 0.28, 0.08, 0.10), "letter"),
    Hospital("Harbour Emergency", 120, (0.16, 0.12, 0.16, 0.28, 0.28), "notes"),
)


@dataclass(frozen=True)
class _Case:
    """What a note may say: indexes of findings that are there or denied, and side stories."""

    age: int
    woman: bool
    present: tuple[int, ...]
    denied: tuple[int, ...]
    past: str | None
    family: str | None
    guess: tuple[str, ...]


def generate(seed: int = 0) -> tuple[Record, ...]:
    """The notes of all hospitals, deterministic: about 870 notes of 770 patients.

    `file` is "synthetic" and `line` the note's number; `site` is the hospital's name.
    """
    records: list[Record] = []
    for number, hospital in enumerate(HOSPITALS):
        stream = np.random.Generator(np.random.PCG64([seed, number]))
        for patient in range(1, hospital.patients + 1):
            label = LABELS[int(stream.choice(len(LABELS), p=hospital.mix))]
            coded = _coded(label, stream)
            for _ in range(1 + int(stream.random() < _SECOND_NOTE)):
                text = _STYLES[hospital.style](_case(label, stream), stream)
                who = f"syn-{number + 1}-{patient:04d}"
                line = len(records) + 1
                records.append(Record(who, text, coded, hospital.name, "synthetic", line))
    return tuple(records)


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write `records` with the columns patient, hospital, label, text, origin (= SYNTHETIC).

    Raises:
        StorageError: the file cannot be written.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([r.patient, r.site, r.label, r.text, MARK] for r in records)
    try:
        path.write_text(buffer.getvalue(), "utf-8", newline="")
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror})."
        raise StorageError(Code.MODEL_OUTPUT, message) from None


def _coded(label: str, stream: np.random.Generator) -> str:
    """The label in the file: now and then another one, as codes in real files are."""
    if stream.random() >= _MISCODED:
        return label
    others = [other for other in LABELS if other != label]
    return others[int(stream.integers(len(others)))]


def _case(label: str, stream: np.random.Generator) -> _Case:
    rates = np.array([chances[LABELS.index(label)] for chances, _ in _FINDINGS]) / 100
    there = stream.random(len(_FINDINGS)) < rates
    present = stream.permutation(np.flatnonzero(there))[: int(stream.integers(5, 10))]
    denied = stream.permutation(np.flatnonzero(~there))[: int(stream.integers(1, 3))]
    other = LABELS[int(stream.integers(len(LABELS)))]
    past = label if label in _LASTING and stream.random() < _PAST_IS_TRUE else other
    guess = {label, LABELS[int(stream.integers(len(LABELS)))]}
    kin = LABELS[int(stream.integers(len(LABELS)))]
    return _Case(
        age=_age(label, stream),
        woman=bool(stream.integers(2)),
        present=tuple(int(i) for i in present),
        denied=tuple(int(i) for i in denied),
        past=past if stream.random() < _PAST_TOLD else None,
        family=kin if stream.random() < _FAMILY_TOLD else None,
        guess=tuple(sorted(guess)) if stream.random() < _GUESSED else (),
    )


def _age(label: str, stream: np.random.Generator) -> int:
    centre, spread = (34, 14) if label == "asthma" else (68, 13)
    return int(np.clip(round(stream.normal(centre, spread)), 18, 96))


def _name(label: str, form: int, stream: np.random.Generator) -> str:
    """A disease in words (form 0) or in short (form 2), in one of two ways."""
    return _NAMES[label][form + int(stream.integers(2))]


def _number(text: str, stream: np.random.Generator) -> str:
    values = {key: int(stream.integers(low, high + 1)) for key, (low, high) in _NUMBERS.items()}
    return text.format(**values)


def _said(indexes: Sequence[int], form: int, stream: np.random.Generator) -> list[str]:
    return [_number(_FINDINGS[i][1][form], stream) for i in indexes]


def _join(parts: Sequence[str], word: str) -> str:
    if len(parts) < 2:  # noqa: PLR2004 - one thing needs no conjunction
        return "".join(parts)
    return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def _verbose(case: _Case, stream: np.random.Generator) -> str:
    who = "woman" if case.woman else "man"
    she = "She" if case.woman else "He"
    said = _said(case.present, 0, stream)
    half = len(said) // 2 + 1
    parts = [
        f"This {case.age}-year-old {who} presented with {_join(said[:half], 'and')}.",
        f"There was no sign of {_join(_said(case.denied, 0, stream), 'or')}.",
    ]
    if said[half:]:
        parts.insert(1, f"On examination we found {_join(said[half:], 'and')}.")
    if case.past:
        parts.append(f"{she} had been treated for {_name(case.past, 0, stream)} years ago.")
    if case.family:
        parts.append(f"A parent died of {_name(case.family, 0, stream)}.")
    if case.guess:
        parts.append(f"We considered {_join([_name(g, 0, stream) for g in case.guess], 'or')}.")
    return " ".join(parts)


def _brief(case: _Case, stream: np.random.Generator) -> str:
    parts = [
        f"{case.age}{'F' if case.woman else 'M'}",
        ", ".join(_said(case.present, 1, stream)),
        ", ".join(f"no {item}" for item in _said(case.denied, 1, stream)),
    ]
    if case.past:
        parts.append(f"h/o {_name(case.past, 2, stream)}")
    if case.family:
        parts.append(f"FHx {_name(case.family, 2, stream)}")
    if case.guess:
        parts.append("DDx " + " vs ".join(_name(g, 2, stream) for g in case.guess))
    return ". ".join(parts) + "."


def _numeric(case: _Case, stream: np.random.Generator) -> str:
    parts = [f"Age {case.age}, {'f' if case.woman else 'm'}"]
    parts.extend(_said(case.present, 2, stream))
    parts.extend(f"{item}: neg" for item in _said(case.denied, 1, stream))
    if case.past:
        parts.append(f"prev dx {_name(case.past, 2, stream)}")
    if case.family:
        parts.append(f"fam: {_name(case.family, 2, stream)}")
    if case.guess:
        parts.append("? " + " / ".join(_name(g, 2, stream) for g in case.guess))
    return "; ".join(parts)


def _letter(case: _Case, stream: np.random.Generator) -> str:
    who = "lady" if case.woman else "gentleman"
    parts = [
        f"Dear colleague, thank you for seeing this {who} of {case.age}.",
        f"The main complaints are {_join(_said(case.present, 0, stream), 'and')};",
        f"{_join(_said(case.denied, 0, stream), 'and')} could be ruled out.",
    ]
    if case.past:
        parts.append(f"Known from the files: {_name(case.past, 0, stream)}.")
    if case.family:
        parts.append(f"A sibling suffers from {_name(case.family, 0, stream)}.")
    if case.guess:
        parts.append(f"Could this be {_join([_name(g, 0, stream) for g in case.guess], 'or')}?")
    return " ".join(parts)


def _notes(case: _Case, stream: np.random.Generator) -> str:
    forms = [int(stream.integers(3)) for _ in case.present]
    said = [_said((i,), form, stream)[0] for i, form in zip(case.present, forms, strict=True)]
    parts = [f"triage: {case.age} yo", " + ".join(said)]
    parts.append("denies " + ", ".join(_said(case.denied, 0, stream)))
    if case.past:
        parts.append(f"PMH {_name(case.past, 2, stream)}")
    if case.family:
        parts.append(f"fam hx {_name(case.family, 2, stream)}")
    if case.guess:
        parts.append("r/o " + ", r/o ".join(_name(g, 2, stream) for g in case.guess))
    return " - ".join(parts)


_STYLES: Final[dict[str, Callable[[_Case, np.random.Generator], str]]] = {
    "verbose": _verbose,
    "brief": _brief,
    "numeric": _numeric,
    "letter": _letter,
    "notes": _notes,
}
