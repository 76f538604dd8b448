"""The audit log: evidence of what one party did, that nobody can quietly change.

One line of canonical JSON per record: `index`, `at` (Unix seconds), `event`, `fields`, `prev`
(the hash of the record before) and `hash`. Now and then, and always at the end, a record
`checkpoint` carries the owner's Ed25519 signature over the head of the chain. Events and
fields are allow-listed and fields have narrow kinds (counts, digests, site ids, single
words): there is no way to write free text, hence no way to write patient data.

What the chain shows: a changed, removed, inserted or moved record, by its index. What only
the end shows: a cut tail, because a closed log ends with a signed checkpoint. What only the
other logs show: a log cut at an earlier checkpoint, because all logs name the same rounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from common.errors import Code, StorageError
from common.ids import is_site_id

__all__ = [
    "ALONE",
    "AuditLog",
    "AuditReport",
    "FolderReport",
    "Problem",
    "RoundMark",
    "RoundTrace",
    "Value",
    "keys_digest",
    "run_audit_verify",
    "verify",
    "verify_folder",
    "write_keys",
]

Value = str | int | float | bool | None | Sequence[str]
Fields = Mapping[str, Value]
Severity = Literal["altered", "open"]

FORMAT: Final = "wardround-audit/1"
GENESIS: Final = "0" * 64
KEYS_FILE: Final = "keys.json"
LOG_SUFFIX: Final = ".jsonl"
ALONE: Final = "alone"
_RECORD_LABEL: Final = b"wardround/audit/record/1\0"
_CHECKPOINT_LABEL: Final = b"wardround/audit/checkpoint/1\0"
_KEYS_LABEL: Final = b"wardround/audit/keys/1\0"
_MAX_LINE: Final = 1 << 16
_MAX_LOG: Final = 1 << 28
_MAX_SITES: Final = 1000

_HEX64 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,63}")
_CODE = re.compile(r"WR-[0-9]{4}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (whole and math.isfinite(value))  # type: ignore[arg-type]


def _is_sites(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= _MAX_SITES
        and all(isinstance(site, str) and is_site_id(site) for site in value)
    )


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_KINDS: Mapping[str, Callable[[object], bool]] = {
    "code": _matches(_CODE),
    "count": _is_count,
    "digest": _matches(_HEX64),
    "number": _is_number,
    "signature": _matches(_SIGNATURE),
    "site": lambda value: isinstance(value, str) and is_site_id(value),
    "sites": _is_sites,
    "word": _matches(_WORD),
}
_FIELD_KIND: Mapping[str, str] = {
    **dict.fromkeys(
        ["aggregate", "commit", "digest", "head", "header", "keys", "model", "run"], "digest"
    ),
    **dict.fromkeys(["roster", "root", "study", "transcript", "uh1", "uh2"], "digest"),
    **dict.fromkeys(["attempt", "bytes_down", "bytes_up", "colluders", "cut_bytes"], "count"),
    **dict.fromkeys(["entries", "parties", "quorum", "round", "rounds_aborted"], "count"),
    **dict.fromkeys(["rounds", "rounds_completed", "steps"], "count"),
    **dict.fromkeys(["cap", "delta", "epsilon", "noise_multiplier", "sampling_rate"], "number"),
    **dict.fromkeys(["cohort", "dropouts", "present", "survivors"], "sites"),
    **dict.fromkeys(["format", "kept", "kind", "phase", "reason", "software", "verdict"], "word"),
    "code": "code",
    "owner": "site",
    "signature": "signature",
    "site": "site",
}
_ROUND = frozenset({"round", "kind"})
_EVENTS: Mapping[str, frozenset[str]] = {
    "checkpoint": frozenset({"signature"}),
    "log.opened": frozenset({"format", "owner", "keys", "run", "study", "software", "kept"}),
    "log.reopened": frozenset({"cut_bytes", "software"}),
    "log.closed": frozenset(),
    "study.approved": frozenset({"study", "roster", "model", "epsilon", "delta", "rounds"}),
    "study.refused": frozenset({"study", "code", "reason"}),
    "study.stopped": frozenset({"reason"}),
    "run.started": frozenset(
        {"run", "study", "roster", "model", "parties", "quorum", "colluders", "rounds"}
    ),
    "run.resumed": _ROUND,
    "run.finished": frozenset({"rounds_completed", "rounds_aborted", "model", "verdict"}),
    "handshake.completed": frozenset({"transcript", "present"}),
    "budget.reserved": _ROUND
    | {"epsilon", "cap", "delta", "noise_multiplier", "sampling_rate", "steps", "entries", "head"},
    "budget.refused": _ROUND | {"epsilon", "cap", "code"},
    "round.started": _ROUND | {"header", "model", "cohort", "attempt"},
    "round.uploaded": _ROUND | {"uh1", "root", "bytes_up"},
    "round.agreed": _ROUND | {"uh2"},
    "round.unmasked": _ROUND | {"uh2"},
    "round.completed": _ROUND
    | {"uh2", "commit", "aggregate", "model", "survivors", "dropouts", "quorum"}
    | {"bytes_up", "bytes_down", "epsilon", "cap"},
    "round.aborted": _ROUND | {"code", "reason", "phase", "survivors", "dropouts", "quorum"},
    "round.declined": _ROUND | {"code"},
    "round.burned": _ROUND | {"code", "reason", "phase"},
    "model.rejected": _ROUND | {"model"},
    "site.dropped": _ROUND | {"site", "phase"},
    "site.returned": _ROUND | {"site"},
    "peer.refused": _ROUND | {"site", "code", "phase"},
    "model.exported": frozenset({"model", "digest"}),
}

# What a hospital's log says of its part in a round before the round is known to be complete.
_PART = frozenset({"round.uploaded", "round.agreed", "round.unmasked"})
# What is synced at once; the records between are made durable by the next of these.
_DURABLE = frozenset({"log.opened", "checkpoint", "study.stopped", "budget.refused"})


# ------------------------------------------------------------------------------ writing


class AuditLog:
    """One party's audit log, open for appending.

    Guarantee: when `append` returns, the record survives the process; when `checkpoint` or
    `finish` returns, all records survive a power cut. When either raises, the file ends with
    the last record that was appended.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        *,
        owner: str,
        sign: Callable[[bytes], bytes],
        clock: Callable[[], int],
    ) -> None:
        self.path = path
        self.owner = owner
        self.cut_bytes = 0
        self._descriptor = descriptor
        self._sign = sign
        self._clock = clock
        self._next = 0
        self._head = GENESIS
        self._size = 0
        self._failed = False

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        owner: str,
        sign: Callable[[bytes], bytes],
        clock: Callable[[], int],
        facts: Fields,
    ) -> Self:
        """Open the log at `path`, or begin it.

        A last line without its line end is a torn write of a crash: it is cut off, and a
        record `log.reopened` says how many bytes were cut.

        Args:
            path: the file, `<owner>.jsonl` in the run's audit folder.
            owner: the site id, or `coordinator`.
            sign: makes the owner's 64-byte Ed25519 signature of its argument.
            clock: Unix time in whole seconds.
            facts: `keys` (`keys_digest` of the run's keys), and `run`, `study`, `software`
                where known; recorded when the log begins.

        Raises:
            StorageError: the file cannot be written, its chain is broken, or it is another's.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise _write_error(path) from error
        log = cls(path, descriptor, owner=owner, sign=sign, clock=clock)
        try:
            log._recover(facts)
        except BaseException:
            log.close()
            raise
        return log

    @property
    def head(self) -> bytes:
        """The hash of the last record: what this party's evidence stands on."""
        return bytes.fromhex(self._head)

    @property
    def entries(self) -> int:
        """How many records the log holds."""
        return self._next

    def append(self, event: str, fields: Fields | None = None) -> int:
        """Append one record and return its index.

        Raises:
            StorageError: the record could not be made durable, or the file was changed.
            ValueError: the event or a field is not on the allow list (a bug of the caller).
        """
        if event in {"checkpoint", "log.opened", "log.reopened", "log.closed"}:
            raise ValueError(f"the log itself writes {event!r}")
        return self._append(event, {} if fields is None else fields)

    def checkpoint(self) -> int:
        """Sign the head of the chain: nothing before it can change without the owner's key."""
        at = self._clock()
        signature = self._sign(_checkpoint_message(self.owner, self._next, at, self._head))
        return self._append("checkpoint", {"signature": signature.hex()}, at=at)

    def finish(self) -> None:
        """Close the log for good: a last record, a signed checkpoint, the file closed."""
        self._append("log.closed", {})
        self.checkpoint()
        self.close()

    def close(self) -> None:
        """Close the file only: the log may be opened again and go on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, event: str, fields: Fields, *, at: int | None = None) -> int:
        complaint = _field_complaint(event, fields)
        if complaint is not None:
            raise ValueError(complaint)
        if self._failed or self._descriptor < 0:
            raise _write_error(self.path)
        digest, line = _record(
            self._clock() if at is None else at, event, fields, self._next, self._head
        )
        self._write(line, durable=event in _DURABLE)
        self._size += len(line)
        self._head = digest
        self._next += 1
        return self._next - 1

    def _write(self, line: bytes, *, durable: bool) -> None:
        try:
            if os.fstat(self._descriptor).st_size != self._size:
                raise StorageError(
                    Code.AUDIT_CHANGED, f"The audit log {self.path.name} changed under our hands."
                )
            self._write_all(line)
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            # After a failed fsync nobody knows what the disk holds: this object is done.
            self._failed = True
            _truncate(self._descriptor, self._size)
            raise _write_error(self.path) from error

    def _write_all(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _recover(self, facts: Fields) -> None:
        data = _read(self.path)
        kept = data[: data.rfind(b"\n") + 1]
        self.cut_bytes = len(data) - len(kept)
        self._adopt(kept)
        try:
            if self.cut_bytes:
                os.ftruncate(self._descriptor, len(kept))
                os.fsync(self._descriptor)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise _write_error(self.path) from error
        if self._next == 0:
            self._append("log.opened", {"format": FORMAT, "owner": self.owner, **facts})
        else:
            self._append("log.reopened", {"cut_bytes": self.cut_bytes})

    def _adopt(self, kept: bytes) -> None:
        walk = _Walk(self.owner)
        for line in _lines(kept):
            walk.step(line)
        if walk.problems:
            first = walk.problems[0]
            raise StorageError(
                Code.AUDIT_BROKEN,
                f"The audit log {self.path.name} is broken at record {first.index}: "
                f"{first.message}",
            )
        self._next, self._head, self._size = walk.expected, walk.head, len(kept)


# ---------------------------------------------------------------------------- verifying


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a log, and where.

    `altered` means that records were changed, removed, inserted or moved; `open` means that
    the log does not end with its signed last checkpoint: it is still in use, its owner
    crashed for good, or its end was cut off.
    """

    log: str
    index: int
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.log}: record {self.index}: {self.message}"


