"""The coordinator's listeners and its grid, over real TLS sockets."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from flwr.app import Array, Error, Message
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError
from common.protocol.envelope import Envelope
from common.world import SystemClock
from server.app import Exchange, Pace
from server.flower import FlowerCoordinator, Route, TlsFiles, Wire
from tests.flower_node import (
    TinyNode,
    public_line,
    question,
    records,
    reply,
    transport_key,
)

TOKEN = "t0ken-of-the-operator"
WIRE = Wire(hold_s=0.2, most_body=6 << 20, most_answer=4 << 20)
STUDY = b"S" * 32
COORDINATOR_KEY = SiteKey.from_seed(b"c" * 32)
SITE_KEY = SiteKey.from_seed(b"s" * 32)
MEDIA = {"content-type": "application/protobuf"}


# ---------------------------------------------------------------------------- fixtures
def make_tls(folder: Path) -> tuple[TlsFiles, Path]:
    """A self-signed certificate for 127.0.0.1: it is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    now = dt.datetime.now(dt.UTC)  # noqa: TID251
    host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([host]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = TlsFiles(folder / "server.crt", folder / "server.key")
    files.cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files, files.cert


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("tls"))[0]


def coordinator(folder: Path, tls: TlsFiles, **settings: Any) -> FlowerCoordinator:
    given = {"listen": ("127.0.0.1", 0), "admin": ("127.0.0.1", 0), "wire": WIRE, **settings}
    return FlowerCoordinator(folder, tls=tls, admin_token=TOKEN, **given)


@pytest.fixture(scope="module")
def notices() -> list[tuple[str, str]]:
    return []


