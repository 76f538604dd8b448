"""The world behind the ports: clocks, the system's entropy, files, and their stand-ins for tests.

`SeededEntropy`, `ManualClock` and `MemoryJournal` exist for tests and fault schedules. A run takes
one of them only where nothing is protected: a simulation orders the batches of a hospital that
trains alone, for comparison, by its seed. It also skips waiting, through `SkippingClock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.crypto.seal import Vault
from common.errors import Code, StorageError
from common.ports import Journal


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


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make the folder, and those above it, where they are absent. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_durably(path: Path, parts: Sequence[bytes | memoryview], *, durable: bool = True) -> None:
    """Replace the file atomically: temporary file, fsync, rename, fsync of the folder.

    Guarantee: after a crash the file holds the old or the new content, whole; if not
    `durable`, that holds for a crash of the process only.
    Raises StorageError (disk full, no permission), leaving the old content in place.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for part in parts:
                _write_all(handle, memoryview(part).cast("B"))
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def _write_all(handle: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(handle, view) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(Code.JOURNAL_WRITE, f"{path}: cannot be written ({error.strerror}).")


class FileJournal:
    """A journal in a folder: one record file with two slots, and one file per blob.

    A record is written into the slot that does not hold the last one, synced, and only then is
    the other slot wiped. So a torn write leaves the last record, one sync makes a record
    durable, the file stays bounded, and after a round closes no file in the folder holds its
    keys or shares.
    """

    _MAGIC = b"WRJ1"
    _HEAD = struct.Struct(">4sQQ32s")
    _LEAST_SLOT = 4096

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "record"
        make_folder(folder, mode=0o700)
        try:
            self._lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
            self._record = os.open(self._path, os.O_RDWR) if self._path.exists() else -1
        except OSError as error:
            raise _unwritable(folder, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise StorageError(
                Code.FOLDER_IN_USE, f"{folder}: in use by another process."
            ) from None
        self._sequence, self._slot, self._size, self._last = self._scan()

    def close(self) -> None:
        """Release the folder; again is harmless."""
        for handle in (self._lock, self._record):
            if handle >= 0:
                os.close(handle)
        self._lock = self._record = -1

    def _scan(self) -> tuple[int, int, int, bytes | None]:
        """(sequence, slot, slot size, record) of the newest whole record.

        The file appears whole, by a rename, and a slot is wiped only after the other was synced:
        a file without a whole record is damage, never an accident that may be forgotten.
        """
        if self._record < 0:
            return 0, 0, 0, None
        content = self._path.read_bytes()
        size = len(content) // 2
        entries = [self._whole(content[slot * size : (slot + 1) * size]) for slot in (0, 1)]
        found = [(*entry, slot) for slot, entry in enumerate(entries) if entry is not None]
        if not found:
            raise StorageError(Code.JOURNAL_DAMAGED, f"{self._path}: the record is damaged.")
        sequence, record, slot = max(found)
        return sequence, slot, size, record

    def _whole(self, content: bytes) -> tuple[int, bytes] | None:
        if len(content) < self._HEAD.size:
            return None
        magic, sequence, length, check = self._HEAD.unpack_from(content)
        body = content[self._HEAD.size : self._HEAD.size + length]
        told = sequence.to_bytes(8, "big") + body
        if magic != self._MAGIC or hashlib.sha256(told).digest() != check:
            return None
        return sequence, body

    def load(self) -> bytes | None:
        """The last record. A damaged file is refused when the journal is opened."""
        return self._last

    def store(self, record: bytes) -> None:
        """Make `record` the last durable record."""
        sequence = self._sequence + 1
        check = hashlib.sha256(sequence.to_bytes(8, "big") + record).digest()
        entry = self._HEAD.pack(self._MAGIC, sequence, len(record), check) + record
        try:
            if len(entry) > self._size:
                self._grow(entry)
                slot = 0
            else:
                slot = 1 - self._slot
                self._put(slot * self._size, entry.ljust(self._size, b"\0"))
                os.fdatasync(self._record)
                # Synced: the old record, with its keys and shares, may go now and not before.
                self._put(self._slot * self._size, bytes(self._size))
        except OSError as error:
            raise _unwritable(self._path, error) from None
        self._sequence, self._slot, self._last = sequence, slot, record

    def _put(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        while view.nbytes:
            written = os.pwrite(self._record, view, at)
            view, at = view[written:], at + written

    def _grow(self, entry: bytes) -> None:
        """Replace the file by one with larger slots, the new record in the first."""
        size = max(self._LEAST_SLOT, 1 << (2 * len(entry) - 1).bit_length())
        temporary = self._path.with_name("record.part")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(handle, memoryview(entry.ljust(2 * size, b"\0")))
            os.fsync(handle)
            temporary.replace(self._path)
            _sync_folder(self._folder)
        except OSError:
            os.close(handle)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if self._record >= 0:
            os.close(self._record)
        self._record, self._size = handle, size

    def put_blob(
        self, name: str, parts: Sequence[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Write a blob."""
        write_durably(self._folder / f"blob-{name}", parts, durable=durable)

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

    def put_blob(
        self, name: str, parts: Sequence[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Keep a blob."""
        del durable
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

    def put_blob(
        self, name: str, parts: Sequence[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Write a blob."""
        self._journal.put_blob(name, parts, durable=durable)

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
