"""Diagnosis and drug codes: one normal form for each, and their roll-up to coarser groups.

Systems are told apart by the source or by an unmistakable form, never by guessing: what does not
fit its system has no normal form, and whoever asks counts it.
Source: ICD-9-CM and ICD-10 tabular lists (chapters), WHO ATC (levels), FDA (NDC segments).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

__all__ = [
    "CHAPTERS",
    "CodeRollUp",
    "ancestors",
    "atc_group",
    "category",
    "chapter",
    "normal",
    "parse",
    "public_set",
    "system_of_icd",
    "tagged",
]

Level = Literal["exact", "category", "chapter"]

_ICD9: Final = re.compile(r"([0-9]{3}|V[0-9]{2}|E[0-9]{3})(?:(\.?)([0-9]{1,2}))?", re.ASCII)
_ICD10: Final = re.compile(r"([A-Z][0-9][0-9A-Z])(?:\.?([0-9A-Z]{1,4}))?", re.ASCII)
_ATC: Final = re.compile(
    r"[ABCDGHJLMNPRSV](?:[0-9]{2}(?:[A-Z](?:[A-Z](?:[0-9]{2})?)?)?)?", re.ASCII
)
_NDC: Final = re.compile(r"([0-9]{4,5})-([0-9]{3,4})-([0-9]{1,2})", re.ASCII)
_PLAIN: Final = MappingProxyType(
    {
        "snomed": re.compile(r"[0-9]{6,18}", re.ASCII),
        "rxnorm": re.compile(r"[0-9]{1,8}", re.ASCII),
        "loinc": re.compile(r"[0-9]{1,7}-[0-9]", re.ASCII),
    }
)
_NDC_LENGTH: Final = 10  # digits of an FDA code; the eleventh pads one segment

CHAPTERS: Final[Mapping[str, tuple[tuple[str, str, str], ...]]] = MappingProxyType(
    {
        "icd9": (
            ("001", "139", "infectious and parasitic diseases"),
            ("140", "239", "neoplasms"),
            ("240", "279", "endocrine, nutritional, metabolic and immune disorders"),
            ("280", "289", "blood and blood-forming organs"),
            ("290", "319", "mental disorders"),
            ("320", "389", "nervous system and sense organs"),
            ("390", "459", "circulatory system"),
            ("460", "519", "respiratory system"),
            ("520", "579", "digestive system"),
            ("580", "629", "genitourinary system"),
            ("630", "679", "pregnancy, childbirth and the puerperium"),
            ("680", "709", "skin and subcutaneous tissue"),
            ("710", "739", "musculoskeletal system and connective tissue"),
            ("740", "759", "congenital anomalies"),
            ("760", "779", "conditions of the perinatal period"),
            ("780", "799", "symptoms, signs and ill-defined conditions"),
            ("800", "999", "injury and poisoning"),
            ("V01", "V91", "factors influencing health status"),
            ("E000", "E999", "external causes"),
        ),
        "icd10": (
            ("A00", "B99", "infectious and parasitic diseases"),
            ("C00", "D49", "neoplasms"),
            ("D50", "D89", "blood, blood-forming organs and immune mechanism"),
            ("E00", "E90", "endocrine, nutritional and metabolic diseases"),
            ("F00", "F99", "mental and behavioural disorders"),
            ("G00", "G99", "nervous system"),
            ("H00", "H59", "eye and adnexa"),
            ("H60", "H95", "ear and mastoid process"),
            ("I00", "I99", "circulatory system"),
            ("J00", "J99", "respiratory system"),
            ("K00", "K95", "digestive system"),
            ("L00", "L99", "skin and subcutaneous tissue"),
            ("M00", "M99", "musculoskeletal system and connective tissue"),
            ("N00", "N99", "genitourinary system"),
            ("O00", "O9Z", "pregnancy, childbirth and the puerperium"),
            ("P00", "P96", "conditions of the perinatal period"),
            ("Q00", "Q99", "congenital anomalies"),
            ("R00", "R99", "symptoms, signs and abnormal findings"),
            ("S00", "T98", "injury, poisoning and consequences of external causes"),
            ("V00", "Y99", "external causes"),
            ("Z00", "Z99", "factors influencing health status"),
            ("U00", "U85", "codes for special purposes"),
        ),
    }
)
"""(first category, last category, title) of every chapter, in the order of their numbers."""

_SYSTEMS: Final = frozenset(
    {"icd9", "icd10", "snomed", "rxnorm", "ndc", "atc", "loinc", "name"}
)  # as client/data/encounters.py names them


def normal(system: str, code: str) -> str | None:
    """The one way to write `code` of `system` (ICD dotted, NDC of 11 digits); None if it is none.

    ICD-9 categories keep their zeros: `38.9` is no diagnosis (it is a procedure), `038.9` is.
    An NDC of ten digits without hyphens has no normal form: which segment lacks a zero is not told.
    """
    text = code.strip().upper()
    if system == "icd9":
        return _normal_icd9(text)
    if system == "icd10":
        found = _ICD10.fullmatch(text)
        if found is None or _chapter_of("icd10", found[1]) is None:
            return None
        return f"{found[1]}.{found[2]}" if found[2] else found[1]
    if system == "atc":
        return text if _ATC.fullmatch(text) else None
    if system == "ndc":
        return _normal_ndc(text)
    if system in _PLAIN:
        return text if _PLAIN[system].fullmatch(text) else None
    return None


def _normal_icd9(text: str) -> str | None:
    found = _ICD9.fullmatch(text)
    if found is None or _chapter_of("icd9", found[1]) is None:
        return None
    if found[1][0] == "E" and len(found[3] or "") > 1:
        return None
    return f"{found[1]}.{found[3]}" if found[3] else found[1]


def _normal_ndc(text: str) -> str | None:
    if re.fullmatch(r"[0-9]{11}", text, re.ASCII):
        return text
    found = _NDC.fullmatch(text)
    if found is None:
        return None
    digits = len(found[1]) + len(found[2]) + len(found[3])
    if digits not in {_NDC_LENGTH, _NDC_LENGTH + 1}:
        return None
    return found[1].zfill(5) + found[2].zfill(4) + found[3].zfill(2)


def system_of_icd(code: str) -> Literal["icd9", "icd10"] | None:
    """Which ICD a dotted code is written in; None where both or neither would do.

    `V45.01` is a pacemaker in ICD-9 and an accident in ICD-10: nobody can tell from the code.
    """
    text = code.strip().upper()
    old, new = normal("icd9", text), normal("icd10", text)
    if "." not in text and old is not None and new is not None:
        return None
    if "." in text:  # the place of the dot tells: E812.0 is ICD-9, E81.20 is ICD-10
        head = text.partition(".")[0]
        old = old if old is not None and old.partition(".")[0] == head else None
        new = new if new is not None and new.partition(".")[0] == head else None
    if (old is None) == (new is None):
        return None
    return "icd9" if old is not None else "icd10"


def category(system: str, code: str) -> str | None:
    """The ICD category (three characters; four for ICD-9 E codes) of a code in any form."""
    found = normal(system, code)
    return None if found is None or system not in CHAPTERS else found.partition(".")[0]


def chapter(system: str, code: str) -> int | None:
    """The number of the ICD chapter that holds `code`, counted from 1; None if none does."""
    head = category(system, code)
    return None if head is None else _chapter_of(system, head)


def _chapter_of(system: str, head: str) -> int | None:
    for number, (first, last, _) in enumerate(CHAPTERS[system], start=1):
        if len(head) == len(first) and first <= head <= last:
            return number
    return None


def atc_group(code: str, level: Literal[1, 2, 3, 4, 5] = 3) -> str | None:
    """The ATC group of a drug at a level (3: four characters, as `C07A`).

    None where the code is none, or is itself coarser than the level.
    """
    found = normal("atc", code)
    length = (1, 3, 4, 5, 7)[level - 1]
    return None if found is None or len(found) < length else found[:length]


# ---------------------------------------------------------------------- codes with their system


def tagged(system: str, code: str) -> str | None:
    """`system:code` in normal form, as vocabularies and records hold it; None if it is no code."""
    found = normal(system, code)
    return None if found is None else f"{system}:{found}"


def parse(text: str, system: str) -> str | None:
    """A record's code as `tagged` writes it, or None if it is none.

    `text` is `system:code`, or a bare code of `system`; with `icd` the form tells which ICD; with
    `none` it is a word of the study's own vocabulary, taken as it stands.
    """
    head, colon, rest = text.strip().partition(":")
    if colon and head.lower() in _SYSTEMS:
        return tagged(head.lower(), rest)
    if system == "none":
        return text.strip() or None
    if system == "icd":
        told = system_of_icd(text)
        return None if told is None else tagged(told, text)
    return tagged(system, text)


def ancestors(code: str) -> tuple[str, ...]:
    """A tagged code and what it rolls up to, finest first: exact, category, chapter.

    For ATC its own levels; for other systems the code alone.
    """
    system, _, rest = code.partition(":")
    if system in CHAPTERS:
        head, number = category(system, rest), chapter(system, rest)
        if head is None or number is None:
            return (code,)
        found: tuple[str, ...] = (code, f"{system}:{head}", f"{system}:chapter-{number:02d}")
    elif system == "atc":
        found = tuple(f"atc:{rest[:n]}" for n in (7, 5, 4, 3, 1) if n <= len(rest))
    else:
        found = (code,)
    return tuple(dict.fromkeys(found))


def public_set(name: str) -> tuple[str, ...] | None:
    """A whole public vocabulary by name: `icd9:categories`, `icd10:chapters` and so on.

    None if there is no such set. ICD-10 categories are those of a letter and two digits, and
    the few with a letter at their end that ICD-10-CM uses.
    """
    system, _, level = name.partition(":")
    table = CHAPTERS.get(system)
    if table is None or level not in {"categories", "chapters"}:
        return None
    if level == "chapters":
        return tuple(f"{system}:chapter-{number:02d}" for number in range(1, len(table) + 1))
    return tuple(f"{system}:{head}" for head in _categories(system))


def _categories(system: str) -> list[str]:
    if system == "icd9":
        heads = [f"{n:03d}" for n in range(1, 1000)]
        heads += [f"V{n:02d}" for n in range(1, 92)]
        heads += [f"E{n:03d}" for n in range(1000)]
    else:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        heads = [f"{letter}{n:02d}" for letter in letters for n in range(100)]
        heads += ["C4A", "C7A", "C7B", "D3A", "M1A", "O9A", "Z3A"]
    return [head for head in heads if _chapter_of(system, head) is not None]


class CodeRollUp:
    """Rolls codes up to one level and counts what could not be, by reason.

    Reasons are fixed texts; no code is repeated in them.
    """

    def __init__(self, system: str, level: Level = "category") -> None:
        self._system = system
        self._level = level
        self.counts: Counter[str] = Counter()

    def __call__(self, codes: Iterable[str]) -> tuple[str, ...]:
        """The groups of `codes`, each once, in order of first appearance."""
        found: dict[str, None] = {}
        for code in codes:
            known = parse(code, self._system)
            if known is None:
                self.counts["not a code of its system"] += 1
                continue
            steps = ancestors(known)
            wanted = {"exact": 0, "category": 1, "chapter": 2}[self._level]
            coarsest = len(steps) - 1
            # A code that is a category already stands first and second.
            if "chapter-" in steps[-1]:
                at = coarsest if wanted == 2 else min(wanted, coarsest - 1)  # noqa: PLR2004
            else:
                at = 0
            found[steps[at]] = None
        return tuple(found)
