"""A ledger's rows folded up: what is charged, what plans hold, what was drawn from them. Pure.

A plan is a study's whole work, charged at once; rounds draw from it, and once it is settled only
what was drawn counts (docs/PRIVACY.md, "Ledger").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.accountant import DpEvent, epsilon

__all__ = [
    "EMPTY_HEAD",
    "HEAD_BYTES",
    "Charge",
    "Counts",
    "History",
    "Kind",
    "LedgerRow",
    "Part",
    "PlanState",
    "Spending",
    "Works",
    "charge_rows",
    "charges_in",
    "folded",
    "require_work",
    "rounds_in",
    "told",
    "works_of",
]

Part = Literal["train", "held_out", "all"]
Kind = Literal["statistics", "train", "evaluate"]
Counts = Counter[tuple[float, float]]
Works = dict[tuple[Kind, Part], Counts]

HEAD_BYTES = 32
EMPTY_HEAD = bytes(HEAD_BYTES)


@dataclass(frozen=True, slots=True)
class Charge:
    """What one piece of work does to one part of the patients."""

    kind: Kind
    part: Part
    events: tuple[DpEvent, ...]


@dataclass(frozen=True, slots=True)
class Spending:
    """Where the population stands. `train` and `held_out` are its two parts' own epsilons."""

    epsilon: float
    cap: float
    delta: float
    rows: int
    train: float
    held_out: float
    splits: int

    @property
    def left(self) -> float:
        """Epsilon up to the cap. Not a currency: what a round costs depends on the history."""
        return max(0.0, self.cap - self.epsilon)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row as stored: its number, its kind, its moment and its fields."""

    sequence: int
    kind: str
    at: float
    body: Mapping[str, Any]


@dataclass
class PlanState:
    """A plan as its rows tell: everything reserved, and what rounds have drawn of it.

    Units: `first` and `last` are the rows that charged it.
    """

    study: str
    run: str
    split: str
    first: int
    last: int
    reserved: Works = field(default_factory=dict)
    drawn: Works = field(default_factory=dict)
    settled: bool = False

    def unused(self) -> Works:
        """What no round has drawn, in whole steps."""
        return _minus(self.reserved, self.drawn)

    def lacks(self, charges: Iterable[Charge]) -> Works:
        """What of `charges` the plan has not left; empty where it holds all of them."""
        return _minus(works_of(charges), self.unused())

    @property
    def counted(self) -> Works:
        """What counts: all of it until the plan is settled, then what was drawn."""
        return self.drawn if self.settled else self.reserved


def works_of(charges: Iterable[Charge]) -> Works:
    """Charges by kind and part."""
    works: Works = {}
    for charge in charges:
        counts = works.setdefault((charge.kind, charge.part), Counter())
        for event in charge.events:
            counts[(event.noise_multiplier, event.sampling_rate)] += event.steps
    return works


def charges_in(works: Works) -> tuple[Charge, ...]:
    """The inverse of `works_of`, in order."""
    return tuple(
        Charge(
            kind,
            part,
            tuple(DpEvent(sigma, rate, steps) for (sigma, rate), steps in sorted(counts.items())),
        )
        for (kind, part), counts in sorted(works.items())
    )


def _minus(works: Works, less: Works) -> Works:
    left = {key: counts - less.get(key, Counter()) for key, counts in works.items()}
    return {key: counts for key, counts in left.items() if counts}


def _plus(works: Works, more: Works) -> None:
    for key, counts in more.items():
        works.setdefault(key, Counter()).update(counts)


def _works_told(entries: Iterable[Mapping[str, Any]]) -> Works:
    """What rows say of work, part and events. Raises ValueError, KeyError, TypeError."""
    works: Works = {}
    for entry in entries:
        counts = works.setdefault((entry["work"], entry["part"]), Counter())
        for sigma, rate, steps in entry["events"]:
            if steps < 1:
                raise ValueError("a row counts whole steps")
            counts[(sigma, rate)] += steps
    return works


class History:
    """The ledger folded up: enough to answer every question without reading rows again.

    `spent` is what counts, by split, part and kind of work.
    """

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.genesis: Mapping[str, Any] = {}
        self.cap = 0.0
        self.spent: dict[tuple[str, Part, Kind], Counts] = {}
        self.attempts: Counter[tuple[str, str, int]] = Counter()
        self.plans: dict[int, PlanState] = {}
        # What the last reservation's rows say was spent: showing it must not load an accountant.
        self._recorded: Sequence[float] | None = (0.0, 0.0, 0.0)
        self._charges: dict[int, Mapping[str, Any]] = {}

    @property
    def counter(self) -> int:
        """Number of rows."""
        return len(self.heads)

    @property
    def head(self) -> bytes:
        """The last row's head."""
        return self.heads[-1] if self.heads else EMPTY_HEAD

    # ------------------------------------------------------------------ rows

    def fold(self, body: Mapping[str, Any], head: bytes) -> None:
        """Take in the next row, its head already checked.

        Raises ValueError, KeyError or TypeError, and changes nothing, where no ledger can have
        written this row here.
        """
        self.take(body["kind"], body["sequence"], body)
        self.heads.append(head)

    def take(self, kind: str, sequence: int, body: Mapping[str, Any]) -> None:
        """As `fold`, for a row whose head is not kept."""
        if kind == "genesis":
            self.genesis, self.cap = body, body["cap"]
        elif kind == "cap":
            self.cap = body["cap"]
        elif kind == "charge":
            self._charge(sequence, body)
        elif kind == "void":
            self._void(range(body["first"], body["last"] + 1))
        elif kind == "draw":
            self._draw(body)
        elif kind == "settle":
            self._settle(body)

    def _charge(self, sequence: int, body: Mapping[str, Any]) -> None:
        works = _works_told([body])
        key, attempt = (body["study"], body.get("run", ""), body["round"]), body["attempt"]
        if "plan" in body:
            self._planned(sequence, body, works)
        else:
            self._charges[sequence] = body
        self._add(body["split"], works, 1)
        self._recorded = body.get("after")
        self.attempts[key] = max(self.attempts[key], attempt)

    def _planned(self, sequence: int, body: Mapping[str, Any], works: Works) -> None:
        first = body["plan"]
        if first == sequence:
            if self.open_plan(body["study"]) is not None:
                raise ValueError("a study has one open plan")
            self.plans[first] = PlanState(
                body["study"], body["run"], body["split"], first, sequence
            )
        plan = self.plans[first]
        named = (body["study"], body["run"], body["split"])
        follows = sequence in {plan.first, plan.last + 1} and not plan.drawn and not plan.settled
        if named != (plan.study, plan.run, plan.split) or not follows:
            raise ValueError("a row does not belong to its plan")
        plan.last = sequence
        _plus(plan.reserved, works)

    def _void(self, sequences: range) -> None:
        taken = [self._charges[sequence] for sequence in sequences]
        for sequence, body in zip(sequences, taken, strict=True):
            del self._charges[sequence]
            self._add(body["split"], _works_told([body]), -1)
        self._recorded = None

    def _draw(self, body: Mapping[str, Any]) -> None:
        plan, works = self.plans[body["plan"]], _works_told(body["uses"])
        key, attempt = (body["study"], body["run"], body["round"]), body["attempt"]
        if plan.settled or plan.study != body["study"] or _minus(works, plan.unused()):
            raise ValueError("more was drawn than the plan holds")
        _plus(plan.drawn, works)
        self.attempts[key] = max(self.attempts[key], attempt)

    def _settle(self, body: Mapping[str, Any]) -> None:
        plan, after = self.plans[body["plan"]], body["after"]
        if plan.settled or _works_told(body["drawn"]) != plan.drawn:
            raise ValueError("the plan was not settled by what was drawn")
        self._add(plan.split, plan.unused(), -1)
        plan.settled = True
        self._recorded = after

    def _add(self, split: str, works: Works, sign: int) -> None:
        _add(self.spent, split, works, sign)

    # ------------------------------------------------------------------ questions

    def open_plan(self, study: str) -> PlanState | None:
        """The study's plan that is not settled."""
        for plan in self.plans.values():
            if plan.study == study and not plan.settled:
                return plan
        return None

    def not_yet_drawn(self, study: str, charges: Iterable[Charge]) -> Works:
        """`charges` less what settled plans of the study have drawn."""
        left = works_of(charges)
        for plan in self.plans.values():
            if plan.study == study and plan.settled:
                left = _minus(left, plan.drawn)
        return left

    def of_study(self, study: str) -> History:
        """What this study alone was charged: a history whose answers are the study's own."""
        own = History()
        own.genesis, own.cap = self.genesis, self.cap
        for body in self._charges.values():
            if body["study"] == study:
                own._add(body["split"], _works_told([body]), 1)
        for first, plan in self.plans.items():
            if plan.study == study:
                own.plans[first] = plan
                own._add(plan.split, plan.counted, 1)
        own._recorded = None
        return own

    def spending(
        self, extra: Sequence[tuple[str, Charge]] = (), *, settled: Collection[int] = ()
    ) -> Spending:
        """What is spent, were `extra` (split, charge) added and these open plans settled."""
        if not extra and not settled and self._recorded is not None:
            total, train, held_out = self._recorded
            return self._spending(total, train, held_out, self.spent)
        spent = self.after(settled)
        for split, charge in extra:
            _add(spent, split, works_of([charge]), 1)
        delta = self.genesis["delta"]
        train = _compose(spent, ("train", "all"), delta)
        held_out = _compose(spent, ("held_out", "all"), delta)
        # Parallel composition needs two sets of patients that never change; under two splits
        # a patient may have been on both sides, so everything composes (docs/PRIVACY.md).
        total = max(train, held_out)
        if len({split for split, _, _ in spent}) > 1:
            total = _compose(spent, ("train", "held_out", "all"), delta)
        return self._spending(total, train, held_out, spent)

    def after(self, settled: Collection[int]) -> dict[tuple[str, Part, Kind], Counts]:
        """What would count, were these open plans settled; a copy."""
        spent = {key: counts.copy() for key, counts in self.spent.items()}
        for first in settled:
            plan = self.plans[first]
            if not plan.settled:
                _add(spent, plan.split, plan.unused(), -1)
        return spent

    def _spending(
        self,
        total: float,
        train: float,
        held_out: float,
        spent: Mapping[tuple[str, Part, Kind], Counts],
    ) -> Spending:
        splits = len({split for split, _, _ in spent})
        delta = self.genesis["delta"]
        return Spending(total, self.cap, delta, self.counter, train, held_out, splits)


