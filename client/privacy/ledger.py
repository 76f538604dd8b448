"""The privacy ledger: what a population of patients has spent, reserved before it is spent.

One SQLite file per population, shared by every study, run and retry on it. Rows are appended,
never changed; each row's head hashes the row before it, so a changed row is named and a
restored older file lacks heads that other hospitals have witnessed (docs/PRIVACY.md, "Ledger").
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import sqlite3
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.accountant import DpEvent, epsilon
from common.errors import Code, RefusedError, StorageError
from common.ports import Clock, Entropy

Part = Literal["train", "held_out", "all"]
Kind = Literal["statistics", "train", "evaluate"]
_Row = tuple[dict[str, Any], bytes]

FORMAT = "wardround-ledger/1"
HEAD_BYTES = 32
EMPTY_HEAD = bytes(HEAD_BYTES)
_ROW_LABEL = b"wardround/ledger/row/1\x00"
_SPLIT_LABEL = b"wardround/ledger/split/1\x00"
_BUSY_SECONDS = 30.0
_SLACK = 1e-9
_SCHEMA = """
CREATE TABLE ledger (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, head BLOB NOT NULL) STRICT;
CREATE TRIGGER ledger_is_append_only_update BEFORE UPDATE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_is_append_only_delete BEFORE DELETE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True, slots=True)
class HeldOutSplit:
    """Which patients are held out: a fixed keyed hash of the patient's identifier.

    Guarantee: whether a patient is held out depends on his identifier and the key alone, not
    on any other patient or record; `identity` names the pair of disjoint sets without
    revealing the key.
    """

    key: bytes
    fraction: float

    @property
    def identity(self) -> str:
        """The split's name in ledger rows: 64 hex digits."""
        fraction = struct.pack(">d", self.fraction)
        return hashlib.sha256(_SPLIT_LABEL + self.key + fraction).hexdigest()

    def holds_out(self, patient: str) -> bool:
        """Whether this patient is held out from training."""
        digest = hmac.digest(self.key, patient.encode(), "sha256")
        return int.from_bytes(digest[:8], "big") < int(self.fraction * 2.0**64)


@dataclass(frozen=True, slots=True)
class Charge:
    """What one piece of work does to one part of the patients."""

    kind: Kind
    part: Part
    events: tuple[DpEvent, ...]


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


class _History:
    """The ledger folded up: enough to answer every question without reading rows again."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.genesis: dict[str, Any] = {}
        self.cap = 0.0
        self.spent: dict[tuple[str, Part], Counter[tuple[float, float]]] = {}
        self.attempts: Counter[tuple[str, str, int]] = Counter()
        # What the last reservation's rows say was spent: showing it must not load an accountant.
        self._recorded: list[float] | None = [0.0, 0.0, 0.0]
        self._charges: dict[int, dict[str, Any]] = {}

    @property
    def counter(self) -> int:
        return len(self.heads)

    @property
    def head(self) -> bytes:
        return self.heads[-1] if self.heads else EMPTY_HEAD

    def fold(self, body: dict[str, Any], head: bytes) -> None:
        """Take in the next row, already checked."""
        kind = body["kind"]
        self.heads.append(head)
        if kind == "genesis":
            self.genesis, self.cap = body, body["cap"]
        elif kind == "cap":
            self.cap = body["cap"]
        elif kind == "charge":
            self._charges[body["sequence"]] = body
            self._add(body, 1)
            self._recorded = body["after"]
            key = (body["study"], body["run"], body["round"])
            self.attempts[key] = max(self.attempts[key], body["attempt"])
        elif kind == "void":
            for sequence in range(body["first"], body["last"] + 1):
                self._add(self._charges.pop(sequence), -1)
            self._recorded = None

    def _add(self, body: dict[str, Any], sign: int) -> None:
        key = (body["split"], body["part"])
        counts = self.spent.setdefault(key, Counter())
        for sigma, rate, steps in body["events"]:
            counts[(sigma, rate)] += sign * steps
            if not counts[(sigma, rate)]:
                del counts[(sigma, rate)]
        if not counts:
            del self.spent[key]

    def of_study(self, study: str) -> _History:
        """What this study alone was charged: a history whose answers are the study's own."""
        own = _History()
        own.genesis, own.cap = self.genesis, self.cap
        for body in self._charges.values():
            if body["study"] == study:
                own._add(body, 1)
        own._recorded = None
        return own

    def spending(self, extra: Sequence[tuple[str, Charge]] = ()) -> Spending:
        """What is spent, were `extra` (split, charge) added to it."""
        if not extra and self._recorded is not None:
            splits = len({split for split, _ in self.spent})
            total, train, held_out = self._recorded
            return Spending(
                total, self.cap, self.genesis["delta"], self.counter, train, held_out, splits
            )
        spent = {key: counts.copy() for key, counts in self.spent.items()}
        for split, charge in extra:
            counts = spent.setdefault((split, charge.part), Counter())
            for event in charge.events:
                counts[(event.noise_multiplier, event.sampling_rate)] += event.steps
        delta = self.genesis["delta"]
        train = _compose(spent, ("train", "all"), delta)
        held_out = _compose(spent, ("held_out", "all"), delta)
        splits = len({split for split, _ in spent})
        # Parallel composition needs two sets of patients that never change; under two splits
        # a patient may have been on both sides, so everything composes (docs/PRIVACY.md).
        both = ("train", "held_out", "all")
        total = max(train, held_out) if splits <= 1 else _compose(spent, both, delta)
        return Spending(total, self.cap, delta, self.counter, train, held_out, splits)


