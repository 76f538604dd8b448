"""What a study makes of encounters: one record each, by the study's public rules, for all formats.

Nothing is learned from other patients' data, nothing guessed, and whatever is left out is counted
by reason. What may be seen is decided here, not in the readers: nothing after the observation
window, nothing after the label was known, no section that prints the diagnosis, and no code that
stands for a label.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from client.data.counting import hashed
from client.data.deidentify import Category, Deidentifier
from client.data.encounters import Encounter, ImageEntry, Measurement, Note, Tally
from client.data.leakage import UNDATED, Limit, SectionCutter, hours_between
from client.data.readers.files import Item, Wanted
from client.data.records import Record
from common.tasks.cases import (
    CaseRules,
    CodeAnswer,
    CodeInputs,
    CodeRule,
    GroupRules,
    MortalityAnswer,
    NumberAnswer,
    Observable,
    QualifyRules,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CaseMaker", "groups_of", "records_of", "wanted_of"]

Picture = Callable[[ImageEntry], "NDArray[np.uint8]"]

_BEGINNINGS: Final = frozenset({"icd9", "icd10", "atc"})
_HOURS: Final = {"hours": 1.0, "days": 24.0}
_SPACES: Final = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is to be predicted, and when it was known."""

    label: str | None = None
    labels: tuple[str, ...] = ()
    number: float = math.nan
    event: bool | None = None
    known: datetime | None = None


@dataclass(frozen=True, slots=True)
class _View:
    """The part of an encounter that may be seen."""

    zero: datetime | None
    first: datetime | None
    last: datetime | None


class _LeftOut(Exception):  # noqa: N818 - a reason, caught in this module
    """The encounter is no case of this study, for a fixed reason."""


