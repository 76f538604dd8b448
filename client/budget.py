"""What is read out of ledgers: for people, for a study before it runs, and for one that is over."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.privacy.ledger import Charge, Ledger, LedgerRow
from common.accountant import DpEvent, epsilon
from common.errors import Code, StorageError
from common.world import WallClock, write_durably

if TYPE_CHECKING:
    from common.bundle import Bundle

_LEDGER_FILE = "ledger.sqlite"
_CACHE_FILE = "ledger.forecast.json"
_FORECAST_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One hospital's ledger.

    Units:
        rounds: reserved so far. forecast: further rounds like the last one under the cap, or
        None where there was no round yet.
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


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """All ledgers of a folder."""

    lines: tuple[LedgerLine, ...]

    def rows(self) -> list[list[str]]:
        """Table rows for people."""
        return [
            [
                line.site,
                f"{line.epsilon:.3f}",
                f"{line.cap:.3f}",
                f"{max(0.0, line.cap - line.epsilon):.3f}",
                f"{line.delta:g}",
                str(line.rounds),
                "-" if line.forecast is None else f"{line.forecast} more",
            ]
            for line in self.lines
        ]

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
    spent = ledger.spent()
    rows = [row.body for row in ledger.history() if row.kind == "charge"]
    rounds = {(row["study"], row["round"], row["attempt"]) for row in rows}
    last = [row for row in rows if row["round"] == rows[-1]["round"]] if rows else []
    training = [row for row in last if row["part"] == "train"] or last
    forecast = None
    if training:
        charges = [
            Charge(row["work"], row["part"], tuple(DpEvent(*e) for e in row["events"]))
            for row in training
        ]
        forecast = ledger.rounds_left(charges, rows[-1]["split"], limit=_FORECAST_LIMIT)
    return LedgerLine(
        path.parent.name,
        spent.epsilon,
        spent.train,
        spent.held_out,
        spent.cap,
        spent.delta,
        spent.rows,
        len(rounds),
        forecast,
    )


# ---------------------------------------------------------------------------- one study

STATEMENT_FORMAT: Final = "wardround-privacy/1"
_Spent = dict[tuple[str, str], Counter[tuple[float, float]]]


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
    training, before = bundle.study.training, _spent(rows)
    rounds = training.rounds + training.spare_rounds
    own: _Spent = {
        (split, "train"): Counter(
            {(bundle.noise_multiplier, training.sampling_rate): rounds * training.local_steps}
        ),
        (split, "held_out"): Counter(
            {(bundle.evaluation_noise, 1.0): releases + training.spare_rounds}
        ),
    }
    if bundle.statistics_noise is not None:
        own[(split, "train")][(bundle.statistics_noise, 1.0)] += 1
    after: _Spent = {key: counts.copy() for key, counts in before.items()}
    for key, counts in own.items():
        after.setdefault(key, Counter()).update(counts)
    return StudyForecast(
        _total(before, delta), _total(own, delta), _total(after, delta), cap, delta
    )


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
    own = _spent(rows, study=digest)
    parts = {part: _composed(own, (part, "all"), privacy.delta) for part in ("train", "held_out")}
    charged = {
        (row.body["round"], row.body["attempt"])
        for row in rows
        if row.kind == "charge" and row.body["study"] == digest
    }
    worst = max(parts.values())
    return told | {
        "epsilon_agreed": privacy.epsilon,
        "delta": privacy.delta,
        "epsilon_spent": {"training": parts["train"], "held_out": parts["held_out"]},
        "rounds_charged": len(charged),
        "statement": f"Everything this hospital contributed is ({worst:.3f}, {privacy.delta:g})-"
        "differentially private for every one of its patients.",
    }


def _spent(rows: Sequence[LedgerRow], *, study: str | None = None) -> _Spent:
    """(split, part) to how many steps of which event; voided rows left out."""
    voided: set[int] = set()
    for row in rows:
        if row.kind == "void":
            voided.update(range(row.body["first"], row.body["last"] + 1))
    spent: _Spent = {}
    for row in rows:
        if row.kind != "charge" or row.sequence in voided:
            continue
        if study is not None and row.body["study"] != study:
            continue
        counts = spent.setdefault((row.body["split"], row.body["part"]), Counter())
        for sigma, rate, steps in row.body["events"]:
            counts[(sigma, rate)] += steps
    return spent


def _composed(spent: Mapping[tuple[str, str], Any], parts: Sequence[str], delta: float) -> float:
    events = [
        DpEvent(sigma, rate, steps)
        for (_, part), counts in spent.items()
        if part in parts
        for (sigma, rate), steps in counts.items()
    ]
    return epsilon(events, delta) if events else 0.0


def _total(spent: _Spent, delta: float) -> float:
    """Of the worse-off patients; under two divisions a patient may have been on both sides."""
    if len({split for split, _ in spent}) > 1:
        return _composed(spent, ("train", "held_out", "all"), delta)
    return max(_composed(spent, (part, "all"), delta) for part in ("train", "held_out"))
