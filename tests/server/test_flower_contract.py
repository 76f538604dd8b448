"""What the coordinator uses of Flower beyond its public API, one row for each use.

A row that fails after an upgrade names what broke and what of ours stands on it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.app
import flwr.serverapp
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common import constant as common_constant
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import constant, telemetry
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore, ObjectStoreFactory
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.run import Run, RunStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink import main as superlink
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers

import server.flower as ours
from server.doors import PATHS

HERE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One use: the names it covers, what of ours stands on it, and a check."""

    names: str
    what: str
    check: Callable[[], Any]


def takes(function: Any, *names: str) -> bool:
    found = [name for name in inspect.signature(function).parameters if name != "self"]
    return found == list(names)


def accepts(function: Any, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    array = Array(dtype="uint8", shape=(4,), stype="wardround.bytes", data=b"abcd")
    content = RecordDict({"x": ArrayRecord({"data": array}), "y": ConfigRecord({"b": b"1"})})
    return Message(content, 7, "query.step", ttl=60.0)


def body(content: bytes) -> bytes:
    return content[content.index(constant.HEAD_BODY_DIVIDER) + 1 :]


def array_body() -> bool:
    array = Array(dtype="uint8", shape=(4,), stype="s", data=b"abcd")
    told = json.loads(body(array.deflate()))
    kind, children, size = inflatable_object.get_object_head_values_from_object_content(
        array.deflate()
    )
    return (
        told == {"dtype": "uint8", "shape": [4], "stype": "s", "arraychunk_ids": [0]}
        and (kind, len(children), size) == ("Array", 1, len(body(array.deflate())))
        and children
        == inflatable_object.get_object_children_ids_from_object_content(array.deflate())
    )


def chunk_body() -> bool:
    array = Array(dtype="uint8", shape=(4,), stype="s", data=b"abcd")
    [(name, chunk)] = array.slice_array()
    content = chunk.deflate()
    inflatable_utils.validate_object_content(content=content)
    return body(content) == b"abcd" and inflatable_object.get_object_id(content) == name


def hashed_once() -> bool:
    array = Array(dtype="uint8", shape=(4,), stype="s", data=b"abcd")
    return array.slice_array() is array.slice_array() and not (array.object_id and array.is_dirty)


def tree_agrees() -> bool:
    """Our tree of a message is Flower's own."""
    sent = message()
    parts: dict[str, Any] = {}
    mine = ours._tree(sent, parts)
    theirs = inflatable_object.get_object_tree(sent)
    known = inflatable_object.get_all_nested_objects(sent)
    order = [node.object_id for node in inflatable_object.iterate_object_tree(mine)]
    return mine == theirs and set(parts) == set(known) and order[-1] == sent.object_id


def metadata_is_settable() -> bool:
    names = {"_run_id", "_src_node_id", "_message_id", "_reply_to_message_id"}
    sent = message()
    return names <= set(sent.metadata.__dict__) and {"_content", "_error"} <= set(sent.__dict__)


def name_is_content() -> bool:
    """A message's id is its digest, which leaves the id itself out."""
    sent = message()
    before = sent.object_id
    sent.metadata.__dict__["_message_id"] = "x"
    return sent.object_id == before


def bare_keeps_metadata() -> bool:
    sent = message()
    bare = remove_content_from_message(sent)
    return bare.metadata is sent.metadata and len(bare.content) == 0


def overrides() -> Iterator[str]:
    for name, item in {**vars(ours._Messages), **vars(ours._LinkState)}.items():
        if callable(item) and not name.startswith("__") and name not in OWN:
            yield name


OWN = {"forget", "knows", "has_node", "registered"}
FLEET = {
    "send_node_heartbeat": ("request", "state"),
    "pull_messages": ("request", "state", "store"),
    "push_messages": ("request", "state"),
    "push_object": ("request", "state"),
    "pull_object": ("request", "state"),
    "confirm_message_received": ("request", "state", "store"),
}
CALLED = {
    "cleanup_run": ("run_id",),
    "stop_run": ("run_id",),
    "finish_task": ("task_id", "sub_status", "details"),
    "claim_task": ("task_id",),
    "activate_task": ("task_id",),
    "initialize": ("log_queries", "engine_kwargs"),
}

ROWS = [
    Row(
        "flwr.superlink.main",
        "the embedded server is made of this",
        lambda: takes(superlink.create_app, "config", "superlink_lifespan_class"),
    ),
    Row(
        "get_objectstore_linkstate_factories",
        "the one function we replace; create_app must look it up in its module",
        lambda: (
            takes(superlink.get_objectstore_linkstate_factories, "database", "federation_manager")
            and "get_objectstore_linkstate_factories" in superlink.create_app.__code__.co_names
        ),
    ),
    Row(
        "SuperLinkLifespanConfig",
        "every setting is given; a new one must be looked at",
        lambda: {f.name for f in fields(SuperLinkLifespanConfig)} == set(settings_given()),
    ),
    Row(
        "NoOpControlAuthnPlugin AccountInfo",
        "Flower's control calls want the admin token",
        lambda: (
            takes(NoOpControlAuthnPlugin.validate_tokens_in_metadata, "metadata")
            and accepts(AccountInfo, "flwr_aid", "account_name")
        ),
    ),
    Row(
        "ObjectStoreFactory LinkStateFactory",
        "our stores are set as their instances",
        lambda: (
            hasattr(ObjectStoreFactory(), "store_instance")
            and accepts(LinkStateFactory, "database", "federation_manager", "objectstore_factory")
            and "state_instance" in inspect.getsource(LinkStateFactory.state)
        ),
    ),
    Row(
        "ObjectStore NoObjectInStoreError",
        "parts of messages lie in files",
        lambda: (
            ObjectStore.__abstractmethods__
            == {
                *("preregister", "get_object_tree", "put", "get", "delete"),
                *("delete_objects_in_run", "clear", "__contains__", "__len__"),
            }
            and issubclass(NoObjectInStoreError, Exception)
        ),
    ),
    *[
        Row(
            f"SqlLinkState.{name}",
            "replaced or extended by our state",
            lambda name=name: takes(
                getattr(SqlLinkState, name), *signature(getattr(ours._LinkState, name))
            ),
        )
        for name in overrides()
    ],
    *[
        Row(
            f"SqlLinkState.{name}",
            "called by the coordinator",
            lambda name=name, names=names: takes(getattr(SqlLinkState, name), *names),
        )
        for name, names in CALLED.items()
    ],
    Row(
        "SqlLinkState.create_run",
        "a grid has a run of its own",
        lambda: (
            list(inspect.signature(SqlLinkState.create_run).parameters)[1:9]
            == [
                *("fab_id", "fab_version", "fab_hash", "override_config", "federation_id"),
                *("federation_config", "flwr_aid", "primary_task_type"),
            ]
        ),
    ),
    Row(
        "SqlLinkState.get_run_info get_node_info",
        "orphaned runs and registered nodes are found by status",
        lambda: (
            accepts(SqlLinkState.get_run_info, "run_ids", "statuses")
            and accepts(SqlLinkState.get_node_info, "statuses")
        ),
    ),
    Row("Run", "a run's ids", lambda: accepts(Run, "run_id", "primary_task_id")),
    Row(
        "RunStatus",
        "an open run's status",
        lambda: takes(RunStatus, "status", "sub_status", "details"),
    ),
    Row(
        "NodeInfo",
        "who a node is, and when it was last activated",
        lambda: (
            {"node_id", "name", "public_key", "last_activated_at"}
            <= set(NodeInfo.DESCRIPTOR.fields_by_name)
        ),
    ),
    *[
        Row(
            f"fleet_handlers.{name}",
            "called by the desk",
            lambda name=name, names=names: takes(getattr(fleet_handlers, name), *names),
        )
        for name, names in FLEET.items()
    ],
    Row(
        "authenticate_node HTTPException",
        "the desk asks Flower itself who calls",
        lambda: takes(authenticate_node, "request"),
    ),
    Row(
        "fleet router",
        "every call that the door lets through exists",
        lambda: {route.path for route in fleet_router.routes} >= PATHS,
    ),
    Row(
        "PullMessagesRequest PushMessagesRequest SendNodeHeartbeatRequest "
        "ConfirmMessageReceivedRequest PullObjectRequest PushObjectRequest",
        "the desk reads these",
        lambda: (
            {
                ours._Desk(None, SimpleNamespace(object_store=None))._calls[name][0].DESCRIPTOR.name
                for name in ("pull-messages", "push-messages", "send-node-heartbeat")
            }
            == {"PullMessagesRequest", "PushMessagesRequest", "SendNodeHeartbeatRequest"}
        ),
    ),
    Row(
        "FLEET_HTTP_PUBLIC_KEY_HEADER PROTOBUF_MEDIA_TYPE",
        "the door reads the caller's key from this header",
        lambda: (
            (constant.FLEET_HTTP_PUBLIC_KEY_HEADER, PROTOBUF_MEDIA_TYPE)
            == ("flwr-public-key", "application/protobuf")
        ),
    ),
    Row(
        "FlowerError",
        "a refusal of Flower's handlers",
        lambda: issubclass(FlowerError, Exception),
    ),
    Row(
        "Grid",
        "the coordinator's side of a run; a new abstract method must be looked at",
        lambda: (
            Grid.__abstractmethods__
            == {
                *("set_run", "run", "create_message", "get_node_ids"),
                *("push_messages", "pull_messages", "send_and_receive"),
            }
        ),
    ),
    Row(
        "ServerApp Context",
        "called with a grid and a context",
        lambda: takes(ServerApp.__call__, "grid", "context"),
    ),
    Row(
        "TaskIdentity",
        "a message cannot be made without it",
        lambda: {"_run_id", "_task_id", "_node_id"} <= set(vars(TaskIdentity)),
    ),
    Row("Message Error", "private fields of messages", metadata_is_settable),
    Row(
        "remove_content_from_message RecordDict", "what goes into the database", bare_keeps_metadata
    ),
    Row("Message.object_id", "the id is the content's digest", name_is_content),
    Row(
        "Array HEAD_BODY_DIVIDER get_object_head_values_from_object_content "
        "get_object_children_ids_from_object_content",
        "an array's parts are put together from its body",
        array_body,
    ),
    Row("get_object_id validate_object_content", "a part is raw bytes behind a head", chunk_body),
    Row("InflatableObject", "an array is cut and hashed once", hashed_once),
    Row("ObjectTree iterate_object_tree", "our tree of a message is Flower's", tree_agrees),
    Row(
        "inflatable_class_registry UnexpectedObjectContentError",
        "small records are inflated by Flower",
        lambda: (
            {"Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "ConfigRecord"}
            <= set(inflatable_utils.inflatable_class_registry)
        ),
    ),
    Row(
        "SUPERLINK_NODE_ID NOOP_FLWR_AID NOOP_ACCOUNT_NAME NOOP_FEDERATION_ID",
        "who owns nodes and runs without Flower's accounts",
        lambda: (
            common_constant.SUPERLINK_NODE_ID == 1
            and all(
                isinstance(x, str)
                for x in (common_constant.NOOP_FLWR_AID, constant.NOOP_FEDERATION_ID)
            )
        ),
    ),
    Row(
        "Status SubStatus NodeStatus TaskType ErrorCode",
        "names of states",
        lambda: (
            (common_constant.Status.RUNNING, common_constant.SubStatus.COMPLETED)
            == ("running", "completed")
            and constant.NodeStatus.ONLINE == "online"
            and bool(constant.TaskType.SERVER_APP)
            and common_constant.ErrorCode.UNKNOWN == 0
        ),
    ),
    Row(
        "HEARTBEAT_DEFAULT_INTERVAL",
        "a hospital is offline after twice its interval",
        lambda: (
            (common_constant.HEARTBEAT_DEFAULT_INTERVAL, common_constant.HEARTBEAT_PATIENCE)
            == (30, 2)
        ),
    ),
    Row(
        "TIMESTAMP_HEADER TIMESTAMP_TOLERANCE SYSTEM_TIME_TOLERANCE",
        "a hospital's clock may be 5 s ahead and 305 s behind: the guides say so",
        lambda: (
            (common_constant.SYSTEM_TIME_TOLERANCE, common_constant.TIMESTAMP_TOLERANCE) == (5, 300)
        ),
    ),
    Row("telemetry", "nothing is told to anybody", lambda: telemetry.FLWR_TELEMETRY_ENABLED == "0"),
    Row(
        "uvicorn",
        "TLS 1.3 and bounded headers",
        lambda: accepts(uvicorn.Config, "ssl_context_factory", "http", "limit_concurrency"),
    ),
]


def signature(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def settings_given() -> dict[str, Any]:
    return vars(ours._settings("x", None))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[:70])
def test_flower_still_has_what_the_coordinator_stands_on(row: Row):
    assert row.check(), f"{row.names}: {row.what}"


def test_a_row_that_does_not_hold_fails():
    assert not takes(superlink.create_app, "config")
    assert not accepts(AccountInfo, "no_such_field")


def test_every_name_of_flower_that_is_imported_has_a_row():
    public = set(flwr.app.__all__) | set(flwr.serverapp.__all__)
    said = " ".join(row.names for row in ROWS)
    imported = set()
    for name in ("server.flower", "server.app"):
        source = inspect.getsource(importlib.import_module(name))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                imported |= {alias.name for alias in node.names}
    modules = {"main", "fleet_handlers"}
    assert {name for name in imported - public - modules if name not in said} == set()


def test_the_exchange_uses_flowers_public_names_only():
    source = inspect.getsource(importlib.import_module("server.app"))
    modules = {
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr")
    }
    assert modules == {"flwr.app", "flwr.serverapp"}


def test_the_installed_flower_is_the_pinned_one():
    wanted = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["dependencies"]
    [pin] = [line for line in wanted if line.startswith("flwr")]
    assert pin == f"flwr=={version('flwr')}"
