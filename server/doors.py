"""The coordinator's two listeners: what may pass before Flower sees a byte of it.

The public one is TLS 1.3 and knows the few paths that a hospital needs. The admin one is on
loopback and wants a token on every path. Both are plain ASGI around one application.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import math
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.cli import VERSION
from common.errors import Code, ConfigError, ProtocolError
from common.skew import VERSION_HEADER

__all__ = [
    "AdminDoor",
    "Bell",
    "Listener",
    "PublicDoor",
    "Quota",
    "Route",
    "TlsFiles",
    "Traffic",
    "Wire",
    "bound",
    "load_certificate",
    "require_loopback",
    "tls_context",
]

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PULL: Final = "/v1/fleet/pull-messages"
PUSH_OBJECT: Final = "/v1/fleet/push-object"
ACTIVATE: Final = "/v1/fleet/activate-node"
_FINE, _BAD = 200, 400
STOP_S: Final = 5.0
_SMALL: Final = 64 << 10
# Callers in the middle of a TLS handshake, beside those that are through.
_HALF_OPEN: Final = 128
_TREE: Final = 8 << 20
# Buckets beside which the empty ones are forgotten.
_NAMES: Final = 4096
# What a hospital's link calls. Registration is ours, and no code travels: Flower's own calls
# for them are not served.
PATHS: Final = frozenset(
    {
        ACTIVATE,
        "/v1/fleet/deactivate-node",
        "/v1/fleet/send-node-heartbeat",
        PULL,
        "/v1/fleet/push-messages",
        PUSH_OBJECT,
        "/v1/fleet/pull-object",
        "/v1/fleet/confirm-message-received",
    }
)


@dataclass(frozen=True)
class TlsFiles:
    """Paths of the certificate chain and its private key, PEM."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Route:
    """One more path of the admin listener, GET only: what it answers with, and as what."""

    path: str
    media_type: str
    answer: Callable[[], bytes]


@dataclass(frozen=True)
class Wire:
    """Bounds of the listeners and of what lies behind them.

    Attributes:
        most_body: bytes of the largest request: one part of a message.
        hold_s: how long a hospital's question for messages waits for one.
        body_s: how long a request's body may take.
        head_s: how long a request's head may take, from its first byte or the connection's start.
        most_connections: connections at once, on the public listener.
        at_once: calls that are worked on at the same time; bounds memory.
        each_at_once: calls of one hospital at the same time, bodies that are on their way included;
            its link has eight connections, and a restart may leave as many behind for a while.
        calls_per_s: calls of one hospital in a second, in the long run; a link makes a few, and a
            few dozen where small parts pass over a fast line.
        most_calls: calls of one hospital at a stretch, before it is held to `calls_per_s`.
        most_answer: bytes of the largest answer of one hospital.
        most_disk: bytes of all messages on disk.
    """

    most_body: int = 8 << 20
    hold_s: float = 10.0
    body_s: float = 300.0
    head_s: float = 20.0
    most_connections: int = 512
    at_once: int = 6
    each_at_once: int = 32
    calls_per_s: float = 200.0
    most_calls: int = 1000
    most_answer: int = 1 << 34
    most_disk: int = 1 << 37


@dataclass(slots=True)
class Traffic:
    """Bytes of one hospital's requests and answers, without headers; and when the last one was."""

    up: int = 0
    down: int = 0
    at: float = 0.0


class Bell:
    """Wakes the hospitals that wait at the door; rung from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._rung: dict[str, int] = {}
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self.closed = False

    def count(self, key: str) -> int:
        """How often it was rung for `key`; what is passed to `wait`."""
        with self._lock:
            return self._rung.get(key, 0)

    def ring(self, key: str) -> None:
        """Wake whoever waits for `key`, or will wait since an older count."""
        with self._lock:
            self._rung[key] = self._rung.get(key, 0) + 1
            loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._wake, key)

    def close(self) -> None:
        """Wake everybody, for good."""
        self.closed = True
        for key in list(self._waiting):
            self.ring(key)

    def _wake(self, key: str) -> None:
        for waiter in self._waiting.pop(key, set()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, key: str, since: int, seconds: float, receive: Receive) -> bool:
        """Wait for a ring after the count `since`. False where the caller has hung up."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._loop = loop
            if self.closed or self._rung.get(key, 0) != since:
                return True
            self._waiting.setdefault(key, set()).add(waiter)
        gone = asyncio.ensure_future(receive())
        try:
            both: set[asyncio.Future[Any]] = {waiter, gone}
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return not gone.done()
        finally:
            gone.cancel()
            self._waiting.get(key, set()).discard(waiter)