class CaseMaker:
    """Turns encounters into records.

    Args:
        rules: the study's.
        answered: False where a file is read to be predicted, so that no label is looked for.
        picture: reads an image's pixels; needed where the rules take one.

    Attributes:
        tally: what was left out or changed, by reason.
        replaced: what the de-identification pass replaced, by category.
    """

    def __init__(
        self, rules: CaseRules, *, answered: bool = True, picture: Picture | None = None
    ) -> None:
        self._rules = rules
        self._answered = answered
        self._picture = picture
        self.tally = Tally()
        self._codes = _CodeMap(rules.label.map if isinstance(rules.label, CodeAnswer) else ())
        self._cut = SectionCutter(() if rules.notes is None else rules.notes.cut_sections)
        self._deidentify = Deidentifier()
        self._kinds = {
            _plain(kind): place
            for place, kind in enumerate(() if rules.notes is None else rules.notes.kinds)
        }
        series = () if rules.series is None else rules.series.quantities
        self._values = _Numbers(rules.values, self.tally)
        self._series = _Numbers(series, self.tally)
        aimed = (rules.label.quantity,) if isinstance(rules.label, NumberAnswer) else ()
        self._aimed = _Numbers(aimed, self.tally)
        self._seen: Counter[int] = Counter()

    @property
    def replaced(self) -> Counter[Category]:
        """What was replaced in texts."""
        return self._deidentify.counts

    def __call__(self, encounter: Encounter) -> Record | None:
        """The case, or None where the encounter is left out and counted."""
        try:
            return self._case(encounter)
        except _LeftOut as reason:
            self.tally.add(f"encounters {reason}")
            return None

    def _case(self, encounter: Encounter) -> Record:
        _qualify(encounter, self._rules.qualify)
        view = self._view(encounter)
        answer = self._answer(encounter, view) if self._answered else _Answer()
        limit = self._limit(view, answer)
        text = self._text(encounter, view, limit)
        image = self._image(encounter, view, limit)
        self._once_more(encounter.patient)
        return Record(
            patient=encounter.patient,
            text=text,
            label=answer.label,
            site=encounter.site,
            file=encounter.file,
            line=encounter.line,
            values=self._values_of(encounter, view, limit),
            encounter=encounter.encounter,
            labels=answer.labels,
            number=answer.number,
            event=answer.event,
            series=self._series_of(encounter, view, limit),
            codes=self._codes_of(encounter, view, limit),
            image=image,
            groups=groups_of(encounter, self._rules.groups),
        )

    def _once_more(self, patient: str) -> None:
        most = self._rules.qualify.most
        if most is None:
            return
        who = hashed(patient)
        if self._seen[who] >= most:
            raise _LeftOut("beyond the number taken of a patient")
        self._seen[who] += 1

    # ------------------------------------------------------------------------------ times

    def _view(self, encounter: Encounter) -> _View:
        window = self._rules.window
        zero = encounter.start if window.zero == "start" else encounter.end
        bounded = window.from_hours is not None or window.to_hours is not None
        if zero is None:
            if bounded or self._rules.series is not None:
                raise _LeftOut("without the time that the window begins at")
            return _View(None, None, encounter.end)
        first, last = (
            None if hours is None else zero + timedelta(hours=hours)
            for hours in (window.from_hours, window.to_hours)
        )
        return _View(zero, first, last or encounter.end)

    def _limit(self, view: _View, answer: _Answer) -> Limit:
        limit = Limit(view.last, "drop", view.zero)
        if answer.known is None or self._rules.after_label == "keep":
            return limit
        if view.last is not None and hours_between(view.last, answer.known) is None:
            raise _LeftOut("whose label has a time that cannot be compared")
        return limit.earlier(answer.known)

    def _visible(
        self, moment: datetime | None, what: str, view: _View, limit: Limit, *, dated: bool = False
    ) -> bool:
        """Whether something of that time may be seen; counted under `what` where not."""
        reason = limit.judge(moment, dated=dated)
        if not reason and view.first is not None:
            hours = hours_between(view.first, moment)
            if hours is None:
                reason = "" if limit.undated == "keep" else UNDATED
            elif hours < 0:
                reason = "before the observation window"
        if reason:
            self.tally.add(f"{what} {reason}")
        return not reason

    # ----------------------------------------------------------------------------- answer

    def _answer(self, encounter: Encounter, view: _View) -> _Answer:
        rules = self._rules.label
        if isinstance(rules, CodeAnswer):
            return self._coded(encounter, rules, view)
        if isinstance(rules, NumberAnswer):
            return self._measured(encounter, rules, view)
        if encounter.died is None:
            raise _LeftOut("that do not say whether the patient died")
        windowed = self._rules.window.to_hours is not None
        left = (
            None if not windowed or view.last is None else hours_between(view.last, encounter.end)
        )
        if left is not None and left <= 0:
            raise _LeftOut("that ended before the observation window")
        if isinstance(rules, MortalityAnswer):
            label = rules.died if encounter.died else rules.survived
            return _Answer(label, known=encounter.end)
        begin = view.last if windowed else view.zero
        hours = None if begin is None else hours_between(begin, encounter.end)
        if hours is None or hours <= 0:
            raise _LeftOut("without a start and an end")
        return _Answer(number=hours / _HOURS[rules.unit], event=encounter.died, known=encounter.end)

    def _coded(self, encounter: Encounter, rules: CodeAnswer, view: _View) -> _Answer:
        found: dict[str, list[datetime | None]] = defaultdict(list)
        any_code = False
        if rules.source == "diagnoses":
            for entry in encounter.codes:
                if rules.rank == "any" or entry.rank == 1:
                    any_code = True
                    for label in self._codes.labels(entry.system, entry.code, entry.title):
                        found[label].append(entry.time)
        else:
            for drug in encounter.drugs:
                if self._rules.window.to_hours is not None and not self._later(drug.start, view):
                    continue
                any_code = True
                for label in self._codes.labels(drug.system, drug.code, drug.name):
                    found[label].append(None)
        if not any_code:
            principal = "principal " if rules.rank == "principal" else ""
            raise _LeftOut(f"without {principal}{rules.source} to label")
        labels = [label for label in self._rules.labels if label in found]
        times = [time for label in labels for time in found[label]]
        # A label is known from its first code on; where one code has no time, nobody can tell.
        known = None if not times or None in times else _earliest(times)
        return self._chosen(labels, rules, known)

    def _chosen(self, labels: Sequence[str], rules: CodeAnswer, known: datetime | None) -> _Answer:
        if rules.several == "all":
            return _Answer(labels=tuple(labels), known=known)
        if not labels:
            if rules.rest is None:
                raise _LeftOut("whose codes stand for no label")
            return _Answer(rules.rest)
        if len(labels) > 1 and rules.several == "drop":
            raise _LeftOut("whose codes stand for several labels")
        return _Answer(labels[0], known=known)

    def _later(self, moment: datetime | None, view: _View) -> bool:
        hours = None if view.last is None else hours_between(view.last, moment)
        if hours is None:
            self.tally.add("drugs without a time that tells whether they come later")
        return hours is not None and hours > 0

    def _measured(self, encounter: Encounter, rules: NumberAnswer, view: _View) -> _Answer:
        assert view.zero is not None  # noqa: S101 - the rules demand a window
        begin, end = (view.zero + timedelta(hours=h) for h in (rules.from_hours, rules.to_hours))
        kept = [entry for entry in encounter.measurements if _between(begin, entry.time, end)]
        value = self._aimed.reduced(kept)[0]
        if math.isnan(value):
            raise _LeftOut("without the measurement to predict")
        return _Answer(number=value, known=begin)

    # ------------------------------------------------------------------------------ inputs

    def _text(self, encounter: Encounter, view: _View, limit: Limit) -> str:
        rules = self._rules.notes
        if rules is None:
            return ""
        limit = Limit(limit.last, rules.undated, limit.start)
        chosen: list[tuple[int, int, Note]] = []
        for place, note in enumerate(encounter.notes):
            kind = self._kinds.get(_plain(note.kind))
            if self._kinds and kind is None:
                self.tally.add("notes of other kinds")
            elif self._visible(note.time, "notes", view, limit):
                chosen.append((kind or 0, place, note))
        by_kind = rules.order == "kind"
        chosen.sort(key=lambda entry: (entry[0] if by_kind else 0, *_when(entry[2].time), entry[1]))
        parts = []
        for _, _, note in chosen:
            text, cut = self._cut(note.text)
            if cut:
                self.tally.add("sections cut that print the diagnosis", cut)
            if text.strip():
                parts.append((self._deidentify(text) if rules.deidentify else text).strip())
        if not parts:
            raise _LeftOut("without a note that may be read")
        return "\n\n".join(parts)

    def _values_of(self, encounter: Encounter, view: _View, limit: Limit) -> tuple[float, ...]:
        if not self._rules.values:
            return ()
        kept = [
            entry
            for entry in encounter.measurements
            if self._values.knows(entry)
            and self._visible(entry.time, "measurements", view, limit, dated=True)
        ]
        return self._values.reduced(kept, encounter)

    def _series_of(
        self, encounter: Encounter, view: _View, limit: Limit
    ) -> NDArray[np.float32] | None:
        rules = self._rules.series
        if rules is None or view.zero is None:
            return None
        import numpy as np

        by_hour: dict[int, list[Measurement]] = defaultdict(list)
        for entry in encounter.measurements:
            if not self._series.knows(entry):
                continue
            hours = hours_between(view.zero, entry.time)
            if hours is None:
                self.tally.add("measurements of the series without a time that can be compared")
            elif not 0 <= hours < rules.hours:
                self.tally.add("measurements outside the hours of the series")
            elif self._visible(entry.time, "measurements", view, limit, dated=True):
                by_hour[int(hours)].append(entry)
        series = np.full((rules.hours, len(rules.quantities)), np.nan, np.float32)
        for hour, entries in by_hour.items():
            series[hour] = self._series.reduced(entries)
        return series

    def _codes_of(self, encounter: Encounter, view: _View, limit: Limit) -> tuple[str, ...]:
        rules = self._rules.codes
        if rules is None:
            return ()
        bound = Limit(limit.last, rules.undated, limit.start)
        found: dict[str, None] = {}
        entries = [
            ("diagnosis codes", entry.system, entry.code, entry.title, entry.time)
            for entry in encounter.codes
            if entry.system in rules.diagnoses
        ]
        entries += [
            ("drugs", drug.system, drug.code, drug.name, drug.start)
            for drug in encounter.drugs
            if drug.system in rules.drugs
        ]
        target = self._rules.label.source if isinstance(self._rules.label, CodeAnswer) else ""
        for what, system, code, title, time in entries:
            own = (what == "drugs") == (target == "drugs") and target
            if own and self._codes.labels(system, code, title):
                self.tally.add(f"{what} that stand for a label")
            elif self._visible(time, what, view, bound):
                found[f"{system}:{_shortened(system, code, rules)}"] = None
        if len(found) > rules.most:
            self.tally.add("codes beyond the number taken of an encounter", len(found) - rules.most)
        return tuple(found)[: rules.most]

    def _image(self, encounter: Encounter, view: _View, limit: Limit) -> NDArray[np.uint8] | None:
        which = self._rules.image
        if which == "none":
            return None
        seen = [e for e in encounter.images if self._visible(e.time, "images", view, limit)]
        if not seen:
            return None
        if self._picture is None:
            raise TypeError("these rules take images, and nobody reads them")
        seen.sort(key=lambda entry: _when(entry.time))
        return self._picture(seen[0 if which == "first" else -1])


