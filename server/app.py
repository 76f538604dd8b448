"""The coordinator's ServerApp: one signed question at a time to every hospital.

A thin shell between the round machine and Flower's public Grid. The machine sends when it likes;
Flower lets a hospital speak only in answer. So what is for a hospital waits in its outbox until
its last question is answered, and a hospital that may have something to say is asked who is there.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import importlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError
from common.ids import DIGEST_BYTES, is_site_id
from common.ports import Clock, Entropy
from common.protocol.envelope import (
    COORDINATOR,
    MAX_PAYLOADS,
    NONCE_BYTES,
    Envelope,
    check_envelope,
    payload_digest,
    sign_envelope,
)
from common.protocol.wire import BurnRequest, Finished, HandshakeOpen, RoundStart, claims
from common.world import SystemEntropy

__all__ = ["Driver", "Exchange", "Pace", "Presence", "Watcher", "app", "bind"]

HELLO: Final = "query.hello"
STEP: Final = "query.step"
TRAIN: Final = "train.step"
STYPE: Final = "wardround.bytes"
RUN_SETTING: Final = "wardround-run"
# What makes everything waiting before it pointless.
FRESH: Final = (RoundStart, HandshakeOpen, BurnRequest, Finished)
# A hospital's link makes itself heard every ten seconds.
OFFLINE_S: Final = 35.0
# A node may come anew so often within so many seconds, and is greeted at once.
COMINGS: Final = 4
COMINGS_S: Final = 10.0
_SIGNATURE_BYTES: Final = 64
_CODES: Final = frozenset(code.label for code in Code)
_FIELDS: Final = {
    "study": bytes,
    "sender": str,
    "recipient": str,
    "nonce": bytes,
    "code": str,
    "signature": bytes,
    "payloads": int,
}


class Machine(Protocol):
    """What the exchange reads of the round machine."""

    @property
    def next_wakeup(self) -> float:
        """When `tick` has something to do, in the clock's seconds."""
        ...


class Driver(Protocol):
    """The coordinator's process behind the exchange: `server.driver.CoordinatorDriver`."""

    @property
    def machine(self) -> Machine:
        """The round machine."""
        ...

    def start(self) -> None:
        """Begin or resume."""
        ...

    def receive(self, site: str, payload: bytes) -> None:
        """Handle one message of a site."""
        ...

    def tick(self) -> None:
        """Act on the time."""
        ...


class Watcher(Protocol):
    """Who hears what passes; nothing it is told holds a payload."""

    def arrived(self, site: str) -> None:
        """A site answered a hello on a node that was not its own before."""
        ...

    def left(self, site: str) -> None:
        """A site's node is gone."""
        ...

    def answered(self, site: str, size: int, seconds: float, code: str) -> None:
        """An answer was taken: its bytes, since the question, and why it holds no payload."""
        ...

    def refused(self, site: str, code: Code) -> None:
        """An answer was refused and changed nothing; `site` is empty where nobody knows."""
        ...

    def lost(self, site: str, code: str) -> None:
        """A question will not be answered: a code of the hospital, or Flower's own number."""
        ...


@dataclass(frozen=True, slots=True)
class Presence:
    """What the transport knows of one site, for people.

    Attributes:
        online: a node that proved to be this site is there, and was heard of just now.
        last_heard: the clock's seconds at its last answer; None: never.
        last_sent: the same of the last question.
        bytes_up, bytes_down: payloads, since the start.
        code: why its last answer held no payload, as a label; empty where it did.
        asked: whether a question is out.
    """

    online: bool = False
    last_heard: float | None = None
    last_sent: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    code: str = ""
    asked: bool = False


@dataclass(frozen=True)
class Pace:
    """How often and how long.

    Attributes:
        poll_s: least pause between two looks for answers.
        look_s: least time between two looks at who is online.
        silence_s: a site with no question out, unheard for this long, is asked who it is.
        question_s: how long a question and its answer are valid.
        linger_s: how long, after the end, hospitals are still told of it.
        most_answer: bytes of the largest answer.
    """

    poll_s: float = 0.05
    look_s: float = 0.5
    silence_s: float = 30.0
    question_s: float = 7 * 24 * 3600.0
    linger_s: float = 60.0
    most_answer: int = 1 << 34