class Once:
    """Signed moments, each of use once: headers that somebody saw are worth nothing to him.

    Flower's node authentication signs the time and nothing else, and takes it for minutes.

    Args:
        seconds: how long a moment would be taken.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Digests: thousands of moments are kept, and a caller's key is long.
        self._used: dict[bytes, float] = {}

    def use(self, key: str, moment: str) -> bool:
        """Whether this key's moment was not used yet; from now on it is."""
        now = time.monotonic()
        while self._used and now - next(iter(self._used.values())) > self._seconds:
            del self._used[next(iter(self._used))]
        name = _mark(key, moment)
        if name in self._used:
            return False
        self._used[name] = now
        return True

    def forget(self, key: str, moment: str) -> None:
        """It was not used: whoever showed it was not let in."""
        self._used.pop(_mark(key, moment), None)


def _mark(key: str, moment: str) -> bytes:
    return hashlib.sha256(f"{key}\n{moment}".encode()).digest()[:16]


class Quota:
    """A bucket for each name: a stretch of calls at once, and in the long run so many a second.

    Args:
        per_second: calls that a bucket forgives in a second.
        most: calls that it holds.
    """

    def __init__(self, per_second: float, most: int) -> None:
        self._per_second = per_second
        self._most = most
        self._spent: dict[str, tuple[float, float]] = {}

    def left(self, name: str, now: float) -> float:
        """Seconds until this name may call again; 0: it may."""
        return max(0.0, self._level(name, now) + 1 - self._most) / self._per_second

    def spend(self, name: str, now: float) -> None:
        """Count one call."""
        level = self._level(name, now) + 1
        if len(self._spent) >= _NAMES:  # whoever was quiet for a while needs no bucket
            self._spent = {n: told for n, told in self._spent.items() if self._level(n, now) > 0}
        self._spent[name] = (level, now)

    def _level(self, name: str, now: float) -> float:
        level, at = self._spent.get(name, (0.0, now))
        return max(0.0, level - (now - at) * self._per_second)


class Desk(Protocol):
    """Answers calls without a web framework; only those that succeed."""

    @property
    def key_header(self) -> bytes:
        """The name of the header with the caller's public key, lower case."""
        ...

    @property
    def moment_header(self) -> bytes:
        """The name of the header with the moment that the caller signed, lower case."""
        ...

    @property
    def moment_s(self) -> float:
        """How long such a moment is taken, in seconds."""
        ...

    @property
    def media_type(self) -> str:
        """What its answers are."""
        ...

    @property
    def paths(self) -> Collection[str]:
        """The calls it knows."""
        ...

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
        """The answer; None where it is not a plain success, and nothing was changed.

        Raises ProtocolError at a call that means nothing.
        """
        ...