def _compose(
    spent: Mapping[tuple[str, Part], Counter[tuple[float, float]]],
    parts: Sequence[str],
    delta: float,
) -> float:
    events = [
        DpEvent(sigma, rate, steps)
        for (_, part), counts in spent.items()
        if part in parts
        for (sigma, rate), steps in counts.items()
    ]
    return epsilon(events, delta)


class Ledger:
    """An open ledger. Safe for threads of one process and for several processes.

    Guarantee: when `reserve_round` returns, its rows survive a crash or a power cut; every
    reservation by any process was weighed against all rows before it.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, clock: Clock) -> None:
        self._path = path
        self._connection = connection
        self._clock = clock
        self._lock = threading.RLock()
        self._history = _History()
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
            _found(path, epsilon_cap, delta, clock, entropy)
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
        with _storage(path):
            connection = _connect(path)
        ledger = Ledger(path, connection, clock)
        try:
            with _storage(path):
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
        with self._lock, _storage(self._path):
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
        with self._lock, _storage(self._path):
            self._sync()
            return self._bounded(self._history.spending())

    def events(self, part: Part) -> tuple[DpEvent, ...]:
        """Everything that one part of the patients was charged, for a second accountant."""
        with self._lock, _storage(self._path):
            self._sync()
            return tuple(
                DpEvent(sigma, rate, steps)
                for (_, named), counts in sorted(self._history.spent.items())
                if named in {part, "all"}
                for (sigma, rate), steps in sorted(counts.items())
            )

    def rounds_left(self, charges: Sequence[Charge], split_id: str, *, limit: int = 10_000) -> int:
        """How many more rounds of `charges` fit under the cap, at most `limit`."""
        with self._lock, _storage(self._path):
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

    def history(self) -> tuple[LedgerRow, ...]:
        """Every row, oldest first; the genesis row without the split's key."""
        with self._lock, _storage(self._path):
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
        with self._lock, _storage(self._path):
            fresh = _History()
            _fold_rows(self._path, self._connection, fresh)
            if fresh.heads[: self.counter] != self._history.heads:
                raise _tampered(self._path, min(fresh.counter, self.counter))
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
        if not charges or not all(charge.events for charge in charges):
            raise ValueError("a reservation charges at least one event per part")
        with self._transaction() as rows:
            after = self._bounded(self._history.spending([(split_id, c) for c in charges]))
            if after.epsilon > after.cap + _SLACK:
                before = self._history.spending()
                raise RefusedError(
                    Code.BUDGET_EXCEEDED,
                    f"round {round_id.number} would bring these patients to epsilon "
                    f"{after.epsilon:.3f}, above the cap of {after.cap:.3f} "
                    f"(spent {before.epsilon:.3f}, delta {after.delta:g}).",
                )
            study = round_id.study.hex()
            self._require_study(study, [(split_id, c) for c in charges], study_limit)
            attempt = self._history.attempts[(study, round_id.run, round_id.number)] + 1
            bodies = [
                {
                    "kind": "charge",
                    "study": study,
                    "run": round_id.run,
                    "round": round_id.number,
                    "attempt": attempt,
                    "work": charge.kind,
                    "part": charge.part,
                    "split": split_id,
                    "events": [
                        [event.noise_multiplier, event.sampling_rate, event.steps]
                        for event in charge.events
                    ],
                    "after": [after.epsilon, after.train, after.held_out],
                }
                for charge in charges
            ]
            first = self.counter + 1
            rows.extend(self._append(bodies))
        reservation = Reservation(first, first + len(bodies) - 1, attempt, after.epsilon)
        self._voidable.add(reservation.sequence)
        return reservation

    def _require_study(
        self, study: str, charges: Sequence[tuple[str, Charge]], limit: float
    ) -> None:
        if limit == math.inf:
            return
        own = self._history.of_study(study).spending(charges).epsilon
        if own > limit + _SLACK:
            raise RefusedError(
                Code.BUDGET_STUDY,
                f"the study would cost a patient epsilon {own:.3f}, more than the {limit:.3f} "
                "it declares.",
            )

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
        with self._lock, _storage(self._path):
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
            text = _canonical(whole)
            head = _next_head(head, text)
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
                raise _tampered(self._path, known)
            if row[1] == known:
                return
        _fold_rows(self._path, self._connection, self._history)