def _unknown(_site: str) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class _Question:
    name: str
    node: int
    site: str  # empty: a hello
    nonce: bytes
    marks: tuple[tuple[int, int], ...]
    at: float


@dataclass(slots=True)
class _Node:
    activated: str
    site: str = ""
    asked: _Question | None = None
    greet: bool = True
    greeted: float = -math.inf


@dataclass(slots=True)
class _Site:
    node: int | None = None
    outbox: deque[bytes] = field(default_factory=deque)
    heard: float | None = None
    sent: float | None = None
    up: int = 0
    down: int = 0
    code: str = ""


class Exchange:
    """The coordinator's Transport port over a Grid, and the loop that drives a run.

    Args:
        grid: Flower's public Grid; any implementation.
        key: the coordinator's identity; signs every question.
        study: the study digest.
        roster: the public key of every site of the study.
        clock: monotonic seconds, the driver's own.
        registered: the site that a node is registered as, where this process knows; else None.
        silence: seconds since a site was last heard of in any way, where this process knows.
        watch: hears what passes.
        pace: how often and how long.
        pause: sleeps, at most so many seconds; may return early where something came.
        entropy: nonces.

    Guarantee: an answer reaches the driver only if the site's roster key signed it for exactly
    the question that is out; every other answer changes nothing. One question per site is out.
    """

    def __init__(  # noqa: PLR0913 - the parties of one exchange, by name
        self,
        grid: Grid,
        key: SiteKey,
        study: bytes,
        roster: Mapping[str, bytes],
        clock: Clock,
        *,
        registered: Callable[[int], str | None],
        silence: Callable[[str], float | None] = _unknown,
        watch: Watcher,
        pace: Pace | None = None,
        pause: Callable[[float], object] = time.sleep,
        entropy: Entropy | None = None,
    ) -> None:
        self._grid = grid
        self._key = key
        self._study = study
        self._roster = dict(roster)
        self._clock = clock
        self._registered = registered
        self._silence = silence
        self._watch = watch
        self._pace = Pace() if pace is None else pace
        self._pause = pause
        self._entropy = SystemEntropy() if entropy is None else entropy
        self._sites = {site: _Site() for site in self._roster}
        self._nodes: dict[int, _Node] = {}
        self._gone: set[str] = set()
        self._shunned: set[int] = set()
        self._comings: dict[int, deque[float]] = {}
        self._looked = -math.inf

    # ------------------------------------------------------------ the Transport port

    def send(self, recipient: str, payload: bytes) -> None:
        """Put a message in a site's outbox.

        What is for a site that is not here goes nowhere: on its return it is asked who it is,
        and the machine then says what it needs.
        """
        place = self._sites.get(recipient)
        if place is None or place.node is None or recipient in self._gone:
            return
        asked = self._nodes[place.node].asked
        mark = _mark(payload)
        waiting = any(_mark(other) == mark for other in place.outbox)
        if waiting or (asked is not None and mark in asked.marks):
            return
        if any(claims(payload, kind) for kind in FRESH):
            place.outbox.clear()
        place.outbox.append(payload)

    def forget(self, site: str) -> None:
        """Have nothing to do with a site any more; from any thread, effective at once."""
        self._gone.add(site)

    def presence(self) -> dict[str, Presence]:
        """What is known of every site; from any thread."""
        return {site: self._present(site, place) for site, place in self._sites.items()}

    def _present(self, site: str, place: _Site) -> Presence:
        node = None if place.node is None else self._nodes.get(place.node)
        silent = self._silence(site) or 0.0
        online = node is not None and site not in self._gone and silent < OFFLINE_S
        asked = node is not None and node.asked is not None
        return Presence(online, place.heard, place.sent, place.up, place.down, place.code, asked)

    # ------------------------------------------------------------ the loop

    def serve(self, driver: Driver, over: Callable[[], bool]) -> None:
        """Run the driver until `over`, and until hospitals that are here were told.

        Raises what the driver raises: AbortedRound, StorageError.
        """
        driver.start()
        ended: float | None = None
        while True:
            moved = self.step(driver)
            now = self._clock.now()
            if not over():
                ended = None
            elif ended is None:
                ended = now
            if ended is not None and (self.quiet or now - ended >= self._pace.linger_s):
                return
            if not moved:
                self._pause(self._nap(driver, now))

    def _nap(self, driver: Driver, now: float) -> float:
        pace = self._pace
        times = (driver.machine.next_wakeup - now, self._looked + pace.look_s - now)
        return max(0.001, min([pace.poll_s, *(left for left in times if left > 0)]))

    @property
    def quiet(self) -> bool:
        """Whether nobody who is here waits for a message or owes an answer."""
        here = [place for place in self._sites.values() if place.node is not None]
        nodes = self._nodes.values()
        return not any(p.outbox for p in here) and not any(n.asked and n.site for n in nodes)

    def step(self, driver: Driver) -> bool:
        """Look around once: nodes, answers, the time, outboxes. Whether anything moved."""
        now = self._clock.now()
        if now - self._looked >= self._pace.look_s:
            self._looked = now
            self._look()
        moved = self._collect(driver)
        if self._clock.now() >= driver.machine.next_wakeup:
            driver.tick()
        return self._ask() or moved

    # ------------------------------------------------------------ who is here

    def _look(self) -> None:
        found = {info.node_id: info.last_activated_at for info in self._grid.get_nodes()}
        found = {node: stamp for node, stamp in found.items() if self._wanted(node)}
        for number in [number for number in self._nodes if number not in found]:
            self._drop(number)
        for number, stamp in found.items():
            known = self._nodes.get(number)
            if known is None:
                self._nodes[number] = self._come(number, stamp)
            elif known.activated != stamp:
                # It was away: what was asked of it may never have reached it.
                self._drop(number)
                self._nodes[number] = self._come(number, stamp)

    def _come(self, number: int, stamp: str) -> _Node:
        """A node that came, perhaps anew; one that comes on and on is greeted after a pause.

        Every greeting may be answered with rubbish, which is refused and written down.
        """
        now = self._clock.now()
        times = self._comings.setdefault(number, deque(maxlen=COMINGS))
        storm = len(times) == COMINGS and now - times[0] < COMINGS_S
        times.append(now)
        return _Node(stamp, greeted=now) if storm else _Node(stamp)

    def _wanted(self, number: int) -> bool:
        """Whether the node may be a site of this study."""
        site = self._registered(number)
        known = self._nodes.get(number)
        if known is not None and known.site in self._gone:
            self._shunned.add(number)
        if number in self._shunned:
            return False
        return site is None or (site in self._roster and site not in self._gone)

    def _drop(self, number: int) -> None:
        node = self._nodes.pop(number)
        if node.site:
            place = self._sites[node.site]
            if place.node == number:
                place.node = None
                place.outbox.clear()
                self._watch.left(node.site)

    # ------------------------------------------------------------ answers

    def _collect(self, driver: Driver) -> bool:
        """Take every answer that is here, one at a time."""
        moved = False
        while True:
            out = {n.asked.name: n.asked for n in self._nodes.values() if n.asked is not None}
            if not out:
                return moved
            came = 0
            for reply in self._grid.pull_messages(list(out)):
                question = out.get(reply.metadata.reply_to_message_id)
                if question is not None:
                    came += 1
                    self._take(driver, question, reply)
                del reply
            if not came:
                return moved
            moved = True

    def _take(self, driver: Driver, question: _Question, reply: Any) -> None:
        node = self._nodes.get(question.node)
        if node is None or node.asked is not question:
            return
        node.asked = None
        node.greeted = self._clock.now()
        if reply.has_error():
            reason = str(reply.error.reason)
            code = reason if reason in _CODES else f"flower-{int(reply.error.code)}"
            self._noted(node, question, code)
            return
        try:
            envelope, payloads = opened(reply.content, self._pace.most_answer)
            site = self._checked(question, envelope, payloads)
        except ProtocolError as error:
            self._watch.refused(question.site or self._registered(question.node) or "", error.code)
            return
        del reply
        self._arrive(question.node, node, site)
        self._deliver(driver, question, envelope.code, site, payloads)

    def _noted(self, node: _Node, question: _Question, code: str) -> None:
        """A question that brought no signed answer: the site is asked anew, who it is."""
        self._watch.lost(question.site or self._registered(question.node) or "", code)
        if node.site and code in _CODES:
            self._sites[node.site].code = code
        node.greet = bool(node.site)

    def _checked(self, question: _Question, envelope: Envelope, payloads: Sequence[bytes]) -> str:
        """The site that signed the answer. Raises ProtocolError."""
        site = question.site or envelope.sender
        registered = self._registered(question.node)
        if site not in self._roster or site in self._gone or registered not in {None, site}:
            raise ProtocolError(Code.SIGNER_UNKNOWN, "An answer is signed by nobody of this study.")
        check_envelope(
            envelope,
            payloads,
            public=self._roster[site],
            study=self._study,
            sender=site,
            recipient=COORDINATOR,
            nonce=question.nonce,
        )
        if envelope.code and envelope.code not in _CODES:
            raise ProtocolError(Code.MALFORMED, f"{site} told a code that is none.")
        return site

    def _arrive(self, number: int, node: _Node, site: str) -> None:
        """Bind node and site; a site has one node, the one that answered last."""
        place = self._sites[site]
        if place.node is not None and place.node != number:
            self._nodes[place.node].site = ""
            place.outbox.clear()
        node.site, node.greet = site, False
        if place.node != number:
            place.node = number
            self._watch.arrived(site)

    def _deliver(
        self,
        driver: Driver,
        question: _Question,
        code: str,
        site: str,
        payloads: Sequence[bytes],
    ) -> None:
        place, now = self._sites[site], self._clock.now()
        size = sum(len(payload) for payload in payloads)
        place.heard, place.code = now, code
        place.up += size
        self._watch.answered(site, size, now - question.at, code)
        for payload in payloads:
            driver.receive(site, payload)

    # ------------------------------------------------------------ questions

    def _ask(self) -> bool:
        """Ask every node that owes no answer and has something to be asked."""
        now = self._clock.now()
        shared = _Shared()
        moved = False
        for number, node in list(self._nodes.items()):
            if node.asked is not None or node.site in self._gone:
                continue
            place = self._sites.get(node.site)
            if node.greet:
                if now - node.greeted >= self._greeting_pause(node):
                    moved |= self._push(number, node, (), shared)
            elif place is not None and place.outbox and place.node == number:
                payloads = tuple(place.outbox)[:MAX_PAYLOADS]
                if self._push(number, node, payloads, shared):
                    for _ in payloads:
                        place.outbox.popleft()
                    moved = True
            elif now - max(node.greeted, self._last(place)) >= self._pace.silence_s:
                moved |= self._push(number, node, (), shared)
        return moved

    def _greeting_pause(self, node: _Node) -> float:
        """The first hello goes at once; one after a failure waits, so that no storm arises."""
        return 0.0 if node.greeted == -math.inf else min(2.0, self._pace.silence_s)

    def _last(self, place: _Site | None) -> float:
        times = () if place is None else (place.heard, place.sent)
        return max((at for at in times if at is not None), default=-math.inf)

    def _push(
        self,
        number: int,
        node: _Node,
        payloads: tuple[bytes, ...],
        shared: _Shared,
    ) -> bool:
        site = node.site if payloads else ""
        nonce = self._entropy.take(NONCE_BYTES)
        envelope = sign_envelope(
            self._key,
            study=self._study,
            sender=COORDINATOR,
            recipient=site,
            nonce=nonce,
            payloads=payloads,
            digest=shared.digest,
        )
        message = Message(
            _sealed(envelope, payloads, shared), number, _kind(payloads), ttl=self._pace.question_s
        )
        now = self._clock.now()
        node.greeted = now
        name = next(iter(self._grid.push_messages([message])), "")
        if not name:
            node.greet = True
            return False
        node.greet = False
        marks = tuple(_mark(payload) for payload in payloads)
        node.asked = _Question(name, number, site, nonce, marks, now)
        if site:
            place = self._sites[site]
            place.sent = now
            place.down += sum(len(payload) for payload in payloads)
        return True