class PublicDoor:
    """ASGI: what hospitals may call, from whom, how large; and the wait for messages.

    A request for messages that finds none is held until there is one: hospitals need not poll
    in a hurry, and a question reaches them at once.

    Args:
        app: Flower's.
        desk: answers the calls that a hospital makes all day.
        known: whether a public key, as the header holds it, is a registered hospital's.
        bell: rung when a hospital has a message.
        wire: bounds.
    """

    def __init__(
        self, app: App, desk: Desk, known: Callable[[str], bool], bell: Bell, wire: Wire
    ) -> None:
        self._app = app
        self._desk = desk
        self._known = known
        self._bell = bell
        self._wire = wire
        # Few at a time: each holds a part of a message or two.
        self._clerks = ThreadPoolExecutor(wire.at_once, "desk")
        self._once = Once(desk.moment_s)
        self._busy: Counter[str] = Counter()
        self._quota = Quota(wire.calls_per_s, wire.most_calls)
        self.traffic: dict[str, Traffic] = {}

    def close(self) -> None:
        """Let the clerks go."""
        self._clerks.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await _close(scope, send)
            return
        path = scope["path"]
        if scope["method"] != "POST" or path not in PATHS:
            await _plain(send, 404)
            return
        key = _header(scope, self._desk.key_header) or ""
        # Somebody who may not speak is not listened to: the body is not even read.
        if not self._known(key):
            await _plain(send, 401, [(b"connection", b"close")])
            return
        # Calls that were served count for the key, wherever they come from: who signed them has
        # it. Refused ones count for the key at that address: the key alone is no secret, and
        # whoever shows another's may not use up what its owner has.
        place = f"{key}\n{_address(scope)}"
        wait = max(self._quota.left(name, time.monotonic()) for name in (key, place))
        if wait > 0:
            told = (b"retry-after", str(math.ceil(wait)).encode())
            await _plain(send, 429, [(b"connection", b"close"), told])
            return
        served = False
        try:
            served = await self._admitted(scope, receive, send, key)
        finally:
            self._quota.spend(key if served else place, time.monotonic())

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, key: str) -> bool:
        """One request under a key that is known; whether it was served."""
        # A moment that is there twice would be told from none here, and taken there.
        moment = _header(scope, self._desk.moment_header)
        if moment is None or not self._once.use(key, moment):
            # A known key hears our version: `doctor` asks with the key alone.
            told = (VERSION_HEADER.encode(), VERSION.encode())
            await _plain(send, 401, [(b"connection", b"close"), told])
            return False
        if self._busy[key] >= self._wire.each_at_once:
            self._once.forget(key, moment)
            await _plain(send, 503, [(b"connection", b"close")])
            return False
        served = False
        self._busy[key] += 1
        try:
            path = scope["path"]
            body = await _body(scope, receive, send, self._limit(path), self._wire.body_s)
            served = body is not None and await self._pass(scope, receive, send, body, key)
        finally:
            self._busy[key] -= 1
            if not served:
                self._once.forget(key, moment)
        return served

    def _limit(self, path: str) -> int:
        if path == PUSH_OBJECT:
            return self._wire.most_body
        return min(self._wire.most_body, _TREE if path.endswith("push-messages") else _SMALL)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, body: bytes, key: str
    ) -> bool:
        """Answer a call; whether the caller was who it said."""
        if scope["path"] == PULL:
            answer = await self._held(scope, receive, body, key)
        else:
            answer = await self._answer(scope, body)
        if answer is None:
            return True  # it was let in, and hung up while it waited
        known = self._known(key)
        served = known and answer.status < _BAD
        if served:
            tally = self.traffic.setdefault(key, Traffic())
            tally.up += len(body)
            tally.down += answer.size
            tally.at = time.monotonic()
        for event in answer.events:
            await send(_telling(event) if known else event)
        return served

    async def _answer(self, scope: Scope, body: bytes) -> _Answer:
        """The desk's answer; where it has none, Flower's application has the word."""
        desk, path = self._desk, scope["path"]
        content = None
        if path in desk.paths:
            headers = {
                name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
            }
            loop = asyncio.get_running_loop()
            try:
                content = await loop.run_in_executor(self._clerks, desk.answer, path, headers, body)
            except ProtocolError:
                return _Answer(_events(_BAD), _BAD, 0)
        if content is None:
            return await _ask(self._app, scope, body)
        told = [(b"content-type", desk.media_type.encode())]
        return _Answer(_events(_FINE, told, content), _FINE, len(content))

    async def _held(self, scope: Scope, receive: Receive, body: bytes, key: str) -> _Answer | None:
        """Ask for messages; where there are none, wait for one and ask again."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wire.hold_s
        while True:
            since = self._bell.count(key)
            answer = await self._answer(scope, body)
            left = end - loop.time()
            if answer.status != _FINE or answer.size or left <= 0 or self._bell.closed:
                return answer
            if not await self._bell.wait(key, since, left, receive):
                return None


def _telling(event: Event) -> Event:
    """The event, with our version in an answer's head: only hospitals that are known hear it."""
    if event["type"] != "http.response.start":
        return event
    told = (VERSION_HEADER.encode(), VERSION.encode())
    return {**event, "headers": [*event.get("headers", ()), told]}