@pytest.fixture(scope="module")
def up(
    tmp_path_factory: pytest.TempPathFactory, tls: TlsFiles, notices: list[tuple[str, str]]
) -> Iterator[FlowerCoordinator]:
    made = coordinator(
        tmp_path_factory.mktemp("coordinator") / "flower",
        tls,
        routes=[Route("/metrics", "text/plain", lambda: b"wardround_up 1\n")],
        notice=lambda level, place: notices.append((level, place)),
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture
def web(up: FlowerCoordinator, tls: TlsFiles) -> Iterator[httpx.Client]:
    """A stranger with the right authority and no key."""
    context = ssl.create_default_context(cafile=str(tls.cert))
    with httpx.Client(base_url=f"https://127.0.0.1:{up.public_port}", verify=context) as made:
        yield made


@pytest.fixture
def admin(up: FlowerCoordinator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{up.admin_port}") as made:
        yield made


@pytest.fixture
def hospital(up: FlowerCoordinator, tls: TlsFiles) -> Iterator[TinyNode]:
    key = transport_key()
    up.register("ash", public_line(key))
    node = TinyNode(up.public_port, tls.cert, key)
    node.activate()
    yield node
    node.close()
    up.unregister("ash")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# ---------------------------------------------------------------------------- the public door
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/metrics",
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-run",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/V1/fleet/pull-messages",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_but_the_calls_of_a_hospital_is_served_in_public(
    web: httpx.Client, path: str, method: str
):
    assert web.request(method, path, headers=bearer(TOKEN)).status_code == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_the_calls_of_a_hospital_are_posts(web: httpx.Client, method: str):
    assert web.request(method, "/v1/fleet/pull-messages").status_code == 404


def test_the_same_call_with_a_registered_key_is_served(hospital: TinyNode):
    assert hospital.fetch() is None
    assert hospital.heartbeat()


@pytest.mark.parametrize(
    "call",
    ["pull-messages", "push-messages", "push-object", "pull-object", "send-node-heartbeat"],
)
def test_without_a_key_no_call_is_answered(web: httpx.Client, call: str):
    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    assert web.post(f"/v1/fleet/{call}", content=body, headers=MEDIA).status_code == 401


def test_a_key_that_is_not_registered_is_refused(up: FlowerCoordinator, tls: TlsFiles):
    node = TinyNode(up.public_port, tls.cert, transport_key())
    with pytest.raises(httpx.HTTPStatusError) as refused:
        node.activate()
    assert refused.value.response.status_code in {401, 412}
    with pytest.raises(httpx.HTTPStatusError) as refused:
        node.fetch()
    assert refused.value.response.status_code == 401
    node.close()


def test_a_registered_key_without_its_private_half_is_refused(
    hospital: TinyNode, up: FlowerCoordinator, tls: TlsFiles
):
    """The header names a registered key; another key signed."""
    thief = TinyNode(up.public_port, tls.cert, transport_key())
    thief.node_id = hospital.node_id
    layer = thief.calls._interceptors[1]
    layer._public_key_bytes = public_key_to_bytes(hospital.key.public_key())
    with pytest.raises(httpx.HTTPStatusError) as refused:
        thief.fetch()
    assert refused.value.response.status_code == 401
    thief.close()


def test_a_key_does_not_speak_for_another_node(
    hospital: TinyNode, up: FlowerCoordinator, tls: TlsFiles
):
    key = transport_key()
    up.register("birch", public_line(key))
    other = TinyNode(up.public_port, tls.cert, key)
    other.activate()
    other.node_id = hospital.node_id
    with pytest.raises(httpx.HTTPStatusError) as refused:
        other.fetch()
    assert refused.value.response.status_code == 401
    other.close()
    up.unregister("birch")


def test_stolen_headers_do_not_outlive_their_time(hospital: TinyNode, monkeypatch):
    from flwr.superlink.routers.fleet import node_auth

    later = node_auth.now() + dt.timedelta(seconds=400)
    assert hospital.fetch() is None
    monkeypatch.setattr(node_auth, "now", lambda: later)
    with pytest.raises(httpx.HTTPStatusError) as refused:
        hospital.fetch()
    assert refused.value.response.status_code == 401


def test_a_revoked_key_is_out_at_once_and_for_good(up: FlowerCoordinator, tls: TlsFiles):
    key = transport_key()
    up.register("elm", public_line(key))
    node = TinyNode(up.public_port, tls.cert, key)
    node.activate()
    assert node.fetch() is None
    assert "elm" in up.sites()
    up.unregister("elm")
    for call in (node.fetch, node.heartbeat, node.activate):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call()
        assert refused.value.response.status_code in {401, 412}
    assert "elm" not in up.sites()
    with pytest.raises(ConfigError) as again:
        up.register("elm", public_line(key))
    assert again.value.code is Code.TRANSPORT_KEY
    node.close()


def test_a_new_key_of_a_site_takes_the_place_of_the_old(up: FlowerCoordinator, tls: TlsFiles):
    old, new = transport_key(), transport_key()
    up.register("elm", public_line(old))
    up.register("elm", public_key_to_bytes(new.public_key()))  # PEM does as well
    up.register("elm", public_line(new))  # and again changes nothing
    nodes = [TinyNode(up.public_port, tls.cert, key) for key in (old, new)]
    with pytest.raises(httpx.HTTPStatusError):
        nodes[0].activate()
    nodes[1].activate()
    assert up.site_of(nodes[1].node_id) == "elm"
    with pytest.raises(ConfigError):
        up.register("fir", public_line(new))
    for node in nodes:
        node.close()
    up.unregister("elm")


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"ecdsa-sha2-nistp384 AAAA",
        b"-----BEGIN PUBLIC KEY-----\nno\n-----END PUBLIC KEY-----\n",
        public_line(ec.generate_private_key(ec.SECP256R1())),
        public_line(rsa.generate_private_key(65537, 2048)),
    ],
)
def test_only_a_p384_key_is_registered(up: FlowerCoordinator, key: bytes):
    with pytest.raises(ConfigError) as refused:
        up.register("elm", key)
    assert refused.value.code is Code.TRANSPORT_KEY


