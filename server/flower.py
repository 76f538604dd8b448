"""The coordinator's Flower: its server embedded in this process, and a grid straight on its state.

The only module on this side that knows Flower's internals; tests/server/test_flower_contract.py
names every one of them and says what broke where Flower changes. Flower carries messages and
authenticates hospitals' transport keys. It starts no process, ships no code and is trusted with
no secret: payloads are signed and masked before they come here.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import base64
import contextlib
import fcntl
import io
import json
import logging
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import HTTPException
from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    Status,
    SubStatus,
)
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import telemetry
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    HEAD_BODY_DIVIDER,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    UnexpectedObjectContentError,
    get_object_children_ids_from_object_content,
    get_object_head_values_from_object_content,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflatable_class_registry,
    validate_object_content,
)
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore, ObjectStoreFactory
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run, RunStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import main as superlink
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from common.errors import Code, ConfigError, ProtocolError, StorageError, WardroundError
from common.world import give_back_memory, make_folder, write_durably
from server.blobs import BlobStore
from server.doors import (
    AdminDoor,
    Bell,
    Listener,
    PublicDoor,
    Route,
    TlsFiles,
    Traffic,
    Wire,
    bound,
    load_certificate,
    require_loopback,
    tls_context,
)

__all__ = ["FlowerCoordinator", "LocalGrid", "Route", "TlsFiles", "Traffic", "Wire"]

STYPE: Final = "wardround.bytes"
# An answer with an update.
_LARGE_BYTES: Final = 1 << 20
_OPEN: Final = (Status.PENDING, Status.STARTING, Status.RUNNING)
_IN_USE: Final = (NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE)
# What Flower's parsers raise at bytes that Flower did not write.
_HOSTILE: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(RecursionError, OverflowError, DecodeError),
)
_LOGGERS: Final = ("flwr", "uvicorn", "uvicorn.error", "uvicorn.access", "alembic")


# Where somebody imported Flower before, it has read another environment.
telemetry.FLWR_TELEMETRY_ENABLED = "0"


# ---------------------------------------------------------------------------- state
class _Objects(ObjectStore):  # type: ignore[misc]  # Flower is not typed here
    """Flower's object store over files."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs
        self._roots: dict[int, set[str]] = {}

    def preregister(self, run_id: int, object_tree: Any, *, own: bool = False) -> list[str]:
        """Announce a tree, our own or a hospital's; the parts that are missing."""
        nodes = [
            (node.object_id, tuple(child.object_id for child in node.children))
            for node in iterate_object_tree(object_tree)
        ]
        missing = self.blobs.expect(nodes, own=own)
        self._roots.setdefault(run_id, set()).add(object_tree.object_id)
        return missing

    def get_object_tree(self, object_id: str) -> Any:
        """The tree under a part. Raises NoObjectInStoreError."""
        children = self.blobs.children(object_id)
        if children is None:
            raise NoObjectInStoreError("An object was not announced.")
        return ObjectTree(
            object_id=object_id, children=[self.get_object_tree(child) for child in children]
        )

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep a part, if it is what its name and its announcement say."""
        children = self.blobs.children(object_id)
        if children is None:
            raise NoObjectInStoreError("An object was not announced.")
        if get_object_id(object_content) != object_id:
            raise ValueError("an object is not what its name says")
        validate_object_content(content=object_content)
        if tuple(get_object_children_ids_from_object_content(object_content)) != children:
            raise ValueError("an object has other children than announced")
        self.blobs.put(object_id, object_content)

    def get(self, object_id: str) -> bytes | None:
        """A part, empty where it is announced only, None where it is unknown."""
        return self.blobs.get(object_id)

    def delete(self, object_id: str) -> None:
        """Forget a tree."""
        for roots in self._roots.values():
            roots.discard(object_id)
        self.blobs.drop(object_id)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Forget every tree of a run."""
        for root in self._roots.pop(run_id, set()):
            self.blobs.drop(root)

    def clear(self) -> None:
        """Forget everything."""
        self.blobs.clear()

    def __contains__(self, object_id: str) -> bool:
        return object_id in self.blobs

    def __len__(self) -> int:
        return len(self.blobs)