def wanted_of(rules: CaseRules) -> Wanted:
    """What a reader has to collect for these rules; units are left to the rules."""
    target = rules.label
    quantities = [*rules.values, *(() if rules.series is None else rules.series.quantities)]
    if isinstance(target, NumberAnswer):
        quantities.append(target.quantity)
    items = dict.fromkeys(item for quantity in quantities for item in quantity.items)
    source = target.source if isinstance(target, CodeAnswer) else ""
    inputs = rules.codes or CodeInputs()
    kinds = () if rules.notes is None else rules.notes.kinds
    return Wanted(
        notes=rules.notes is not None,
        categories=kinds or None,
        codes=bool(inputs.diagnoses) or source == "diagnoses",
        drugs=bool(inputs.drugs) or source == "drugs",
        measurements=bool(items),
        items=tuple(Item(item, None) for item in items),
    )


def records_of(encounters: Iterable[Encounter], make: CaseMaker) -> Iterator[Record]:
    """The cases among the encounters, in their order."""
    return (record for encounter in encounters if (record := make(encounter)) is not None)


def groups_of(encounter: Encounter, rules: GroupRules) -> tuple[str, ...]:
    """The subgroups that results are told for: `sex:female`, `age:45-64`."""
    groups = [f"sex:{encounter.sex or 'unknown'}"] if rules.sex else []
    if rules.age_edges:
        groups.append(f"age:{_band(encounter.age, rules.age_edges)}")
    return tuple(groups)


