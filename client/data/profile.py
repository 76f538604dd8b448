"""What a source holds, held against what a study declares, before anything is trained on it.

One pass with bounded memory: counters, lengths up to a cap, and eight bytes for each patient and
record; no value of a record is kept longer than it takes to count it, except a few hundred numbers
outside their bounds, from which a wrong unit is guessed and which are never shown. Counts below
`SMALL` are not shown, nor what they could be worked out from.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from client.data.counting import HashCounts, hashed
from client.data.deidentify import Deidentifier
from client.data.leakage import SMALL, LabelWords, share_told
from client.data.partition import MIN_PATIENTS
from client.data.records import Record
from client.data.tables import (
    _MISSING,
    _NUMBER,
    _READERS,
    MAX_FIELD_BYTES,
    TableColumns,
    _json_object,
    _lines,
    _open,
    _rows,
    _unreadable,
)
from common.errors import Code, DataError
from common.fields import Ranged
from common.outcomes import LabelSet, Number
from common.study import MAX_SITES, Study
from common.tasks.cases import CaseRules, NumberAnswer
from common.tasks.multimodal import MultimodalTask

__all__ = [
    "Bounds",
    "ColumnProfile",
    "Fix",
    "Profile",
    "Profiler",
    "Schema",
    "hidden_counts",
    "profile_records",
    "profile_tables",
    "schema_of",
    "schema_of_cases",
    "tokenizer_of",
]

Tokens = Callable[[str], int]
Tick = Callable[[int], None]

_HIDDEN: Final = f"fewer than {SMALL}"
_WITHHELD: Final = "not shown"
_SAMPLE: Final = 2000
_LOOKED_AT: Final = 200
_RARELY: Final = 16
_KEPT_NUMBERS: Final = 512
_LONGEST: Final = 1 << 16
_MOST_CONTENTS: Final = 1 << 21
_TELLING_TEXT: Final = 80
_TELLING_VALUES: Final = 8
_TICK: Final = 1000
_SHOWN_NAMES: Final = 40

_WORTH_SAYING: Final = 0.01
_MOSTLY_MISSING: Final = 0.5
_OFTEN_CUT: Final = 0.2
_FITS: Final = 0.95
_FACTORS: Final[tuple[tuple[float, str], ...]] = (
    (10.0, "mg/l for mg/dl, or mm for cm"),
    (18.016, "mg/dl for mmol/l of glucose"),
    (88.42, "umol/l for mg/dl of creatinine"),
    (17.1, "umol/l for mg/dl of bilirubin"),
    (38.67, "mg/dl for mmol/l of cholesterol"),
    (2.2046, "pounds for kilograms"),
    (2.54, "centimetres for inches"),
    (100.0, "per cent for a part, or cm for m"),
    (1000.0, "mg for g, or ml for l"),
)
_BANDS: Final = (("1", 1, 1), ("2-3", 2, 3), ("4-9", 4, 9), ("10 or more", 10, None))


@dataclass(frozen=True, slots=True)
class Bounds:
    """A number and its public range."""

    name: str
    low: float
    high: float

    @staticmethod
    def of(features: Iterable[Ranged]) -> tuple[Bounds, ...]:
        """The same for several."""
        return tuple(Bounds(f.name, f.low, f.high) for f in features)


@dataclass(frozen=True)
class Schema:
    """What a study declares about its records.

    Attributes:
        several: a record has any of the labels, or none.
        features: of a record's `values`, in order. series: of the columns of its `series`.
        categories: of its `codes`, in order: the values that the study knows.
        number: of its `number`. most: records of a patient that are read.
        phrases: by label, words that give it away.
    """

    labels: tuple[str, ...] = ()
    several: bool = False
    text: bool = False
    features: tuple[Bounds, ...] = ()
    series: tuple[Bounds, ...] = ()
    categories: tuple[tuple[str, frozenset[str]], ...] = ()
    number: Bounds | None = None
    max_tokens: int | None = None
    most: int | None = None
    phrases: Mapping[str, Sequence[str]] = field(default_factory=dict)


def schema_of(study: Study) -> Schema:
    """What a study's task declares."""
    task: Any = study.task
    outcome = task.outcome
    number = None
    if isinstance(outcome, Number):
        number = Bounds("what is predicted", outcome.low, outcome.high)
    if isinstance(task, MultimodalTask):
        return _schema_of_inputs(task, number)
    bounds = Bounds.of(getattr(task, "features", ()))
    by_hour = hasattr(task, "hours")
    return Schema(
        labels=study.labels,
        several=isinstance(outcome, LabelSet),
        text=hasattr(task, "max_tokens"),
        features=() if by_hour else bounds,
        series=bounds if by_hour else (),
        categories=tuple(
            (entry.name, frozenset(entry.values)) for entry in getattr(task, "categories", ())
        ),
        number=number,
        max_tokens=getattr(task, "max_tokens", None),
        most=_most(task),
    )