@dataclass(slots=True)
class _Upload:
    run: int
    root: str
    missing: set[str]
    room: int


class _Messages(SqlLinkState):  # type: ignore[misc]
    """Flower's state, whose messages live as long as this process: their rows are in memory.

    They cannot outlive it: a run ends with its process, and what a run needs to go on is in
    journals. Their content lies in files. An upload has no term, and is announced when its last
    part is here. A question that was fetched over a line that then broke is handed out again
    when its hospital asks for messages: it asks only when it has nothing to do.
    """

    def __init__(
        self,
        database: str,
        federation: Any,
        objects: _Objects,
        *,
        woken: Callable[[], None],
        most_answer: int,
    ) -> None:
        super().__init__(database, federation, objects)
        self._serial = threading.RLock()
        self._woken = woken
        self._most = most_answer
        self._blobs = objects.blobs
        self._questions: dict[str, Any] = {}
        self._waiting: dict[int, deque[str]] = {}
        self._handed: dict[int, list[str]] = {}
        self._uploads: dict[str, _Upload] = {}
        self.answers: dict[str, Any] = {}

    # ------------------------------------------------------------ questions

    def store_message_ins(self, message: Any) -> str | None:
        """Put a question in a node's box."""
        name: str = message.metadata.message_id
        with self._serial:
            self._questions[name] = message
            self._waiting.setdefault(message.metadata.dst_node_id, deque()).append(name)
        return name

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Any]:
        """What waits for a node; first, what was handed out but never received whole."""
        del run_id
        with self._serial:
            box = self._waiting.setdefault(node_id, deque())
            handed = self._handed.pop(node_id, [])
            box.extendleft(
                name for name in handed if name in self._blobs and name not in self.answers
            )
            found: list[Any] = []
            while box and (limit is None or len(found) < limit):
                question = self._questions.get(box.popleft())
                if question is not None:
                    found.append(question)
            if found:
                self._handed[node_id] = [message.metadata.message_id for message in found]
            return found

    def knows(self, question: str) -> bool:
        """Whether a question may still be answered."""
        return question in self._questions

    def forget(self, question: str) -> None:
        """Delete a question, and its answer as far as it is here."""
        with self._serial:
            answer = self.answers.pop(question, None)
            self._questions.pop(question, None)
        self.object_store.delete(question)
        if answer is not None:
            self.object_store.delete(answer.message_id)

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Delete questions and answers."""
        for name in message_ins_ids:
            self.forget(name)

    def get_message_ids_from_run_id(self, run_id: int) -> set[str]:
        """The questions of a run."""
        with self._serial:
            return {n for n, q in self._questions.items() if q.metadata.run_id == run_id}

    # ------------------------------------------------------------ answers

    def store_message_and_object_tree(
        self, message: Any, object_tree: Any, session_id: str
    ) -> tuple[bool, list[str]]:
        """Announce an answer; the parts that are missing. One that fits no question is dropped."""
        told = message.metadata
        with self._serial:
            question = self._questions.get(told.reply_to_message_id)
            if question is None or told.message_id != object_tree.object_id:
                return False, []
            asked = question.metadata
            if (asked.run_id, asked.dst_node_id) != (told.run_id, told.src_node_id):
                return False, []
            known = self.answers.get(asked.message_id)
            if known is not None and known.message_id != told.message_id:
                if self._blobs.complete(known.message_id):
                    return False, []  # it was answered
                self.object_store.delete(known.message_id)
            try:
                missing = self.preregister_object_tree(object_tree, session_id)
            except ProtocolError:
                return False, []
            self.answers[asked.message_id] = told
        if not missing:
            self._woken()
        return True, missing

    def start_session(self, run_id: int) -> str:
        """A name for an upload."""
        return f"{run_id}:{secrets.token_hex(16)}"

    def delete_sessions_in_run(self, run_id: int) -> None:
        """Forget the uploads of a run."""
        with self._serial:
            self._uploads = {n: u for n, u in self._uploads.items() if u.run != run_id}

    def preregister_object_tree(self, object_tree: Any, session_id: str) -> list[str]:
        """Announce an upload's parts. An earlier upload of the same tree is over."""
        run, root = int(session_id.partition(":")[0]), object_tree.object_id
        with self._serial:
            missing: list[str] = self.object_store.preregister(run, object_tree)
            self._uploads = {n: u for n, u in self._uploads.items() if u.root != root}
            if missing:
                room = self._most - self._blobs.size(root)
                self._uploads[session_id] = _Upload(run, root, set(missing), room)
            return missing

    def store_object(
        self, run_id: int, session_id: str, object_id: str, object_content: bytes
    ) -> bool:
        """Keep a part of an upload; False where it is none, damaged, too much, or no room is."""
        with self._serial:
            upload = self._uploads.get(session_id)
            fits = upload is not None and upload.run == run_id and object_id in upload.missing
            if upload is None or not fits or len(object_content) > upload.room:
                return False
            upload.room -= len(object_content)
        try:
            self.object_store.put(object_id, object_content)
        except (NoObjectInStoreError, UnexpectedObjectContentError, ValueError, WardroundError):
            return False
        with self._serial:
            upload.missing.discard(object_id)
            over = not upload.missing
            if over:
                self._uploads.pop(session_id, None)
        if over:
            self._woken()
        return True

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        """A part; unlike Flower, no upload is thrown away because a part is late."""
        del run_id
        return self._blobs.get(object_id)