def _band(age: float | None, edges: Sequence[int]) -> str:
    if age is None or math.isnan(age):
        return "unknown"
    below = [edge for edge in edges if edge <= age]
    above = [edge for edge in edges if edge > age]
    if not below:
        return f"0-{above[0] - 1}"
    return f"{below[-1]}-{above[0] - 1}" if above else f"{below[-1]}+"


def _qualify(encounter: Encounter, rules: QualifyRules) -> None:
    age = encounter.age
    if rules.min_age is not None or rules.max_age is not None:
        if age is None:
            raise _LeftOut("without an age")
        if (
            not (rules.min_age or 0)
            <= age
            <= (math.inf if rules.max_age is None else rules.max_age)
        ):
            raise _LeftOut("of other ages")
    if rules.sex is not None and encounter.sex != rules.sex:
        raise _LeftOut("of another or unknown sex")
    if rules.min_hours is not None:
        hours = None if encounter.start is None else hours_between(encounter.start, encounter.end)
        if hours is None:
            raise _LeftOut("without a start and an end")
        if hours < rules.min_hours:
            raise _LeftOut("that are too short")


# ------------------------------------------------------------------------------------ codes


class _CodeMap:
    """Which labels a code stands for."""

    def __init__(self, rules: Sequence[CodeRule]) -> None:
        self._whole: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._begins: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for rule in rules:
            for code in rule.codes:
                plain = _comparable(rule.system, code)
                if rule.system in _BEGINNINGS or rule.system == "name":
                    self._begins[rule.system][plain][rule.label] = None
                else:
                    self._whole[rule.system, plain][rule.label] = None
        self._lengths = {
            system: sorted({len(code) for code in codes}) for system, codes in self._begins.items()
        }

    def labels(self, system: str, code: str, name: str) -> tuple[str, ...]:
        """The labels of a code; free text is compared as the code and as the name."""
        found: dict[str, None] = {}
        found.update(self._whole.get((system, _comparable(system, code)), {}))
        tried = {
            _comparable(system, text) for text in ((code, name) if system == "name" else (code,))
        }
        for text in tried:
            for length in self._lengths.get(system, ()):
                beginning = text[:length]
                ends = system != "name" or not text[length : length + 1].isalnum()
                if len(beginning) == length and ends:
                    found.update(self._begins[system].get(beginning, {}))
        return tuple(found)


def _comparable(system: str, code: str) -> str:
    if system in _BEGINNINGS:
        return code.replace(".", "").strip().upper()
    return _plain(code) if system == "name" else code.strip().upper()


