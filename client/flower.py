"""The hospital's line to its coordinator, over Flower's Fleet protocol: dials out, never listens.

The only module of this side that knows Flower's wire. It speaks the protobufs of Flower's Fleet
API over HTTPS itself, because Flower's own client ends the process on a refused heartbeat, reads
bodies without a bound and trusts the system's certificate store. It asks for messages and their
parts alone; it never asks for a run's code.

    activate ─► poll ─► fetch parts (cached by digest) ─► ask the app ─► push parts ─► poll …
    beside it, in a thread of its own: heartbeats

What goes wrong on the way is waited out, for days if need be; `state()` says what it is.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import (
    SendNodeHeartbeatRequest,
    SendNodeHeartbeatResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflatable_class_registry,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from client.app import ERROR_NUMBER, STYPE
from client.dial import Dial, Meter, Over, Rejected, Reply, Seat, Shut, Trouble
from client.link import (
    BIG_BYTES,
    LinkLimits,
    LinkState,
    LinkWorld,
    ObjectCache,
    Stopped,
    backoff,
)
from common.errors import Code, StorageError, WardroundError
from common.world import make_folder, write_durably

__all__ = ["FleetLink", "LinkLimits", "LinkState", "LinkWorld"]

# What Flower is told: a node counts as there for twice this. Longer than a cut that should not
# cost a question; the coordinator sees by itself when a hospital was last heard.
HEARTBEAT_TOLD_S: Final = 300.0
# At first less: an activation whose answer is lost leaves a row that nobody can free.
ACTIVATION_TOLD_S: Final = 10.0
TIMEOUT_S: Final = 30.0
HEARTBEAT_TIMEOUT_S: Final = 10.0
FAREWELL_S: Final = 2.0
GRACE_S: Final = 1.0
SMALL_PART: Final = 1 << 18
MOST_PART: Final = 16 << 20
MOST_PARTS: Final = 1 << 14
MOST_STRUCTURE: Final = 512
MOST_STRUCTURE_PART: Final = 1 << 20
MOST_REPLY: Final = 8 << 20
WORKERS: Final = 3
THIN_BITS: Final = 16_000_000
POLL_FIRST_S: Final = 0.05
POLL_LAST_S: Final = 2.0
POLL_GROWTH: Final = 1.3
# A coordinator that holds a poll until there is a question need not be spared.
HELD_S: Final = 0.5
# The parts of a message: Message, RecordDict, a record, an Array; below it only raw chunks.
CHUNK_DEPTH: Final = 4
# About a question in hand; a 403 to one of these means that its run is over.
_ABOUT: Final = frozenset(
    {"pull-object", "push-object", "push-messages", "confirm-message-received"}
)
_REJECTED: Final = frozenset({400, 405, 409, 411, 413, 414, 415, 422})
REJECTIONS: Final = 6

Response = TypeVar("Response")


class _Unfit(Exception):  # noqa: N818
    """The question cannot be read."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


