"""What a hospital's line to its coordinator needs beside the wire: limits, pace, cache, state.

No Flower and no HTTP here: the verbs read limits and states without loading either.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.address import is_loopback
from common.errors import Code, ConfigError
from common.ports import Clock
from common.world import SkippingClock, WallClock, make_folder, write_durably

if TYPE_CHECKING:
    from common.logs import Log

__all__ = [
    "BIG_BYTES",
    "Bucket",
    "LinkLimits",
    "LinkState",
    "LinkWorld",
    "ObjectCache",
    "Stopped",
    "backoff",
    "chosen_proxy",
]

BIG_BYTES: Final = 1_000_000
SLICE_BYTES: Final = 1 << 16
CACHE_BYTES: Final = 4 << 30
# Below it, a part takes longer than its signature is valid.
LEAST_BITS: Final = 200_000
LONGEST_WAIT_S: Final = 60.0
_FIRST_WAIT_S: Final = 0.25
_HOURS: Final = 24
_OBJECT: Final = re.compile(r"[0-9a-f]{64}")


class Stopped(Exception):  # noqa: N818 - not a fault: the line was asked to stop
    """The line was asked to stop while it waited or transferred."""


@dataclass(frozen=True)
class LinkLimits:
    """What a hospital allows its line.

    Attributes:
        bits_per_second: most bits each way; None: no cap.
        window: local hours (from, to) in which transfers above 1 MB may run; from > to passes
            midnight; None: always.
        most_bytes: the largest question that is fetched.
    """

    bits_per_second: int | None = None
    window: tuple[float, float] | None = None
    most_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.bits_per_second is not None and self.bits_per_second < LEAST_BITS:
            raise ConfigError(
                Code.LINK_SETTINGS,
                "The line's cap is below 0.2 Mbit/s: no part fits in time.",
            )
        if self.window is not None and not all(0 <= hour <= _HOURS for hour in self.window):
            raise ConfigError(Code.LINK_SETTINGS, "The line's window is not in hours of a day.")

    def open_at(self, hour: float) -> bool:
        """Whether large transfers may run at this local hour."""
        if self.window is None:
            return True
        start, end = self.window
        if start <= end:
            return start <= hour < end
        return hour >= start or hour < end


@dataclass(frozen=True)
class LinkState:
    """The line as it stands.

    Attributes:
        connected: the last exchange with the coordinator worked.
        since: Unix seconds since when `connected` has been what it is.
        last_heard: Unix seconds of the last exchange that worked; None: never.
        waiting_because: one sentence with a code in front; empty where nothing is waited for.
        code: that code.
        bytes_up, bytes_down: of HTTP messages since the start, headers included.
        clock_offset_s: this machine's clock minus the coordinator's, to about a second.
        peer_version: the coordinator's release; empty until it knows this hospital.
    """

    connected: bool
    since: float
    last_heard: float | None
    waiting_because: str
    code: Code | None
    bytes_up: int
    bytes_down: int
    clock_offset_s: float | None
    peer_version: str = ""


def _pause(stop: threading.Event, seconds: float) -> None:
    stop.wait(seconds)


@dataclass(frozen=True)
class LinkWorld:
    """The machine under the line; tests put their own clocks in.

    Attributes:
        clock: steady seconds, for pacing.
        wall: Unix seconds, for signatures, the window and the comparison of clocks.
        pause: waits for seconds or until the event is set.
        proxy: URL of an HTTPS proxy; None: the environment says.
        log: the operator's log.
        heartbeat_s: how often a heartbeat is sent.
        patience_s: how long a part of a question may be announced but missing.
    """

    clock: Clock = field(default_factory=SkippingClock)
    wall: Clock = field(default_factory=WallClock)
    pause: Callable[[threading.Event, float], None] = _pause
    proxy: str | None = None
    log: Log | None = None
    heartbeat_s: float = 10.0
    patience_s: float = 300.0

    def hour(self) -> float:
        """The local hour, 0 to 24."""
        local = time.localtime(self.wall.now())
        return local.tm_hour + local.tm_min / 60


def backoff(tries: int) -> float:
    """Seconds to wait after this many failures in a row: doubling, never above a minute."""
    return min(LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(tries, 16))


class Bucket:
    """A token bucket: what is spent beyond the rate is waited for.

    Guarantee: in any T seconds at most rate x T + two slices pass, where all callers wait.
    """

    def __init__(self, rate: float | None, clock: Clock, pause: Callable[[float], None]) -> None:
        self._rate = rate
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._level = float(SLICE_BYTES)
        self._at = clock.now()

    def spend(self, count: int, *, wait: bool = True) -> None:
        """Account for `count` bytes; with `wait`, return when the rate allows what comes next."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock.now()
            self._level = min(float(SLICE_BYTES), self._level + (now - self._at) * self._rate)
            self._at = now
            self._level -= count
            owed = -self._level / self._rate
        if wait and owed > 0:
            self._pause(owed)


class ObjectCache:
    """Parts of questions on disk, each named by its SHA-256, so that a cut costs one part.

    Guarantee: what `get` returns has the digest asked for; the folder never holds much more
    than `most_bytes`. A part need not survive a power cut, so nothing is synced.
    """

    def __init__(self, folder: Path, most_bytes: int = CACHE_BYTES) -> None:
        make_folder(folder, mode=0o700)
        self._folder = folder
        self._most = most_bytes
        self._lock = threading.Lock()
        self._sizes = {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
            if _OBJECT.fullmatch(path.name)
        }
        self._checked: set[str] = set()
        for left in folder.glob("*.part"):
            left.unlink(missing_ok=True)
        self.make_room(())

    def put(self, name: str, content: bytes) -> None:
        """Keep a part whose digest was checked. Raises StorageError."""
        write_durably(self._folder / name, [content], durable=False)
        with self._lock:
            self._sizes[name] = len(content)
            self._checked.add(name)

    def get(self, name: str) -> bytes | None:
        """The part, or None where it is absent or damaged."""
        if name not in self._sizes:
            return None
        try:
            content = (self._folder / name).read_bytes()
        except OSError:
            content = b""
        if name in self._checked and len(content) == self._sizes[name]:
            return content
        if hashlib.sha256(content).hexdigest() == name:
            self._checked.add(name)
            return content
        self.drop([name])
        return None

    def drop(self, names: Iterable[str]) -> None:
        """Forget these parts."""
        for name in names:
            with self._lock:
                known = self._sizes.pop(name, None)
                self._checked.discard(name)
            if known is not None:
                (self._folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget every part."""
        self.drop(list(self._sizes))

    def make_room(self, keep: Iterable[str]) -> None:
        """Forget the oldest parts beyond the bound, except those of the question in hand."""
        kept = set(keep)
        total = sum(self._sizes.values())
        for name in list(self._sizes):
            if total <= self._most:
                return
            if name not in kept:
                total -= self._sizes[name]
                self.drop([name])

    def __len__(self) -> int:
        return len(self._sizes)


def chosen_proxy(host: str, explicit: str | None) -> str | None:
    """The HTTPS proxy for `host`: the one told, else the environment's; never for loopback.

    Raises:
        ConfigError: LINK_SETTINGS, without repeating the address: it may hold a password.
    """
    if is_loopback(host):
        return None
    import urllib.request

    proxy = explicit
    if proxy is None and not urllib.request.proxy_bypass(host):
        found = urllib.request.getproxies_environment()
        proxy = found.get("https") or found.get("all")
    if not proxy:
        return None
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(Code.LINK_SETTINGS, "The proxy is not an address like http://host:port.")
    return parts.geturl()