def _add(spent: dict[tuple[str, Part, Kind], Counts], split: str, works: Works, sign: int) -> None:
    for (kind, part), counts in works.items():
        key = (split, part, kind)
        kept = spent.setdefault(key, Counter())
        for event, steps in counts.items():
            kept[event] += sign * steps
            if not kept[event]:
                del kept[event]
        if not kept:
            del spent[key]


def _compose(
    spent: Mapping[tuple[str, Part, Kind], Counts], parts: Sequence[str], delta: float
) -> float:
    events = [
        DpEvent(sigma, rate, steps)
        for (_, part, _), counts in spent.items()
        if part in parts
        for (sigma, rate), steps in counts.items()
    ]
    return epsilon(events, delta)


def folded(rows: Iterable[LedgerRow]) -> History:
    """Rows that a ledger has given out, folded up again."""
    history = History()
    for row in rows:
        history.take(row.kind, row.sequence, row.body)
    return history


def rounds_in(rows: Iterable[LedgerRow], study: str | None = None) -> set[tuple[str, int, int]]:
    """(study, round, attempt) of every round that was charged, or drawn from a plan."""
    return {
        (row.body["study"], row.body["round"], row.body["attempt"])
        for row in rows
        if (row.kind == "draw" or (row.kind == "charge" and "plan" not in row.body))
        and study in {None, row.body["study"]}
    }


def require_work(charges: Sequence[Charge]) -> None:
    """A reservation without work is our own fault. Raises ValueError."""
    if not charges or not all(charge.events for charge in charges):
        raise ValueError("a reservation charges at least one event per part")


def told(charge: Charge) -> dict[str, Any]:
    """What rows say of a charge."""
    return {
        "work": charge.kind,
        "part": charge.part,
        "events": [
            [event.noise_multiplier, event.sampling_rate, event.steps] for event in charge.events
        ],
    }


def charge_rows(
    charges: Sequence[Charge], fields: dict[str, Any], after: Spending
) -> list[dict[str, Any]]:
    """The rows of charges that share `fields`, each with what is spent after all of them."""
    totals = [after.epsilon, after.train, after.held_out]
    return [{"kind": "charge", **fields, **told(charge), "after": totals} for charge in charges]