def _most(task: Any) -> int | None:
    """How many records of a patient are read."""
    named = (getattr(task, name, None) for name in ("max_notes", "max_visits", "max_stays"))
    return next((most for most in named if most is not None), None)


def _schema_of_inputs(task: MultimodalTask, number: Bounds | None) -> Schema:
    """What is declared of inputs of several kinds, each of which may be missing."""
    row = task.numbers
    categories = () if row is None else row.categories
    return Schema(
        labels=task.outcome.labels,
        text=task.text is not None,
        features=() if row is None else Bounds.of(row.features),
        series=() if task.series is None else Bounds.of(task.series.features),
        categories=tuple((entry.name, frozenset(entry.values)) for entry in categories),
        number=number,
        max_tokens=None if task.text is None else task.text.max_tokens,
        most=task.max_records,
    )


def schema_of_cases(rules: CaseRules) -> Schema:
    """What the rules that make cases of encounters declare."""
    aim = rules.label.quantity if isinstance(rules.label, NumberAnswer) else None
    return Schema(
        labels=rules.labels,
        text=rules.notes is not None,
        features=Bounds.of(rules.values),
        series=() if rules.series is None else Bounds.of(rules.series.quantities),
        number=None if aim is None else Bounds(aim.name, aim.low, aim.high),
        most=rules.qualify.most,
        phrases={
            entry.label: entry.phrases
            for entry in (() if rules.notes is None else rules.notes.phrases)
        },
    )


# ------------------------------------------------------------------------------------ result


@dataclass(frozen=True, slots=True)
class Fix:
    """Something to put right (`fault`: the records cannot be used as they are) or to look at."""

    kind: Literal["fault", "warning"]
    message: str


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """A number over all records; shares in words, small counts hidden."""

    name: str
    low: float
    high: float
    values: str
    missing: str
    below: str
    above: str


