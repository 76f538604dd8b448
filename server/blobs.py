"""Parts of messages on disk, each named by its SHA-256: a coordinator's memory stays flat.

Messages travel as trees of parts of a few megabytes. A part lies in one file however many
hospitals it goes to. Parts of an upload that was cut off stay for a while, so that the hospital
sends only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import Code, ProtocolError, StorageError
from common.world import make_folder

__all__ = ["BlobStore"]

KEEP_SECONDS: Final = 24 * 3600.0
MAX_PARTS: Final = 1 << 16
_NAME: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class _Entry:
    children: tuple[str, ...]
    size: int = -1  # -1: announced, not here yet
    parents: int = 0


class BlobStore:
    """Content-addressed files, and the trees that name them.

    Args:
        folder: its own; parts of an earlier process in it may be taken up again.
        most_bytes: what all files together may take.
        now: monotonic seconds.

    Guarantee: a file's content has the digest of its name when it is used; a dropped tree's
    files are gone, except those of an upload that never became whole, which stay for a day.
    """

    def __init__(
        self,
        folder: Path,
        *,
        most_bytes: int = 1 << 37,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        make_folder(folder, mode=0o700)
        self._folder = folder
        self._most = most_bytes
        self._now = now
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, set[str]] = {}
        self._kept: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._bytes = 0
        self._adopt()

    def _adopt(self) -> None:
        """Take over what an earlier process left; half-written files go."""
        now = self._now()
        for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime):
            if _NAME.fullmatch(path.name):
                size = path.stat().st_size
                self._kept[path.name] = (size, now)
                self._bytes += size
            else:
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------ trees

    def expect(
        self, nodes: Sequence[tuple[str, tuple[str, ...]]], *, own: bool = False
    ) -> list[str]:
        """Announce a tree, children before parents; the last is its root.

        Args:
            nodes: every part with the parts directly under it.
            own: it is this process's own tree: of what somebody announced that contradicts it,
                nothing stays. A name is a digest, so no such upload could have become whole.

        Returns the parts that are not here yet.
        Raises ProtocolError MALFORMED or OVERSIZED, having changed nothing.
        """
        with self._lock:
            if own:
                self._evict(nodes)
            self._check(nodes)
            self._sweep()
            for name, children in nodes:
                if name not in self._entries:
                    self._entries[name] = _Entry(children, self._take_up(name))
                    for child in children:
                        self._entries[child].parents += 1
            missing = list(dict.fromkeys(n for n, _ in nodes if self._entries[n].size < 0))
            if nodes and missing:
                self._open[nodes[-1][0]] = set(missing)
            return missing

    def _evict(self, nodes: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Drop every unfinished tree that says something else of one of these parts."""
        for name, children in nodes:
            known = self._entries.get(name)
            if known is not None and known.children != children:
                for root in [root for root in self._open if name in self._under(root)]:
                    self.drop(root)

    def _check(self, nodes: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        if len(nodes) > MAX_PARTS:
            raise ProtocolError(Code.OVERSIZED, "A message has more parts than its bound.")
        seen: dict[str, tuple[str, ...]] = {}
        for name, children in nodes:
            known = self._entries.get(name)
            fits = known is None or known.children == children
            plain = _NAME.fullmatch(name) is not None and len(set(children)) == len(children)
            if not (plain and fits and seen.get(name, children) == children):
                raise ProtocolError(Code.MALFORMED, "A message's parts contradict each other.")
            if not all(child in seen for child in children):
                raise ProtocolError(Code.MALFORMED, "A message's parts are out of order.")
            seen[name] = children

    def _take_up(self, name: str) -> int:
        """The size of a part that lies here from an upload cut off, or -1."""
        if self._kept.pop(name, None) is None:
            return -1
        path = self._folder / name
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() == name:
            return len(content)
        self._unlink(name)
        return -1

    def complete(self, root: str) -> bool:
        """Whether every part of an announced tree is here."""
        with self._lock:
            return root in self._entries and root not in self._open

    def size(self, root: str) -> int:
        """Bytes of the parts that are here, each counted once."""
        with self._lock:
            return sum(max(0, self._entries[name].size) for name in self._under(root))

    def _under(self, root: str) -> Iterator[str]:
        """The names of a tree, the root last."""
        seen: dict[str, None] = {}
        stack = [root]
        while stack:
            name = stack.pop()
            if name not in seen and name in self._entries:
                seen[name] = None
                stack.extend(self._entries[name].children)
        yield from reversed(seen)

    def children(self, name: str) -> tuple[str, ...] | None:
        """The parts directly under `name`, or None where it is unknown."""
        with self._lock:
            entry = self._entries.get(name)
            return None if entry is None else entry.children

    # ------------------------------------------------------------ parts

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Keep an announced part; one that is here already is left as it is.

        Raises:
            KeyError: it was not announced.
            StorageError: JOURNAL_WRITE, the disk or the bound is full.
        """
        with self._lock:
            entry = self._entries[name]
            if entry.size >= 0:
                return
            self._sweep(len(content))
            if self._bytes + len(content) > self._most:
                raise StorageError(Code.JOURNAL_WRITE, "The message store is full.")
        self._write(name, content)
        with self._lock:
            self._bytes += len(content)
            entry.size = len(content)
            for root in [root for root, missing in self._open.items() if name in missing]:
                self._open[root].discard(name)
                if not self._open[root]:
                    del self._open[root]

    def _write(self, name: str, content: bytes | memoryview) -> None:
        """Nothing is synced: a part that a power cut takes away is asked for again."""
        draft = self._folder / f"{name}.{threading.get_ident()}"
        try:
            with draft.open("wb") as file:
                file.write(content)
            draft.replace(self._folder / name)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise StorageError(
                Code.JOURNAL_WRITE, f"{self._folder}: cannot be written ({error.strerror})."
            ) from None

    def get(self, name: str) -> bytes | None:
        """A part's content; empty where it is announced but not here; None where unknown."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return None
            if entry.size < 0:
                return b""
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    # ------------------------------------------------------------ letting go

    def drop(self, root: str) -> None:
        """Forget a tree and whatever no other tree names; of a part of another tree, nothing."""
        with self._lock:
            entry = self._entries.get(root)
            if entry is None or entry.parents:
                return
            keep = self._open.pop(root, None) is not None
            self._release([root], keep=keep)

    def _release(self, names: Iterable[str], *, keep: bool) -> None:
        stack = list(names)
        while stack:
            name = stack.pop()
            entry = self._entries[name]
            if entry.parents:
                continue
            del self._entries[name]
            if entry.size >= 0 and keep:
                self._kept[name] = (entry.size, self._now())
            elif entry.size >= 0:
                self._bytes -= entry.size
                self._unlink(name)
            for child in entry.children:
                self._entries[child].parents -= 1
                stack.append(child)

    def _sweep(self, room: int = 0) -> None:
        """Give up kept parts that are old, or in the way of `room` bytes."""
        while self._kept:
            name, (size, since) = next(iter(self._kept.items()))
            if self._now() - since <= KEEP_SECONDS and self._bytes + room <= self._most:
                return
            del self._kept[name]
            self._bytes -= size
            self._unlink(name)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for name in [*self._entries, *self._kept]:
                self._unlink(name)
            self._entries.clear()
            self._open.clear()
            self._kept.clear()
            self._bytes = 0

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    @property
    def bytes(self) -> int:
        """What the files take, kept ones included."""
        with self._lock:
            return self._bytes
