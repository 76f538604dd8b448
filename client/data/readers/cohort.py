"""What is collected of each encounter while a folder's tables stream by.

Numbers lie packed, so that millions of measurements fit; what is shared between rows (names,
units, titles) is held once.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Generic, TypeVar

from client.data.encounters import (
    CodeEntry,
    CodeSystem,
    DrugEntry,
    Encounter,
    Measurement,
    Note,
    Tally,
)
from client.data.readers.files import Item, Table, Wanted
from common.errors import Code, DataError

__all__ = ["OLDEST", "Cohort", "Items", "Stay", "age_in_years", "named"]

OLDEST: Final = 90.0
"""Years that stand for every age above 89, which these data sets hide."""

_NEVER: Final = datetime(9999, 12, 31)  # noqa: DTZ001 - after every note's time
_ORIGIN: Final = datetime(2000, 1, 1)  # noqa: DTZ001 - shifted dates have no zone
_MAX_AGE: Final = 130.0
# MIMIC-III moves births of patients above 89 back by 300 years.
_HIDDEN_AGE: Final = 200.0

_Kept = TypeVar("_Kept", bound=Hashable)


def age_in_years(years: float) -> float | None:
    """An age as an encounter has it: hidden and high ages are 90, impossible ones None."""
    if not years >= 0 or _MAX_AGE < years < _HIDDEN_AGE:
        return None
    return min(years, OLDEST)


class _Pool(Generic[_Kept]):
    """Holds equal things once, and knows them by number."""

    def __init__(self) -> None:
        self._numbers: dict[_Kept, int] = {}
        self._things: list[_Kept] = []

    def add(self, thing: _Kept) -> int:
        known = self._numbers.get(thing)
        if known is None:
            known = self._numbers[thing] = len(self._things)
            self._things.append(thing)
        return known

    def __getitem__(self, place: int) -> _Kept:
        return self._things[place]


@dataclass(slots=True)
class _Page:
    """A note being collected; `order` is its time and then its place in the file."""

    order: tuple[datetime, int]
    key: object
    kind: str
    text: str


@dataclass(slots=True, kw_only=True, repr=False)
class Stay:
    """One encounter in the making. The packed parts hold three numbers an entry."""

    patient: str
    encounter: str
    site: str | None
    start: datetime | None
    end: datetime | None
    age: float | None
    sex: str | None
    died: bool | None
    line: int
    pages: list[_Page] | None = None
    codes: array[float] | None = None
    drugs: array[float] | None = None
    numbers: array[float] | None = None


class Cohort:
    """All encounters of a folder, and what the tables say of them.

    Args:
        table: where the encounters stand.
        wanted: what is collected.
        tally: counts what is left out.
    """

    def __init__(self, table: Table, wanted: Wanted, tally: Tally) -> None:
        self._file = str(table.path)
        self._wanted = wanted
        self._tally = tally
        self._stays: dict[str, Stay] = {}
        self._left_out: dict[str, tuple[str, int]] = {}
        self._codes = _Pool[tuple[CodeSystem, str, str]]()
        self._drugs = _Pool[tuple[CodeSystem, str, str]]()
        self._items = _Pool[tuple[str, str]]()
        self._order = 0

    def add(self, stay: Stay) -> bool:
        """Take an encounter; False where it is left out and counted.

        An encounter that comes again is counted, and the first kept; one that comes again under
        another patient would blur whose it is.

        Raises:
            DataError: the same encounter belongs to two patients.
        """
        first = self._first(stay.encounter)
        if first is not None:
            patient, line = first
            if patient != stay.patient:
                message = (
                    f"{self._file}:{stay.line}: gives the encounter of line {line} to another "
                    f"patient."
                )
                raise DataError(Code.DATA_VALUE, message)
            self._tally.add("encounters that come again (the first is kept)")
            return False
        if stay.start is not None and stay.end is not None and stay.end < stay.start:
            self._left_out[stay.encounter] = (stay.patient, stay.line)
            self._tally.add("encounters that end before they begin")
            return False
        self._stays[stay.encounter] = stay
        return True

    def _first(self, encounter: str) -> tuple[str, int] | None:
        stay = self._stays.get(encounter)
        if stay is not None:
            return stay.patient, stay.line
        return self._left_out.get(encounter)

    def require_some(self) -> None:
        """Raises DataError where the table held no encounter at all."""
        if not self._stays and not self._left_out:
            raise DataError(Code.DATA_EMPTY, f"{self._file}: holds no record.")

    def rows(
        self, table: Table, required: Sequence[str], optional: Sequence[str] = ()
    ) -> Iterator[tuple[str, ...]]:
        """The cells of a table's rows; a table that holds none is counted. Raises DataError."""
        empty = True
        for _, cells in table.rows(required, optional):
            empty = False
            yield cells
        if empty:
            self._tally.add("tables that hold no record")

    def find(self, encounter: str, what: str, *, patient: str | None = None) -> Stay | None:
        """The encounter that a row of `what` points to; None, counted, where there is none.

        Args:
            encounter: its id, as the row has it.
            what: which rows these are, in the plural and in fixed words.
            patient: whose the row says that it is, where it says so.
        """
        encounter = encounter.strip()
        stay = self._stays.get(encounter)
        if stay is None:
            if not encounter:
                reason = "outside any encounter"
            elif encounter in self._left_out:
                reason = "of an encounter that is left out"
            else:
                reason = "of an unknown encounter"
            self._tally.add(f"{what} {reason}")
            return None
        if patient is not None and patient.strip() != stay.patient:
            self._tally.add(f"{what} of another patient than the encounter's")
            return None
        return stay

    def add_note(
        self, stay: Stay, kind: str, time: datetime | None, text: str, *, key: object = None
    ) -> None:
        """Keep a note; the latest give way where there are more than wanted.

        Args:
            stay: whose note.
            kind: its category.
            time: when it was written.
            text: what it says.
            key: lines under one key (not None) are one note.
        """
        pages = stay.pages
        if pages is None:
            pages = stay.pages = []
        same = None if key is None else next((page for page in pages if page.key == key), None)
        if same is not None:
            same.text = f"{same.text}\n{text}"
        else:
            self._order += 1
            page = _Page((time or _NEVER, self._order), key, kind, text)
            bisect.insort(pages, page, key=_order_of)
        self._trim(pages)

    def _trim(self, pages: list[_Page]) -> None:
        # What is kept is the beginning of all notes in order of time; a note that comes in only
        # pushes out the end, so what once went out never belongs in again.
        most, room = self._wanted.most_notes, self._wanted.most_characters
        if most is not None and len(pages) > most:
            del pages[most:]
            self._tally.add("notes beyond the number wanted of an encounter")
        if room is None:
            return
        for place, page in enumerate(pages):
            if len(page.text) > room:
                page.text = page.text[:room]
                del pages[place + (1 if page.text else 0) :]
                self._tally.add("notes cut at the characters wanted of an encounter")
                return
            room -= len(page.text)

    def add_code(
        self,
        stay: Stay,
        system: CodeSystem,
        code: str,
        *,
        rank: int | None,
        time: datetime | None,
        title: str,
    ) -> None:
        """Keep a diagnosis."""
        stay.codes = array("d") if stay.codes is None else stay.codes
        if self._has_room(stay.codes):
            place = self._codes.add((system, code, title))
            stay.codes.extend((place, math.nan if rank is None else rank, _packed(time)))

    def add_drug(
        self,
        stay: Stay,
        system: CodeSystem,
        code: str,
        *,
        name: str,
        start: datetime | None,
        stop: datetime | None,
    ) -> None:
        """Keep a drug; a stop before the start is left out and counted."""
        if start is not None and stop is not None and stop < start:
            self._tally.add("drugs that stop before they start (kept without the stop)")
            stop = None
        stay.drugs = array("d") if stay.drugs is None else stay.drugs
        if self._has_room(stay.drugs):
            place = self._drugs.add((system, code, name))
            stay.drugs.extend((place, _packed(start), _packed(stop)))

    def add_number(
        self, stay: Stay, item: str, unit: str, *, value: float, time: datetime | None
    ) -> None:
        """Keep a measurement, if it lies within the hours wanted."""
        hours = self._wanted.hours
        if hours is not None and (
            time is None or stay.start is None or time - stay.start > timedelta(hours=hours)
        ):
            self._tally.add("measurements outside the hours wanted")
            return
        stay.numbers = array("d") if stay.numbers is None else stay.numbers
        if self._has_room(stay.numbers):
            stay.numbers.extend((self._items.add((item, unit)), _packed(time), value))

    def _has_room(self, packed: array[float]) -> bool:
        if len(packed) < 3 * self._wanted.most_entries:
            return True
        self._tally.add("entries beyond the number wanted of an encounter")
        return False

    def encounters(self) -> Iterator[Encounter]:
        """All encounters in the order of the file; each is let go of as it is given."""
        for name in list(self._stays):
            yield self._finished(self._stays.pop(name))

    def _finished(self, stay: Stay) -> Encounter:
        return Encounter(
            patient=stay.patient,
            encounter=stay.encounter,
            site=stay.site,
            start=stay.start,
            end=stay.end,
            age=stay.age,
            sex=stay.sex,
            died=stay.died,
            file=self._file,
            line=stay.line,
            notes=tuple(
                Note(page.text, page.kind, None if page.order[0] == _NEVER else page.order[0])
                for page in stay.pages or ()
            ),
            codes=tuple(
                CodeEntry(system, code, None if math.isnan(rank) else int(rank), time, title)
                for place, rank, when in _triples(stay.codes)
                for (system, code, title), time in [(self._codes[int(place)], _unpacked(when))]
            ),
            drugs=tuple(
                DrugEntry(*self._drugs[int(place)], _unpacked(start), _unpacked(stop))
                for place, start, stop in _triples(stay.drugs)
            ),
            measurements=tuple(
                Measurement(item, value, unit, _unpacked(when))
                for place, when, value in _triples(stay.numbers)
                for item, unit in [self._items[int(place)]]
            ),
        )


