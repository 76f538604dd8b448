"""The privacy ledger: what a population of patients has spent, reserved before it is spent.

One SQLite file per population, shared by every study, run and retry on it. Rows are appended,
never changed; each row's head hashes the row before it, so a changed row is named and a
restored older file lacks heads that other hospitals have witnessed (docs/PRIVACY.md, "Ledger").
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.privacy.ledger_file import (
    canonical,
    connect,
    fold_rows,
    found,
    next_head,
    storage,
    tampered,
)
from client.privacy.ledger_history import (
    EMPTY_HEAD,
    HEAD_BYTES,
    Charge,
    History,
    Kind,
    LedgerRow,
    Part,
    PlanState,
    Spending,
    charge_rows,
    charges_in,
    require_work,
    told,
)
from client.privacy.split import HeldOutSplit
from common.accountant import DpEvent
from common.errors import Code, RefusedError, StorageError
from common.ports import Clock, Entropy

__all__ = [
    "EMPTY_HEAD",
    "HEAD_BYTES",
    "Charge",
    "HeldOutSplit",
    "Kind",
    "Ledger",
    "LedgerRow",
    "Part",
    "PlanReservation",
    "Reservation",
    "RoundId",
    "Spending",
]

_Row = tuple[dict[str, Any], bytes]

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class RoundId:
    """Which round of which run of which study a reservation is for."""

    study: bytes
    run: str
    number: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A round's charges, durable. `sequence` is the last of its rows; `attempt` counts from 1."""

    first_sequence: int
    sequence: int
    attempt: int
    epsilon_after: float


@dataclass(frozen=True, slots=True)
class PlanReservation:
    """A study's whole work, charged and durable; what it still holds, the ledger knows.

    Units: `first_sequence` to `sequence` are its rows; `charges` what they reserve.
    """

    study: bytes
    first_sequence: int
    sequence: int
    charges: tuple[Charge, ...]
    epsilon_after: float = field(compare=False)