class _LinkState(_Messages):
    """Flower's state: nodes and runs in SQLite.

    One writer at a time, so that nobody waits in SQLite's own lock loop. Tasks do not expire,
    because the process that would revive them is this one.
    """

    def __init__(
        self,
        database: str,
        federation: Any,
        objects: _Objects,
        *,
        woken: Callable[[], None],
        most_answer: int,
    ) -> None:
        super().__init__(database, federation, objects, woken=woken, most_answer=most_answer)
        self.running: set[int] = set()
        self._node_of: dict[bytes, int] = {}

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """A transaction; re-entrant. Raises StorageError where the disk is full or gone."""
        try:
            with self._serial, super().session() as session:
                yield session
        except OperationalError:
            raise StorageError(
                Code.FLOWER_STATE, "The transport's database cannot be written."
            ) from None

    def _cleanup_expired_task_tokens(self) -> None:
        """Nothing: no task is run by somebody else."""

    def get_run_status(self, run_ids: set[int]) -> dict[int, Any]:
        """As Flower; asked at every part of a message, so open runs are known by heart."""
        if run_ids <= self.running:
            return {run_id: RunStatus(Status.RUNNING, "", "") for run_id in run_ids}
        found: dict[int, Any] = super().get_run_status(run_ids)
        # Of a run in a database that was removed: over, so that its hospitals let go of it.
        over = RunStatus(Status.FINISHED, SubStatus.STOPPED, "")
        return {run_id: found.get(run_id, over) for run_id in run_ids}

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Nothing: the door counts, by hospital."""

    def add_clientapp_runtime(self, run_id: int, runtime: float) -> None:
        """Nothing."""

    def create_node(
        self,
        owner_aid: str,
        owner_name: str,
        public_key: bytes,
        heartbeat_interval: float,
        *,
        location: str | None = None,
        name: str | None = None,
    ) -> int:
        """As Flower; keeps the key at hand."""
        node: int = super().create_node(
            owner_aid, owner_name, public_key, heartbeat_interval, location=location, name=name
        )
        self._node_of[public_key] = node
        return node

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """As Flower; from now on nobody knows the key."""
        super().delete_node(owner_aid, node_id)
        for key in [key for key, node in self._node_of.items() if node == node_id]:
            del self._node_of[key]
        with self._serial:
            self._waiting.pop(node_id, None)
            self._handed.pop(node_id, None)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """As Flower; asked at every call, so it is not asked of the disk."""
        return self._node_of.get(public_key)

    def has_node(self, node_id: int) -> bool:
        """Whether the node is registered."""
        return node_id in self._node_of.values()

    def registered(self) -> list[Any]:
        """Every node that is not deleted; read once, at the start."""
        found = list(self.get_node_info(statuses=list(_IN_USE)))
        self._node_of = {info.public_key: info.node_id for info in found}
        return found

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """As Flower, but also for a node that died and still counts as online.

        It proved its key. The exchange hears of it at once.
        """
        super().deactivate_node(node_id)
        done: bool = super().activate_node(node_id, heartbeat_interval)
        self._woken()
        return done

    def deactivate_node(self, node_id: int) -> bool:
        """As Flower; the exchange hears of it at once."""
        done: bool = super().deactivate_node(node_id)
        self._woken()
        return done


class _Desk:
    """Flower's own checks and handlers for the calls that a hospital makes all day.

    Flower's web framework costs four times what it frames. Whatever does not succeed here goes
    through Flower's application, whose refusal then counts; nothing was changed by the attempt.
    """

    key_header: bytes = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
    media_type: str = PROTOBUF_MEDIA_TYPE
    moment_header: bytes = TIMESTAMP_HEADER.lower().encode()
    moment_s: float = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE + 1

    def __init__(self, app: Any, state: _LinkState) -> None:
        self._app = app
        self._state = state
        objects = state.object_store
        self._calls: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "send-node-heartbeat": (
                SendNodeHeartbeatRequest,
                lambda call: fleet_handlers.send_node_heartbeat(call, state),
            ),
            "pull-messages": (
                PullMessagesRequest,
                lambda call: fleet_handlers.pull_messages(call, state, objects),
            ),
            "push-messages": (
                PushMessagesRequest,
                lambda call: fleet_handlers.push_messages(call, state),
            ),
            "push-object": (
                PushObjectRequest,
                lambda call: fleet_handlers.push_object(call, state),
            ),
            "pull-object": (
                PullObjectRequest,
                lambda call: fleet_handlers.pull_object(call, state),
            ),
            "confirm-message-received": (
                ConfirmMessageReceivedRequest,
                lambda call: fleet_handlers.confirm_message_received(call, state, objects),
            ),
        }
        self.paths = frozenset(f"/v1/fleet/{name}" for name in self._calls)

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
        """The serialised answer, or None. Raises ProtocolError at a call that means nothing."""
        if headers.get("content-type", "").partition(";")[0].strip() != self.media_type:
            return None
        kind, handle = self._calls[path.rpartition("/")[2]]
        try:
            call = kind.FromString(body)
            authenticate_node(
                SimpleNamespace(
                    headers=headers, state=SimpleNamespace(protobuf_request=call), app=self._app
                )
            )
            answer: bytes = handle(call).SerializeToString()
        except (DecodeError, HTTPException, FlowerError):
            return None
        except _HOSTILE:  # Flower takes its callers' word for what a call holds
            raise ProtocolError(Code.MALFORMED, "A hospital's call means nothing.") from None
        return answer


class _TokenPlugin(NoOpControlAuthnPlugin):  # type: ignore[misc]
    """Flower's control calls want the admin token a second time, in case the door is wrong."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token.encode()

    def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, Any]]) -> tuple[bool, Any]:
        """Whether one of the entries is the token."""
        for _, value in metadata:
            if secrets.compare_digest(str(value).encode(), self._token):
                return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)
        return False, None


