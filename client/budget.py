"""What is read out of ledgers: for people, for a study before it runs, and for one that is over."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.privacy.ledger import Charge, Ledger, LedgerRow, Part
from client.privacy.ledger_history import History, Kind, folded, rounds_in, works_of
from common.accountant import DpEvent, epsilon
from common.errors import Code, StorageError
from common.world import WallClock, write_durably

if TYPE_CHECKING:
    from client.folders import HospitalFolder
    from common.bundle import Bundle
    from common.joint import Audience

_LEDGER_FILE = "ledger.sqlite"
_CACHE_FILE = "ledger.forecast.json"
_FORECAST_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One hospital's ledger.

    Units:
        rounds: reserved so far, or drawn from a plan. forecast: further rounds like the last one
        under the cap, or None where there was no round yet. run: epsilon of what was done, without
        what plans still hold. reserved: the rest of `epsilon`, which comes back where a plan's
        rounds are not needed. planned: training steps that open plans hold; None without one.
    """

    site: str
    epsilon: float
    train: float
    held_out: float
    cap: float
    delta: float
    rows: int
    rounds: int
    forecast: int | None
    run: float
    reserved: float
    planned: int | None


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """All ledgers of a folder."""

    lines: tuple[LedgerLine, ...]

    @property
    def planned(self) -> bool:
        """Whether a study has reserved its whole work somewhere, and is not over."""
        return any(line.planned is not None for line in self.lines)

    @property
    def columns(self) -> list[str]:
        """The names of `rows`."""
        ahead = ["of it not yet run"] if self.planned else []
        return ["site", "epsilon", *ahead, "cap", "left", "delta", "rounds", "forecast"]

    def rows(self) -> list[list[str]]:
        """Table rows for people."""
        return [self._row(line) for line in self.lines]

    def _row(self, line: LedgerLine) -> list[str]:
        ahead = "-"
        if line.planned is not None:
            ahead = f"{line.reserved:.3f} ({line.planned} steps)"
        return [
            line.site,
            f"{line.epsilon:.3f}",
            *([ahead] if self.planned else []),
            f"{line.cap:.3f}",
            f"{max(0.0, line.cap - line.epsilon):.3f}",
            f"{line.delta:g}",
            str(line.rounds),
            "-" if line.forecast is None else f"{line.forecast} more",
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person needs to read the table."""
        told = ["epsilon: of the worse-off patients, training or held out; see docs/PRIVACY.md"]
        if self.planned:
            told.append(
                "not yet run: a joint study reserves all of its rounds before the first; what it "
                "does not run is given back when it is over or withdrawn"
            )
        return tuple(told)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {"ledgers": [asdict(line) for line in self.lines]}


def budget_report(folder: Path) -> BudgetReport:
    """Read every ledger under `folder`, verifying each chain.

    Raises StorageError where there is none, or one was tampered with.
    """
    lines = tuple(_line(path) for path in _ledgers(folder))
    if not lines:
        raise StorageError(
            Code.LEDGER_MISSING,
            f"{folder}: there is no privacy ledger here.",
            remedy="Name a run's output folder; a study with privacy.mode: none has no ledger.",
        )
    return BudgetReport(lines)


def _ledgers(folder: Path) -> Iterator[Path]:
    direct = folder / _LEDGER_FILE
    if direct.is_file():
        yield direct
    yield from sorted((folder / "state" / "sites").glob(f"*/{_LEDGER_FILE}"))


def _line(path: Path) -> LedgerLine:
    """A ledger's line: the one kept from last time, where not a row has come since."""
    ledger = Ledger.open_existing(path, clock=WallClock())
    try:
        head = ledger.head.hex()
        kept = _kept(path, head)
        if kept is not None:
            return kept
        line = _computed(path, ledger)
    finally:
        ledger.close()
    _keep(path, head, line)
    return line


def _kept(path: Path, head: str) -> LedgerLine | None:
    """What was computed for exactly this chain of rows. Shown only: no decision rests on it."""
    try:
        found = json.loads(path.with_name(_CACHE_FILE).read_text(encoding="utf-8"))
        return LedgerLine(**found["line"]) if found["head"] == head else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, head: str, line: LedgerLine) -> None:
    text = json.dumps({"head": head, "line": asdict(line)})
    with contextlib.suppress(StorageError):  # a folder that may only be read is computed anew
        write_durably(path.with_name(_CACHE_FILE), [text.encode()])


def _computed(path: Path, ledger: Ledger) -> LedgerLine:
    spent, run, plans = ledger.spent(), ledger.run_so_far(), ledger.open_plans()
    rows = ledger.history()
    left = [charge for plan in plans for charge in ledger.plan_left(plan)]
    planned = sum(event.steps for one in left if one.kind == "train" for event in one.events)
    return LedgerLine(
        path.parent.name,
        spent.epsilon,
        spent.train,
        spent.held_out,
        spent.cap,
        spent.delta,
        spent.rows,
        len(rounds_in(rows)),
        _forecast(ledger, rows),
        run.epsilon,
        max(0.0, spent.epsilon - run.epsilon),
        planned if plans else None,
    )