# ---------------------------------------------------------------------------- the calls
class _Fleet:
    """One call each of Flower's Fleet API, bounded, counted, paced and signed.

    Every call raises Trouble (again later), Shut (401, 412) or Over (403).
    """

    def __init__(self, seat: Seat, dial: Dial, world: LinkWorld, meter: Meter) -> None:
        self._seat = seat
        self._dial = dial
        self._world = world
        self._meter = meter
        self._public = public_key_to_bytes(seat.key.public_key())
        self._fixed = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            "accept": PROTOBUF_MEDIA_TYPE,
            "accept-encoding": "identity",
            "user-agent": "wardround",
            **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        }
        self.node_id = 0
        self._signing = threading.Lock()
        self._signed_at = 0.0

    # ------------------------------------------------------------------ calls
    def activate(self) -> int:
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=ACTIVATION_TOLD_S)
        return int(self._call("activate-node", request, ActivateNodeResponse).node_id)

    def deactivate(self, node_id: int) -> None:
        request = DeactivateNodeRequest(node_id=node_id)
        self._call("deactivate-node", request, DeactivateNodeResponse, timeout=FAREWELL_S)

    def heartbeat(self) -> bool:
        request = SendNodeHeartbeatRequest(node=self._node(), heartbeat_interval=HEARTBEAT_TOLD_S)
        response = self._call(
            "send-node-heartbeat", request, SendNodeHeartbeatResponse, timeout=HEARTBEAT_TIMEOUT_S
        )
        return bool(response.success)

    def pull(self) -> PullMessagesResponse:
        request = PullMessagesRequest(node=self._node())
        return self._call("pull-messages", request, PullMessagesResponse)

    def pull_part(self, run: int, name: str, most: int) -> PullObjectResponse:
        request = PullObjectRequest(node=self._node(), run_id=run, object_id=name)
        return self._call("pull-object", request, PullObjectResponse, most=most, bulk=True)

    def confirm(self, run: int, name: str) -> None:
        request = ConfirmMessageReceivedRequest(
            node=self._node(), run_id=run, message_object_id=name
        )
        self._call("confirm-message-received", request, ConfirmMessageReceivedResponse)

    def push(self, message: Message, tree: Any) -> PushMessagesResponse:
        request = PushMessagesRequest(
            node=self._node(),
            messages_list=[message_to_proto(message)],
            message_object_trees=[tree],
        )
        return self._call("push-messages", request, PushMessagesResponse)

    def push_part(self, run: int, session: str, name: str, content: bytes) -> bool:
        request = PushObjectRequest(
            node=self._node(),
            run_id=run,
            session_id=session,
            object_id=name,
            object_content=content,
        )
        return bool(self._call("push-object", request, PushObjectResponse, bulk=True).stored)

    def _node(self) -> Any:
        return Node(node_id=self.node_id)

    # ------------------------------------------------------------------ one exchange
    def _call(
        self,
        path: str,
        request: Any,
        kind: Callable[[], Response],
        *,
        most: int = MOST_REPLY,
        bulk: bool = False,
        timeout: float | None = None,
    ) -> Response:
        reply = self._dial.exchange(
            f"/v1/fleet/{path}",
            request.SerializeToString(),
            {**self._fixed, **self._signed()},
            most=most,
            bulk=bulk,
            timeout=timeout,
        )
        _judge(reply, about=path in _ABOUT)
        response = kind()
        try:
            response.ParseFromString(reply.content)  # type: ignore[attr-defined]
        except DecodeError:
            raise Trouble(Code.SERVER_FAULT, "an answer is not Flower's protocol") from None
        return response

    def _signed(self) -> dict[str, str]:
        """Flower's node authentication: a signature over the time, under the transport key.

        The coordinator takes a moment once, so two calls in the same one sign two.
        """
        with self._signing:
            now, last = self._world.wall.now(), self._signed_at
            self._signed_at = now = max(now, last + 2e-6) if now > last - 1 else now
        moment = dt.datetime.fromtimestamp(now, dt.UTC).isoformat()
        signature = sign_message(self._seat.key, moment.encode("ascii"))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self._public).decode("ascii"),
            TIMESTAMP_HEADER: moment,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode("ascii"),
        }


def _judge(reply: Reply, *, about: bool) -> None:
    """Return if the call was served; `about`: it was about a question in hand."""
    status = reply.status
    if status == httpx.codes.OK:
        return
    if status == httpx.codes.FORBIDDEN and about:
        raise Over
    if status == httpx.codes.UNAUTHORIZED:
        raise _refusal(reply.clock_offset_s)
    if status == httpx.codes.PRECONDITION_FAILED:
        raise Shut(Code.NOT_ADMITTED, "the coordinator does not activate this hospital")
    kind = Rejected if status in _REJECTED else Trouble
    raise kind(Code.SERVER_FAULT, f"the coordinator's side answers HTTP {status}")


def _refusal(offset: float | None) -> Trouble:
    """Why a signature over the time was not accepted: the clock, or the key."""
    if offset is None or -TIMESTAMP_TOLERANCE < offset < SYSTEM_TIME_TOLERANCE - 1:
        return Shut(Code.NOT_ADMITTED, "the coordinator does not know this transport key")
    side = "ahead of" if offset > 0 else "behind"
    return Trouble(
        Code.CLOCK_OFF, f"this machine's clock is {_span(abs(offset))} {side} the coordinator's"
    )


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:  # noqa: PLR2004 - below two minutes seconds are clearer
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004


# ---------------------------------------------------------------------------- one question
@dataclass(frozen=True)
class _Question:
    """A message that was announced: who it is, its parts with their children, and its chunks."""

    proto: Any
    run: int
    name: str
    structure: Mapping[str, frozenset[str]]
    chunks: tuple[str, ...]


