"""A small hospital node on Flower's Fleet calls, for the coordinator's tests."""

from __future__ import annotations

import contextlib
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.crypto.identity import SiteKey
from common.protocol.envelope import COORDINATOR, Envelope, sign_envelope

STYPE = "wardround.bytes"
CODES = ("study", "sender", "recipient", "nonce", "code", "signature")


def transport_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def public_line(key: Any) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )


def records(envelope: Envelope, payloads: tuple[bytes, ...]) -> RecordDict:
    fields = {name: getattr(envelope, name) for name in CODES}
    made: dict[str, Any] = {"envelope": ConfigRecord({**fields, "payloads": len(payloads)})}
    for index, payload in enumerate(payloads):
        array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
        made[f"payload-{index}"] = ArrayRecord({"data": array})
    return RecordDict(made)


def question(message: Message) -> tuple[Envelope, tuple[bytes, ...]]:
    fields = dict(message.content["envelope"])
    count = fields.pop("payloads")
    payloads = tuple(message.content[f"payload-{i}"]["data"].data for i in range(count))
    return Envelope(**fields), payloads


def reply(
    message: Message, key: SiteKey, site: str, payloads: tuple[bytes, ...], code: str = ""
) -> Message:
    asked, _ = question(message)
    envelope = sign_envelope(
        key,
        study=asked.study,
        sender=site,
        recipient=COORDINATOR,
        nonce=asked.nonce,
        payloads=payloads,
        code=code,
    )
    return Message(records(envelope, payloads), reply_to=message)


def error(message: Message, label: str) -> Message:
    return Message(Error(2, label), reply_to=message)


def client(port: int, ca: Path, key: Any = None, timeout: float = 30.0) -> FleetHttpClient:
    context = ssl.create_default_context(cafile=str(ca))
    layers: list[Any] = [RuntimeVersionHttpInterceptor(component_name="SuperNode")]
    if key is not None:
        layers.append(NodeAuthHttpInterceptor(key, key.public_key()))
    return FleetHttpClient(
        f"https://127.0.0.1:{port}", interceptors=layers, verify=context, timeout=timeout
    )


class TinyNode:
    """One hospital's link: activate, pull, push. No threads: the test turns the handle."""

    def __init__(self, port: int, ca: Path, key: Any, timeout: float = 30.0) -> None:
        self.calls = client(port, ca, key, timeout)
        self.ca = ca
        self.key = key
        self.node_id = 0
        self.sent: list[str] = []

    def close(self) -> None:
        self.calls._client.close()

    def activate(self) -> None:
        if self.node_id:
            with contextlib.suppress(httpx.HTTPStatusError):
                self.calls.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(self.key.public_key()), heartbeat_interval=30
        )
        self.node_id = self.calls.ActivateNode(request).node_id

    @property
    def me(self) -> Node:
        return Node(node_id=self.node_id)

    def heartbeat(self) -> bool:
        request = SendNodeHeartbeatRequest(node=self.me, heartbeat_interval=30)
        return self.calls.SendNodeHeartbeat(request).success

    def fetch(self) -> tuple[Any, Any] | None:
        """Claims a question without downloading it."""
        came = self.calls.PullMessages(PullMessagesRequest(node=self.me))
        if not came.messages_list:
            return None
        return message_from_proto(came.messages_list[0]).metadata, came.message_object_trees[0]

    def download(self, metadata: Any, tree: Any) -> Message:
        run, name = metadata.run_id, metadata.message_id
        parts = {}
        for leaf in iterate_object_tree(tree):
            request = PullObjectRequest(node=self.me, run_id=run, object_id=leaf.object_id)
            got = self.calls.PullObject(request)
            assert got.object_available
            parts[leaf.object_id] = got.object_content
        request = ConfirmMessageReceivedRequest(node=self.me, run_id=run, message_object_id=name)
        self.calls.ConfirmMessageReceived(request)
        message = inflate_object_from_contents(name, parts)
        message.metadata.__dict__["_message_id"] = name
        return message

    def pull(self, seconds: float = 20.0) -> Message:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.fetch()
            if found is not None:
                return self.download(*found)
        raise AssertionError("no question came")

    def announce(self, answer: Message) -> tuple[Any, dict[str, Any]]:
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            parts = get_all_nested_objects(answer)
            request = PushMessagesRequest(
                node=self.me,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[get_object_tree(answer)],
                clientapp_runtime_list=[0.1],
            )
            return self.calls.PushMessages(request), parts

    def push(self, answer: Message, most: int | None = None) -> bool:
        """Uploads an answer, or only so many of its parts."""
        told, parts = self.announce(answer)
        self.sent = []
        for name in list(told.objects_to_push)[:most]:
            request = PushObjectRequest(
                node=self.me,
                run_id=answer.metadata.run_id,
                session_id=told.session_id,
                object_id=name,
                object_content=parts[name].deflate(),
            )
            if not self.calls.PushObject(request).stored:
                return False
            self.sent.append(name)
        return True