class _NoLifespan:
    """What Flower would start beside its web application: nothing."""

    def __init__(self, config: Any, state_factory: Any) -> None:
        del config
        self.state_factory = state_factory

    def startup(self) -> None:
        """Nothing."""

    def shutdown(self) -> None:
        """Nothing."""


# ---------------------------------------------------------------------------- grid
@dataclass(slots=True)
class _Room:
    """What one answer may still take in memory; a part that is named twice takes it twice."""

    left: int

    def take(self, count: int) -> None:
        """Raise ValueError where there is no room for so many bytes more."""
        self.left -= count
        if self.left < 0:
            raise ValueError("an answer is larger than its bound")


class LocalGrid(Grid):  # type: ignore[misc]
    """Flower's Grid on the state of this process: no HTTP, one large answer at a time.

    A new question to a hospital takes the place of the one before. Answers are handed out when
    they are whole, one for each call of `pull_messages`.
    """

    def __init__(
        self,
        state: _LinkState,
        objects: _Objects,
        run: Any,
        ring: Callable[[int], None],
        most_answer: int,
    ) -> None:
        self._state = state
        self._objects = objects
        self._run = run
        self._ring = ring
        self._most = most_answer
        self._asked: dict[int, str] = {}

    def set_run(self, run: Any) -> None:
        """Work in another run."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(
        self,
        content: Any,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Any:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return [info.node_id for info in self.get_nodes()]

    def get_nodes(self) -> Iterable[Any]:
        """Nodes that are online, with their names and when each was last activated."""
        found: Iterable[NodeInfo] = self._state.get_node_info(statuses=[NodeStatus.ONLINE])
        return found

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        """Store messages for their nodes; an id is empty where the node is not registered."""
        return [self._push(message) for message in messages]

    def _push(self, message: Any) -> str:
        state, run_id = self._state, self._run.run_id
        node = message.metadata.dst_node_id
        if not state.has_node(node):
            return ""
        # Flower keeps both in a variable of the process; a hospital in the same process (a
        # test) or a second run would write its own into it.
        message.metadata.__dict__["_run_id"] = run_id
        message.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        parts: dict[str, Any] = {}
        tree = _tree(message, parts)
        message.metadata.__dict__["_message_id"] = name = str(tree.object_id)
        before = self._asked.pop(node, None)
        for missing in self._objects.preregister(run_id, tree, own=True):
            self._objects.blobs.put(missing, parts[missing].deflate())
        if before is not None:  # only now: parts that both name are not written twice
            state.forget(before)
        state.store_message_ins(remove_content_from_message(message))
        self._asked[node] = name
        self._ring(node)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """At most one whole answer, and Flower's own answers where no other will come."""
        ids = set(message_ids)
        state, blobs = self._state, self._objects.blobs
        for question in ids & state.answers.keys():
            if blobs.complete(state.answers[question].message_id):
                return [self._taken(question)]
        gone = [name for name in ids if not state.knows(name)]
        error = Error(ErrorCode.MESSAGE_UNAVAILABLE, "")
        return [_error_reply(name, error) for name in gone]

    def _taken(self, question: str) -> Any:
        metadata = self._state.answers[question]
        if self._objects.blobs.size(metadata.message_id) > _LARGE_BYTES:
            give_back_memory()  # the calls that brought it have left their bodies' room
        try:
            reply = self._inflate(metadata.message_id, _Room(self._most))
            if not isinstance(reply, Message):
                raise TypeError("an answer is no message")
        except _HOSTILE:
            # A hospital's bytes, which Flower's own parser would not take.
            error = Error(ErrorCode.UNKNOWN, Code.MALFORMED.label)
            reply = _error_reply(question, error)
        finally:
            self._state.forget(question)
        reply.metadata.__dict__["_message_id"] = metadata.message_id
        reply.metadata.__dict__["_src_node_id"] = metadata.src_node_id
        reply.metadata.__dict__["_reply_to_message_id"] = question
        return reply

    def _inflate(self, name: str, room: _Room) -> Any:
        content = self._objects.get(name)
        if not content:
            raise LookupError("a part of an answer is gone")
        room.take(len(content))
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__ and children:
            return self._array(content, children, room)
        inside = {child: self._inflate(child, room) for child in children}
        return inflatable_class_registry[kind].inflate(content, children=inside)

    def _array(self, content: bytes, children: Sequence[str], room: _Room) -> Any:
        """The array, its parts read straight into one buffer."""
        told = json.loads(bytes(_body(content)))
        order = [children[index] for index in told["arraychunk_ids"]]
        total = 0
        for name in order:
            size = self._objects.blobs.size(name)
            room.take(size)
            total += size
        # Room for all of it at once, heads included; `getvalue` then hands the buffer itself out.
        buffer = io.BytesIO()
        buffer.seek(total)
        buffer.write(b"\0")
        buffer.seek(0)
        for name in order:
            part = self._objects.get(name)
            if not part:
                raise LookupError("a part of an answer is gone")
            buffer.write(_body(part))
            del part
        buffer.truncate()
        return Array(
            dtype=told["dtype"],
            shape=tuple(told["shape"]),
            stype=told["stype"],
            data=buffer.getvalue(),
        )

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> Iterable[Any]:
        """Push, then pull until every answer is here or the time is over."""
        end = None if timeout is None else time.monotonic() + timeout
        left = {name for name in self.push_messages(messages) if name}
        answers: list[Any] = []
        while left and (end is None or time.monotonic() < end):
            came = list(self.pull_messages(left))
            answers += came
            left -= {reply.metadata.reply_to_message_id for reply in came}
            if not came:
                time.sleep(0.02)
        return answers