def _announced(response: Any, node_id: int) -> _Question:
    """The question in a poll's answer, its tree within bounds. Raises _Unfit."""
    proto, trees = response.messages_list[0], response.message_object_trees
    metadata = proto.metadata
    if len(trees) != 1 or len(response.messages_list) != 1:
        raise _Unfit("it does not come with one tree")
    tree = trees[0]
    if tree.object_id != metadata.message_id or metadata.dst_node_id != node_id:
        raise _Unfit("it is for another node, or its tree for another message")
    structure: dict[str, frozenset[str]] = {}
    chunks: dict[str, None] = {}
    level, seen = [tree], 1
    for _ in range(CHUNK_DEPTH):
        for node in level:
            children = frozenset(_part_name(child.object_id) for child in node.children)
            if structure.setdefault(_part_name(node.object_id), children) != children:
                raise _Unfit("its tree contradicts itself")
        level = [child for node in level for child in node.children]
        seen += len(level)
        if len(structure) > MOST_STRUCTURE or seen > MOST_PARTS:
            raise _Unfit("it has more parts than its bound")
    for node in level:
        if node.children:
            raise _Unfit("its tree is deeper than a message")
        chunks[_part_name(node.object_id)] = None
    return _Question(proto, metadata.run_id, tree.object_id, structure, tuple(chunks))


def _part_name(text: str) -> str:
    # It becomes a file's name: exactly 64 lower-case hex digits and nothing else.
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):  # noqa: PLR2004 - SHA-256
        raise _Unfit("a part's name is not a digest")
    return text


# What Flower's readers raise on parts that do not fit together.
_MISMADE: Final = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    DecodeError,
)