def _order_of(page: _Page) -> tuple[datetime, int]:
    return page.order


def _triples(packed: array[float] | None) -> Iterator[tuple[float, float, float]]:
    cells = iter(packed or ())
    return zip(cells, cells, cells, strict=True)


def _packed(time: datetime | None) -> float:
    return math.nan if time is None else (time - _ORIGIN).total_seconds()


def _unpacked(seconds: float) -> datetime | None:
    return None if math.isnan(seconds) else _ORIGIN + timedelta(seconds=seconds)


class Items:
    """Units of the wanted items, and which of them ever occurred.

    A reader does not convert units. Where the study names one, numbers in another are left out;
    where it names none, they are kept with their units and counted, so that a mixture is seen.
    """

    def __init__(self, wanted: Wanted, tally: Tally) -> None:
        self.names = None if wanted.items is None else tuple(item.name for item in wanted.items)
        self._units = {
            item.name: _plain(item.unit) for item in wanted.items or () if item.unit is not None
        }
        self._first: dict[str, str] = {}
        self._unseen = set(self.names or ())
        self._tally = tally

    def saw(self, item: str) -> None:
        """Note that the item occurs."""
        self._unseen.discard(item)

    def accepts(self, item: str, unit: str) -> bool:
        """Whether a number of this item in this unit is kept."""
        self.saw(item)
        asked = self._units.get(item)
        plain = _plain(unit)
        if asked is not None:
            if plain == asked:
                return True
            self._tally.add("measurements in another unit than the one wanted")
            return False
        if self._first.setdefault(item, plain) != plain:
            self._tally.add("measurements in another unit than the item's first (kept)")
        return True

    def close(self) -> None:
        """Count the wanted items that never occurred."""
        if self._unseen:
            self._tally.add("wanted measurements that never occur", len(self._unseen))


def named(items: tuple[Item, ...] | None) -> dict[str, str]:
    """How each wanted item is called, by its name without case."""
    return {item.name.strip().casefold(): item.name for item in items or ()}


def _plain(unit: str) -> str:
    return "".join(unit.split()).casefold()