def test_an_old_tls_version_is_refused(up: FlowerCoordinator, tls: TlsFiles):
    for newest, fits in ((ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)):
        context = ssl.create_default_context(cafile=str(tls.cert))
        context.maximum_version = newest
        with socket.create_connection(("127.0.0.1", up.public_port)) as plain:
            try:
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
                    assert wrapped.version() == "TLSv1.3"
                    assert fits
            except ssl.SSLError:
                assert not fits


def test_the_public_port_does_not_speak_plain_http(up: FlowerCoordinator):
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{up.public_port}/v1/fleet/pull-messages")


# ---------------------------------------------------------------------------- bodies
def test_a_part_as_large_as_allowed_is_looked_at_and_a_larger_one_is_not(hospital: TinyNode):
    def push(size: int) -> bool:
        request = PushObjectRequest(
            node=hospital.me,
            run_id=1,
            session_id="x",
            object_id="0" * 64,
            object_content=bytes(size),
        )
        return hospital.calls.PushObject(request).stored

    with pytest.raises(httpx.HTTPStatusError) as refused:
        push(WIRE.most_body)
    assert refused.value.response.status_code == 413
    with pytest.raises(httpx.HTTPStatusError) as run:  # there is no such run, that is all
        push(WIRE.most_body - 1024)
    assert run.value.response.status_code == 403


def test_a_body_of_unknown_length_is_cut_off_at_the_bound(hospital: TinyNode):
    def endless() -> Iterator[bytes]:
        for _ in range(1024):
            yield bytes(1 << 16)

    asked = hospital.calls._client.build_request(
        "POST", f"{hospital.calls._base_url}/v1/fleet/push-object", content=endless(), headers=MEDIA
    )
    layer = hospital.calls._interceptors[1]
    context = SimpleNamespace(request=asked, rpc_method="", message=PushObjectRequest())
    try:
        status = layer.intercept(
            context, lambda c: hospital.calls._client.send(c.request)
        ).status_code
    except httpx.TransportError:  # hung up on while it was still sending
        status = 413
    assert status == 413


@pytest.mark.parametrize(
    "call", ["pull-messages", "send-node-heartbeat", "confirm-message-received"]
)
def test_a_call_that_carries_nothing_may_not_carry_much(hospital: TinyNode, call: str):
    client_ = hospital.calls._client
    layer = hospital.calls._interceptors[1]
    asked = client_.build_request(
        "POST", f"{hospital.calls._base_url}/v1/fleet/{call}", content=bytes(70_000), headers=MEDIA
    )
    context = SimpleNamespace(request=asked, rpc_method="", message=PullMessagesRequest())
    try:
        status = layer.intercept(context, lambda c: client_.send(c.request)).status_code
    except httpx.TransportError:
        status = 413
    assert status == 413


@pytest.mark.parametrize("body", [b"", b"\xff" * 40, bytes(64), b"{}", os.urandom(200)])
@pytest.mark.parametrize(
    "call", ["activate-node", "pull-messages", "push-messages", "push-object", "pull-object"]
)
def test_a_malformed_body_is_refused_and_nothing_breaks(hospital: TinyNode, call: str, body: bytes):
    client_ = hospital.calls._client
    layer = hospital.calls._interceptors[1]
    asked = client_.build_request(
        "POST", f"{hospital.calls._base_url}/v1/fleet/{call}", content=body, headers=MEDIA
    )
    context = SimpleNamespace(request=asked, rpc_method="", message=PullMessagesRequest())
    answer = layer.intercept(context, lambda c: client_.send(c.request))
    assert 400 <= answer.status_code < 500
    assert hospital.fetch() is None


CALLS = {
    "pull-messages": PullMessagesRequest(),
    "push-messages": PushMessagesRequest(),
    "push-object": PushObjectRequest(object_id="0" * 64, object_content=b"x"),
    "pull-object": PullObjectRequest(object_id="0" * 64),
    "confirm-message-received": ConfirmMessageReceivedRequest(message_object_id="0" * 64),
    "send-node-heartbeat": SendNodeHeartbeatRequest(heartbeat_interval=30),
}