def _mark(payload: bytes) -> tuple[int, int]:
    """Tells one message of ours from another without keeping it."""
    return len(payload), hash(payload)


def _kind(payloads: Sequence[bytes]) -> str:
    if not payloads:
        return HELLO
    return TRAIN if any(claims(payload, RoundStart) for payload in payloads) else STEP


# ---------------------------------------------------------------------------- records
class _Shared:
    """What several questions of one moment have in common: a model goes to every hospital.

    A payload that goes to several is digested once and becomes one record.
    """

    def __init__(self) -> None:
        self.digest = cache(payload_digest)
        self.record = cache(_record)


def _record(payload: bytes) -> ArrayRecord:
    data = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return ArrayRecord({"data": data})


def _sealed(envelope: Envelope, payloads: Sequence[bytes], shared: _Shared) -> RecordDict:
    """The records of a question."""
    told = ConfigRecord(
        {
            "study": envelope.study,
            "sender": envelope.sender,
            "recipient": envelope.recipient,
            "nonce": envelope.nonce,
            "code": envelope.code,
            "signature": envelope.signature,
            "payloads": len(payloads),
        }
    )
    records: dict[str, Any] = {"envelope": told}
    for index, payload in enumerate(payloads):
        records[f"payload-{index}"] = shared.record(payload)
    return RecordDict(records)