def _fold_rows(path: Path, connection: sqlite3.Connection, history: _History) -> None:
    """Fold every row after those that `history` holds, checking the chain."""
    rows = connection.execute(
        "SELECT sequence, body, head FROM ledger WHERE sequence > ? ORDER BY sequence",
        (history.counter,),
    )
    for sequence, text, head in rows:
        expected = history.counter + 1
        if sequence != expected or head != _next_head(history.head, text):
            raise _tampered(path, expected)
        try:
            history.fold(json.loads(text), head)
        except (ValueError, KeyError, TypeError):
            raise _tampered(path, expected) from None
    if not history.genesis:
        raise StorageError(Code.LEDGER_DAMAGED, f"{path}: the ledger has no first row.")


def _tampered(path: Path, row: int) -> StorageError:
    return StorageError(Code.LEDGER_TAMPERED, f"{path}: row {row} is not what was written.")


def _times(charge: Charge, rounds: int) -> Charge:
    events = (
        DpEvent(event.noise_multiplier, event.sampling_rate, event.steps * rounds)
        for event in charge.events
    )
    return Charge(charge.kind, charge.part, tuple(events))


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(
        body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )


def _next_head(head: bytes, text: str) -> bytes:
    return hashlib.sha256(_ROW_LABEL + head + text.encode()).digest()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute("PRAGMA synchronous=FULL")
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if mode != "wal":
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _found(path: Path, cap: float, delta: float, clock: Clock, entropy: Entropy) -> None:
    """Make the file whole under another name, then link it: no one ever sees half a ledger."""
    genesis = {
        "sequence": 1,
        "kind": "genesis",
        "at": round(clock.now(), 3),
        "format": FORMAT,
        "unit": "patient",
        "relation": "add-or-remove-one",
        "delta": delta,
        "cap": cap,
        "population": entropy.take(16).hex(),
        "split_key": entropy.take(32).hex(),
    }
    text = _canonical(genesis)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    with _storage(path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(_connect(temporary)) as connection:
                connection.executescript(_SCHEMA)
                connection.execute(
                    "INSERT INTO ledger VALUES (1, ?, ?)", (text, _next_head(EMPTY_HEAD, text))
                )
            with contextlib.suppress(FileExistsError):  # another process was first: its own counts
                os.link(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turn the storage's faults into ours."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            Code.LEDGER_WRITE, f"{path}: cannot be written ({error.strerror})."
        ) from None
    except sqlite3.Error as error:
        primary = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StorageError(Code.LEDGER_BUSY, f"{path}: held by another process.") from None
        unwritable = (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        )
        if primary in unwritable:
            reason = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
            raise StorageError(
                Code.LEDGER_WRITE, f"{path}: cannot be written ({reason})."
            ) from None
        raise StorageError(Code.LEDGER_DAMAGED, f"{path}: not a readable ledger.") from None
