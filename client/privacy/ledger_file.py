"""A ledger's file: SQLite rows that are only appended, each hashing the row before it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.privacy.ledger_history import EMPTY_HEAD, History
from common.errors import Code, StorageError
from common.ports import Clock, Entropy

__all__ = [
    "canonical",
    "connect",
    "fold_rows",
    "found",
    "next_head",
    "storage",
    "tampered",
]

FORMAT = "wardround-ledger/1"
_ROW_LABEL = b"wardround/ledger/row/1\x00"
_BUSY_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE ledger (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, head BLOB NOT NULL) STRICT;
CREATE TRIGGER ledger_is_append_only_update BEFORE UPDATE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_is_append_only_delete BEFORE DELETE ON ledger
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


def fold_rows(path: Path, connection: sqlite3.Connection, history: History) -> None:
    """Fold every row after those that `history` holds, checking the chain.

    Raises StorageError, naming the first row that no ledger can have written there.
    """
    rows = connection.execute(
        "SELECT sequence, body, head FROM ledger WHERE sequence > ? ORDER BY sequence",
        (history.counter,),
    )
    for sequence, text, head in rows:
        expected = history.counter + 1
        if sequence != expected or head != next_head(history.head, text):
            raise tampered(path, expected)
        try:
            history.fold(json.loads(text), head)
        except (ValueError, KeyError, TypeError):
            raise tampered(path, expected) from None
    if not history.genesis:
        raise StorageError(Code.LEDGER_DAMAGED, f"{path}: the ledger has no first row.")


def tampered(path: Path, row: int) -> StorageError:
    """The fault that names the first row that is not as it was written."""
    return StorageError(Code.LEDGER_TAMPERED, f"{path}: row {row} is not what was written.")


def canonical(body: Mapping[str, Any]) -> str:
    """A row's one way to be written."""
    return json.dumps(
        body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )


def next_head(head: bytes, text: str) -> bytes:
    """The head of the row `text` after a row with `head`."""
    return hashlib.sha256(_ROW_LABEL + head + text.encode()).digest()


def connect(path: Path) -> sqlite3.Connection:
    """The file, every commit synced. Raises sqlite3.Error."""
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


def found(path: Path, cap: float, delta: float, clock: Clock, entropy: Entropy) -> None:
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
    text = canonical(genesis)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    with storage(path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(connect(temporary)) as connection:
                connection.executescript(_SCHEMA)
                connection.execute(
                    "INSERT INTO ledger VALUES (1, ?, ?)", (text, next_head(EMPTY_HEAD, text))
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
def storage(path: Path) -> Iterator[None]:
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
