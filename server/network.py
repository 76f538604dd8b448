"""The in-process transport of a simulation: one queue, planned accidents, and a wire tap.

Deterministic: messages are delivered one by one in the order sent; where nobody has anything
to say, the clock skips to the coordinator's next deadline.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, ProtocolError, StorageError
from common.protocol.wire import Upload, claims, unpack_from_site
from common.world import SkippingClock
from server.driver import CoordinatorDriver

# A masked plane's bytes are uniform: chi-square over 256 bins has mean 255, deviation 22.6.
# Twelve deviations never happen by chance; the high bytes of a bare update miss by thousands.
_UNIFORM_LIMIT = 255 + 12 * 22.6
_ENOUGH_BYTES = 256
_COUNTS = 3
_WORD = 8
# Where the counts of a byte begin, by its position in the word; a plane is counted in such pieces.
_PLACES = np.tile(np.arange(_WORD, dtype=np.uint16) * 256, 1 << 13)


class WireTap:
    """What the coordinator saw: counts uploads whose bytes look masked, and those that do not.

    Args:
        max_bytes: the bound on a message, as the coordinator has it.
        kept: a file that carries the counts over a crash, or None.

    Guarantee: what a killed process had counted is still counted. Raises StorageError where the
        file cannot be used.
    """

    def __init__(self, max_bytes: int, kept: Path | None = None) -> None:
        self.max_bytes = max_bytes
        self.masked = 0
        self.plain = 0
        self.bytes_up = 0
        self._kept = kept
        if kept is not None:
            self._load(kept)

    def see(self, payload: bytes) -> None:
        """Look at one message of a site, as the coordinator receives it."""
        self.bytes_up += len(payload)
        if not claims(payload, Upload):
            return
        try:
            _, message = unpack_from_site(payload, self.max_bytes)
        except ProtocolError:
            return
        if all(_uniform(plane) for plane in message.planes):
            self.masked += 1
        else:
            self.plain += 1
        self._keep()

    def _load(self, path: Path) -> None:
        try:
            found = path.read_bytes().split() if path.exists() else []
            if len(found) == _COUNTS:
                self.masked, self.plain, self.bytes_up = (int(count) for count in found)
            if not path.exists():
                path.write_bytes(self._line())
        except (OSError, ValueError):
            raise StorageError(Code.JOURNAL_WRITE, f"{path}: cannot be used.") from None

    def _keep(self) -> None:
        """One write of a fixed width over the last one: whole after a kill, and never larger."""
        if self._kept is None:
            return
        try:
            handle = os.open(self._kept, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(handle, self._line(), 0)
            finally:
                os.close(handle)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message = f"{self._kept}: cannot be written ({reason})."
            raise StorageError(Code.JOURNAL_WRITE, message) from None

    def _line(self) -> bytes:
        return b"%20d %20d %20d\n" % (self.masked, self.plain, self.bytes_up)


def _uniform(plane: memoryview) -> bool:
    """Whether a plane's bytes could be uniform.

    A word that is not masked has nearly constant high bytes, so every one of the eight byte
    positions must vary; a long plane must be flat as a whole as well.
    """
    data = np.frombuffer(plane, np.uint8)
    rows = data.size // _WORD
    counts = _byte_counts(data)
    if rows >= _WORD and (np.count_nonzero(counts, axis=1) <= min(rows, 256) // 4).any():
        return False
    total = counts.sum(axis=0)
    if data.size < _ENOUGH_BYTES:
        return bool(np.count_nonzero(total) > data.size // 4)
    expected = data.size / 256
    return float(((total - expected) ** 2 / expected).sum()) < _UNIFORM_LIMIT


def _byte_counts(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each byte value comes at each of the eight positions of a word, (8, 256)."""
    counts = np.zeros(_WORD * 256, np.int64)
    for start in range(0, data.size, _PLACES.size):
        piece = data[start : start + _PLACES.size]
        counts += np.bincount(_PLACES[: piece.size] + piece, minlength=counts.size)
    return counts.reshape(_WORD, 256)


@dataclass
class SiteHandle:
    """A hospital's process in a simulation: may be killed and started again."""

    start: Callable[[], None]
    receive: Callable[[bytes], None]
    kill: Callable[[], None]
    up: bool = False


def _settled() -> None:
    """Where every journal makes each record durable itself."""


class InProcessNetwork:
    """Connects one coordinator with its hospitals inside one process.

    Args:
        clock: skipped to the next deadline where nobody has anything to say.
        tap: sees every message of a hospital.
        settle: makes durable what hospitals have stored; called before the coordinator sees
            anything that a hospital sent, or acts on the time.
    """

    def __init__(
        self, clock: SkippingClock, tap: WireTap, settle: Callable[[], None] = _settled
    ) -> None:
        self._clock = clock
        self._settle = settle
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self._tap = tap
        self.sites: dict[str, SiteHandle] = {}
        self.driver: CoordinatorDriver | None = None
        self.dropping: Mapping[int, frozenset[str]] = {}
        self.crashing: Mapping[int, frozenset[str]] = {}
        self._down: dict[str, int] = {}

    def from_site(self, site: str) -> SitePort:
        """The transport that a site sends through."""
        return SitePort(self, site)

    def send(self, recipient: str, payload: bytes) -> None:
        """The coordinator's transport."""
        self._queue.append(("coordinator", recipient, payload))

    def post(self, site: str, payload: bytes) -> None:
        """What a site's transport does."""
        self._queue.append((site, "coordinator", payload))

    @property
    def quiet(self) -> bool:
        """Whether nobody has anything to say, and nobody is down."""
        return not self._queue and not self._down

    def step(self) -> None:
        """Deliver one message, or let the coordinator act on the time."""
        driver = self._driver()
        self._bring_back()
        if not self._queue:
            self._settle()
            self._clock.skip_to(driver.machine.next_wakeup)
            driver.tick()
            return
        sender, recipient, payload = self._queue.popleft()
        if recipient == "coordinator":
            # Hospitals answer a broadcast one after the other: one sync for all their records.
            self._settle()
            self._tap.see(payload)
            driver.receive(sender, payload)
            return
        site = self.sites[recipient]
        if not self._lost(recipient, site) and site.up:
            site.receive(payload)

    def _driver(self) -> CoordinatorDriver:
        if self.driver is None:
            raise AssertionError("the network has a coordinator before it steps")
        return self.driver

    def _lost(self, name: str, site: SiteHandle) -> bool:
        """Whether a planned accident swallows this delivery: always between Ready and upload."""
        machine = self._driver().machine
        if machine.phase in {"handshake", "ready", "idle", "new", "done"}:
            return False
        current = machine.record.round
        if name in self.crashing.get(current, ()) and name not in self._down:
            site.kill()
            site.up = False
            self._down[name] = current
        return name in self.dropping.get(current, ()) or name in self._down

    def _bring_back(self) -> None:
        """A crashed hospital starts again, from its journal, once its round is over."""
        current = self._driver().machine.record.round
        for name, crashed in list(self._down.items()):
            if current > crashed or self._driver().machine.phase == "done":
                del self._down[name]
                self.sites[name].start()
                self.sites[name].up = True


@dataclass(frozen=True)
class SitePort:
    """One site's transport."""

    network: InProcessNetwork
    site: str

    def send(self, recipient: str, payload: bytes) -> None:
        """Queue a message for the coordinator."""
        if recipient != "coordinator":
            raise AssertionError("a site speaks to the coordinator only")
        self.network.post(self.site, payload)