def signed(node: TinyNode, call: str, body: bytes) -> int:
    """The status of a call whose headers are right, whatever its body."""
    web = node.calls._client
    asked = web.build_request(
        "POST", f"{node.calls._base_url}/v1/fleet/{call}", content=body, headers=MEDIA
    )
    context = SimpleNamespace(request=asked, rpc_method="", message=PullMessagesRequest())
    return node.calls._interceptors[1].intercept(context, lambda c: web.send(c.request)).status_code


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_means_nothing_is_no_fault_of_ours(
    up: FlowerCoordinator, hospital: TinyNode, call: str
):
    """Right headers, right node, and then: empty, of no run, of a run, cut, and changed."""
    run = up.grid().run.run_id
    chance = np.random.default_rng(7)
    for number in (0, 5, run):
        request = CALLS[call]
        request.node.node_id = hospital.node_id
        if hasattr(request, "run_id"):
            request.run_id = number
        whole = request.SerializeToString()
        bodies = [whole, whole[: len(whole) // 2], whole + b"\x0a\x00", whole + whole]
        for _ in range(15):
            changed = bytearray(whole)
            changed[int(chance.integers(len(changed)))] ^= int(chance.integers(1, 256))
            bodies.append(bytes(changed))
        for body in bodies:
            assert signed(hospital, call, body) < 500
    assert hospital.fetch() is None


def test_a_hospital_that_died_comes_back_though_it_counts_as_online(
    up: FlowerCoordinator, hospital: TinyNode
):
    grid = up.grid()

    def stamp() -> list[str]:
        return [i.last_activated_at for i in grid.get_nodes() if i.node_id == hospital.node_id]

    before, hospital.node_id = stamp(), 0
    hospital.activate()  # without having said good-bye
    assert stamp() != before


# ---------------------------------------------------------------------------- the admin door
@pytest.mark.parametrize(
    "path",
    ["/", "/metrics", "/health", "/docs", "/v1/control/list-runs", "/v1/fleet/pull-messages"],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer \xff"},
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_admin_path_wants_the_token(admin: httpx.Client, path: str, headers, method: str):
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    raw = [(name.encode(), text.encode("latin-1")) for name, text in pairs]
    assert admin.request(method, path, headers=raw).status_code == 401


def test_with_the_token_the_extra_routes_and_flowers_control_answer(admin: httpx.Client):
    metrics = admin.get("/metrics", headers=bearer(TOKEN))
    assert (metrics.status_code, metrics.text) == (200, "wardround_up 1\n")
    assert admin.post("/metrics", headers=bearer(TOKEN)).status_code == 405
    runs = admin.post(
        "/v1/control/list-runs",
        content=ListRunsRequest().SerializeToString(),
        headers={**bearer(TOKEN), **MEDIA},
    )
    assert runs.status_code == 200


def test_the_admin_listener_is_on_loopback_only(tmp_path: Path, tls: TlsFiles):
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org", ""):  # noqa: S104
        with pytest.raises(ConfigError) as refused:
            coordinator(tmp_path / "flower", tls, admin=(host, 0))
        assert refused.value.code is Code.ADMIN_NOT_LOOPBACK
    assert not (tmp_path / "flower").exists()


def test_the_admin_listener_has_another_port_than_the_public_one(up: FlowerCoordinator):
    assert up.admin_port != up.public_port


# ---------------------------------------------------------------------------- ports, files
def test_a_port_that_is_taken_is_named(tmp_path: Path, tls: TlsFiles):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name in ("listen", "admin"):
            with pytest.raises(ConfigError) as refused:
                coordinator(tmp_path / name, tls, **{name: ("127.0.0.1", port)})
            assert refused.value.code is Code.LISTENER_PORT
            assert str(port) in refused.value.message


def test_a_certificate_that_is_none_is_named(tmp_path: Path, tls: TlsFiles):
    other = make_tls(tmp_path / "other")[0]
    for files in (
        TlsFiles(tmp_path / "absent", tls.key),
        TlsFiles(tls.key, tls.key),
        TlsFiles(other.cert, tls.key),
    ):
        with pytest.raises(ConfigError) as refused:
            coordinator(tmp_path / "flower", files)
        assert refused.value.code is Code.LISTENER_TLS


def test_a_folder_has_one_coordinator(tmp_path: Path, tls: TlsFiles):
    first = coordinator(tmp_path / "flower", tls)
    try:
        with pytest.raises(StorageError) as refused:
            coordinator(tmp_path / "flower", tls)
        assert refused.value.code is Code.FOLDER_IN_USE
    finally:
        first.stop()


def test_a_database_that_is_none_is_named(tmp_path: Path, tls: TlsFiles):
    folder = tmp_path / "flower"
    folder.mkdir()
    (folder / "state.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError) as refused:
        coordinator(folder, tls)
    assert refused.value.code is Code.FLOWER_STATE


def test_a_renewed_certificate_is_shown_without_a_restart(up: FlowerCoordinator, tls: TlsFiles):
    def shown() -> bytes:
        context = ssl.create_default_context(cafile=str(tls.cert))
        with (
            socket.create_connection(("127.0.0.1", up.public_port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True) or b""

    before = shown()
    make_tls(tls.cert.parent)
    up.renew()
    assert shown() != before


# ---------------------------------------------------------------------------- the grid
def ask(grid: Grid, node: TinyNode, payloads: tuple[bytes, ...] = ()) -> str:
    envelope = Envelope(STUDY, "coordinator", "ash", bytes(16), "", bytes(64))
    message = Message(records(envelope, payloads), node.node_id, "query.step", ttl=60)
    return next(iter(grid.push_messages([message])))


def pulled(grid: Grid, up: FlowerCoordinator, *names: str) -> Message:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for found in grid.pull_messages(names):
            return found
        up.wait(0.2)
    raise AssertionError("no answer came")


def test_a_question_goes_out_and_its_answer_comes_back(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    payload = os.urandom(300_000)
    name = ask(grid, hospital, (payload, b""))
    came = hospital.pull()
    assert question(came)[1] == (payload, b"")
    assert hospital.push(reply(came, SITE_KEY, "ash", (payload[::-1], b"small")))
    answer = pulled(grid, up, name)
    assert answer.metadata.reply_to_message_id == name
    assert question(answer)[1] == (payload[::-1], b"small")
    assert type(answer.content["payload-0"]["data"].data) is bytes


def test_nothing_of_an_answered_question_stays_on_disk(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    name = ask(grid, hospital, (os.urandom(200_000),))
    assert up._objects.blobs.bytes > 200_000
    assert hospital.push(reply(hospital.pull(), SITE_KEY, "ash", (os.urandom(100_000),)))
    pulled(grid, up, name)
    assert (up._objects.blobs.bytes, len(up._objects)) == (0, 0)
    assert not any((up._objects.blobs._folder).iterdir())


def test_a_payload_for_many_hospitals_is_one_file(up: FlowerCoordinator, hospital: TinyNode):
    key = transport_key()
    up.register("birch", public_line(key))
    other = TinyNode(up.public_port, hospital.ca, key)
    other.activate()
    grid = up.grid()
    payload = os.urandom(400_000)
    ask(grid, hospital, (payload,))
    ask(grid, other, (payload,))
    assert up._objects.blobs.bytes < 500_000
    assert question(hospital.pull())[1] == question(other.pull())[1] == (payload,)
    other.close()
    up.unregister("birch")


def test_a_half_answer_is_not_handed_out_and_is_completed_by_what_is_missing(
    up: FlowerCoordinator, hospital: TinyNode, monkeypatch
):
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100_000)
    grid = up.grid()
    name = ask(grid, hospital)
    came = hospital.pull()
    payload = os.urandom(1_000_000)
    answer = reply(came, SITE_KEY, "ash", (payload,))
    assert hospital.push(answer, most=5)
    first = set(hospital.sent)
    assert list(grid.pull_messages([name])) == []
    assert hospital.push(answer)  # after a cut: announced again
    assert first.isdisjoint(hospital.sent)
    assert question(pulled(grid, up, name))[1] == (payload,)


def test_an_upload_cut_off_serves_the_next_question_too(
    up: FlowerCoordinator, hospital: TinyNode, monkeypatch
):
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100_000)
    grid = up.grid()
    ask(grid, hospital)
    payload = os.urandom(1_000_000)
    assert hospital.push(reply(hospital.pull(), SITE_KEY, "ash", (payload,)), most=8)
    first = set(hospital.sent)
    name = ask(grid, hospital)  # takes the place of the one before
    assert hospital.push(reply(hospital.pull(), SITE_KEY, "ash", (payload,)))
    assert first.isdisjoint(hospital.sent)
    assert question(pulled(grid, up, name))[1] == (payload,)


def test_a_question_lost_on_the_line_is_handed_out_again(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    name = ask(grid, hospital, (b"once more",))
    assert hospital.fetch() is not None  # claimed; the line broke before a part of it came
    came = hospital.pull()
    assert question(came)[1] == (b"once more",)
    assert hospital.fetch() is None  # received whole: not a third time
    assert hospital.push(reply(came, SITE_KEY, "ash", (b"x",)))
    pulled(grid, up, name)
    assert hospital.fetch() is None


def test_a_waiting_hospital_is_woken_by_its_question(tmp_path: Path, tls: TlsFiles):
    held = coordinator(tmp_path / "flower", tls, wire=Wire(hold_s=60))
    held.start()
    key = transport_key()
    held.register("ash", public_line(key))
    node = TinyNode(held.public_port, tls.cert, key)
    node.activate()
    came: list[Message] = []
    waiter = threading.Thread(target=lambda: came.append(node.pull()))
    waiter.start()
    while not held._bell._waiting:
        held.wait(0.01)
    began = time.monotonic()
    ask(held.grid(), node)
    waiter.join(timeout=30)
    assert came
    assert time.monotonic() - began < 30  # far below the hold
    node.close()
    held.stop()


def test_an_answer_above_the_bound_is_not_taken(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    ask(grid, hospital)
    came = hospital.pull()
    assert not hospital.push(reply(came, SITE_KEY, "ash", (os.urandom(WIRE.most_answer + 1),)))
    small = up.grid(most_answer=10_000)
    name = ask(small, hospital)
    assert hospital.push(reply(hospital.pull(), SITE_KEY, "ash", (os.urandom(20_000),)))
    answer = pulled(small, up, name)
    assert answer.has_error()
    assert answer.error.reason == Code.MALFORMED.label
    assert up._objects.blobs.bytes < 100_000 or not up._state.answers


def test_a_question_to_nobody_is_not_pushed(up: FlowerCoordinator):
    grid = up.grid()
    nobody = SimpleNamespace(node_id=12345)
    assert ask(grid, nobody) == ""


def test_a_hospital_that_deactivates_is_gone_from_the_grid(
    up: FlowerCoordinator, hospital: TinyNode
):
    grid = up.grid()
    assert hospital.node_id in grid.get_node_ids()
    [before] = [i.last_activated_at for i in grid.get_nodes() if i.node_id == hospital.node_id]
    hospital.activate()  # off and on again
    [after] = [i.last_activated_at for i in grid.get_nodes() if i.node_id == hospital.node_id]
    assert before != after


def test_bytes_are_counted_by_site(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    name = ask(grid, hospital, (os.urandom(50_000),))
    assert hospital.push(reply(hospital.pull(), SITE_KEY, "ash", (os.urandom(90_000),)))
    pulled(grid, up, name)
    tally = up.traffic()["ash"]
    assert tally.up > 90_000
    assert tally.down > 50_000


def test_a_server_app_runs_over_a_grid_of_its_own(up: FlowerCoordinator):
    seen: list[Any] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Any) -> None:
        seen.append((grid.run.run_id, context.run_id))

    up.run(app)
    assert seen[0][0] == seen[0][1]


def test_the_exchange_speaks_with_a_hospital_over_the_wire(
    up: FlowerCoordinator, hospital: TinyNode
):
    got: list[tuple[str, bytes]] = []

    class Driver:
        machine = SimpleNamespace(next_wakeup=float("inf"))

        def start(self) -> None:
            pass

        def tick(self) -> None:
            pass

        def receive(self, site: str, payload: bytes) -> None:
            got.append((site, payload))
            if payload == b"hello":
                exchange.send("ash", b"train")

    class Watch:
        def __getattr__(self, name: str) -> Any:
            return lambda *_told: None

    exchange = Exchange(
        up.grid(),
        COORDINATOR_KEY,
        STUDY,
        {"ash": SITE_KEY.public},
        SystemClock(),
        registered=up.site_of,
        watch=Watch(),
        pace=Pace(poll_s=0.2, look_s=0.0),
        pause=up.wait,
    )

    def work() -> None:
        for answer in (b"hello", b"trained"):
            came = hospital.pull()
            hospital.push(reply(came, SITE_KEY, "ash", (answer,)))

    other = threading.Thread(target=work)
    other.start()
    exchange.serve(Driver(), lambda: len(got) == 2)
    other.join()
    assert got == [("ash", b"hello"), ("ash", b"trained")]


# ---------------------------------------------------------------------------- hostile hospitals
def hostile(node: TinyNode, run_id: int, session: str, parts: dict[str, bytes]) -> list[bool]:
    return [
        node.calls.PushObject(
            PushObjectRequest(
                node=node.me, run_id=run_id, session_id=session, object_id=name, object_content=part
            )
        ).stored
        for name, part in parts.items()
    ]


def test_a_part_that_is_not_what_its_name_says_is_not_kept(
    up: FlowerCoordinator, hospital: TinyNode
):
    grid = up.grid()
    name = ask(grid, hospital)
    answer = reply(hospital.pull(), SITE_KEY, "ash", (b"x" * 100,))
    told, parts = hospital.announce(answer)
    wrong = {key: b"other" + item.deflate() for key, item in parts.items()}
    assert not any(hostile(hospital, answer.metadata.run_id, told.session_id, wrong))
    [(chunk, _)] = answer.content["payload-0"]["data"].slice_array()
    sound = Array(dtype="uint8", shape=(1,), stype="s", data=b"z").slice_array()[0][1].deflate()
    assert hostile(hospital, answer.metadata.run_id, told.session_id, {chunk: sound}) == [False]
    assert list(grid.pull_messages([name])) == []
    right = {key: item.deflate() for key, item in parts.items()}
    assert all(hostile(hospital, answer.metadata.run_id, told.session_id, right))
    assert pulled(grid, up, name).has_content()


def test_an_answer_whose_parts_contradict_each_other_becomes_an_error(
    up: FlowerCoordinator, hospital: TinyNode, monkeypatch
):
    """An array that names a part again and again: kilobytes on disk, gigabytes in memory."""
    grid = up.grid()
    name = ask(grid, hospital)
    answer = reply(hospital.pull(), SITE_KEY, "ash", (b"y" * 50_000,))
    array = answer.content["payload-0"]["data"]
    chunks = array.slice_array()
    array.__dict__["_chunks"] = chunks * 1000
    assert isinstance(array, Array)
    assert hospital.push(answer)
    found = pulled(grid, up, name)
    assert found.has_error()
    assert found.error.reason == Code.MALFORMED.label


@pytest.mark.parametrize(
    "body", [b"not json", b"[]", b"{}", b'{"arraychunk_ids": [7]}', b"\xff\xfe"]
)
def test_an_array_that_cannot_be_read_becomes_an_error(
    up: FlowerCoordinator, hospital: TinyNode, monkeypatch, body: bytes
):
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    grid = up.grid()
    name = ask(grid, hospital)
    answer = reply(hospital.pull(), SITE_KEY, "ash", (b"y" * 500,))
    with monkeypatch.context() as changed:
        changed.setattr(Array, "deflate", lambda self: add_header_to_object_body(body, self))
        assert hospital.push(answer)
    found = pulled(grid, up, name)
    assert found.has_error()
    assert found.error.reason == Code.MALFORMED.label


def test_an_error_of_a_hospital_comes_as_one(up: FlowerCoordinator, hospital: TinyNode):
    grid = up.grid()
    name = ask(grid, hospital)
    assert hospital.push(Message(Error(2, Code.USAGE.label), reply_to=hospital.pull()))
    found = pulled(grid, up, name)
    assert (found.error.code, found.error.reason) == (2, Code.USAGE.label)


# ---------------------------------------------------------------------------- life and death
def test_flower_says_nothing_on_the_terminal(
    up: FlowerCoordinator, hospital: TinyNode, capfd, notices: list[tuple[str, str]]
):
    with pytest.raises(httpx.HTTPStatusError):
        hospital.calls.PushObject(PushObjectRequest(node=hospital.me, run_id=5))
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert all(" " not in place for _, place in notices)


CHILD = """
import os, signal, sys, time
from pathlib import Path
from server.flower import FlowerCoordinator, TlsFiles
folder, cert, key, line = sys.argv[1:]
made = FlowerCoordinator(
    Path(folder), listen=("127.0.0.1", 0), admin=("127.0.0.1", 0),
    tls=TlsFiles(Path(cert), Path(key)), admin_token="t",
)
made.start()
made.register("ash", Path(line).read_bytes())
made.grid()
print(made.public_port, flush=True)
time.sleep(600)
"""


def test_registrations_survive_a_kill_and_open_runs_do_not(tmp_path: Path, tls: TlsFiles):
    key = transport_key()
    line = tmp_path / "ash.pub"
    line.write_bytes(public_line(key))
    folder = tmp_path / "flower"
    argv = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        CHILD,
        str(folder),
        str(tls.cert),
        str(tls.key),
        str(line),
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        node = TinyNode(port, tls.cert, key)
        node.activate()
        child.kill()
    node.close()
    back = coordinator(folder, tls)
    back.start()
    try:
        assert back.sites() == ("ash",)
        again = TinyNode(back.public_port, tls.cert, key)
        again.node_id = node.node_id
        assert again.heartbeat()  # no new activation is needed
        assert not back._state.get_run_info(statuses=["pending", "starting", "running"])
        grid = back.grid()
        name = ask(grid, again, (b"after",))
        assert again.push(reply(again.pull(), SITE_KEY, "ash", (b"fine",)))
        assert question(pulled(grid, back, name))[1] == (b"fine",)
        again.close()
    finally:
        back.stop()


def test_a_stopped_coordinator_has_given_its_ports_and_folder_back(tmp_path: Path, tls: TlsFiles):
    first = coordinator(tmp_path / "flower", tls)
    first.start()
    ports = (first.public_port, first.admin_port)
    first.stop()
    second = coordinator(
        tmp_path / "flower", tls, listen=("127.0.0.1", ports[0]), admin=("127.0.0.1", ports[1])
    )
    second.stop()


def test_no_secret_is_on_disk_or_in_the_database(up: FlowerCoordinator):
    folder = up._objects.blobs._folder.parent
    for path in folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes()
    assert folder.stat().st_mode & 0o077 == 0
