"""One HTTPS exchange after another with one address: pinned, bounded, paced and counted.

No Flower here. What the network does wrong comes out as one of three kinds of trouble, each with
a code; nothing of a server's or a proxy's own text is passed on.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.link import (
    SLICE_BYTES,
    Bucket,
    LinkLimits,
    LinkState,
    LinkWorld,
    Stopped,
    chosen_proxy,
)
from common.address import split_address
from common.errors import Code, ConfigError, StorageError
from common.skew import VERSION_HEADER

__all__ = ["Dial", "Meter", "Over", "Rejected", "Reply", "Seat", "Shut", "Trouble"]

TIMEOUT_S: Final = 30.0
# For a part: what the kernel took may still be on its way over a thin line for a while.
BULK_TIMEOUT_S: Final = 180.0
MOST_CONNECTIONS: Final = 8
# Shorter than the server keeps an idle connection, so that none is found dead.
KEEP_S: Final = 4.0
# A peer that acknowledges nothing for this long is gone, whatever the timeouts of reads say.
UNACKNOWLEDGED_MS: Final = 30_000
SEND_BUFFER: Final = 1 << 18
_LONGEST_VERSION: Final = 32


class Trouble(Exception):  # noqa: N818 - weather, not an error
    """An exchange failed; try again later."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


class Shut(Trouble):
    """The coordinator does not let this node in; activating anew may help."""


class Rejected(Trouble):
    """The coordinator's side does not take what was sent; the same again will hardly help."""


class Over(Exception):  # noqa: N818
    """The question, or its run, is not wanted any more."""


# ---------------------------------------------------------------------------- what is known
class Meter:
    """What the line has carried and when it last worked. Shared by its threads."""

    def __init__(self, world: LinkWorld) -> None:
        self._world = world
        self._lock = threading.Lock()
        self._state = LinkState(
            connected=False,
            since=world.wall.now(),
            last_heard=None,
            waiting_because="",
            code=None,
            bytes_up=0,
            bytes_down=0,
            clock_offset_s=None,
        )

    def state(self) -> LinkState:
        """The line as it stands."""
        with self._lock:
            return self._state

    def _change(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    def carried(self, *, up: int = 0, down: int = 0) -> None:
        """Bytes went over the line."""
        with self._lock:
            was = self._state
            self._change(bytes_up=was.bytes_up + up, bytes_down=was.bytes_down + down)

    def clocks(self, offset: float) -> None:
        """This machine's clock minus the coordinator's."""
        with self._lock:
            self._change(clock_offset_s=offset)

    def version(self, told: str) -> None:
        """The coordinator's release."""
        with self._lock:
            self._change(peer_version=told)

    def heard(self) -> None:
        """An exchange worked."""
        now = self._world.wall.now()
        with self._lock:
            was = self._state
            waits = was.code is Code.WINDOW_CLOSED
            self._change(
                connected=True,
                since=was.since if was.connected else now,
                last_heard=now,
                code=was.code if waits else None,
                waiting_because=was.waiting_because if waits else "",
            )
        if not was.connected:
            self._log("link.connected", None)

    def trouble(self, code: Code, why: str) -> None:
        """An exchange failed."""
        now = self._world.wall.now()
        with self._lock:
            was = self._state
            self._change(
                connected=False,
                since=now if was.connected else was.since,
                code=code,
                waiting_because=f"{code.label}: {why}",
            )
        if was.code is not code:
            self._log("link.waiting", code)

    def window(self, *, closed: bool) -> None:
        """A large transfer waits for its hours, or no longer."""
        code = Code.WINDOW_CLOSED if closed else None
        with self._lock:
            was = self._state
            if was.code not in {None, Code.WINDOW_CLOSED}:
                return
            why = f"{Code.WINDOW_CLOSED.label}: {Code.WINDOW_CLOSED.meaning}" if closed else ""
            self._change(code=code, waiting_because=why)
        if closed and was.code is None:
            self._log("link.waiting", code)

    def note(self, event: str, code: Code | None = None) -> None:
        """A line in the operator's log."""
        self._log(event, code)

    def _log(self, event: str, code: Code | None) -> None:
        if self._world.log is not None:
            self._world.log.info(event, **({} if code is None else {"code": code}))


@dataclass(frozen=True)
class Seat:
    """Where the coordinator is and who is calling."""

    server: str
    host: str
    ca: Path
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, server: str, ca: Path, transport_key: Path) -> Seat:
        """The seat of these settings. Raises ConfigError or StorageError, naming the file."""
        address = server.removeprefix("https://").rstrip("/")
        try:
            host, _ = split_address(address)
        except ValueError:
            raise ConfigError(
                Code.LINK_SETTINGS, "The coordinator's address is not host:port."
            ) from None
        return cls(address, host, ca, _transport_key(transport_key))


def _transport_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise StorageError(
                Code.KEY_FILE_OPEN, f"{path}: others than its owner may read this key."
            )
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            Code.LINK_SETTINGS, f"{path}: cannot be read as a transport key."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(Code.LINK_SETTINGS, f"{path}: not a transport key (EC P-384).")
    return key


def _tls(ca: Path) -> ssl.SSLContext:
    """TLS 1.3 under the pinned authority and no other; the system's store is not loaded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cafile=str(ca))
    except (OSError, ssl.SSLError):
        raise ConfigError(
            Code.LINK_SETTINGS, f"{ca}: cannot be read as the pinned authority."
        ) from None
    return context


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: HTTP status, content, how far the clocks were apart, and the other's release.

    `version` is empty where the coordinator does not know who asked.
    """

    status: int
    content: bytes
    clock_offset_s: float | None
    version: str = ""