@dataclass(frozen=True, slots=True)
class RoundMark:
    """What one log says of one completed round."""

    round: int
    kind: str
    uh2: str | None
    commit: str | None
    survivors: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """What one log says of its owner's part in a round, whether or not it saw the end.

    `uh2` is what the owner agreed to or unmasked, None where it got only as far as its upload.
    """

    round: int
    uh2: str | None
    index: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the verification of one log found."""

    log: str
    owner: str | None
    entries: int
    checkpoints: int
    head: str
    closed: bool
    keys: str | None
    rounds: tuple[RoundMark, ...]
    traces: tuple[RoundTrace, ...]
    problems: tuple[Problem, ...]
    alone: bool = False

    @property
    def verified(self) -> bool:
        """No record was changed, removed, inserted or moved, as far as signatures reach."""
        return all(problem.severity != "altered" for problem in self.problems)

    @property
    def complete(self) -> bool:
        """The log also ends as a closed log ends: no tail is unsigned or missing."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "log": self.log,
            "owner": self.owner,
            "entries": self.entries,
            "checkpoints": self.checkpoints,
            "head": self.head,
            "closed": self.closed,
            "rounds": len(self.rounds),
            "verified": self.verified,
            "complete": self.complete,
            "problems": [str(problem) for problem in self.problems],
        }


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What the verification of all logs of a run found.

    `keys` is the digest of the table of keys that was used; where the table came from the
    folder itself, compare it with what another party of the run has. `elsewhere` are the parties
    that keep their own logs: what their logs say was not looked at.
    """

    keys: str
    logs: tuple[AuditReport, ...]
    problems: tuple[Problem, ...]
    elsewhere: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """No log was altered, and all logs agree on every round."""
        return all(problem.severity != "altered" for problem in self.problems)

    @property
    def complete(self) -> bool:
        """Every log is also closed and signed to its end."""
        return not self.problems

    @property
    def entries(self) -> int:
        """The records of all logs."""
        return sum(log.entries for log in self.logs)

    @property
    def checkpoints(self) -> int:
        """The signed checkpoints of all logs."""
        return sum(log.checkpoints for log in self.logs)

    def verdict(self) -> str:
        """One line for a person."""
        found = f"{len(self.logs)} logs, {self.entries} records, {self.checkpoints} signatures"
        if self.complete and self.elsewhere:
            there = ", ".join(self.elsewhere)
            return f"audit verified: {found}; not looked at, kept elsewhere: {there}"
        if self.complete:
            return f"audit verified: {found}, all rounds agree"
        altered = sum(problem.severity == "altered" for problem in self.problems)
        if altered:
            return f"AUDIT BROKEN: {altered} problems; first: {self._first('altered')}"
        return f"audit intact but not closed: {found}; {self._first('open')}"

    def _first(self, severity: Severity) -> Problem:
        return next(problem for problem in self.problems if problem.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "verified": self.verified,
            "complete": self.complete,
            "keys": self.keys,
            "elsewhere": list(self.elsewhere),
            "entries": self.entries,
            "checkpoints": self.checkpoints,
            "logs": [log.to_json() for log in self.logs],
            "problems": [str(problem) for problem in self.problems],
        }


def verify(path: Path, public_key: bytes, *, owner: str | None = None) -> AuditReport:
    """Verify one log against its owner's Ed25519 public key (32 bytes).

    Args:
        path: the log.
        public_key: the key that signed its checkpoints.
        owner: who must have written it; the file's own name says so by default.

    Raises:
        StorageError: the file cannot be read.
    """
    owner = path.name.removesuffix(LOG_SUFFIX) if owner is None else owner
    data = _read(path)
    walk = _Walk(owner, checker=_checker(public_key))
    for line in _lines(data):
        walk.step(line)
    return walk.report(torn=bool(data) and not data.endswith(b"\n"))


def verify_folder(
    directory: Path, keys: Mapping[str, bytes] | None = None, *, others: Sequence[Path] = ()
) -> FolderReport:
    """Verify every log of a run, and that all logs name the same rounds.

    A simulation keeps all logs in one folder, and one that is missing was removed. A real party
    keeps its own, and its log says so in its signed first record (`kept: alone`); the folders
    of other parties may be given, too.

    Args:
        directory: the run's folder (then its `audit` folder is used), or the audit folder.
        others: the same of other parties.
        keys: public keys by owner, from a place you trust; by default the folder's own
            `keys.json`, whose digest every log has signed.

    Raises:
        StorageError: there is no log, or the keys cannot be read.
    """
    folder = _audit_folder(directory)
    paths = [path for place in (folder, *map(_audit_folder, others)) for path in _logs_in(place)]
    known = _read_keys(folder / KEYS_FILE) if keys is None else dict(keys)
    digest = keys_digest(known)
    problems: list[Problem] = []
    logs: list[AuditReport] = []
    for path in paths:
        name = path.name.removesuffix(LOG_SUFFIX)
        if name not in known:
            problems.append(Problem(name, 0, "altered", "no key is known for this log"))
            continue
        report = verify(path, known[name], owner=name)
        logs.append(report)
        problems.extend(report.problems)
        if report.keys is not None and report.keys != digest:
            problems.append(
                Problem(name, 0, "altered", "the log was begun with other keys than these")
            )
    absent = sorted(set(known) - {path.name.removesuffix(LOG_SUFFIX) for path in paths})
    alone = bool(logs) and all(log.alone for log in logs)
    if not alone:
        problems = [
            *(Problem(n, 0, "altered", "the log of this party is missing") for n in absent),
            *problems,
        ]
    problems.extend(_disagreements(logs))
    return FolderReport(digest, tuple(logs), tuple(problems), tuple(absent) if alone else ())


def _audit_folder(directory: Path) -> Path:
    inner = directory / "audit"
    return inner if inner.is_dir() else directory


def _logs_in(folder: Path) -> list[Path]:
    paths = sorted(folder.glob(f"*{LOG_SUFFIX}"))
    if not paths:
        raise StorageError(Code.AUDIT_MISSING, f"There is no audit log in {folder}.")
    return paths


def run_audit_verify(directory: Path, others: Sequence[Path] = ()) -> FolderReport:
    """What `wardround audit verify DIR [DIR ...]` does; see `verify_folder`."""
    return verify_folder(directory, others=others)


def keys_digest(keys: Mapping[str, bytes]) -> str:
    """The digest of a run's audit keys, for the first record of every log."""
    body = _canonical({owner: key.hex() for owner, key in keys.items()})
    return hashlib.sha256(_KEYS_LABEL + body).hexdigest()