def _body(content: bytes) -> memoryview:
    """What follows an object's head, not copied."""
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


def _tree(item: Any, parts: dict[str, Any]) -> Any:
    """The object's tree; `parts` gets every part by name. An array is hashed once, ever."""
    if isinstance(item, Array):
        name = item.object_id
        chunks: dict[str, InflatableObject] = dict(item.slice_array())
        parts.update(chunks)
        parts[name] = item
        return ObjectTree(object_id=name, children=[ObjectTree(object_id=c) for c in chunks])
    children = [_tree(child, parts) for child in (item.children or {}).values()]
    name = item.object_id
    parts[name] = item
    return ObjectTree(object_id=name, children=children)


def _error_reply(question: str, error: Any) -> Any:
    reply = Message(RecordDict(), SUPERLINK_NODE_ID, "query.step")
    reply.metadata.__dict__["_reply_to_message_id"] = question
    reply.__dict__["_content"] = None
    reply.__dict__["_error"] = error
    return reply


# ---------------------------------------------------------------------------- logs
class _Forward(logging.Handler):
    """Tells where in Flower something was said, and how loudly; never what.

    Flower's texts quote keys and exceptions.
    """

    def __init__(self, notice: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._notice = notice

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on level and place, as plain tokens."""
        self._notice(record.levelname.lower(), f"{record.module}:{record.lineno}")


def _silent(_level: str, _place: str) -> None:
    return None


def quiet_logs(notice: Callable[[str, str], None]) -> None:
    """Take Flower's, its database's and the web server's logs off the terminal."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [_Forward(notice)]
        logger.propagate = False
        logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Around the making of the database, which is not one transaction of Flower's.

    A kill in the middle of the first one leaves tables that Flower cannot make again. Nothing is
    in them yet, so the next start begins anew.
    """
    mark = folder / "state.making"
    if mark.exists():
        for left in folder.glob("state.db*"):
            left.unlink()
    elif not (folder / "state.db").exists():
        write_durably(mark, [b""])
    yield
    mark.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- coordinator
class FlowerCoordinator:
    """Flower's server inside this process: two listeners, the registered hospitals, grids.

    Args:
        folder: its own state; registrations survive in it.
        listen: address and port of the public listener; port 0 takes any.
        admin: the same of the admin listener; a loopback address.
        tls: the public listener's certificate.
        admin_token: what every request to the admin listener must show.
        routes: paths of the admin listener beside Flower's.
        wire: bounds.
        notice: hears level and place of Flower's warnings, for the operator's log.

    Raises:
        ConfigError: LISTENER_PORT, LISTENER_TLS, ADMIN_NOT_LOOPBACK.
        StorageError: FOLDER_IN_USE, FLOWER_STATE, JOURNAL_WRITE.
    """

    def __init__(
        self,
        folder: Path,
        *,
        listen: tuple[str, int],
        admin: tuple[str, int],
        tls: TlsFiles,
        admin_token: str,
        routes: Sequence[Route] = (),
        wire: Wire | None = None,
        notice: Callable[[str, str], None] = _silent,
    ) -> None:
        self._wire = Wire() if wire is None else wire
        require_loopback(admin[0])
        self._tls = tls
        self._context = tls_context(tls)
        quiet_logs(notice)
        make_folder(folder, mode=0o700)
        self._event = threading.Event()
        self._bell = Bell()
        self._keys: dict[str, tuple[str, int]] = {}
        self._runs: list[Any] = []
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, _locked(folder))
            inner = undo.enter_context(bound("admin", admin))
            outer = undo.enter_context(bound("public", listen))
            app = self._embedded(folder, admin_token)
            undo.callback(self._state._engine.dispose)  # noqa: SLF001
            self._load()
            door = AdminDoor(app, admin_token, routes, self._wire.most_body)
            self._admin = Listener(inner, door)
            self._public_door = PublicDoor(
                app, _Desk(app, self._state), self._keys.__contains__, self._bell, self._wire
            )
            most = self._wire.most_connections
            self._public = Listener(
                outer,
                self._public_door,
                tls=self._context,
                most_connections=most,
                head_s=self._wire.head_s,
            )
            self._held = undo.pop_all()

    def _embedded(self, folder: Path, token: str) -> Any:
        """Flower's application over our state; the only place that replaces a part of Flower."""
        blobs = BlobStore(folder / "objects", most_bytes=self._wire.most_disk)
        self._objects = _Objects(blobs)
        self._state: _LinkState

        def factories(database: str, federation: Any) -> tuple[Any, Any]:
            objects = ObjectStoreFactory(database)
            objects.store_instance = self._objects
            links = LinkStateFactory(database, federation, objects)
            self._state = _LinkState(
                database,
                federation,
                self._objects,
                woken=self._event.set,
                most_answer=self._wire.most_answer,
            )
            with _made(folder):
                self._state.initialize()
            links.state_instance = self._state
            return objects, links

        original = superlink.get_objectstore_linkstate_factories
        superlink.get_objectstore_linkstate_factories = factories
        try:
            return superlink.create_app(
                _settings(str(folder / "state.db"), _TokenPlugin(token)), _NoLifespan
            )
        except (SQLAlchemyError, sqlite3.Error, OSError):
            raise StorageError(
                Code.FLOWER_STATE, f"{folder}: the transport's database cannot be opened."
            ) from None
        finally:
            superlink.get_objectstore_linkstate_factories = original

    def _load(self) -> None:
        """Who is registered; and no run of an earlier process is still open."""
        for info in self._state.registered():
            self._keys[_as_header(info.public_key)] = (info.name, info.node_id)
        for run in self._state.get_run_info(statuses=list(_OPEN)):
            self._state.stop_run(run.run_id)

    # ------------------------------------------------------------ life

    @property
    def public_port(self) -> int:
        """The public listener's port."""
        return self._public.port

    @property
    def admin_port(self) -> int:
        """The admin listener's port."""
        return self._admin.port

    def start(self) -> None:
        """Serve both listeners."""
        self._admin.start()
        self._public.start()

    def stop(self) -> None:
        """End open runs and connections, and let go of ports and folder."""
        self._bell.close()
        for listener in (self._public, self._admin):
            listener.ask_to_stop()
        for listener in (self._public, self._admin):
            listener.join()
        self._public_door.close()
        for run in self._runs:
            self._state.running.discard(run.run_id)
            # Where the disk is full, the next start ends the run.
            with contextlib.suppress(StorageError):
                self._state.finish_task(run.primary_task_id, SubStatus.COMPLETED, "")
                self._state.cleanup_run(run.run_id)
        self._runs.clear()
        self._held.close()

    def renew(self) -> None:
        """Show the certificate that now lies in the files. Raises ConfigError LISTENER_TLS."""
        load_certificate(self._context, self._tls)

    def wait(self, seconds: float) -> None:
        """Sleep until a hospital or an answer came, at most this long."""
        self._event.wait(max(0.0, seconds))
        self._event.clear()

    # ------------------------------------------------------------ hospitals

    def register(self, site: str, transport_public: bytes) -> None:
        """Let a site's transport key in; another key of the same site is let in no longer.

        Args:
            site: its id.
            transport_public: EC P-384, as OpenSSH line or PEM.

        Raises:
            ConfigError: TRANSPORT_KEY: not such a key, another site's, or one that was revoked.
        """
        public = _public_key(site, transport_public)
        header = _as_header(public)
        owner = self._keys.get(header, ("", 0))[0]
        if owner == site:
            # A kill between the new key's row and the old one's end leaves both.
            self._strike(site, but=header)
            return
        node = 0
        if not owner:
            with contextlib.suppress(ValueError):  # the key of a node that was deleted
                node = self._state.create_node(
                    NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, HEARTBEAT_DEFAULT_INTERVAL, name=site
                )
        if not node:
            raise ConfigError(Code.TRANSPORT_KEY, f"The transport key of {site} was used before.")
        self.unregister(site)
        self._keys[header] = (site, node)

    def unregister(self, site: str) -> None:
        """Let none of a site's keys in any more, from this moment; no error where there is none."""
        self._strike(site)
        self._event.set()

    def _strike(self, site: str, *, but: str = "") -> None:
        """Let none of a site's keys in any more, but this one."""
        for header, (name, node) in list(self._keys.items()):
            if name == site and header != but:
                del self._keys[header]
                self._state.delete_node(NOOP_FLWR_AID, node)
                self._bell.ring(header)

    def sites(self) -> tuple[str, ...]:
        """The registered sites, ascending."""
        return tuple(sorted(name for name, _ in dict(self._keys).values()))

    def site_of(self, node: int) -> str | None:
        """The site whose key registered this node, or None."""
        return next((name for name, known in dict(self._keys).values() if known == node), None)

    def traffic(self) -> Mapping[str, Traffic]:
        """Bytes of each site's requests since the start, whatever they carried."""
        found = dict(self._public_door.traffic)
        return {
            name: found[header] for header, (name, _) in dict(self._keys).items() if header in found
        }

    def silence(self, site: str) -> float | None:
        """Seconds since the site's last call that was served; None: none yet."""
        tally = self.traffic().get(site)
        return None if tally is None else time.monotonic() - tally.at

    def _ring(self, node: int) -> None:
        for header, (_, known) in dict(self._keys).items():
            if known == node:
                self._bell.ring(header)

    # ------------------------------------------------------------ runs

    def grid(self, *, most_answer: int | None = None) -> LocalGrid:
        """A grid in a run of its own, which ends with this process.

        Args:
            most_answer: bytes of the largest answer that is read; the wire's bound where None.
        """
        state = self._state
        run_id = state.create_run(
            "", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        run: Run = state.get_run_info(run_ids=[run_id])[0]
        task = run.primary_task_id
        if not (state.claim_task(task) and state.activate_task(task)):
            raise RuntimeError("Flower did not start a run that was just made")
        self._runs.append(run)
        state.running.add(run_id)
        TaskIdentity.run_id, TaskIdentity.task_id = run_id, task
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        bound = self._wire.most_answer if most_answer is None else most_answer
        return LocalGrid(state, self._objects, run, self._ring, bound)

    def run(self, app: ServerApp) -> None:
        """Run a ServerApp in this thread over a grid of its own."""
        grid = self.grid()
        app(
            grid,
            Context(
                run_id=grid.run.run_id,
                node_id=SUPERLINK_NODE_ID,
                node_config={},
                state=RecordDict(),
                run_config={},
            ),
        )


def _settings(database: str, plugin: Any) -> Any:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),
        authn_plugin=plugin,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=database,
        isolation="process",
        runtime_dependency_install=False,
    )


def _locked(folder: Path) -> int:
    handle = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StorageError(
            Code.FOLDER_IN_USE, f"{folder}: another coordinator is using this folder."
        ) from None
    return handle


def _public_key(site: str, text: bytes) -> bytes:
    """The key as Flower keeps it: PEM."""
    try:
        load = (
            serialization.load_pem_public_key
            if text.lstrip().startswith(b"-----")
            else serialization.load_ssh_public_key
        )
        key = load(text.strip())
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(Code.TRANSPORT_KEY, f"The transport key of {site} is not EC P-384.")
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _as_header(public: bytes) -> str:
    return base64.b64encode(public).decode()