def _socket_options() -> list[tuple[int, int, int]]:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        # What waits in the kernel is neither paced nor counted as sent: keep it little.
        (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER),
    ]
    patience = getattr(socket, "TCP_USER_TIMEOUT", None)
    if patience is not None:
        options.append((socket.IPPROTO_TCP, patience, UNACKNOWLEDGED_MS))
    return options


def _quiet() -> None:
    """The HTTP library's own log shows headers, and a proxy's password among them."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


# ---------------------------------------------------------------------------- the exchange
class Dial:
    """Exchanges with the seat's address; shared by the threads of one line.

    Raises ConfigError LINK_SETTINGS on construction.
    """

    def __init__(self, seat: Seat, world: LinkWorld, limits: LinkLimits, meter: Meter) -> None:
        self._seat = seat
        self._world = world
        self._meter = meter
        self.stop = threading.Event()
        rate = None if limits.bits_per_second is None else limits.bits_per_second / 8
        self._up, self._down = (Bucket(rate, world.clock, self.pause) for _ in range(2))
        proxy = chosen_proxy(seat.host, world.proxy)
        _quiet()
        transport = httpx.HTTPTransport(
            verify=_tls(seat.ca),
            proxy=None if proxy is None else httpx.Proxy(proxy),
            trust_env=False,
            limits=httpx.Limits(max_connections=MOST_CONNECTIONS, keepalive_expiry=KEEP_S),
            socket_options=_socket_options(),
        )
        self._client = httpx.Client(transport=transport, trust_env=False, follow_redirects=False)

    def pause(self, seconds: float) -> None:
        """Wait; raises Stopped once the line is to stop."""
        if not self.stop.is_set():
            self._world.pause(self.stop, seconds)
        if self.stop.is_set():
            raise Stopped

    def close(self) -> None:
        """Let go of every connection."""
        self._client.close()

    def exchange(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        most: int,
        bulk: bool = False,
        timeout: float | None = None,
    ) -> Reply:
        """Post `body`.

        Args:
            path: absolute, on the seat's address.
            body: what is sent.
            headers: beside the length.
            most: the longest answer that is read.
            bulk: wait where the cap on the bandwidth says so; else only account for it.
            timeout: seconds without progress.

        Raises:
            Trouble: UNREACHABLE, PROXY_REFUSED, SERVER_CERTIFICATE or SERVER_FAULT.
            Stopped: in a wait for the bandwidth.
        """
        patience = BULK_TIMEOUT_S if bulk else TIMEOUT_S
        try:
            return self._exchange(
                path, body, headers, most=most, bulk=bulk, timeout=timeout or patience
            )
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _weather(error) from None

    def _exchange(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        most: int,
        bulk: bool,
        timeout: float,
    ) -> Reply:
        request = self._client.build_request(
            "POST",
            f"https://{self._seat.server}{path}",
            content=self._slices(body, wait=bulk),
            headers={**headers, "content-length": str(len(body))},
            timeout=httpx.Timeout(timeout, connect=min(timeout, TIMEOUT_S)),
        )
        self._count(up=_length(request.headers), wait=False)
        self._client.cookies.clear()  # nothing here keeps what a server wants remembered
        response = self._client.send(request, stream=True)
        with contextlib.closing(response):
            offset = self._offset(response.headers.get("date"))
            version = ascii(response.headers.get(VERSION_HEADER, "")[:_LONGEST_VERSION])[1:-1]
            if version:
                self._meter.version(version)
            content = self._read(response, most, wait=bulk)
        return Reply(response.status_code, content, offset, version)

    def _slices(self, body: bytes, *, wait: bool) -> Iterator[bytes]:
        view = memoryview(body)
        for at in range(0, len(view), SLICE_BYTES):
            piece = bytes(view[at : at + SLICE_BYTES])
            self._count(up=len(piece), wait=wait)
            yield piece

    def _read(self, response: httpx.Response, most: int, *, wait: bool) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Trouble(Code.SERVER_FAULT, "an answer is compressed, which was not asked for")
        self._count(down=_length(response.headers), wait=False)
        pieces = bytearray()
        for piece in response.iter_raw(SLICE_BYTES):
            pieces += piece
            if len(pieces) > most:
                raise Trouble(Code.SERVER_FAULT, "an answer is longer than its bound")
            self._count(down=len(piece), wait=wait)
        return bytes(pieces)

    def _count(self, *, up: int = 0, down: int = 0, wait: bool) -> None:
        self._meter.carried(up=up, down=down)
        for bucket, count in ((self._up, up), (self._down, down)):
            if count:
                bucket.spend(count, wait=wait)
        if self.stop.is_set() and wait:
            raise Stopped

    def _offset(self, date: str | None) -> float | None:
        """This machine's clock minus the other's, to about a second."""
        try:
            moment = parsedate_to_datetime(date or "").timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        offset = self._world.wall.now() - moment
        self._meter.clocks(offset)
        return offset


def _length(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw)


def _weather(error: Exception) -> Trouble:
    """What a failed exchange is called; the error's own text may hold a proxy's password."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Trouble(Code.SERVER_CERTIFICATE, f"TLS: {cause.verify_message}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ProxyError):
        return Trouble(Code.PROXY_REFUSED, "the proxy does not pass the connection on")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Trouble(Code.UNREACHABLE, "no connection to the coordinator's address")
    return Trouble(Code.UNREACHABLE, f"the connection broke ({type(error).__name__})")
