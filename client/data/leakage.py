"""Keeps the answer out of the question: what was written too late, and what prints the diagnosis.

Three guards. Times: nothing after the observation window or after the label was known (`Limit`).
Headings: sections that print the diagnosis are cut (`SectionCutter`). Words: a warning where a
label's own words stand in its patients' texts far more often than in others' (`LabelWords`).
They see headings and times, not meaning: a diagnosis told in a sentence of the history stays.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Final, Literal

import numpy as np

from client.data.counting import HashCounts, hashed

__all__ = [
    "LATE",
    "SMALL",
    "UNDATED",
    "LabelWords",
    "Leak",
    "Limit",
    "SectionCutter",
    "hours_between",
    "share_told",
]

LATE: Final = "after the observation window or the label"
UNDATED: Final = "without a time to hold against the observation window or the label"

SMALL: Final = 5
"""Counts of fewer patients or records than this are not shown."""

_MANY: Final = 0.3  # a leak shows in at least this part of a label's patients …
_TIMES: Final = 3.0  # … this many times as often as elsewhere …
_SIGMAS: Final = 4.0  # … and not by chance
_LONGEST_HEADING: Final = 80
_WORDS_OF_A_TITLE: Final = 6
_SHORTEST_SHOUT: Final = 5
_MOST_ORNAMENTS: Final = 4
_END_OF_DAY: Final = time(23, 59, 59, 999_999)

# Sections that end a cut; other lines with a colon may be part of a list of diagnoses.
_SECTIONS: Final = (
    *("chief complaint", "history of present illness", "hpi", "present illness", "history"),
    *("past medical history", "pmh", "past surgical history", "surgical history"),
    *("medical history", "family history", "social history", "allergies", "allergy"),
    *("medications", "medications on admission", "admission medications", "home medications"),
    *("discharge medications", "current medications", "medication", "review of systems", "ros"),
    *("physical exam", "physical examination", "exam", "examination", "vital signs", "vitals"),
    *("discharge exam", "admission exam", "pertinent results", "laboratory data", "labs"),
    *("laboratory", "results", "studies", "imaging", "findings", "technique", "comparison"),
    *("indication", "clinical information", "procedure", "procedures", "service"),
    *("major surgical or invasive procedure", "discharge condition", "condition on discharge"),
    *("discharge disposition", "disposition", "followup instructions", "follow-up", "follow up"),
    *("facility", "attending", "sex", "date of birth", "admission date", "discharge date"),
    *("subjective", "objective", "data", "ecg", "ekg", "microbiology", "radiology"),
)
_GOES_ON: Final = re.compile(
    r"\b(?:primary|secondary|principal|acute|chronic|active|other|additional|final|resolved|"
    r"diagnos\w*|dx|problems?|comorbidit\w*|impressions?|assessment|plan|cardiac|pulmonary)\b"
)
_LEVEL: Final = re.compile(r"#{1,6}(?=[ \t\w*])")
_ORNAMENT: Final = re.compile(r"(?:[*_=>-]{1,4}|\d{1,2}[.)])[ \t]{0,4}")
_WORD: Final = re.compile(r"[^\W_]+")


# ---------------------------------------------------------------------------------- times


def hours_between(zero: datetime, moment: datetime | None) -> float | None:
    """Hours from `zero` to `moment`; None where one of the two has a time zone and the other not.

    A guess of the zone could be a day wrong, which is what a guard against leaks cannot afford.
    """
    if moment is None or (zero.tzinfo is None) != (moment.tzinfo is None):
        return None
    return (moment - zero).total_seconds() / 3600


@dataclass(frozen=True, slots=True)
class Limit:
    """The last moment that may be seen, None for no limit.

    `start` is the encounter's own start. Guarantee: a time of exactly midnight may be a date
    alone, so it is taken as the end of that day, unless it is `start` itself; what has no time, or
    one that cannot be compared, is judged by `undated`.
    """

    last: datetime | None
    undated: Literal["keep", "drop"]
    start: datetime | None = None

    def judge(self, moment: datetime | None, *, dated: bool = False) -> str:
        """Empty where `moment` may be seen, else the reason; `dated`: midnight is a time."""
        if self.last is None:
            return ""
        if moment is not None and not dated and moment.time() == time() and moment != self.start:
            moment = datetime.combine(moment.date(), _END_OF_DAY, moment.tzinfo)
        hours = hours_between(self.last, moment)
        if hours is None:
            return "" if self.undated == "keep" else UNDATED
        return "" if hours <= 0 else LATE

    def earlier(self, moment: datetime | None) -> Limit:
        """The limit that also holds at `moment`, which has a time zone exactly if `last` has."""
        if moment is None or self.last is None:
            return Limit(moment or self.last, self.undated, self.start)
        return Limit(min(moment, self.last), self.undated, self.start)


# ------------------------------------------------------------------------------- sections


@dataclass(frozen=True, slots=True)
class _Heading:
    """Where a heading begins, its level (0 without `#`), and what it does."""

    at: int
    level: int
    cuts: bool


class SectionCutter:
    """Cuts sections by their headings.

    A heading is a line that begins with it (after `#`, numbers, asterisks) and ends there or goes
    on after a colon or dash; or the heading and a colon within a line, because exports lose
    line ends. A section goes to the next heading: of the same or a higher level where it began
    with `#`; else a well-known one, one in capitals, or a title of several words after an empty
    line. Lines such as `Secondary:` do not end a cut: too much is cut rather than too little.

    Guarantee: time linear in the text's length.
    """

    def __init__(self, headings: Sequence[str]) -> None:
        self._cut = frozenset(_name(heading) for heading in headings)
        ends = {name for name in _SECTIONS if name not in self._cut}
        self._known = self._cut | ends
        # Within a line one word and a colon may be anything: `check labs: CBC` ends no plan.
        inline = self._cut | {name for name in ends if " " in name} | {"hpi", "pmh", "ros"}
        names = sorted(inline, key=len, reverse=True)
        alternatives = "|".join(re.escape(name).replace(r"\ ", "[ \t]") for name in names)
        self._inline = re.compile(rf"(?<![\w/&-])({alternatives})[ \t]{{0,3}}:", re.IGNORECASE)

    def __call__(self, text: str) -> tuple[str, int]:
        """(what is left, how many sections were cut); the text itself where none is."""
        if not self._cut:
            return text, 0
        kept, count, done, cutting = [], 0, 0, None
        for heading in self._headings(text):
            if cutting is None and heading.cuts:
                kept.append(text[done : heading.at])
                cutting, count = heading, count + 1
            elif cutting is not None and _ends(cutting, heading):
                cutting, done = None, heading.at
        if not count:
            return text, 0
        if cutting is None:
            kept.append(text[done:])
        return "".join(kept), count

    def _headings(self, text: str) -> Iterator[_Heading]:
        """Every heading, in order."""
        at, blank = 0, True
        for line in text.splitlines(keepends=True):
            title = _Title.of(line)
            headed = None if title is None else self._of_line(title, at, after_blank=blank)
            if headed is not None:
                yield headed
            for found in self._inline.finditer(line):
                # The heading that the line begins with was told already.
                if headed is None or title is None or found.start(1) > title.offset:
                    yield _Heading(at + found.start(1), 0, _name(found[1]) in self._cut)
            blank = title is None
            at += len(line)

    def _of_line(self, title: _Title, at: int, *, after_blank: bool) -> _Heading | None:
        name, words = _name(title.text), title.text.split()
        if not name or len(title.text) > _LONGEST_HEADING:
            return None
        capitals = title.text.isupper()
        marked = title.colon or title.alone
        if name in self._cut and (marked or title.level):
            return _Heading(at, title.level, cuts=True)
        if title.level:
            return _Heading(at, title.level, cuts=self._begins(name))
        if title.colon and len(words) <= _WORDS_OF_A_TITLE and self._begins(name):
            return _Heading(at, 0, cuts=True)
        if name in self._known and marked:
            sure = len(words) > 1 or title.alone or after_blank or capitals
            return _Heading(at, 0, cuts=False) if sure else None
        if not title.colon or _GOES_ON.search(name):
            return None
        titled = after_blank and title.alone and len(words) > 1 and title.text[0].isupper()
        shouted = capitals and len(name) >= _SHORTEST_SHOUT
        return _Heading(at, 0, cuts=False) if shouted or titled else None

    def _begins(self, name: str) -> bool:
        """Whether a cut heading stands at the beginning: `impression and recommendations`."""
        words = name.split()
        return any(" ".join(words[:count]) in self._cut for count in range(1, len(words)))


@dataclass(frozen=True, slots=True)
class _Title:
    """The beginning of a line, in case it is a heading.

    `offset` is where the title begins in the line, `colon` whether a colon or dash follows it,
    `alone` whether nothing else stands in the line.
    """

    text: str
    level: int
    offset: int
    colon: bool
    alone: bool

    @staticmethod
    def of(line: str) -> _Title | None:
        """None for an empty line."""
        bare = line.strip()
        if not bare:
            return None
        marks = _LEVEL.match(bare)
        level = 0 if marks is None else marks.end()
        start = level
        for _ in range(_MOST_ORNAMENTS):
            while start < len(bare) and bare[start] in " \t":
                start += 1
            ornament = _ORNAMENT.match(bare, start)
            if ornament is None or ornament.end() >= len(bare):
                break
            start = ornament.end()
        rest = bare[start : start + 2 * _LONGEST_HEADING]
        text, mark, tail = rest.partition(":")
        for dash in (" - ", " – "):  # noqa: RUF001 - as people write it
            if not mark:
                text, mark, tail = rest.partition(dash)
        offset = len(line) - len(line.lstrip()) + start
        return _Title(text, level, offset, bool(mark), alone=not tail.strip(" \t*_"))


def _ends(cutting: _Heading, heading: _Heading) -> bool:
    if heading.cuts:
        return False
    if cutting.level:
        return 0 < heading.level <= cutting.level
    return True


def _name(title: str) -> str:
    return " ".join(title.strip(" \t*_:#-").casefold().split())


# ---------------------------------------------------------------------------------- words


@dataclass(frozen=True, slots=True)
class Leak:
    """A label whose words stand in its patients' texts far more often than in others'.

    `here` and `elsewhere` are shares in words, with small counts hidden.
    """

    label: str
    here: str
    elsewhere: str

    def __str__(self) -> str:
        return (
            f"the words of the label {self.label} stand in the texts of {self.here} of its "
            f"patients, and of {self.elsewhere} of the others"
        )


class LabelWords:
    """Counts, label by label, in whose texts its words stand; one pass, patients as hashes.

    Args:
        phrases: for each label the words that give it away; the label itself always counts.
    """

    def __init__(self, labels: Iterable[str], phrases: Mapping[str, Sequence[str]] = {}) -> None:
        self._labels = tuple(labels)
        further = {} if phrases is None else phrases
        # By first word: a text is looked at once, however many labels there are.
        self._first: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        for label in self._labels:
            for phrase in {label, *further.get(label, ())}:
                words = tuple(_WORD.findall(phrase.casefold()))
                if words:
                    self._first[words[0]].append((words, label))
        self._everybody = HashCounts()
        self._with: dict[str, HashCounts] = {label: HashCounts() for label in self._labels}
        self._told: dict[str, HashCounts] = {label: HashCounts() for label in self._labels}
        self._other: dict[str, HashCounts] = {label: HashCounts() for label in self._labels}

    def add(self, patient: str, labels: Sequence[str], text: str) -> None:
        """One record: whose, with which labels, and its text."""
        who = hashed(patient)
        self._everybody.add(who)
        for label in labels:
            if label in self._with:
                self._with[label].add(who)
        for label in self._found(text):
            (self._told if label in labels else self._other)[label].add(who)

    def _found(self, text: str) -> set[str]:
        words = _WORD.findall(text.casefold())
        found: set[str] = set()
        single = self._first.keys() & set(words)
        if not single:
            return found
        for at, word in enumerate(words):
            if word in single:
                for phrase, label in self._first[word]:
                    if label not in found and tuple(words[at : at + len(phrase)]) == phrase:
                        found.add(label)
        return found

    def leaks(self) -> tuple[Leak, ...]:
        """The labels to warn of.

        Guarantee: no warning rests on, or shows, a count below `SMALL`.
        """
        return tuple(leak for label in self._labels if (leak := self._judge(label)))

    def _judge(self, label: str) -> Leak | None:
        mine = len(self._with[label])
        others = len(self._everybody) - mine
        told = len(self._told[label])
        outside = np.setdiff1d(self._other[label].keys, self._with[label].keys, assume_unique=True)
        elsewhere = len(outside)
        if min(mine, others, told) < SMALL or told < _MANY * mine:
            return None
        here, there = told / mine, elsewhere / others
        pooled = (told + elsewhere) / (mine + others)
        error = (pooled * (1 - pooled) * (1 / mine + 1 / others)) ** 0.5
        if here < _TIMES * there or here - there <= _SIGMAS * error:
            return None
        return Leak(label, share_told(told, mine), share_told(elsewhere, others))


def share_told(count: int, total: int) -> str:
    """A share in words; a count, or what is left of the total, below `SMALL` is not shown."""
    if count == 0 or total == 0:
        return "none"
    if count < SMALL:
        return f"fewer than {SMALL}"
    if total == count:
        return "all"
    if total - count < SMALL:
        return f"all but fewer than {SMALL}"
    percent = 100 * count / total
    return f"{percent:.0f} %" if percent >= 1 else "less than 1 %"
