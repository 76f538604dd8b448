"""The world behind the ports: system clock and entropy, files, and their stand-ins for tests.

`SeededEntropy` and `ManualClock` exist for tests and fault schedules; no command builds them,
except that a simulation skips waiting through `SkippingClock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import time
from collections.abc import Sequence
from pathlib import Path

from common.crypto.seal import Vault
from common.errors import Code, StorageError
from common.ports import Journal


class SystemClock:
    """Monotonic seconds of this process."""

    def now(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()


class SkippingClock:
    """A clock that can be moved forward: a simulation never sleeps through a deadline."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def now(self) -> float:
        """Seconds since an arbitrary start, with what was skipped."""
        return time.monotonic() + self._skipped

    def skip_to(self, moment: float) -> None:
        """Make `now()` at least `moment`."""
        self._skipped += max(0.0, moment - self.now())


class ManualClock:
    """A clock that only tests move."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """The time last set."""
        return self._now

    def skip_to(self, moment: float) -> None:
        """Make `now()` at least `moment`."""
        self._now = max(self._now, moment)


class SystemEntropy:
    """The operating system's CSPRNG."""

    def take(self, count: int) -> bytes:
        """`count` unpredictable bytes."""
        return os.urandom(count)


class SeededEntropy:
    """Reproducible bytes for tests: HMAC-SHA256 in counter mode. Never for a real run."""

    def __init__(self, seed: str) -> None:
        self._key = hashlib.sha256(seed.encode()).digest()
        self._counter = 0
        self._rest = b""

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the stream."""
        while len(self._rest) < count:
            self._rest += hmac.digest(self._key, self._counter.to_bytes(8, "big"), "sha256")
            self._counter += 1
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def write_durably(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Replace the file atomically: temporary file, fsync, rename, fsync of the folder.

    Guarantee: after a crash the file holds the old or the new content, whole.
    Raises StorageError (disk full, no permission), leaving the old content in place.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view.nbytes:
                    view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            Code.JOURNAL_WRITE, f"{path}: cannot be written ({error.strerror})."
        ) from None


class FileJournal:
    """A journal in a folder: one record file and one file per blob, each replaced atomically.

    Replacing, not appending, is what erases old secrets and keeps the journal bounded: after
    a round closes, no file in the folder holds its keys or shares.
    """

    _MAGIC = b"wardround-journal-1\n"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(
                Code.JOURNAL_WRITE, f"{folder}: cannot be written ({error.strerror})."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StorageError(
                Code.FOLDER_IN_USE, f"{folder}: in use by another process."
            ) from None

    def close(self) -> None:
        """Release the folder; again is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def load(self) -> bytes | None:
        """The last durable record. Raises StorageError where it is damaged."""
        path = self._folder / "record"
        if not path.exists():
            return None
        content = path.read_bytes()
        body, check = content[len(self._MAGIC) : -32], content[-32:]
        if not content.startswith(self._MAGIC) or hashlib.sha256(body).digest() != check:
            raise StorageError(Code.JOURNAL_DAMAGED, f"{path}: the record is damaged.")
        return body

    def store(self, record: bytes) -> None:
        """Make `record` the last durable record."""
        check = hashlib.sha256(record).digest()
        write_durably(self._folder / "record", [self._MAGIC, record, check])

    def put_blob(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Durably write a blob."""
        write_durably(self._folder / f"blob-{name}", parts)

    def get_blob(self, name: str) -> bytes | None:
        """A blob's content, or None."""
        path = self._folder / f"blob-{name}"
        return path.read_bytes() if path.exists() else None

    def drop_blob(self, name: str) -> None:
        """Remove a blob."""
        (self._folder / f"blob-{name}").unlink(missing_ok=True)


class MemoryJournal:
    """A journal that survives as long as this object: the disk of the fault schedules."""

    def __init__(self) -> None:
        self.record: bytes | None = None
        self.blobs: dict[str, bytes] = {}

    def load(self) -> bytes | None:
        """The last record."""
        return self.record

    def store(self, record: bytes) -> None:
        """Keep `record`."""
        self.record = record

    def put_blob(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep a blob."""
        self.blobs[name] = b"".join(bytes(memoryview(part).cast("B")) for part in parts)

    def get_blob(self, name: str) -> bytes | None:
        """A blob's content, or None."""
        return self.blobs.get(name)

    def drop_blob(self, name: str) -> None:
        """Forget a blob."""
        self.blobs.pop(name, None)


class SealedJournal:
    """A journal whose record is sealed at rest; blobs hold only what was sent, and stay so.

    Guarantee: the record's content (pair keys, received shares) is unreadable without the
    vault's key; a record moved from another party or altered does not open.
    """

    def __init__(self, journal: Journal, vault: Vault, owner: str) -> None:
        self._journal = journal
        self._vault = vault
        self._context = owner.encode()

    def load(self) -> bytes | None:
        """The opened record. Raises StorageError where it does not open."""
        sealed = self._journal.load()
        return None if sealed is None else self._vault.open(sealed, self._context)

    def store(self, record: bytes) -> None:
        """Seal and keep `record`."""
        self._journal.store(self._vault.seal(record, self._context))

    def put_blob(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Durably write a blob."""
        self._journal.put_blob(name, parts)

    def get_blob(self, name: str) -> bytes | None:
        """A blob's content, or None."""
        return self._journal.get_blob(name)

    def drop_blob(self, name: str) -> None:
        """Remove a blob."""
        self._journal.drop_blob(name)


def unix_seconds() -> int:
    """The wall clock, for evidence that people read; nothing depends on it."""
    return int(time.time())  # noqa: TID251 - the one place where the wall clock is read


class WallClock:
    """Unix time, for ledger rows that people read."""

    def now(self) -> float:
        """Seconds since 1970."""
        return float(unix_seconds())