class _Builder:
    """Rebuilds a message from its parts with one copy of every array."""

    def __init__(self, question: _Question, parts: Mapping[str, bytes]) -> None:
        self._question = question
        self._parts = parts

    def size(self) -> int:
        """The bytes that the arrays say they have. Raises _Unfit."""
        total = 0
        for name in self._question.structure:
            kind, _, body = self._open(name)
            if kind == "Array":
                total += self._shape(body)[0]
        return total

    def message(self, chunk: Callable[[str], bytes]) -> Message:
        """The message; `chunk` fetches a part of an array. Raises _Unfit."""
        try:
            message = self._build(self._question.name, chunk)
        except _MISMADE:
            raise _Unfit("its parts do not make a message") from None
        if not isinstance(message, Message):
            raise _Unfit("it is not a message")
        told, own = self._question.proto.metadata, message.metadata
        own.__dict__["_message_id"] = self._question.name
        announced = (told.run_id, told.dst_node_id, told.message_type)
        if announced != (own.run_id, own.dst_node_id, own.message_type):
            raise _Unfit("its announcement says something else than itself")
        return message

    def _build(self, name: str, chunk: Callable[[str], bytes]) -> Any:
        kind, children, body = self._open(name)
        if kind == "Array":
            return self._array(children, body, chunk)
        inside = {child: self._build(child, chunk) for child in children}
        return inflatable_class_registry[kind].inflate(self._parts[name], children=inside)

    def _open(self, name: str) -> tuple[str, list[str], bytes]:
        try:
            content = self._parts[name]
            kind, children, length = get_object_head_values_from_object_content(content)
        except (KeyError, ValueError):
            raise _Unfit("a part has no head") from None
        if kind not in inflatable_class_registry or not 0 <= length <= len(content):
            raise _Unfit("a part is of an unknown kind")
        if frozenset(children) != self._question.structure[name]:
            raise _Unfit("a part has other children than its tree says")
        return kind, children, content[len(content) - length :]

    @staticmethod
    def _shape(body: bytes) -> tuple[int, list[int]]:
        try:
            told = json.loads(body)
            (size,), order = told["shape"], told["arraychunk_ids"]
            form = (told["dtype"], told["stype"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Unfit("an array does not describe itself") from None
        numbers = [size, *order] if isinstance(order, list) else [None]
        if form != ("uint8", STYPE) or not all(type(number) is int for number in numbers):
            raise _Unfit("an array is not plain bytes")
        if size < 0 or len(order) > MOST_PARTS or not all(number >= 0 for number in order):
            raise _Unfit("an array is not plain bytes")
        return size, order

    def _array(self, children: list[str], body: bytes, chunk: Callable[[str], bytes]) -> Array:
        size, order = self._shape(body)
        whole = BytesIO()  # hands its buffer out without a copy
        for index in order:
            content = chunk(children[index])
            kind, none, length = get_object_head_values_from_object_content(content)
            if kind != "ArrayChunk" or none or whole.tell() + length > size:
                raise _Unfit("a chunk is not one")
            whole.write(memoryview(content)[len(content) - length :])
        if whole.tell() != size:
            raise _Unfit("an array has another length than it says")
        return Array(dtype="uint8", shape=(size,), stype=STYPE, data=whole.getvalue())


# ---------------------------------------------------------------------------- the line
class FleetLink:
    """A hospital's line: fetches questions, asks the app, brings answers, for as long as it runs.

    Args:
        server: the coordinator, host:port.
        ca: PEM file of the pinned authority; nothing else is trusted.
        transport_key: OpenSSH file of the EC P-384 key that Flower knows this hospital by.
        app: the ClientApp; called from one thread, one question at a time.
        node_config: handed to the app in its context.
        state: folder for parts of questions that are being fetched.
        limits: bandwidth and hours.
        beat: called at most once a second after an exchange that worked.
        may_leave: whether what the app answered about the study with this digest may still leave;
            asked before every single part, however late it is sent; from several threads.
        world: clocks, proxy and log.

    Guarantee: opens no listener; runs nothing that the coordinator sends; gives up on nothing
        but the question that the coordinator withdrew, and the answer that may not leave any more.
    Raises: ConfigError or StorageError on construction, for a file that cannot be used.
    """

    def __init__(  # noqa: PLR0913 - each names another owner's decision
        self,
        server: str,
        ca: Path,
        transport_key: Path,
        app: ClientApp,
        node_config: Mapping[str, Any],
        *,
        state: Path,
        limits: LinkLimits | None = None,
        beat: Callable[[], None] = lambda: None,
        may_leave: Callable[[bytes], bool] = lambda _study: True,
        world: LinkWorld | None = None,
    ) -> None:
        self._world = LinkWorld() if world is None else world
        self._may_leave = may_leave
        self._limits = LinkLimits() if limits is None else limits
        self._app = app
        self._config = dict(node_config)
        self._beat = beat
        self._beaten = -1.0
        self._meter = Meter(self._world)
        seat = Seat.of(server, ca, transport_key)
        self._dial = Dial(seat, self._world, self._limits, self._meter)
        self._fleet = _Fleet(seat, self._dial, self._world, self._meter)
        folder = state / "link"
        make_folder(folder, mode=0o700)
        self._cache = ObjectCache(folder / "parts")
        self._node_file = folder / "node"
        self._renew = threading.Event()
        self._rough = False

    def state(self) -> LinkState:
        """The line as it stands; from any thread."""
        return self._meter.state()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then return within a few seconds.

        An answer still in work then is left to the journal: it is answered after the next start.
        Raises what the line's own thread raised: our own fault, never the network's.
        """
        raised: list[BaseException] = []
        inner = self._dial.stop

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller of run
                raised.append(error)
            finally:
                inner.set()

        works = (self._work, self._heartbeats)
        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        while not stop.wait(0.2) and not inner.is_set():
            pass
        inner.set()
        for thread in threads:
            thread.join(GRACE_S)
        self._farewell()
        if raised:
            raise raised[0]

    def _farewell(self) -> None:
        if self._fleet.node_id and self.state().connected:
            with contextlib.suppress(Trouble, Stopped):
                self._fleet.deactivate(self._fleet.node_id)
        self._dial.close()

    # ------------------------------------------------------------------ loops
    def _work(self) -> None:
        tries, pause = 0, POLL_FIRST_S
        while True:
            start = self._world.clock.now()
            try:
                if self._renew.is_set() or not self._fleet.node_id:
                    self._activate()
                answered = self._turn()
                held = self._world.clock.now() - start > HELD_S
                # After an answer there is often a question at once; after that, less and less.
                slower = min(POLL_LAST_S, max(POLL_FIRST_S, pause * POLL_GROWTH))
                pause = 0.0 if answered or held else slower
                tries = 0
            except Over:  # withdrawn while we worked on it
                pause = backoff(tries)
                tries += 1
            except Trouble as trouble:
                if isinstance(trouble, Shut):
                    self._renew.set()
                pause = self._troubled(trouble.code, trouble.why, tries)
                tries += 1
            except StorageError as error:
                pause = self._troubled(error.code, error.message, tries)
                tries += 1
            self._dial.pause(pause)

    def _heartbeats(self) -> None:
        tries = 0
        while True:
            self._dial.pause(max(self._world.heartbeat_s, backoff(tries) if tries else 0.0))
            if not self._fleet.node_id or self._renew.is_set():
                continue
            try:
                if not self._fleet.heartbeat():
                    self._renew.set()  # the coordinator has forgotten this node
                self._heard()
                tries = 0
            except Trouble as trouble:
                tries += 1
                self._meter.trouble(trouble.code, trouble.why)

    def _troubled(self, code: Code, why: str, tries: int) -> float:
        self._rough = True
        self._meter.trouble(code, why)
        return backoff(tries)

    def _heard(self) -> None:
        self._meter.heard()
        now = self._world.clock.now()
        if not 0 <= now - self._beaten < 1 or self._beaten < 0:
            self._beaten = now
            with contextlib.suppress(WardroundError, OSError):  # a full disk cuts no line
                self._beat()

    def _activate(self) -> None:
        """Become known as online; first free the row that a crash left behind."""
        known = self._fleet.node_id or self._remembered()
        if known:
            with contextlib.suppress(Trouble):
                self._fleet.deactivate(known)
        self._fleet.node_id = self._fleet.activate()
        self._renew.clear()
        write_durably(self._node_file, [str(self._fleet.node_id).encode()], durable=False)
        self._heard()
        self._meter.note("link.active")
        with contextlib.suppress(Trouble):  # else the next heartbeat does it
            self._fleet.heartbeat()

    def _remembered(self) -> int:
        try:
            text = self._node_file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return 0
        return int(text) if text.isdecimal() and len(text) <= 20 else 0  # noqa: PLR2004 - 64 bits

    # ------------------------------------------------------------------ one question
    def _turn(self) -> bool:
        """Fetch and answer one question; False where there is none."""
        response = self._fleet.pull()
        self._heard()
        if not response.messages_list:
            return False
        try:
            question = _announced(response, self._fleet.node_id)
            message = self._fetch(question)
        except _Unfit:
            self._meter.note("link.question_refused", Code.BAD_QUESTION)
            self._decline(response.messages_list[0])
            return True
        del response
        reply = self._ask(message)
        del message
        if len(self._cache) and question.chunks:
            self._cache.clear()
        self._bring(reply)
        return True

    def _insist(self, call: Callable[[], Response]) -> Response:
        """`call` until it works. Raises Over, Shut or Stopped."""
        tries = 0
        while True:
            try:
                result = call()
            except Shut:
                raise
            except Rejected as trouble:
                if tries >= REJECTIONS:
                    # The coordinator goes on waiting for it, unless this node comes anew.
                    self._renew.set()
                    raise Over from None
                self._dial.pause(self._troubled(trouble.code, trouble.why, tries))
            except Trouble as trouble:
                self._dial.pause(self._troubled(trouble.code, trouble.why, tries))
            except StorageError as error:
                self._dial.pause(self._troubled(error.code, error.message, tries))
            else:
                self._heard()
                return result
            tries += 1

    def _await_window(self, size: int) -> None:
        """Return when a transfer of this size may run."""
        while size > BIG_BYTES and not self._limits.open_at(self._world.hour()):
            self._meter.window(closed=True)
            self._dial.pause(30.0)
        self._meter.window(closed=False)

    def _fetch(self, question: _Question) -> Message:
        small: dict[str, bytes] = {}
        for name in question.structure:
            small[name] = self._part(question.run, name, most=MOST_STRUCTURE_PART)
        builder = _Builder(question, small)
        size = builder.size()
        if size > self._limits.most_bytes:
            raise _Unfit("it is larger than its bound")
        self._cache.make_room(question.chunks)
        memory: dict[str, bytes] = {}

        def fetch(name: str) -> None:
            if self._cache.get(name) is None:
                self._await_window(size)
                content = self._part(question.run, name)
                if size <= BIG_BYTES and len(content) <= SMALL_PART:
                    memory[name] = content
                else:
                    self._insist(lambda: self._cache.put(name, content))

        self._together(question.chunks, fetch)

        def chunk(name: str) -> bytes:
            # A part that the disk lost meanwhile is fetched once more.
            return memory.get(name) or self._cache.get(name) or self._part(question.run, name)

        message = builder.message(chunk)
        self._insist(lambda: self._fleet.confirm(question.run, question.name))
        return message

    def _part(self, run: int, name: str, *, most: int = MOST_PART) -> bytes:
        """One part, with the digest it is named by. Raises Over, _Unfit."""
        waited = 0.0
        while True:
            response = self._insist(lambda: self._fleet.pull_part(run, name, most))
            if not response.object_found:
                raise Over
            if response.object_available:
                content: bytes = response.object_content
                if hashlib.sha256(content).hexdigest() != name:
                    raise _Unfit("a part does not have its digest")
                return content
            if waited > self._world.patience_s:
                raise Over
            pause = min(2.0, 0.05 + waited / 4)
            waited += pause
            self._dial.pause(pause)

    def _ask(self, message: Message) -> Message:
        context = Context(
            run_id=message.metadata.run_id,
            node_id=self._fleet.node_id,
            node_config=dict(self._config),
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._app(message, context)
        except Exception as error:  # noqa: BLE001 - Flower would send its text to the coordinator
            code = error.code if isinstance(error, WardroundError) else Code.INTERNAL_FAULT
            self._meter.note("link.app_failed", code)
            return Message(Error(ERROR_NUMBER, code.label), reply_to=message)

    def _decline(self, proto: Any) -> None:
        """Tell the coordinator that its question could not be read.

        Raises Over where not even its announcement can be: there is nothing to answer to.
        """
        try:
            told = message_from_proto(proto)
            reply = Message(Error(ERROR_NUMBER, Code.BAD_QUESTION.label), reply_to=told)
        except _MISMADE:
            raise Over from None
        if proto.metadata.dst_node_id == self._fleet.node_id:
            self._bring(reply)

    def _bring(self, reply: Message) -> None:
        """Push an answer; what the coordinator already has is not sent again."""
        run = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            parts = get_all_nested_objects(reply)
            tree = get_object_tree(reply)
        size = sum(len(part.data) for part in parts.values() if isinstance(part, Array))
        study = _study_of(reply) if size else None
        bare = remove_content_from_message(reply)

        def announce() -> PushMessagesResponse:
            self._check_leave(study)
            return self._fleet.push(bare, tree)

        while True:
            self._await_window(size)
            told = self._insist(announce)
            missing = [name for name in told.objects_to_push if name in parts]
            if self._push_parts(run, told.session_id, missing, parts, size, study):
                return
            self._dial.pause(0.5)  # the session ended; the next one names what is missing

    def _check_leave(self, study: bytes | None) -> None:
        """Return if the answer may leave at this moment. A code alone, `None`, always may.

        Raises Shut: the node comes anew, and the coordinator is told the code instead.
        """
        if study is not None and not self._may_leave(study):
            raise Shut(Code.APPROVAL_STOPPED, "what was to be sent may not leave any more")

    def _push_parts(
        self,
        run: int,
        session: str,
        missing: list[str],
        parts: Mapping[str, Any],
        size: int,
        study: bytes | None,
    ) -> bool:
        refused = threading.Event()

        def push(name: str) -> None:
            if refused.is_set():
                return
            self._await_window(size)
            content = parts[name].deflate()

            def send() -> bool:
                self._check_leave(study)
                return self._fleet.push_part(run, session, name, content)

            if not self._insist(send):
                refused.set()

        self._together(missing, push)
        return not refused.is_set()

    def _together(self, names: Iterable[str], work: Callable[[str], None]) -> None:
        """`work` on every name, in order; the first thing raised is raised.

        A few at a time, but one at a time over a line that is thin or has just broken: there,
        several at once only make each so slow that it may not finish.
        """
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            todo.put(name)
        raised: list[BaseException] = []

        def worker(*, first: bool) -> None:
            while not raised and (first or not self._rough):
                try:
                    work(todo.get_nowait())
                except queue.Empty:
                    return
                except BaseException as error:  # noqa: BLE001 - raised again below
                    raised.append(error)

        cap = self._limits.bits_per_second
        self._rough = cap is not None and cap < THIN_BITS
        count = 0 if self._rough else min(WORKERS, todo.qsize()) - 1
        helper = partial(worker, first=False)
        threads = [threading.Thread(target=helper, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        worker(first=True)
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]


def _study_of(reply: Message) -> bytes:
    """The study that an answer is about; empty where it does not say, which is approved nowhere."""
    envelope = reply.content.get("envelope") if reply.has_content() else None
    study = envelope.get("study") if isinstance(envelope, ConfigRecord) else None
    return study if isinstance(study, bytes) else b""