@dataclass(frozen=True)
class _Answer:
    events: Sequence[Event]
    status: int
    size: int


async def _ask(app: App, scope: Scope, body: bytes) -> _Answer:
    """Flower's whole answer to one request whose body is at hand."""
    events: list[Event] = []

    async def send(event: Event) -> None:
        events.append(event)

    copy = {**scope, "state": dict(scope.get("state") or {})}
    await app(copy, _replayed(body, _never), send)
    status = next((e["status"] for e in events if e["type"] == "http.response.start"), 500)
    return _Answer(events, status, sum(len(e.get("body", b"")) for e in events))


async def _never() -> Event:
    """Of a caller that is waited for elsewhere: nothing more."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


def _replayed(body: bytes, after: Receive) -> Receive:
    """Hands the body out once, then whatever comes `after`."""
    given = False

    async def receive() -> Event:
        nonlocal given
        if given:
            return await after()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


class AdminDoor:
    """ASGI: the token on every path, then the extra routes, then Flower's own.

    Args:
        app: Flower's.
        token: the bearer token.
        routes: the extra paths.
        most_body: bytes of the largest request.
    """

    def __init__(self, app: App, token: str, routes: Sequence[Route], most_body: int) -> None:
        self._app = app
        self._expected = f"bearer {token}".encode()
        self._routes: Mapping[str, Route] = {route.path: route for route in routes}
        self._most = most_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await _close(scope, send)
            return
        if not self._allowed(scope):
            await _plain(send, 401, [(b"www-authenticate", b"Bearer")])
            return
        route = self._routes.get(scope["path"])
        if route is not None:
            await self._serve(route, scope, send)
            return
        body = await _body(scope, receive, send, self._most, None)
        if body is not None:
            # Passed on as it comes: some of Flower's answers here are streams.
            await self._app(scope, _replayed(body, receive), send)

    def _allowed(self, scope: Scope) -> bool:
        told = _header(scope, b"authorization") or ""
        scheme, _, token = told.partition(" ")
        given = f"{scheme.lower()} {token}".encode(errors="replace")
        return hmac.compare_digest(given, self._expected)

    async def _serve(self, route: Route, scope: Scope, send: Send) -> None:
        if scope["method"] not in {"GET", "HEAD"}:
            await _plain(send, 405)
            return
        content = await asyncio.to_thread(route.answer)
        await _plain(send, 200, [(b"content-type", route.media_type.encode())], content)


def _header(scope: Scope, name: bytes) -> str | None:
    """A header that is there exactly once."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else None


def _address(scope: Scope) -> str:
    """Where a request comes from, as far as anybody here can tell."""
    client = scope.get("client")
    return str(client[0]) if client else ""


async def _body(
    scope: Scope, receive: Receive, send: Send, most: int, seconds: float | None
) -> bytes | None:
    """The request's body; None where it was answered with 413 or 408, or nobody is there."""
    told = _header(scope, b"content-length")
    if told is not None and (not told.isdecimal() or int(told) > most):
        await _plain(send, 413, [(b"connection", b"close")])
        return None
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                event = await receive()
                if event["type"] != "http.request":
                    return None
                part = event.get("body", b"")
                size += len(part)
                if size > most:
                    await _plain(send, 413, [(b"connection", b"close")])
                    return None
                parts.append(part)
                if not event.get("more_body", False):
                    break
    except TimeoutError:
        await _plain(send, 408, [(b"connection", b"close")])
        return None
    return b"".join(parts)


async def _plain(
    send: Send,
    status: int,
    headers: Sequence[tuple[bytes, bytes]] = (),
    content: bytes = b"",
) -> None:
    for event in _events(status, headers, content):
        await send(event)