def write_keys(folder: Path, keys: Mapping[str, bytes]) -> str:
    """Write the audit folder's table of public keys and return its digest.

    Raises:
        StorageError: the file cannot be written.
    """
    target = folder / KEYS_FILE
    temporary = folder / (KEYS_FILE + ".tmp")
    body = json.dumps({owner: key.hex() for owner, key in keys.items()}, indent=1, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="ascii") as stream:
            stream.write(body + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        _sync_folder(folder)
    except OSError as error:
        raise _write_error(target) from error
    return keys_digest(keys)


# ------------------------------------------------------------------------------ the walk


@dataclass(slots=True)
class _Walk:
    """Reads a log record by record; after a break it goes on from the record it found."""

    owner: str
    checker: Callable[[bytes, bytes], bool] | None = None
    expected: int = 0
    head: str = GENESIS
    position: int = 0
    checkpoints: int = 0
    signed_to: int = 0
    keys: str | None = None
    last_events: tuple[str, str] = ("", "")
    rounds: list[RoundMark] = field(default_factory=list)
    traces: list[RoundTrace] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    alone: bool = False

    def step(self, line: bytes) -> None:
        """Check the next line of the file."""
        place = self.position
        self.position += 1
        if not line.endswith(b"\n"):
            self._blame(place, "the line is torn", "open")
            return
        record = _parse(line)
        if record is None:
            self._blame(place, "the line is not a record")
            self.expected, self.head = self.expected + 1, ""
            return
        self._check_chain(place, record)
        complaint = _field_complaint(record["event"], record["fields"])
        if complaint is not None:
            self._blame(place, complaint)
        self._check_meaning(place, record)
        self.head = record["hash"]
        self.expected = record["index"] + 1
        self.last_events = (self.last_events[1], record["event"])

    def _check_chain(self, place: int, record: Mapping[str, Any]) -> None:
        if record["hash"] != _record_hash({k: v for k, v in record.items() if k != "hash"}):
            self._blame(place, "its content was altered")
            # Go on with the hash it claims: the records behind it were made from that one.
        if record["index"] != self.expected:
            self._blame(place, _misplaced(record["index"], self.expected))
        elif self.head and record["prev"] != self.head:
            self._blame(place, "it does not follow the record before it")

    def _check_meaning(self, place: int, record: Mapping[str, Any]) -> None:
        event, fields = record["event"], record["fields"]
        if place == 0 and event != "log.opened":
            self._blame(place, "a log begins with log.opened")
        if event == "log.opened":
            if place != 0 or fields.get("owner") != self.owner:
                self._blame(place, "it opens another log than this one")
            self.keys = fields.get("keys")
            self.alone = fields.get("kept") == ALONE
        elif event == "round.completed":
            self.rounds.append(_round_mark(place, fields))
        elif event in _PART:
            self.traces.append(RoundTrace(fields.get("round", 0), fields.get("uh2"), place))
        elif event == "checkpoint":
            self._check_signature(place, record)

    def _check_signature(self, place: int, record: Mapping[str, Any]) -> None:
        if self.checker is None:
            return
        message = _checkpoint_message(self.owner, record["index"], record["at"], record["prev"])
        signature = record["fields"].get("signature", "")
        if _SIGNATURE.fullmatch(str(signature)) and self.checker(bytes.fromhex(signature), message):
            self.checkpoints += 1
            self.signed_to = place + 1
        else:
            self._blame(
                place,
                f"its signature does not fit; some record from {self.signed_to} to {place} "
                "was replaced",
            )

    def report(self, *, torn: bool) -> AuditReport:
        """The finished report, after the last line."""
        entries = self.position - torn
        closed = self.last_events == ("log.closed", "checkpoint") and self.signed_to == entries
        if entries == 0:
            self._blame(0, "the log is empty")
        elif self.signed_to < entries:
            self._blame(self.signed_to, "unsigned tail: no checkpoint behind this record", "open")
        elif not closed:
            self._blame(entries, "the log was not closed: its end may be missing", "open")
        return AuditReport(
            log=self.owner,
            owner=self.owner if entries else None,
            entries=entries,
            checkpoints=self.checkpoints,
            head=self.head,
            closed=closed,
            keys=self.keys,
            rounds=tuple(self.rounds),
            traces=tuple(self.traces),
            problems=tuple(self.problems),
            alone=self.alone,
        )

    def _blame(self, place: int, message: str, severity: Severity = "altered") -> None:
        self.problems.append(Problem(self.owner, place, severity, message))


def _misplaced(found: int, expected: int) -> str:
    if found > expected:
        gap = found - expected
        return f"{gap} record{'s are' if gap > 1 else ' is'} missing before it"
    return f"it is record {found}, inserted or moved here"


def _round_mark(place: int, fields: Mapping[str, Any]) -> RoundMark:
    return RoundMark(
        round=fields.get("round", 0),
        kind=fields.get("kind", ""),
        uh2=fields.get("uh2"),
        commit=fields.get("commit"),
        survivors=tuple(fields.get("survivors", ())),
        index=place,
    )


def _disagreements(logs: Sequence[AuditReport]) -> Iterator[Problem]:
    """Rounds on which the logs differ, and rounds that a survivor's own log does not know."""
    said: dict[tuple[int, str], tuple[str, RoundMark]] = {}
    for log in logs:
        for mark in log.rounds:
            key = (mark.round, mark.kind)
            first, other = said.setdefault(key, (log.log, mark))
            if (mark.uh2, mark.commit) != (other.uh2, other.commit):
                message = f"{mark.kind} round {mark.round} has another transcript than in {first}"
                yield Problem(log.log, mark.index, "altered", message)
    by_name = {log.log: log for log in logs}
    for _, (witness, mark) in sorted(said.items()):
        for site in mark.survivors:
            own = by_name.get(site)
            if own is not None:
                yield from _unknown_round(own, witness, mark)
    yield from _contradictions(logs, said)


def _unknown_round(own: AuditReport, witness: str, mark: RoundMark) -> Iterator[Problem]:
    """A completed round of which a survivor's own log says nothing.

    A survivor that crashed before it saw the certificate has no `round.completed`, but its log
    still says how far it came.
    """
    number, kind = mark.round, mark.kind
    if any((m.round, m.kind) == (number, kind) for m in own.rounds):
        return
    if any(trace.round == number for trace in own.traces):
        return
    later = any(m.round > number and m.kind == kind for m in own.rounds)
    severity: Severity = "altered" if own.closed or later else "open"
    message = f"{witness} records {kind} round {number} with this site; it does not"
    yield Problem(own.log, own.entries, severity, message)


def _contradictions(
    logs: Sequence[AuditReport], said: Mapping[tuple[int, str], tuple[str, RoundMark]]
) -> Iterator[Problem]:
    """Survivors that a log agreed to, where another log says that others were agreed on."""
    known = {number: (witness, mark.uh2) for (number, _), (witness, mark) in said.items()}
    for log in logs:
        for trace in log.traces:
            witness, uh2 = known.get(trace.round, ("", None))
            if uh2 is not None and trace.uh2 is not None and trace.uh2 != uh2:
                message = f"it agreed to other survivors of round {trace.round} than {witness} has"
                yield Problem(log.log, trace.index, "altered", message)


# --------------------------------------------------------------------------------- bytes


def _field_complaint(event: object, fields: Mapping[str, object]) -> str | None:
    allowed = _EVENTS.get(event) if isinstance(event, str) else None
    if allowed is None:
        return "its event is not on the allow list"
    for name, value in fields.items():
        if name not in allowed:
            return "a field is not on the allow list of its event"
        if not _KINDS[_FIELD_KIND[name]](value):
            return f"its field {name} is not a {_FIELD_KIND[name]}"
    return None


def _lines(data: bytes) -> list[bytes]:
    """Every line with its line end; the last one without, where the file is torn."""
    pieces = data.split(b"\n")
    last = [pieces[-1]] if pieces[-1] else []
    return [piece + b"\n" for piece in pieces[:-1]] + last


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is not exactly one canonical record."""
    if len(line) > _MAX_LINE:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or set(record) != _RECORD_KEYS:
        return None
    shaped = (
        _is_count(record["index"])
        and _is_count(record["at"])
        and isinstance(record["event"], str)
        and isinstance(record["fields"], dict)
        and all(isinstance(record[key], str) for key in ("prev", "hash"))
    )
    try:
        return record if shaped and _canonical(record) + b"\n" == line else None
    except (ValueError, RecursionError):
        return None


_RECORD_KEYS: Final = {"at", "event", "fields", "hash", "index", "prev"}


_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(value).encode("ascii")


def _record(at: int, event: str, fields: Fields, index: int, prev: str) -> tuple[str, bytes]:
    """A record's hash, and its line: the hashed body with the hash in its place, encoded once."""
    # Only the fields need the encoder: the rest are numbers, a word and hex digits.
    before = b'{"at":%d,"event":"%b","fields":%b' % (at, event.encode(), _canonical(dict(fields)))
    after = b'"index":%d,"prev":"%b"}' % (index, prev.encode())
    digest = hashlib.sha256(b"".join((_RECORD_LABEL, before, b",", after))).hexdigest()
    return digest, b'%b,"hash":"%b",%b\n' % (before, digest.encode(), after)


def _record_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_RECORD_LABEL + _canonical(body)).hexdigest()