def _shortened(system: str, code: str, rules: CodeInputs) -> str:
    plain = _comparable(system, code)
    return plain[: rules.characters] if system in _BEGINNINGS else plain


# ---------------------------------------------------------------------------------- numbers


class _Numbers:
    """Measurements as the study's numbers: by item, in its unit, within its bounds."""

    def __init__(self, quantities: Sequence[Observable], tally: Tally) -> None:
        self._quantities = tuple(quantities)
        self._tally = tally
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, quantity in enumerate(self._quantities):
            for item in quantity.items:
                self._places[_plain(item)].append(place)
        self._factors = [_factors(quantity) for quantity in self._quantities]

    def knows(self, entry: Measurement) -> bool:
        """Whether a measurement is one of these."""
        return _plain(entry.item) in self._places

    def reduced(
        self, entries: Iterable[Measurement], encounter: Encounter | None = None
    ) -> tuple[float, ...]:
        """One number for each quantity, NaN where there is none."""
        collected: list[list[float]] = [[] for _ in self._quantities]
        for entry in sorted(entries, key=lambda entry: _when(entry.time)):
            for place in self._places.get(_plain(entry.item), ()):
                value = self._converted(place, entry)
                if not math.isnan(value):
                    collected[place].append(value)
        return tuple(
            self._fact(quantity, encounter)
            if quantity.of != "measurement"
            else _taken(values, quantity)
            for quantity, values in zip(self._quantities, collected, strict=True)
        )

    def _converted(self, place: int, entry: Measurement) -> float:
        quantity, factors = self._quantities[place], self._factors[place]
        if not math.isfinite(entry.value):
            self._tally.add(f"{quantity.name}: not a finite number")
            return math.nan
        value = entry.value
        if factors is not None:
            unit = _unit(entry.unit)
            if unit not in factors:
                self._tally.add(
                    f"{quantity.name}: {'in another unit' if unit else 'without a unit'}"
                )
                return math.nan
            factor, offset = factors[unit]
            if (factor, offset) != (1.0, 0.0):
                value = value * factor + offset
                self._tally.add(f"{quantity.name}: converted")
        return self._bounded(quantity, value)

    def _bounded(self, quantity: Observable, value: float) -> float:
        if quantity.low <= value <= quantity.high:
            return value
        self._tally.add(f"{quantity.name}: outside the bounds")
        if quantity.outside == "drop":
            return math.nan
        return min(max(value, quantity.low), quantity.high)

    def _fact(self, quantity: Observable, encounter: Encounter | None) -> float:
        if encounter is None:
            return math.nan
        if quantity.of == "female":
            return {"female": 1.0, "male": 0.0}.get(encounter.sex or "", math.nan)
        return math.nan if encounter.age is None else self._bounded(quantity, encounter.age)


def _factors(quantity: Observable) -> Mapping[str, tuple[float, float]] | None:
    """By unit, what makes the study's unit of it; None where units are not compared."""
    if quantity.unit is None:
        return None
    factors = {_unit(other.unit): (other.factor, other.offset) for other in quantity.convert}
    return {**factors, _unit(quantity.unit): (1.0, 0.0)}


def _taken(values: Sequence[float], quantity: Observable) -> float:
    if not values:
        return math.nan
    return {
        "first": lambda: values[0],
        "last": lambda: values[-1],
        "mean": lambda: math.fsum(values) / len(values),
        "min": lambda: min(values),
        "max": lambda: max(values),
        "sum": lambda: math.fsum(values),
    }[quantity.take]()


def _unit(unit: str) -> str:
    """A unit as it is compared: case, spaces and the two signs for micro do not matter."""
    return "".join(unit.split()).casefold().replace("\u00b5", "u").replace("\u03bc", "u")


# ------------------------------------------------------------------------------------ times


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text.strip()).casefold()


def _between(begin: datetime, moment: datetime | None, end: datetime) -> bool:
    hours = hours_between(begin, moment)
    return hours is not None and moment is not None and hours >= 0 and moment < end


def _when(moment: datetime | None) -> tuple[bool, float]:
    """A key that sorts by time, what has none first; zones do not get in the way."""
    if moment is None:
        return (False, 0.0)
    return (True, (moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta())).timestamp())


def _earliest(times: Iterable[datetime | None]) -> datetime | None:
    return min((time for time in times if time is not None), key=_when, default=None)