class Ledger:
    """An open ledger. Safe for threads of one process and for several processes.

    Guarantee: when `reserve_round`, `reserve_plan` or `draw_round` returns, its rows survive a
    crash or a power cut; every reservation by any process was weighed against all rows before
    it. What counts is never less than what was reserved or drawn.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Clock) -> None:
        self._path = path
        self._connection = connection
        self._clock = clock
        self._lock = threading.RLock()
        self._history = History()
        self._ceiling = math.inf
        self._voidable: set[int] = set()

    @staticmethod
    def open(
        path: Path, *, epsilon_cap: float, delta: float, clock: Clock, entropy: Entropy
    ) -> Ledger:
        """Open the ledger at `path`, founding it where there is none.

        A cap below the ledger's own binds while it is open; one above it changes nothing
        (`raise_cap` does). The whole chain is verified first.

        Raises:
            StorageError: missing folder, not a ledger, tampered, unwritable.
            RefusedError: founded on another delta.
        """
        if not (0 < delta < 1 and math.isfinite(epsilon_cap) and epsilon_cap > 0):
            raise ValueError("a ledger needs a positive cap and a delta in (0, 1)")
        if not path.exists():
            found(path, epsilon_cap, delta, clock, entropy)
        ledger = Ledger.open_existing(path, clock=clock)
        if ledger._history.genesis["delta"] != delta:  # noqa: SLF001 - our own class
            founded = ledger._history.genesis["delta"]  # noqa: SLF001
            ledger.close()
            raise RefusedError(
                Code.BUDGET_DELTA, f"{path}: founded on delta {founded:g}, opened with {delta:g}."
            )
        ledger._ceiling = epsilon_cap  # noqa: SLF001
        return ledger

    @staticmethod
    def open_existing(path: Path, *, clock: Clock) -> Ledger:
        """Open a ledger that must exist, under its own cap: to show it, or to raise the cap."""
        if not path.is_file():
            raise StorageError(Code.LEDGER_MISSING, f"{path}: no ledger here.")
        with storage(path):
            connection = connect(path)
        ledger = Ledger(path, connection, clock)
        try:
            with storage(path):
                ledger._sync()
        except StorageError:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # ------------------------------------------------------------------ questions

    @property
    def counter(self) -> int:
        """Number of rows this process has seen."""
        return self._history.counter

    @property
    def head(self) -> bytes:
        """The last row's head, 32 bytes: what other hospitals witness."""
        return self._history.head

    def head_at(self, counter: int) -> bytes:
        """The head after `counter` rows; 32 zero bytes after none."""
        if not 0 <= counter <= self.counter:
            raise ValueError(f"the ledger has {self.counter} rows, not {counter}")
        return self._history.heads[counter - 1] if counter else EMPTY_HEAD

    def contains(self, counter: int, head: bytes) -> bool:
        """Whether a head that somebody witnessed lies in this ledger's past.

        Guarantee: False for a ledger restored from before that head, or branched off it.
        """
        with self._lock, storage(self._path):
            self._sync()
            known = 0 <= counter <= self.counter
            return known and hmac.compare_digest(self.head_at(counter), head)

    def split(self, fraction: float) -> HeldOutSplit:
        """The population's fixed split that holds out about `fraction` of the patients."""
        if not 0 <= fraction < 1:
            raise ValueError("the held-out fraction lies in [0, 1)")
        return HeldOutSplit(bytes.fromhex(self._history.genesis["split_key"]), fraction)

    def spent(self) -> Spending:
        """Where the population stands, all processes' rows included."""
        with self._lock, storage(self._path):
            self._sync()
            return self._bounded(self._history.spending())

    def run_so_far(self) -> Spending:
        """As `spent`, but of open plans only what rounds have drawn: nothing that is to come."""
        with self._lock, storage(self._path):
            self._sync()
            return self._bounded(self._history.spending(settled=self._open()))

    def events(self, part: Part) -> tuple[DpEvent, ...]:
        """Everything that one part of the patients was charged, for a second accountant."""
        with self._lock, storage(self._path):
            self._sync()
            return tuple(
                DpEvent(sigma, rate, steps)
                for (_, named, _), counts in sorted(self._history.spent.items())
                if named in {part, "all"}
                for (sigma, rate), steps in sorted(counts.items())
            )

    def rounds_left(self, charges: Sequence[Charge], split_id: str, *, limit: int = 10_000) -> int:
        """How many more rounds of `charges` fit under the cap, at most `limit`."""
        with self._lock, storage(self._path):
            self._sync()

        def fits(rounds: int) -> bool:
            extra = [(split_id, _times(charge, rounds)) for charge in charges] if rounds else []
            after = self._bounded(self._history.spending(extra))
            return after.epsilon <= after.cap + _SLACK

        # Doubling first: histories of `limit` rounds are slow to compose and rarely needed.
        low, high = 0, 1
        while high <= limit and fits(high):
            low, high = high, high * 2
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def rounds_charged(self) -> int:
        """How many rounds were reserved, or drawn from a plan; every attempt counts."""
        with self._lock, storage(self._path):
            self._sync()
            return sum(times for (*_, number), times in self._history.attempts.items() if number)

    def history(self) -> tuple[LedgerRow, ...]:
        """Every row, oldest first; the genesis row without the split's key."""
        with self._lock, storage(self._path):
            self._sync()
            rows = self._connection.execute("SELECT body FROM ledger ORDER BY sequence").fetchall()
        bodies = [json.loads(text) for (text,) in rows]
        return tuple(
            LedgerRow(
                body["sequence"],
                body["kind"],
                body["at"],
                {name: value for name, value in body.items() if name != "split_key"},
            )
            for body in bodies
        )

    def verify(self) -> bytes:
        """Read and check every row again; the head.

        Raises:
            StorageError: names the first row that is not what was written.
        """
        with self._lock, storage(self._path):
            fresh = History()
            fold_rows(self._path, self._connection, fresh)
            if fresh.heads[: self.counter] != self._history.heads:
                raise tampered(self._path, min(fresh.counter, self.counter))
            self._history = fresh
            return fresh.head

    # ------------------------------------------------------------------ changes

    def reserve_round(
        self,
        round_id: RoundId,
        charges: Sequence[Charge],
        split_id: str,
        *,
        study_limit: float = math.inf,
    ) -> Reservation:
        """Charge a whole round, training and evaluation, before its first gradient.

        Every call charges, also for a round that was reserved before: a retry is a new
        attempt. One transaction, one fsync.

        Args:
            round_id: which round.
            charges: what it does to which patients.
            split_id: the division into training and held-out patients.
            study_limit: the epsilon this study declared. It is what the hospital approved, so
                it binds here, whatever multipliers a bundle holds or rounds a coordinator asks.

        Raises:
            RefusedError: the charge would pass the cap; nothing is written.
            StorageError: the ledger cannot be read or written; nothing is written.
        """
        require_work(charges)
        with self._transaction() as rows:
            study = round_id.study.hex()
            what = f"round {round_id.number}"
            after = self._weighed(what, study, [(split_id, c) for c in charges], study_limit)
            attempt = self._history.attempts[(study, round_id.run, round_id.number)] + 1
            fields = {
                "study": study,
                "run": round_id.run,
                "round": round_id.number,
                "attempt": attempt,
                "split": split_id,
            }
            bodies = charge_rows(charges, fields, after)
            first = self.counter + 1
            rows.extend(self._append(bodies))
        reservation = Reservation(first, first + len(bodies) - 1, attempt, after.epsilon)
        self._voidable.add(reservation.sequence)
        return reservation

    def _weighed(
        self, what: str, study: str, charges: Sequence[tuple[str, Charge]], limit: float
    ) -> Spending:
        """What is spent with `charges`, within the cap and the study's own limit, or refused."""
        after = self._bounded(self._history.spending(charges))
        if after.epsilon > after.cap + _SLACK:
            before = self._history.spending()
            raise RefusedError(
                Code.BUDGET_EXCEEDED,
                f"{what} would bring these patients to epsilon "
                f"{after.epsilon:.3f}, above the cap of {after.cap:.3f} "
                f"(spent {before.epsilon:.3f}, delta {after.delta:g}).",
            )
        if limit != math.inf:
            own = self._history.of_study(study).spending(charges).epsilon
            if own > limit + _SLACK:
                raise RefusedError(
                    Code.BUDGET_STUDY,
                    f"the study would cost a patient epsilon {own:.3f}, more than the "
                    f"{limit:.3f} it declares.",
                )
        return after

    # ------------------------------------------------------------------ plans

    def open_plan(self, study: bytes) -> PlanReservation | None:
        """The study's plan that is not settled: after a restart, say."""
        with self._lock, storage(self._path):
            self._sync()
            plan = self._history.open_plan(study.hex())
            return None if plan is None else self._reservation(plan)

    def open_plans(self) -> tuple[PlanReservation, ...]:
        """Every study's plan that is not settled."""
        with self._lock, storage(self._path):
            self._sync()
            return tuple(self._reservation(self._history.plans[at]) for at in self._open())

    def _open(self) -> tuple[int, ...]:
        return tuple(at for at, plan in self._history.plans.items() if not plan.settled)

    def _reservation(self, plan: PlanState) -> PlanReservation:
        charges, total = charges_in(plan.reserved), self._history.spending().epsilon
        return PlanReservation(bytes.fromhex(plan.study), plan.first, plan.last, charges, total)

    def reserve_plan(
        self,
        study: bytes,
        run: str,
        charges: Sequence[Charge],
        split_id: str,
        *,
        study_limit: float = math.inf,
    ) -> PlanReservation:
        """Charge everything that a study may do, before its first round. One transaction.

        Where the study has such a plan open, that one is returned. What settled plans of the
        same study have drawn is not reserved again: `charges` is always the study's whole.

        Args:
            study: its digest.
            run: as in `RoundId`.
            charges: all of its rounds, those that may have to be tried again included.
            split_id: the division into training and held-out patients.
            study_limit: as in `reserve_round`.

        Guarantee: counts in full until `settle_plan`, whatever crashes.

        Raises:
            RefusedError: the whole would pass the cap or the study's own limit; the study has
                used up its whole; an open plan is for other work. Nothing is written.
            StorageError: as `reserve_round`.
        """
        require_work(charges)
        name = study.hex()
        with self._transaction() as rows:
            wanted = self._history.not_yet_drawn(name, charges)
            known = self._history.open_plan(name)
            if known is not None:
                if (known.split, known.reserved) != (split_id, wanted):
                    raise RefusedError(
                        Code.PLAN_DIFFERS,
                        f"rows {known.first} to {known.last} reserve other work for this study.",
                    )
                return self._reservation(known)
            if not wanted:
                raise RefusedError(
                    Code.BUDGET_PLAN, "every step of this study has been drawn and settled."
                )
            whole = charges_in(wanted)
            after = self._weighed(
                "the whole study", name, [(split_id, c) for c in whole], study_limit
            )
            first = self.counter + 1
            fields = {
                "study": name,
                "run": run,
                "round": 0,
                "attempt": self._history.attempts[(name, run, 0)] + 1,
                "split": split_id,
                "plan": first,
            }
            bodies = charge_rows(whole, fields, after)
            rows.extend(self._append(bodies))
        return PlanReservation(study, first, first + len(bodies) - 1, whole, after.epsilon)

    def plan_left(self, plan: PlanReservation) -> tuple[Charge, ...]:
        """What no round has drawn from the plan; nothing once it is settled."""
        with self._lock, storage(self._path):
            self._sync()
            state = self._state(plan)
            return () if state.settled else charges_in(state.unused())

    def draw_round(
        self, plan: PlanReservation, round_id: RoundId, charges: Sequence[Charge]
    ) -> Reservation:
        """Take a round's work out of its plan, before its first gradient. One fsynced row.

        Epsilon does not change: the plan is charged. What is drawn is never given back; a round
        that is tried again draws again, as the next attempt.

        Raises:
            RefusedError: BUDGET_PLAN, where the plan has not so much left or was settled.
            StorageError: as `reserve_round`.
        """
        require_work(charges)
        if round_id.study != plan.study:
            raise ValueError("a round draws from the plan of its own study")
        with self._transaction() as rows:
            state = self._state(plan)
            if state.settled:
                raise RefusedError(
                    Code.BUDGET_PLAN, f"the plan of row {state.first} has been settled."
                )
            if state.lacks(charges):
                raise RefusedError(
                    Code.BUDGET_PLAN,
                    f"round {round_id.number} needs more steps than the plan of row "
                    f"{state.first} has left.",
                )
            attempt = self._history.attempts[(state.study, round_id.run, round_id.number)] + 1
            body = {
                "kind": "draw",
                "plan": state.first,
                "study": state.study,
                "run": round_id.run,
                "round": round_id.number,
                "attempt": attempt,
                "uses": [told(charge) for charge in charges],
            }
            rows.extend(self._append([body]))
            total = self._history.spending().epsilon
        return Reservation(self.counter, self.counter, attempt, total)

    def settle_plan(self, plan: PlanReservation) -> bool:
        """From here only what was drawn from the plan counts; the rest is free again.

        Nothing can be drawn from it any more. Whether this call settled it: a second one changes
        nothing.
        """
        with self._transaction() as rows:
            state = self._state(plan)
            if state.settled:
                return False
            after = self._history.spending(settled=(state.first,))
            body = {
                "kind": "settle",
                "plan": state.first,
                "study": state.study,
                "drawn": [told(charge) for charge in charges_in(state.drawn)],
                "after": [after.epsilon, after.train, after.held_out],
            }
            rows.extend(self._append([body]))
        return True

    def _state(self, plan: PlanReservation) -> PlanState:
        state = self._history.plans.get(plan.first_sequence)
        if state is None or state.study != plan.study.hex():
            raise ValueError("the plan is not of this ledger")
        return state

    # ------------------------------------------------------------------ rounds, after

    def begin(self, reservation: Reservation) -> None:
        """Training under `reservation` starts now: from here it can no longer be voided."""
        self._voidable.discard(reservation.sequence)

    def void(self, reservation: Reservation) -> None:
        """Take a reservation back whose training never began.

        Only the process that reserved can know that, so only this object may void, and only
        before `begin`; a reservation found after a restart stays charged.

        Raises:
            RefusedError: training began, or this object did not make the reservation.
        """
        if reservation.sequence not in self._voidable:
            raise RefusedError(
                Code.RESERVATION_BEGUN, f"row {reservation.sequence} may have been trained on."
            )
        self._write(
            {"kind": "void", "first": reservation.first_sequence, "last": reservation.sequence}
        )
        self._voidable.discard(reservation.sequence)

    def release(self, reservation: Reservation) -> None:
        """Note that the round's result left the site. Evidence only: epsilon does not change."""
        self.begin(reservation)
        self._write({"kind": "release", "reservation": reservation.sequence})

    def raise_cap(self, cap: float) -> None:
        """Raise the population's cap: the data steward's explicit decision, on record for ever.

        Raises:
            RefusedError: `cap` is not above the present one.
        """
        with self._transaction() as rows:
            if not (math.isfinite(cap) and cap > self._history.cap):
                raise RefusedError(
                    Code.BUDGET_CAP, f"the cap is {self._history.cap:g}; {cap:g} is not above it."
                )
            rows.extend(self._append([{"kind": "cap", "cap": cap}]))

    # ------------------------------------------------------------------ storage

    def _bounded(self, spending: Spending) -> Spending:
        if self._ceiling >= spending.cap:
            return spending
        return Spending(
            spending.epsilon,
            self._ceiling,
            spending.delta,
            spending.rows,
            spending.train,
            spending.held_out,
            spending.splits,
        )

    def _write(self, body: dict[str, Any]) -> None:
        with self._transaction() as rows:
            rows.extend(self._append([body]))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[list[_Row]]:
        """What is put on the list is folded into the history once it is durable."""
        with self._lock, storage(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            rows: list[_Row] = []
            done = False
            try:
                self._sync()
                yield rows
                self._connection.execute("COMMIT")
                done = True
            finally:
                if not done and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            for body, head in rows:
                self._history.fold(body, head)

    def _append(self, bodies: Sequence[dict[str, Any]]) -> list[_Row]:
        head = self.head
        rows: list[_Row] = []
        for offset, body in enumerate(bodies, start=1):
            whole = body | {"sequence": self.counter + offset, "at": round(self._clock.now(), 3)}
            text = canonical(whole)
            head = next_head(head, text)
            self._connection.execute(
                "INSERT INTO ledger VALUES (?, ?, ?)", (whole["sequence"], text, head)
            )
            rows.append((whole, head))
        return rows

    def _sync(self) -> None:
        """Take in what other processes appended; our own past must still be there."""
        known = self.counter
        if known:
            row = self._connection.execute(
                "SELECT head, (SELECT max(sequence) FROM ledger) FROM ledger WHERE sequence = ?",
                (known,),
            ).fetchone()
            if row is None or row[0] != self.head:
                raise tampered(self._path, known)
            if row[1] == known:
                return
        fold_rows(self._path, self._connection, self._history)


def _times(charge: Charge, rounds: int) -> Charge:
    events = (
        DpEvent(event.noise_multiplier, event.sampling_rate, event.steps * rounds)
        for event in charge.events
    )
    return Charge(charge.kind, charge.part, tuple(events))