def _checkpoint_message(owner: str, index: int, at: int, head: str) -> bytes:
    """All that a checkpoint says: whose, which record, when, and the chain before it."""
    body = {"at": at, "head": head, "index": index, "owner": owner}
    return _CHECKPOINT_LABEL + _canonical(body)


def _checker(public_key: bytes) -> Callable[[bytes, bytes], bool]:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(public_key)

    def fits(signature: bytes, message: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return fits


def _read_keys(path: Path) -> dict[str, bytes]:
    try:
        table = json.loads(_read(path))
        keys = {str(owner): bytes.fromhex(key) for owner, key in table.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(Code.AUDIT_KEYS, f"{path} is not a table of audit keys.") from error
    if any(len(key) != 32 or not is_site_id(owner) for owner, key in keys.items()):  # noqa: PLR2004
        raise StorageError(Code.AUDIT_KEYS, f"{path} holds a key that is not 32 bytes.")
    return keys


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_LOG:
            raise StorageError(Code.AUDIT_BROKEN, f"{path.name} is too large for an audit log.")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(Code.AUDIT_MISSING, f"{path} cannot be read.") from error


def _truncate(descriptor: int, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        return  # the next open finds a torn tail and cuts it


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path) -> StorageError:
    return StorageError(Code.AUDIT_WRITE, f"The audit log {path.name} cannot be written.")