def _events(
    status: int, headers: Sequence[tuple[bytes, bytes]] = (), content: bytes = b""
) -> tuple[Event, Event]:
    length = (b"content-length", str(len(content)).encode())
    return (
        {"type": "http.response.start", "status": status, "headers": [*headers, length]},
        {"type": "http.response.body", "body": content},
    )


async def _close(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})


# ------------------------------------------------------------------------------ sockets
def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """A server's context: TLS 1.3 and nothing older. Raises ConfigError LISTENER_TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_certificate(context, files)
    return context


def load_certificate(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Serve this certificate from now on. Raises ConfigError LISTENER_TLS."""
    try:
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError):
        raise ConfigError(
            Code.LISTENER_TLS, f"{files.cert} and {files.key} are no certificate with its key."
        ) from None


def require_loopback(host: str) -> None:
    """Raise ConfigError ADMIN_NOT_LOOPBACK for an address that others can reach."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ConfigError(Code.ADMIN_NOT_LOOPBACK, f"The admin listener may not listen on {host}.")


class Gate(socket.socket):
    """A listening socket that bounds what it has let in, unfinished TLS handshakes included.

    The web server counts a caller when its handshake is done. Those that never finish theirs
    would take every descriptor of the process, and a run whose journal cannot be opened ends.
    Where it is full, the oldest unfinished handshake makes room: a hospital needs no luck.
    """

    most = 1 << 16

    def __init__(self, *, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._in: list[socket.socket] = []
        self.greeted: set[int] = set()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next caller. Raises BlockingIOError where there is none, or no room for it."""
        caller, address = super().accept()
        if len(self._in) >= self.most:
            self._in = [one for one in self._in if one.fileno() >= 0]
        if len(self._in) >= self.most and not self._make_room():
            caller.close()
            raise BlockingIOError
        self._in.append(caller)
        return caller, address

    def _make_room(self) -> bool:
        for index, one in enumerate(self._in):
            if one.fileno() not in self.greeted:
                del self._in[index]
                with contextlib.suppress(OSError):  # gone by itself
                    one.shutdown(socket.SHUT_RDWR)
                return True
        return False


class _Prompt(H11Protocol):
    """Hangs up on a caller that does not bring a request's head to its end in time.

    The web server itself waits for ever, and a few hundred such callers would keep everybody out.
    """

    head_s = 20.0
    gate: Gate

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._number = transport.get_extra_info("socket").fileno()
        self.gate.greeted.add(self._number)
        self._late: asyncio.TimerHandle | None = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect()
        else:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        self.gate.greeted.discard(self._number)
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.head_s, self._hang_up)

    def _calm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Listener:
    """One uvicorn server in a thread of its own, on a socket from `bound`."""

    def __init__(
        self,
        listening: Gate,
        app: App,
        *,
        tls: ssl.SSLContext | None = None,
        most_connections: int | None = None,
        head_s: float = Wire.head_s,
    ) -> None:
        self.port: int = listening.getsockname()[1]
        if most_connections is not None:
            listening.most = most_connections + _HALF_OPEN
        config = uvicorn.Config(
            app,
            lifespan="off",
            # h11 bounds a request's headers.
            http=type("_Listening", (_Prompt,), {"head_s": head_s, "gate": listening}),
            # Another loop would not ask the gate.
            loop="asyncio",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            # A caller's word on where it comes from is not taken.
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
            limit_concurrency=most_connections,
            ssl_context_factory=None if tls is None else (lambda _config, _default: tls),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, daemon=True
        )

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Take no more connections and end those there are."""
        self._server.should_exit = True

    def join(self) -> None:
        """Wait for the end, but not for a caller that holds on: a listener never blocks a stop."""
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
            self._server.force_exit = True
            self._thread.join(STOP_S)


def bound(name: str, address: tuple[str, int]) -> Gate:
    """A socket that listens there. Raises ConfigError LISTENER_PORT."""
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=512)
        return Gate(fileno=made.detach())
    except OSError as error:
        raise ConfigError(
            Code.LISTENER_PORT,
            f"The {name} listener cannot have {host}:{port} ({error.strerror}).",
        ) from None
