"""Replaces what names a person by tags, with counts; an optional pass over texts.

It lowers what a person reads on a screen and what gets into a model's vocabulary. It is no
guarantee: names without a title, places, rare words and everything misspelt stay, so what comes
out is still a patient's record and is treated as one. English, by patterns alone; each pattern is
bounded, so no text takes more than linear time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Final, Literal, get_args

__all__ = ["CATEGORIES", "Category", "Deidentifier", "deidentify"]

Category = Literal["date", "phone", "email", "id", "name", "age", "postcode", "url", "ip"]
CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)

_MONTH: Final = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?|"
    r"JAN(?:UARY)?|FEB(?:RUARY)?|MAR(?:CH)?|APR(?:IL)?|MAY|JUNE?|JULY?|AUG(?:UST)?|"
    r"SEPT?(?:EMBER)?|OCT(?:OBER)?|NOV(?:EMBER)?|DEC(?:EMBER)?)\b\.?"
)
_DAY: Final = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR: Final = r"(?:19|20)\d\d"
_CLOCK: Final = r"(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:?\d\d)?)?"
_ORDINAL: Final = r"(?:st|nd|rd|th)?"
_CAPITAL: Final = (
    r"[A-ZÀ-ÖØ-Þ](?:[^\W\d_]|['\u2019]){1,30}(?:-[A-ZÀ-ÖØ-Þ](?:[^\W\d_]|['\u2019]){1,30})?"
)
_INITIAL: Final = r"(?:[A-Z]\.?[ ]){0,2}"
_STATE: Final = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|"
    r"S[CD]|T[NX]|UT|V[AT]|W[AIVY])"
)
# Words in capitals after a title that are no names.
_ROLE: Final = (
    r"(?!(?:Practitioner|Manager|Specialist|Anesthetist|Educator|Midwife|Consultant|On|The|Who|"
    r"Is|Was|Will|Has|To|And|In|At|For)\b)"
)

_PATTERNS: Final[tuple[tuple[Category, str], ...]] = (
    ("url", r"\b(?:https?://|ftp://|www\.)[^\s<>\"']{2,2048}+"),
    ("email", r"(?<![\w.+-])[\w.+-]{1,64}+@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"),
    (
        "ip",
        (
            r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
            r"(?![\d.]?\d)|(?<![:\w])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![:\w])"
        ),
    ),
    # A word that announces a number, and the number.
    (
        "id",
        (
            r"(?i:\b(?:MRN|M\.R\.N\.|URN|SSN|NHS|social security|passport|licen[cs]e)"
            r"(?: (?:number|num|no|nr|id)\b\.?)?[ \t]{0,2}[:#=]{0,2}"
            r"|\b(?:(?:medical )?record|patient|hospital|account|acct|chart|case|accession|"
            r"encounter|visit|policy|member|insurance|medicare|medicaid)"
            r"(?:[ ]?(?:number|num|no|nr|id|identifier)\b\.?[ \t]{0,2}[:#=]{0,2}|[ ]?[#:]{1,2}))"
            r"[ \t]{0,2}(?i:is )?#?(?i:[A-Z]{0,4})-?\d(?:[ -]?\d){3,18}(?i:[A-Z]{0,2})"
            r"(?![\w%/]|\.\d)"
        ),
    ),
    ("id", r"(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])"),
    (
        "phone",
        (
            r"(?i:\b(?:telephone|tel|phone|fax|pager|beeper|ext|extension)\b)"
            r"\.?[ \t]{0,2}(?i:number|no\.?)?[ \t]{0,2}[:#]?[ \t]{0,2}(?i:is |at |on )?"
            r"[+(]{0,2}\d(?:[ ().-]{0,2}\d){3,14}+(?!\d)"
        ),
    ),
    (
        "phone",
        (
            r"(?i:\b(?:call|cell|mobile)\b)[ \t]{0,2}[:#]?[ \t]{0,2}(?i:is |at |on )?"
            r"[+(]{0,2}\d(?:[ ().-]{0,2}\d){6,14}+(?!\d)"
        ),
    ),
    ("phone", r"(?<![\w+.-])\+\d(?:[ ().-]{0,2}\d){6,14}+(?!\d)"),
    (
        "phone",
        (
            r"(?<![\w.+-])(?:1[-. ])?(?:\(\d{3}\)[ ]?|\d{3}[-. ])\d{3}[-. ]\d{4}(?:[ ]?(?:x|ext\.?)"
            r"[ ]?\d{1,6})?(?![\d-])"
        ),
    ),
    ("phone", r"(?<![\w.+-])0\d(?:[ -]?\d){8,9}+(?!\d)"),
    (
        "date",
        (
            rf"(?<![\d-]){_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?!\d){_CLOCK}"
            rf"|(?<![\d/]){_YEAR}/(?:0?[1-9]|1[0-2])/{_DAY}(?![\d/])"
            rf"|(?<![\d/.]){_DAY}/{_DAY}/(?:{_YEAR}|\d\d)(?![\d/]){_CLOCK}"
            rf"|(?<![\d.-]){_DAY}([.-]){_DAY}\1{_YEAR}(?![\d-])"
            rf"|(?<![\d/])(?:0?[1-9]|1[0-2])/{_YEAR}(?![\d/])"
            r"|\b(?:[Oo]n|[Dd]ated|[Ss]ince|[Uu]ntil)[ ]"
            rf"(?:0?[1-9]|1[0-2])/{_DAY}(?![\d/%])(?![ ]?[-\u2013])"
            rf"|\b{_MONTH}[ -]{_DAY}{_ORDINAL}(?!\w|[.,]\d|[ ]?(?:mg|mcg|ml|g|units?)\b)"
            rf"(?:,?[ -]{_YEAR}(?!\d))?"
            rf"|(?<!\d){_DAY}{_ORDINAL}(?: of)?[ -]{_MONTH}(?:,?[ -]{_YEAR}(?!\d))?"
            rf"|\b{_MONTH},?[ ]{_YEAR}(?!\d)"
        ),
    ),
    (
        "name",
        (
            r"\b(?:Dr|Mr|Mrs|Ms|Mx|Miss|Prof|Professor|Doctor|Nurse)\b\.?[ ]{1,2}"
            rf"{_INITIAL}{_ROLE}{_CAPITAL}(?:[ ](?:[A-Z]\.[ ])?{_CAPITAL}(?![:\w]))?"
            r"|\b(?:DR|MR|MRS|MS)\.[ ]{1,2}[A-Z][A-Z'-]{2,30}(?:[ ][A-Z][A-Z'-]{2,30})?"
            r"|(?i:\b(?:(?:patient )?name|(?:electronically )?signed by|dictated by|attending"
            r"(?: physician)?|next of kin|PCP|referring physician|seen by|spouse|wife|husband)\b)"
            rf"[ ]{{0,2}}[:]?[ ]{{0,2}}{_INITIAL}{_ROLE}{_CAPITAL},?[ ]{_INITIAL}{_CAPITAL}"
            rf"|\b{_CAPITAL}[ ]{_INITIAL}{_CAPITAL},[ ]?(?:MD|M\.D\.|RN|NP|PA-C|DO|PhD|MBBS|FRCP)\b"
        ),
    ),
    (
        "age",
        (
            r"(?<![\d.])(?:9\d|1[0-4]\d)[ -]?(?:years?|yrs?\.?|y)"
            r"(?:[ /-]{0,2}(?:old|of age|o)\b|\b)"
            r"|(?i:\b(?:aged?|age is|age of))[ ]?:?[ ]?(?:9\d|1[0-4]\d)(?!\d|[.-]\w|%)"
        ),
    ),
    (
        "postcode",
        (
            r"(?i:\b(?:zip(?: ?code)?|post(?:al )?code|postcode)\b)[ ]?:?[ ]?(?=[A-Z]{0,2}\d)"
            r"[A-Z\d]{3,7}(?:[ -][A-Z\d]{3,4})?\b"
            rf"|\b{_STATE},?[ ]\d{{5}}(?:-\d{{4}})?(?!\d)|(?<![\d-])\d{{5}}-\d{{4}}(?![\d-])"
            r"|\b[A-Z]{1,2}\d[A-Z\d]?[ ]\d[ABD-HJLNP-UW-Z]{2}\b"
        ),
    ),
)
# Marks of a pass that somebody else made, as in MIMIC-III, stay as they are.
_DONE: Final = r"\[\*\*[^\]\n]{0,200}\*\*\]"


class Deidentifier:
    """Replaces and counts; `counts` goes on over all texts.

    Args:
        categories: what is replaced; every category where nothing is said.

    Guarantee: time linear in a text's length, whatever it holds.
    """

    def __init__(self, categories: Collection[Category] = CATEGORIES) -> None:
        self.counts: Counter[Category] = Counter()
        self._kinds: list[Category | None] = [None]
        parts = [f"({_DONE})"]
        for category, pattern in _PATTERNS:
            if category in categories:
                self._kinds.append(category)
                parts.append(f"(?P<p{len(self._kinds) - 1}>{_named(pattern, len(parts))})")
        self._pattern = re.compile("|".join(parts))

    def __call__(self, text: str) -> str:
        """The text with `[DATE]`, `[NAME]` and so on in the places of what was found."""
        return self._pattern.sub(self._tag, text)

    def _tag(self, found: re.Match[str]) -> str:
        group = found.lastgroup
        category = None if group is None else self._kinds[int(group[1:])]
        if category is None:
            return found[0]
        self.counts[category] += 1
        return f"[{category.upper()}]"


def _named(pattern: str, number: int) -> str:
    """The pattern with its one inner group named, because patterns are joined."""
    return pattern.replace("([.-])", f"(?P<s{number}>[.-])").replace(r"\1", f"(?P=s{number})")


def deidentify(text: str) -> tuple[str, Counter[Category]]:
    """One text and what was replaced in it, by category."""
    replace = Deidentifier()
    return replace(text), replace.counts