@dataclass(frozen=True)
class Profile:
    """What a source holds; every count as it may be shown.

    `duplicates` are records that a patient has twice; `shared` are long ones that stand alike under
    several patients or encounters. Both are looked for among the first two million.

    Units:
        lengths: words or tokens of a text (`length_unit`) at 50, 90 and 99 of 100 texts.
    """

    records: str
    patients: str
    records_per_patient: Mapping[str, str]
    labels: Mapping[str, str]
    sites: int
    columns: tuple[ColumnProfile, ...]
    names: tuple[str, ...]
    length_unit: str
    lengths: Mapping[str, int]
    longer: str
    duplicates: str
    shared: str
    personal: Mapping[str, str]
    left_out: Mapping[str, str]
    fixes: tuple[Fix, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing stands against using the records."""
        return all(fix.kind != "fault" for fix in self.fixes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        told = asdict(self)
        return {"usable": self.usable, **{k: _plain(value) for k, value in told.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


def hidden_counts(counts: Mapping[str, int], *, zeros: bool = False) -> dict[str, str]:
    """Counts that add up to a known total, as they may be shown.

    Guarantee: none below `SMALL` is shown (zeros are, if asked for). Where exactly one would be
    hidden, the next smallest is, too, and both look alike: the total would give it away.
    """
    small = {name for name, n in counts.items() if n < SMALL and not (zeros and n == 0)}
    rest = sorted((n, name) for name, n in counts.items() if name not in small and n > 0)
    if len(small) == 1 and rest:
        withheld = small | {rest[0][1]}
        return {name: _WITHHELD if name in withheld else str(n) for name, n in counts.items()}
    return {name: _HIDDEN if name in small else str(n) for name, n in counts.items()}


def _told(count: int) -> str:
    """A count that is shown alone."""
    return str(count) if count >= SMALL or count == 0 else _HIDDEN


# ---------------------------------------------------------------------------------- counting


class _Column:
    """One number: how often it is missing or outside its bounds, and a few of those outside."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.count = self.missing = self.below = self.above = 0
        self._inside: list[float] = []
        self._outside: list[float] = []
        self._fresh: list[float] = []
        self._only: float | None = None
        self.varied = False

    def add(self, value: float) -> None:
        """Count one value, NaN for a missing one."""
        self._fresh.append(value)
        if len(self._fresh) >= _SAMPLE:
            self.flush()

    def add_many(self, values: NDArray[np.floating[Any]]) -> None:
        """Count an array of values."""
        self.flush()
        self._count(values.astype(np.float64))

    def flush(self) -> None:
        """Count what was added."""
        if self._fresh:
            self._count(np.array(self._fresh, np.float64))
            self._fresh.clear()

    def _count(self, values: NDArray[np.float64]) -> None:
        there = values[~np.isnan(values)]
        self.count += len(values)
        self.missing += len(values) - len(there)
        if not len(there):
            return
        low, high = there < self.bounds.low, there > self.bounds.high
        self.below += int(low.sum())
        self.above += int(high.sum())
        self._only = float(there[0]) if self._only is None else self._only
        self.varied = self.varied or bool((there != self._only).any())
        for kept, some in (
            (self._outside, there[low | high]),
            (self._inside, there[~(low | high)]),
        ):
            if len(kept) < _KEPT_NUMBERS:
                kept.extend(some[: _KEPT_NUMBERS - len(kept)].tolist())

    def profile(self) -> ColumnProfile:
        """What may be shown."""
        self.flush()
        there = self.count - self.missing
        return ColumnProfile(
            self.bounds.name,
            self.bounds.low,
            self.bounds.high,
            _told(there),
            share_told(self.missing, self.count),
            share_told(self.below, there),
            share_told(self.above, there),
        )

    def fixes(self) -> Iterator[Fix]:
        """What is odd about it."""
        self.flush()
        name, there = self.bounds.name, self.count - self.missing
        if self.count and not there:
            yield Fix("warning", f"{name} has no value at all")
            return
        if there and self.missing >= max(SMALL, _MOSTLY_MISSING * self.count):
            yield Fix("warning", f"{name} is missing in {share_told(self.missing, self.count)}")
        for count, side, bound in (
            (self.below, "below", self.bounds.low),
            (self.above, "above", self.bounds.high),
        ):
            if count >= max(SMALL, _WORTH_SAYING * there):
                share = share_told(count, there)
                hint = self._unit_hint()
                yield Fix("warning", f"{share} of {name} lie {side} the bound {bound:g}{hint}")
        if not self.varied and there >= SMALL:
            yield Fix("warning", f"{name} has the same value in every record")

    def _unit_hint(self) -> str:
        """A unit that would bring the values outside in; the likeliest where several would."""
        outside = np.array(self._outside)
        low, high = self.bounds.low, self.bounds.high
        middle = float(np.median(self._inside)) if self._inside else (low + high) / 2
        # The likeliest power of ten and the likeliest other: numbers alone do not decide.
        found: dict[bool, tuple[float, str]] = {}

        def consider(scaled: NDArray[np.float64], *, ten: bool, told: str) -> None:
            if np.mean((scaled >= low) & (scaled <= high)) >= _FITS:
                guess = (abs(float(np.median(scaled)) - middle), told)
                found[ten] = min(found.get(ten, guess), guess)

        for factor, units in _FACTORS:
            ten = math.log10(factor).is_integer()
            consider(outside / factor, ten=ten, told=f"divided by {factor:g} ({units})")
            consider(outside * factor, ten=ten, told=f"times {factor:g} (the reverse of {units})")
        consider((outside - 32) / 1.8, ten=False, told="degrees Fahrenheit in Celsius")
        told = [found[ten][1] for ten in (True, False) if ten in found]
        return f": another unit? They would fit {', or '.join(told)}" if told else ""


class _Lengths:
    """How long texts are, exactly up to a cap."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int, weight: int = 1) -> None:
        """Count a text that stands for `weight` of them."""
        self._counts[min(length, _LONGEST)] += weight

    def told(self) -> dict[str, int]:
        """Quantiles; empty where there are too few texts to hide one in."""
        total = self._counts.total()
        if total < 2 * SMALL:
            return {}
        found, reached, left = {}, 0, [("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99)]
        for length, count in sorted(self._counts.items()):
            reached += count
            while left and reached >= left[0][1] * total:
                found[left.pop(0)[0]] = length
        return found

    def above(self, limit: int) -> tuple[int, int]:
        """(texts longer than `limit`, texts)."""
        longer = sum(n for length, n in self._counts.items() if length > limit)
        return longer, self._counts.total()


def _stride(place: int) -> int:
    """Every how many records one is looked at closely: all at first, then ever fewer."""
    return 1 << (place // _SAMPLE).bit_length()


class Profiler:
    """Counts records one by one; `finish` tells.

    Args:
        schema: what the study declares.
        tokens: how many tokens a text has, where a tokenizer is at hand; else words are counted.
        by_site: a record's site is a hospital of the study, which has a least size.
    """

    def __init__(
        self, schema: Schema, *, tokens: Tokens | None = None, by_site: bool = False
    ) -> None:
        self._schema = schema
        self._by_site = by_site
        self._tokens = tokens
        self.names: tuple[str, ...] = ()
        self.records = 0
        self._patients = HashCounts()
        self._of_label = {label: HashCounts() for label in schema.labels}
        self._of_site: dict[str, HashCounts] = {}
        self._words = LabelWords(schema.labels, schema.phrases)
        self._near = {_bare(label): label for label in schema.labels}
        self._odd: Counter[str] = Counter()
        self._unlabelled = self._unknown = 0
        self._values = [_Column(bounds) for bounds in schema.features]
        self._series = [_Column(bounds) for bounds in schema.series]
        self._number = None if schema.number is None else _Column(schema.number)
        self._strange = Counter[str]()
        self._uncoded = Counter[str]()
        self._word_lengths, self._token_lengths = _Lengths(), _Lengths()
        self._empty_texts = 0
        self._contents, self._telling, self._pairs = HashCounts(), HashCounts(), HashCounts()
        self._compared = 0
        self._look = Deidentifier()
        self._looked_at = 0
        self._personal: Counter[str] = Counter()
        self._cells: Counter[tuple[str, str]] = Counter()
        self._fixes: list[Fix] = []
        self.left_out: Counter[str] = Counter()

    # ------------------------------------------------------------------------------ adding

    def add(self, record: Record) -> None:
        """Count one record."""
        place = self.records
        self.records += 1
        who = hashed(record.patient)
        self._patients.add(who)
        self._add_labels(record, who)
        if self._by_site and record.site is not None:
            self._add_site(record.site, who)
        for column, value in zip(self._values, record.values, strict=True):
            column.add(value)
        if record.series is not None:
            for at, column in enumerate(self._series):
                column.add_many(record.series[:, at])
        if self._number is not None:
            self._number.add(record.number)
        for (name, known), code in zip(self._schema.categories, record.codes, strict=False):
            if not code:
                self._uncoded[name] += 1
            elif code not in known:
                self._strange[name] += 1
        if self._schema.text:
            self._add_text(record, place)
        self._add_content(record)

    def _add_site(self, site: str, who: int) -> None:
        if site in self._of_site or len(self._of_site) <= MAX_SITES:
            self._of_site.setdefault(site, HashCounts()).add(who)

    def _add_labels(self, record: Record, who: int) -> None:
        labels = record.labels or (() if record.label is None else (record.label,))
        if not self._schema.labels:
            return
        self._unlabelled += not labels
        for label in labels:
            counts = self._of_label.get(label)
            if counts is not None:
                counts.add(who)
                continue
            self._unknown += 1
            near = self._near.get(_bare(label))
            if near is not None:
                self._odd[near] += 1

    def _add_text(self, record: Record, place: int) -> None:
        if not record.text.strip():
            self._empty_texts += 1
            return
        self._word_lengths.add(len(record.text.split()))
        labels = record.labels or (() if record.label is None else (record.label,))
        self._words.add(record.patient, labels, record.text)
        stride = _stride(place)
        if place % stride:
            return
        if self._tokens is not None:
            self._token_lengths.add(self._tokens(record.text), stride)
        if place >= _LOOKED_AT and place % (_RARELY * stride):
            return
        self._look.counts.clear()
        self._look(record.text)
        self._looked_at += 1
        self._personal.update(dict.fromkeys(self._look.counts, 1))

    def _add_content(self, record: Record) -> None:
        if self._compared >= _MOST_CONTENTS:
            return
        self._compared += 1
        parts = [record.text, repr(record.values), *record.codes]
        if record.series is not None:
            parts.append(record.series.tobytes().hex())
        if record.image is not None:
            parts.append(record.image.tobytes().hex())
        pair = hashed(record.patient, record.encounter, *parts)
        self._pairs.add(pair)
        # A short text and a row of few numbers may well be alike; a long one belongs to somebody.
        told = len(record.values) - sum(map(math.isnan, record.values))
        if len(parts) > 2 + len(record.codes) or (
            len(record.text) >= _TELLING_TEXT or told >= _TELLING_VALUES
        ):
            self._telling.add(pair)
            self._contents.add(hashed(*parts))

    def cell(self, column: str, what: str) -> None:
        """Count a cell that a reader would refuse; `what` is a fixed text."""
        self._cells[column, what] += 1

    def fault(self, message: str) -> None:
        """Note something that stands against using the source; never a value of a record."""
        self._fixes.append(Fix("fault", message))

    # ----------------------------------------------------------------------------- telling

    def finish(self) -> Profile:
        """What was counted, as it may be shown, and what to do."""
        unit, lengths = "words", self._word_lengths
        if self._tokens is not None:
            unit, lengths = "tokens", self._token_lengths
        longer = ""
        if self._schema.max_tokens is not None:
            longer = share_told(*lengths.above(self._schema.max_tokens))
        counts = self._patients.counts
        pairs, shared = len(self._pairs), len(self._telling) - len(self._contents)
        columns = [*self._values, *self._series, *((self._number,) if self._number else ())]
        return Profile(
            records=_told(self.records),
            patients=_told(len(counts)),
            records_per_patient=hidden_counts(_banded(counts), zeros=True),
            labels=self._labels(),
            sites=len(self._of_site),
            columns=tuple(column.profile() for column in columns),
            names=self.names,
            length_unit=unit,
            lengths=lengths.told(),
            longer=longer,
            duplicates=share_told(self._compared - pairs, self._compared),
            shared=share_told(shared, self._compared),
            personal={
                kind: share_told(n, self._looked_at) for kind, n in sorted(self._personal.items())
            },
            left_out={reason: _told(n) for reason, n in sorted(self.left_out.items())},
            fixes=tuple(self._all_fixes(columns, unit, longer)),
        )

    def _labels(self) -> dict[str, str]:
        return hidden_counts({label: len(found) for label, found in self._of_label.items()})

    def _all_fixes(self, columns: Sequence[_Column], unit: str, longer: str) -> Iterator[Fix]:
        yield from self._fixes
        for (name, what), count in sorted(self._cells.items()):
            yield Fix("fault", f"column {name} {what} in {_told(count)} record(s)")
        yield from self._label_fixes()
        if self.records and len(self._patients) < MIN_PATIENTS:
            least = f"fewer than {MIN_PATIENTS}"
            yield Fix("fault", f"there are {least} patients: too few to train and to measure")
        if len(self._of_site) > MAX_SITES:
            yield Fix("fault", f"there are more than {MAX_SITES} sites")
        thin = sum(len(found) < MIN_PATIENTS for found in self._of_site.values())
        if thin:
            yield Fix("fault", f"{thin} site(s) have fewer than {MIN_PATIENTS} patients")
        for column in columns:
            yield from column.fixes()
        for name, count in sorted(self._strange.items()):
            share = share_told(count, self.records)
            message = f"{name} has a value that the study does not know in {share} of the records"
            yield Fix("warning", message)
        if self._schema.text:
            yield from self._text_fixes(unit, longer)
        yield from self._repeat_fixes()

    def _label_fixes(self) -> Iterator[Fix]:
        if self._unlabelled and self._unlabelled < self.records and not self._schema.several:
            yield Fix("fault", f"{_told(self._unlabelled)} record(s) have no label")
        if self._unknown:
            told = _told(self._unknown)
            yield Fix("fault", f"{told} record(s) have a label that is not in the study")
        for label, count in sorted(self._odd.items()):
            message = f"{_told(count)} of these differ from {label} in case or punctuation alone"
            yield Fix("warning", message)
        if not self.records or self._unlabelled == self.records:
            return
        rare = [label for label, found in self._of_label.items() if len(found) < SMALL]
        for label in rare:
            yield Fix("warning", f"label {label} has {_HIDDEN} patients here, or none")

    def _text_fixes(self, unit: str, longer: str) -> Iterator[Fix]:
        limit = self._schema.max_tokens
        lengths = self._word_lengths if unit == "words" else self._token_lengths
        if limit is not None:
            above, total = lengths.above(limit)
            if above >= max(SMALL, _OFTEN_CUT * total):
                yield Fix(
                    "warning",
                    f"{longer} of the texts have more {unit} than task.max_tokens ({limit}): "
                    "the rest is not read, except with long_notes: window",
                )
        for leak in self._words.leaks():
            yield Fix("warning", f"{leak}: cut the sections that print it")

    def _repeat_fixes(self) -> Iterator[Fix]:
        repeated = self._compared - len(self._pairs)
        shared = len(self._telling) - len(self._contents)
        if repeated >= max(SMALL, _WORTH_SAYING * self._compared):
            share = share_told(repeated, self._compared)
            yield Fix("warning", f"{share} of the records come again, of the same patient")
        if shared >= max(SMALL, _WORTH_SAYING * self._compared):
            share = share_told(shared, self._compared)
            message = f"{share} of the records stand alike under several patients or encounters"
            yield Fix("warning", f"{message}: is one person there under two ids?")
        most = self._schema.most
        if most is not None:
            many = int((self._patients.counts > most).sum())
            if many >= SMALL:
                share = share_told(many, len(self._patients))
                message = f"{share} of the patients have more than {most} records"
                yield Fix("warning", f"{message}: the study does not read the rest")


def _bare(label: str) -> str:
    return re.sub(r"[\W_]+", "", label.casefold())


def _banded(counts: NDArray[np.int64]) -> dict[str, int]:
    return {
        name: int(((counts >= low) & (counts <= (math.inf if high is None else high))).sum())
        for name, low, high in _BANDS
    }


def profile_records(
    records: Iterable[Record],
    schema: Schema,
    *,
    tokens: Tokens | None = None,
    tick: Tick | None = None,
    left_out: Mapping[str, int] | None = None,
) -> Profile:
    """The profile of any records, for example cases that a reader's encounters make.

    Args:
        records: they are counted as they come; none is kept.
        schema: what the study declares.
        tokens: how many tokens a text has; words are counted without.
        tick: told the number of records now and then.
        left_out: reasons and counts; read at the end, so a reader's running tally will do.
    """
    profiler = Profiler(schema, tokens=tokens)
    try:
        for record in records:
            profiler.add(record)
            _tell(tick, profiler.records)
    except DataError as error:
        profiler.fault(f"{error.message} ({error.code.label}; nothing after it was looked at)")
    profiler.left_out.update(left_out or {})
    return profiler.finish()


def _tell(tick: Tick | None, count: int) -> None:
    if tick is not None and count % _TICK == 0:
        tick(count)


# ------------------------------------------------------------------------------------- files


def profile_tables(
    paths: Sequence[Path],
    columns: TableColumns,
    schema: Schema,
    *,
    tokens: Tokens | None = None,
    tick: Tick | None = None,
) -> Profile:
    """The profile of files of records.

    What training would refuse is counted and goes on: a column that is not there, a cell that is
    no number, a label that the study does not know. A file that breaks its own format is read up
    to there.
    """
    profiler = Profiler(schema, tokens=tokens, by_site=columns.site is not None)
    for path in paths:
        try:
            for record in _lenient(path, columns, profiler):
                profiler.add(record)
                _tell(tick, profiler.records)
        except DataError as error:
            profiler.fault(f"{error.message} ({error.code.label})")
        except (OSError, EOFError, zlib.error) as error:
            broken = _unreadable(path, error)
            profiler.fault(f"{broken.message} ({broken.code.label})")
    return profiler.finish()


def _lenient(path: Path, columns: TableColumns, profiler: Profiler) -> Iterator[Record]:
    names = _header(path)
    missing = [name for name in columns.wanted() if name not in names]
    if len(missing) == len(columns.wanted()):
        # The first line may be a record: nothing of it is shown.
        profiler.fault(f"{path}: none of the study's columns is there; is there a header?")
        return
    profiler.names = tuple(dict.fromkeys((*profiler.names, *(_shown(name) for name in names))))
    for name in missing:
        profiler.fault(f"{path}: column {name} is not there{_hint(name, names)}")
    there = _without(columns, frozenset(missing))
    make = _Lenient(str(path), columns, there, profiler)
    for line, cells in _rows(path, there):
        record = make(line, dict(zip(there.wanted(), cells, strict=True)))
        if record is not None:
            yield record


def _hint(name: str, names: Sequence[str]) -> str:
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    if not close:
        close = [other for other in lower if name.lower() in other or other in name.lower()][:1]
    return f": did you mean {_shown(lower[close[0]])}?" if close else ""


def _shown(name: str) -> str:
    name = "".join(c for c in name if c.isprintable())
    return name if len(name) <= _SHOWN_NAMES else f"{name[:_SHOWN_NAMES]}…"


def _header(path: Path) -> list[str]:
    """The names of a file's columns. Raises DataError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = _READERS.get("".join(suffixes[-2:-1] if packed else suffixes[-1:]))
    if kind is None or (packed and kind == "parquet"):
        raise DataError(Code.DATA_FORMAT, f"{path}: is not a kind of file that is read here.")
    if not path.is_file():
        raise DataError(Code.DATA_UNREADABLE, f"{path}: there is no such file.")
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            return list(parquet.read_schema(path).names)
        except pa.ArrowException as error:
            message = f"{path}: is not a whole Parquet file ({type(error).__name__})."
            raise DataError(Code.DATA_FORMAT, message) from None
    with _open(path, packed=packed) as handle:
        lines = _lines(path, handle)
        if kind == "csv":
            csv.field_size_limit(MAX_FIELD_BYTES)
            try:
                return [name.strip() for name in next(csv.reader(lines, strict=True), [])]
            except csv.Error:
                message = f"{path}:1: is not well-formed CSV (a quote or a line end is wrong)."
                raise DataError(Code.DATA_FORMAT, message) from None
        first = next((line for line in lines if line.strip()), "{}")
        return list(_json_object(path, 1, first))


def _without(columns: TableColumns, missing: frozenset[str]) -> TableColumns:
    def kept(name: str | None) -> str | None:
        return None if name in missing else name

    return replace(
        columns,
        text=kept(columns.text),
        patient=kept(columns.patient),
        label=kept(columns.label),
        site=kept(columns.site),
        numbers=tuple(name for name in columns.numbers if name not in missing),
        codes=tuple(name for name in columns.codes if name not in missing),
        number=kept(columns.number),
        time=kept(columns.time),
        event=kept(columns.event),
    )


class _Lenient:
    """Makes a record of a row, whatever is wrong with its cells, and counts that."""

    def __init__(
        self, file: str, columns: TableColumns, there: TableColumns, profiler: Profiler
    ) -> None:
        self._file, self._columns, self._there = file, columns, there
        self._profiler = profiler

    def __call__(self, line: int, cells: Mapping[str, Any]) -> Record | None:
        columns, there = self._columns, self._there
        patient = f"{self._file}#{line}"
        if there.patient is not None:
            patient = self._text(there.patient, cells).strip()
            if not patient:
                return None
        label = None if there.label is None else self._text(there.label, cells).strip()
        number = there.number or there.time
        return Record(
            patient=patient,
            text="" if there.text is None else self._text(there.text, cells),
            label=label or None,
            site=None if there.site is None else self._text(there.site, cells).strip() or None,
            file=self._file,
            line=line,
            values=tuple(self._number(name, cells) for name in columns.numbers),
            number=math.nan if number is None else self._number(number, cells),
            codes=tuple(
                "" if _absent(cells.get(name)) else self._text(name, cells).strip()
                for name in columns.codes
            ),
        )

    def _text(self, name: str, cells: Mapping[str, Any]) -> str:
        cell = cells[name]
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        if isinstance(cell, bool) or not isinstance(cell, str | int | float | None):
            self._profiler.cell(name, "is neither text nor a number")
            return ""
        text = "" if cell is None or cell != cell else str(cell)  # noqa: PLR0124 - NaN
        if not text.strip():
            self._profiler.cell(name, "is empty")
        elif len(text) > MAX_FIELD_BYTES:
            self._profiler.cell(name, "is longer than 4 MiB")
            return ""
        return text

    def _number(self, name: str, cells: Mapping[str, Any]) -> float:
        cell = cells.get(name)
        if _absent(cell):
            return math.nan
        told = isinstance(cell, str) and _NUMBER.fullmatch(cell.strip())
        if isinstance(cell, bool) or not (told or isinstance(cell, int | float)):
            self._profiler.cell(name, "is not a number")
            return math.nan
        try:
            value = float(cell)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            self._profiler.cell(name, "is not a finite number")
            return math.nan
        return value


def _absent(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and cell.strip() in _MISSING)


# -------------------------------------------------------------------------------- tokenizer


def tokenizer_of(backbone: str) -> Tokens | None:
    """How many tokens a text has for the study's model, None where its tokenizer is not here.

    Nothing is fetched, and nothing of the model but its tokenizer is loaded.
    """
    from client.tasks.backbone import _locate

    here = backbone.startswith("package:") or Path(backbone).expanduser().is_dir()
    if not here:
        return None
    try:
        file = _locate(backbone, fetch=False) / "tokenizer.json"
    except DataError:
        return None
    if not file.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)