def opened(content: Mapping[str, Any], most_bytes: int) -> tuple[Envelope, tuple[bytes, ...]]:
    """The envelope and the payloads of an answer's records; no signature is checked.

    Raises ProtocolError MALFORMED or OVERSIZED.
    """
    record = content.get("envelope")
    if not isinstance(record, ConfigRecord):
        raise _malformed("it has no envelope")
    fields = dict(record)
    if {name: type(value) for name, value in fields.items()} != _FIELDS:
        raise _malformed("its envelope has other fields")
    count = fields.pop("payloads")
    if not 0 <= count <= MAX_PAYLOADS:
        raise ProtocolError(Code.OVERSIZED, "An answer carries more payloads than its bound.")
    names = [f"payload-{index}" for index in range(count)]
    if set(content) != {"envelope", *names}:
        raise _malformed("it has other payloads than its envelope says")
    envelope = Envelope(**fields)
    lengths = (len(envelope.study), len(envelope.nonce), len(envelope.signature))
    if lengths != (DIGEST_BYTES, NONCE_BYTES, _SIGNATURE_BYTES) or not is_site_id(envelope.sender):
        raise _malformed("a field of its envelope has another length")
    payloads = tuple(_payload(content[name]) for name in names)
    if sum(len(payload) for payload in payloads) > most_bytes:
        raise ProtocolError(Code.OVERSIZED, "An answer is larger than its bound.")
    return envelope, payloads


def _payload(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {"data"}:
        raise _malformed("a payload is not one array")
    array = record["data"]
    told = (array.dtype, tuple(array.shape), array.stype)
    if told != ("uint8", (len(array.data),), STYPE):
        raise _malformed("a payload is not plain bytes")
    return bytes(array.data)  # bytes already: no copy


def _malformed(why: str) -> ProtocolError:
    return ProtocolError(Code.MALFORMED, f"An answer is not one of this protocol: {why}.")


# ---------------------------------------------------------------------------- the app
Run = Callable[[Grid], None]
_BOUND: Final[list[Run]] = []


def bind(run: Run) -> None:
    """Make `app` serve this run; a later call replaces it."""
    _BOUND[:] = [run]


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def _main(grid: Grid, context: Context) -> None:
    """Serve the bound run; under stock Flower, the one in the folder that the setting names."""
    if _BOUND:
        _BOUND[0](grid)
        return
    folder = context.run_config.get(RUN_SETTING)
    if not folder:
        raise RuntimeError(f"no run is bound to this app, and {RUN_SETTING} names none")
    serve_folder: Callable[[str, Grid], None] = importlib.import_module(
        "server.deploy"
    ).serve_folder
    serve_folder(str(folder), grid)
