"""What `wardround privacy` shows: every ledger under a folder, and how many rounds are left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.privacy.ledger import Charge, Ledger
from common.accountant import DpEvent
from common.errors import Code, StorageError
from common.world import WallClock, write_durably

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
