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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import Code, StorageError
from common.ports import Journal

if TYPE_CHECKING:
    from common.crypto.seal import Vault


class SystemClock:
    """The clock of a deployment: seconds that never go back, whatever the wall clock does."""

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


def give_back_memory() -> None:
    """Return to the system what this process has freed; the C library else keeps some of it.

    After a model was gone through, that is as much as the model.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(0)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make the folder, and those above it, where they are absent. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_durably(path: Path, parts: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
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


@dataclass(slots=True)
class _Area:
    """One owner's two slots: which holds the newest record, and how much of each is not zero."""

    owner: bytes
    slot: int = 0
    sequence: int = 0
    record: bytes | None = None
    used: list[int] = field(default_factory=lambda: [0, 0])
    unsynced: bool = False


class _Records:
    """A file with the last record of every owner, in two slots each.

    A record is written into the slot that does not hold the last one, synced, and only then is
    the other slot wiped. So a torn write leaves the last record, one sync makes the records of
    all owners durable, the file stays bounded, and what a record no longer holds is erased.
    Every method raises StorageError; after one of them nobody knows what the disk holds, and
    the file is not used again before it is opened again.
    """

    _MAGIC = b"WRJ1"
    _HEAD = struct.Struct(">4sQQ32s")
    _LEAST_SLOT = 4096

    def __init__(self, path: Path, owners: Sequence[bytes]) -> None:
        self._path = path
        self._areas = [_Area(owner) for owner in owners]
        self._size = 0
        self._broken = False
        try:
            self._handle = os.open(path, os.O_RDWR) if path.exists() else -1
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            if self._handle >= 0:
                self._scan(path.read_bytes())
                # A killed process may have left its last records unsynced; the slots beside
                # them are free to be overwritten only once they are durable.
                os.fdatasync(self._handle)
        except OSError as error:
            self.close()
            raise _unwritable(path, error) from None
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def last(self, index: int) -> bytes | None:
        """The last record of an owner, or None."""
        return self._areas[index].record

    def _scan(self, content: bytes) -> None:
        """Find the newest whole record of every owner.

        The file appears whole, by a rename, and a slot is wiped only after the other was synced:
        an owner without a whole record is damage, never an accident that may be forgotten.
        """
        self._size = size = len(content) // (2 * len(self._areas))
        for index, area in enumerate(self._areas):
            start = self._place(index, 0)
            slots = (content[start : start + size], content[start + size : start + 2 * size])
            found = [
                (*entry, slot)
                for slot, part in enumerate(slots)
                if (entry := self._whole(area.owner, part)) is not None
            ]
            if not found:
                raise StorageError(Code.JOURNAL_DAMAGED, f"{self._path}: the record is damaged.")
            area.sequence, record, area.slot = max(found)
            area.record = record if area.sequence else None
            area.used = [size if any(part) else 0 for part in slots]

    def _place(self, index: int, slot: int) -> int:
        return (2 * index + slot) * self._size

    def _entry(self, owner: bytes, sequence: int, record: bytes) -> bytes:
        check = hashlib.sha256(owner + sequence.to_bytes(8, "big") + record).digest()
        return self._HEAD.pack(self._MAGIC, sequence, len(record), check) + record

    def _whole(self, owner: bytes, content: bytes) -> tuple[int, bytes] | None:
        if len(content) < self._HEAD.size:
            return None
        magic, sequence, length, check = self._HEAD.unpack_from(content)
        body = content[self._HEAD.size : self._HEAD.size + length]
        told = owner + sequence.to_bytes(8, "big") + body
        if magic != self._MAGIC or hashlib.sha256(told).digest() != check:
            return None
        return sequence, body

    def put(self, index: int, record: bytes) -> None:
        """Write an owner's next record: it survives the process, and after `sync` a power cut."""
        area = self._areas[index]
        if area.unsynced:
            self.sync()  # the other slot holds the only durable record
        entry = self._entry(area.owner, area.sequence + 1, record)
        with self._writing():
            if len(entry) > self._size:
                self._grow(index, entry)
                slot = 0
            else:
                slot = 1 - area.slot
                self._put(self._place(index, slot), entry.ljust(area.used[slot], b"\0"))
                area.used[slot] = len(entry)
                area.unsynced = True
        area.sequence, area.slot, area.record = area.sequence + 1, slot, record

    def sync(self) -> None:
        """Make every record durable, then wipe those that they replace."""
        fresh = [(index, area) for index, area in enumerate(self._areas) if area.unsynced]
        if not fresh:
            return
        with self._writing():
            os.fdatasync(self._handle)
            # Synced: the old records, with their keys and shares, may go now and not before.
            for index, area in fresh:
                old = 1 - area.slot
                self._put(self._place(index, old), bytes(area.used[old]))
                area.used[old] = 0
                area.unsynced = False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._broken:
            raise StorageError(Code.JOURNAL_WRITE, f"{self._path}: a write failed before.")
        try:
            yield
        except OSError as error:
            self._broken = True
            raise _unwritable(self._path, error) from None

    def _put(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        while view.nbytes:
            written = os.pwrite(self._handle, view, at)
            view, at = view[written:], at + written

    def _grow(self, index: int, entry: bytes) -> None:
        """Replace the file by one with larger slots, every owner's record in the first."""
        entries = [
            entry if at == index else self._entry(area.owner, area.sequence, area.record or b"")
            for at, area in enumerate(self._areas)
        ]
        size = max(self._LEAST_SLOT, 1 << (2 * len(entry) - 1).bit_length())
        temporary = self._path.with_name(self._path.name + ".part")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for part in entries:
                _write_all(handle, memoryview(part.ljust(2 * size, b"\0")))
            os.fsync(handle)
            temporary.replace(self._path)
            _sync_folder(self._path.parent)
        except OSError:
            os.close(handle)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._handle, self._size = handle, size
        for area, part in zip(self._areas, entries, strict=True):
            area.slot, area.used, area.unsynced = 0, [len(part), 0], False


class _Blobs:
    """Named blobs in a folder, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _blob(self, name: str) -> Path:
        return self._folder / f"blob-{name}"

    def put_blob(
        self, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Write a blob."""
        write_durably(self._blob(name), parts, durable=durable)

    def get_blob(self, name: str) -> bytes | None:
        """A blob's content, or None."""
        path = self._blob(name)
        return path.read_bytes() if path.exists() else None

    def drop_blob(self, name: str) -> None:
        """Remove a blob."""
        self._blob(name).unlink(missing_ok=True)


def _locked(folder: Path) -> int:
    """The handle of a folder that is this process's alone, made where it is absent."""
    make_folder(folder, mode=0o700)
    try:
        lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StorageError(Code.FOLDER_IN_USE, f"{folder}: in use by another process.") from None
    return lock


class FileJournal(_Blobs):
    """A journal in a folder: one file for the record, and one for each blob.

    Guarantee: a torn write leaves the last record, and after a round closes no file in the
    folder holds its keys or shares.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lock = _locked(folder)
        try:
            self._records = _Records(folder / "record", [b""])
        except StorageError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Release the folder; again is harmless."""
        self._records.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def load(self) -> bytes | None:
        """The last record. A damaged file is refused when the journal is opened."""
        return self._records.last(0)

    def store(self, record: bytes) -> None:
        """Make `record` the last durable record."""
        self._records.put(0, record)
        self._records.sync()


class JournalGroup:
    """The journals of several parties of one process, made durable by one sync: a simulation's.

    Args:
        folder: where the file with all last records lies.
        parties: everybody who may have a journal here, the same at every opening.

    Guarantee: a record that a member stored survives the process at once, and a power cut
    after `settle`; a blob is dropped only once the records stored before are settled. Who
    carries the members' messages settles before any of them is delivered: then nobody has
    seen what a power cut takes back.
    """

    def __init__(self, folder: Path, parties: Sequence[str]) -> None:
        self._places = {party: index for index, party in enumerate(sorted(parties))}
        self._lock = _locked(folder)
        try:
            self._records = _Records(folder / "records", [party.encode() for party in self._places])
        except StorageError:
            os.close(self._lock)
            raise
        self.dropped: set[Path] = set()

    def member(self, party: str, folder: Path) -> GroupedJournal:
        """The journal of one party; its blobs lie in `folder`."""
        make_folder(folder, mode=0o700)
        return GroupedJournal(self, self._records, self._places[party], folder)

    def settle(self) -> None:
        """Make every stored record durable, then drop the blobs that are to go.

        Raises StorageError; the group is not used again before it is opened again.
        """
        self._records.sync()
        while self.dropped:
            self.dropped.pop().unlink(missing_ok=True)

    def close(self) -> None:
        """Settle and release the folder; again is harmless."""
        with suppress(StorageError):  # nobody has seen what is not settled
            self.settle()
        self._records.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


class GroupedJournal(_Blobs):
    """One party's journal in a `JournalGroup`: durable when the group has settled."""

    def __init__(self, group: JournalGroup, records: _Records, place: int, folder: Path) -> None:
        super().__init__(folder)
        self._group = group
        self._records = records
        self._place = place

    def load(self) -> bytes | None:
        """The last record. A damaged file is refused when the group is opened."""
        return self._records.last(self._place)

    def store(self, record: bytes) -> None:
        """Make `record` the last record: now for this process, durable when the group settles."""
        self._records.put(self._place, record)

    def put_blob(
        self, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Write a blob; a durable one after everything stored before it."""
        if durable:
            self._group.settle()
        self._group.dropped.discard(self._blob(name))
        super().put_blob(name, parts, durable=durable)

    def get_blob(self, name: str) -> bytes | None:
        """A blob's content, or None."""
        return None if self._blob(name) in self._group.dropped else super().get_blob(name)

    def drop_blob(self, name: str) -> None:
        """Remove a blob, once the group has settled."""
        self._group.dropped.add(self._blob(name))


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
        self, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True
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
        self, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True
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