def _forecast(ledger: Ledger, rows: Sequence[LedgerRow]) -> int | None:
    """Rounds like the last one, beyond everything that is reserved; None before the first."""
    found = _last_round(rows)
    if found is None:
        return None
    split, charges = found
    training = [charge for charge in charges if charge.part == "train"] or charges
    return ledger.rounds_left(training, split, limit=_FORECAST_LIMIT)


def _last_round(rows: Sequence[LedgerRow]) -> tuple[str, list[Charge]] | None:
    """(split, charges) of the last round that was charged, or drawn from a plan."""
    for row in reversed(rows):
        body = row.body
        if row.kind == "draw":
            plan = next(other.body for other in rows if other.sequence == body["plan"])
            return plan["split"], [_charge(use) for use in body["uses"]]
        if row.kind == "charge" and "plan" not in body:
            same = [
                other.body
                for other in rows
                if other.kind == "charge"
                and "plan" not in other.body
                and other.body["round"] == body["round"]
            ]
            return body["split"], [_charge(other) for other in same]
    return None


def _charge(told: Mapping[str, Any]) -> Charge:
    return Charge(told["work"], told["part"], tuple(DpEvent(*e) for e in told["events"]))


def settle_unapproved(ledger: Ledger, folder: HospitalFolder) -> int:
    """Give back what studies reserved that nobody here approves any more; how many they were.

    Guarantee: what was drawn stays charged. A study that is approved again reserves the rest of
    its whole again.
    Raises StorageError.
    """
    return sum(
        ledger.settle_plan(plan)
        for plan in ledger.open_plans()
        if not folder.study(plan.study).approval.exists()
    )


# ---------------------------------------------------------------------------- one study

STATEMENT_FORMAT: Final = "wardround-privacy/1"
_Spent = dict[tuple[str, Part, Kind], Counter[tuple[float, float]]]
_PARTS: Final[tuple[Part, ...]] = ("train", "held_out")
_MODES: Final = {
    "local": "Every hospital adds all the noise to its own contribution before it leaves: the "
    "promise holds against everybody else together.",
    "joint": "Every hospital adds a share of the noise inside the secure sum, and only the sum is "
    "ever seen: the promise holds as long as no more hospitals than named tell the coordinator "
    "what they added.",
}


@dataclass(frozen=True, slots=True)
class StudyForecast:
    """What a whole study would do to a population, its spare rounds included.

    Units:
        epsilon of the worse-off patients at the ledger's delta: `before` it, `after` it, and
        the `cap`; `own` is the study's alone.
    """

    before: float
    own: float
    after: float
    cap: float
    delta: float

    @property
    def fits(self) -> bool:
        """Whether the cap allows the whole study."""
        return self.after <= self.cap + 1e-9

    @property
    def left(self) -> float:
        """Epsilon up to the cap, after the study."""
        return max(0.0, self.cap - self.after)


def forecast_study(
    bundle: Bundle,
    rows: Sequence[LedgerRow],
    *,
    releases: int,
    split: str,
    cap: float,
    delta: float,
) -> StudyForecast | None:
    """What the study would add to a ledger's rows; None where it has no privacy mode.

    Args:
        bundle: the study.
        rows: the population's ledger; empty where there is none yet.
        releases: how often its metrics are released, spare rounds aside.
        split: the study's division into training and held-out patients.
        cap: the population's.
        delta: the ledger's.
    """
    if bundle.noise_multiplier is None or bundle.evaluation_noise is None:
        return None
    history = folded(rows)
    before, own = history.spent, _whole(bundle, releases, split)
    after: _Spent = {key: counts.copy() for key, counts in before.items()}
    already: _Spent = {}
    if bundle.study.privacy.mode == "joint":  # its plan may be charged already
        already = history.of_study(bundle.digest.hex()).spent
    for key, counts in own.items():
        after.setdefault(key, Counter()).update(counts - already.get(key, Counter()))
    return StudyForecast(
        _total(before, delta), _total(own, delta), _total(after, delta), cap, delta
    )


def _whole(bundle: Bundle, releases: int, split: str) -> _Spent:
    """Everything a study may do, its spare rounds included."""
    from client.site import plan_charges

    training, sigma, noise = (
        bundle.study.training,
        bundle.noise_multiplier,
        bundle.evaluation_noise,
    )
    if sigma is None or noise is None:
        raise AssertionError("a study with a privacy mode has resolved noise")
    if bundle.study.privacy.mode == "joint":
        charges = plan_charges(bundle)
    else:
        rounds, spare = training.rounds, training.spare_rounds
        steps = DpEvent(sigma, training.sampling_rate, (rounds + spare) * training.local_steps)
        charges = (
            Charge("train", "train", (steps,)),
            Charge("evaluate", "held_out", (DpEvent(noise, 1.0, releases + spare),)),
        )
        if bundle.statistics_noise is not None:
            once = DpEvent(bundle.statistics_noise, 1.0, 1)
            charges += (Charge("statistics", "train", (once,)),)
    return {(split, part, kind): counts for (kind, part), counts in works_of(charges).items()}


def privacy_statement(bundle: Bundle, rows: Sequence[LedgerRow], *, site: str) -> dict[str, Any]:
    """What a study has cost this hospital's patients: for the people who must answer for it.

    Epsilon is at the study's own delta, counted from the ledger's rows by dp-accounting's PLD.
    """
    privacy, digest = bundle.study.privacy, bundle.digest.hex()
    told: dict[str, Any] = {
        "format": STATEMENT_FORMAT,
        "site": site,
        "study": bundle.study.name,
        "digest": digest,
        "mode": privacy.mode,
        "unit": "patient",
        "neighbours": "one patient more or less",
    }
    if privacy.mode == "none" or privacy.delta is None:
        return told | {
            "statement": "The study trained without differential privacy: its model promises no "
            "patient anything; single updates were hidden by secure aggregation."
        }
    own = folded(rows).of_study(digest)
    parts = _by_part(own.spent, privacy.delta)
    told |= {
        "mode_explained": _MODES[privacy.mode],
        "epsilon_agreed": privacy.epsilon,
        "delta": privacy.delta,
        "epsilon_spent": _named(parts),
        "rounds_charged": len(rounds_in(rows, digest)),
    }
    if privacy.mode == "joint":
        return told | _joint_statement(bundle, own, privacy.delta)
    return told | {"statement": _promise(max(parts.values()), privacy.delta)}


def _joint_statement(bundle: Bundle, own: History, delta: float) -> dict[str, Any]:
    """What was reserved, drawn and settled, and epsilon by who conspires, over what was drawn."""
    from common.joint import audiences

    study = bundle.study
    parties = len(study.sites)
    opened = [first for first, plan in own.plans.items() if not plan.settled]
    done = own.after(opened)
    seen = audiences(parties, study.quorum_size(parties), study.colluders(parties))
    against = [_against(bundle, audience, done, delta) for audience in seen]
    charged = _by_part(done, delta)
    steps = {
        name: sum(sum(counts.values()) for works in told for counts in works.values())
        for name, told in {
            "reserved": [plan.counted for plan in own.plans.values()],
            "drawn": [plan.drawn for plan in own.plans.values()],
        }.items()
    }
    return {
        "plan": {**steps, "settled": not opened, "epsilon_drawn": _named(charged)},
        "audiences": against,
        "statement": " ".join(str(one["statement"]) for one in against),
    }


def _against(bundle: Bundle, audience: Audience, done: _Spent, delta: float) -> dict[str, Any]:
    """Epsilon against one audience. Statistics and metrics carry all of their noise: for anyone."""
    scaled: _Spent = {}
    for (split, part, kind), counts in done.items():
        factor = audience.factor if kind == "train" else 1.0
        kept = scaled.setdefault((split, part, kind), Counter())
        for (sigma, rate), steps in counts.items():
            kept[(sigma * factor, rate)] += steps
    parts = _by_part(scaled, delta)
    return {
        "name": audience.name,
        "told": audience.told,
        "noise_multiplier": (bundle.noise_multiplier or 0.0) * audience.factor,
        "epsilon": _named(parts),
        "statement": _promise(max(parts.values()), delta, against=audience.told),
    }


def _promise(worst: float, delta: float, *, against: str = "") -> str:
    before = f"Against {against}, everything" if against else "Everything"
    return (
        f"{before} this hospital contributed is ({worst:.3f}, {delta:g})-"
        "differentially private for every one of its patients."
    )


def _named(parts: Mapping[Part, float]) -> dict[str, float]:
    return {"training": parts["train"], "held_out": parts["held_out"]}


def _by_part(spent: _Spent, delta: float) -> dict[Part, float]:
    return {part: _composed(spent, (part, "all"), delta) for part in _PARTS}


def _composed(spent: _Spent, parts: Sequence[str], delta: float) -> float:
    events = [
        DpEvent(sigma, rate, steps)
        for (_, part, _), counts in spent.items()
        if part in parts
        for (sigma, rate), steps in counts.items()
    ]
    return epsilon(events, delta) if events else 0.0


def _total(spent: _Spent, delta: float) -> float:
    """Of the worse-off patients; under two divisions a patient may have been on both sides."""
    if len({split for split, _, _ in spent}) > 1:
        return _composed(spent, ("train", "held_out", "all"), delta)
    return max(_by_part(spent, delta).values())
