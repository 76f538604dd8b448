"""A coordinator's Fleet side over real loopback TLS, whose every fault a test chooses."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import os
import ssl
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own, about click
    from flwr.app import Message
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_public_key,
        public_key_to_bytes,
        verify_signature,
    )
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
    from flwr.supercore.task_identity import TaskIdentity

    from client.app import Answer, sealed, shell
    from client.flower import FleetLink

from client.link import LinkWorld
from common.crypto.identity import SiteKey
from common.protocol.envelope import COORDINATOR, sign_envelope

STUDY = bytes(range(32))
NODE, RUN = 7_000_000_007, 41
COORDINATOR_KEY = SiteKey.from_seed(b"C" * 32)
SITE_KEY = SiteKey.from_seed(b"S" * 32)
LONG_S = float(os.environ.get("WARDROUND_TEST_WAIT", "60"))

REQUESTS = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-object": message_pb2.PushObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "get-run": run_pb2.GetRunRequest,
    "get-fab": fab_pb2.GetFabRequest,
}


# ---------------------------------------------------------------------------- keys
def make_pki(folder: Path, names: tuple[str, ...] = ("localhost", "coordinator.test")) -> Path:
    """An authority, a server certificate and a transport key, in `folder`."""
    now = dt.datetime.now(dt.UTC)  # noqa: TID251
    first, last = now - dt.timedelta(days=1), now + dt.timedelta(days=30)

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    # A name of its own: OpenSSL looks for an issuer by name, and two of one name hide a mistake.
    authority = named(f"authority {x509.random_serial_number():x}"[:40])
    ca = (
        x509.CertificateBuilder(authority, authority, ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    alternatives = [x509.DNSName(name) for name in names]
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(ca.subject, named("coordinator"), key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectAlternativeName([*alternatives, address]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem, plain = forms.Encoding.PEM, forms.NoEncryption()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_bytes(ca.public_bytes(pem))
    (folder / "server.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "server.key").write_bytes(key.private_bytes(pem, forms.PrivateFormat.PKCS8, plain))
    transport = ec.generate_private_key(ec.SECP384R1())
    path = folder / "transport.key"
    path.write_bytes(transport.private_bytes(pem, forms.PrivateFormat.OpenSSH, plain))
    path.chmod(0o600)
    return folder


# ---------------------------------------------------------------------------- the hospital
class FakeHospital:
    """Answers every question with what `reply` makes of it; remembers what it was asked."""

    def __init__(self, reply: Callable[[tuple[bytes, ...]], Answer] | None = None) -> None:
        self.site = "north"
        self.key = SITE_KEY
        self.coordinator = COORDINATOR_KEY.public
        self.asked: list[tuple[bytes, tuple[bytes, ...], bool]] = []
        self._reply = reply or (lambda payloads: Answer(tuple(p[::-1] for p in payloads)))

    def key_for(self, study: bytes) -> SiteKey:
        return self.key

    def ask(self, study: bytes, payloads: tuple[bytes, ...], *, hello: bool) -> Answer:
        self.asked.append((study, tuple(payloads), hello))
        return Answer((b"hello",)) if hello else self._reply(tuple(payloads))


def question(
    payloads: tuple[bytes, ...] = (),
    *,
    kind: str = "query.step",
    key: SiteKey = COORDINATOR_KEY,
    recipient: str = "north",
    nonce: bytes = b"n" * 16,
    study: bytes = STUDY,
    ttl: float = 3600.0,
) -> Message:
    """A question as the coordinator makes it."""
    envelope = sign_envelope(
        key, study=study, sender=COORDINATOR, recipient=recipient, nonce=nonce, payloads=payloads
    )
    return raw_question(sealed(envelope, payloads), kind=kind, ttl=ttl)


def raw_question(content: Any, *, kind: str = "query.step", ttl: float = 3600.0) -> Message:
    """A question with any records."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
    message = Message(content, dst_node_id=NODE, message_type=kind, ttl=ttl)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


# ---------------------------------------------------------------------------- the server
Fault = Callable[[str, int], tuple[Any, ...] | None]


class FleetDouble:
    """Speaks Flower's Fleet API for one node, and counts every part it hands out or takes in.

    `fault(path, n)` is asked before the n-th call of a path: None, or what happens instead:
    ("status", 500), ("garbage", b"..."), ("truncate", bytes of the body that still go out),
    ("hang-up", bytes of the request that are read first), ("swallow",) does it, but tells nobody.
    """

    def __init__(self, pki: Path, *, port: int = 0) -> None:
        self.pki = pki
        transport = forms.load_ssh_private_key((pki / "transport.key").read_bytes(), None)
        self.public: bytes | None = public_key_to_bytes(transport.public_key())
        self.online = False
        self.skew = 0.0
        self.fault: Fault = lambda _path, _n: None
        self.calls: Counter[str] = Counter()
        self.pulled: Counter[str] = Counter()
        self.pushed: Counter[str] = Counter()
        self.stored: dict[str, bytes] = {}
        self.sessions: dict[str, set[str]] = {}
        self.parts: dict[str, bytes] = {}
        self.trees: dict[str, Any] = {}
        self.waiting: deque[tuple[Message, Any]] = deque()
        self.replies: dict[str, tuple[Any, Any]] = {}
        self.told_clients: list[str] = []
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = LONG_S

            def do_POST(self) -> None:
                double.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                pass

            def finish_request(self, request: Any, client: Any) -> None:
                with context.wrap_socket(request, server_side=True) as secured:
                    super().finish_request(secured, client)

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "server.crt", pki / "server.key")
        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Gone: nobody answers, and open connections break."""
        self.fault = lambda _path, _n: ("hang-up", 0)
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------------ what tests do
    def put(self, message: Message) -> str:
        """Queue a question; returns its id."""
        with self.changed:
            tree = get_object_tree(message)
            for name, part in get_all_nested_objects(message).items():
                self.parts.setdefault(name, part.deflate())
            self.waiting.append((message, tree))
        return str(message.metadata.message_id)

    def reply_to(self, name: str, timeout: float = LONG_S) -> Message:
        """The complete reply to a question."""

        def complete() -> bool:
            found = self.replies.get(name)
            return found is not None and all(
                node.object_id in self.stored for node in iterate_object_tree(found[1])
            )

        self.wait(complete, timeout)
        _, tree = self.replies[name]
        contents = {n.object_id: self.stored[n.object_id] for n in iterate_object_tree(tree)}
        return inflate_object_from_contents(tree.object_id, contents)  # type: ignore[return-value]

    def wait(self, ready: Callable[[], bool], timeout: float = LONG_S) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, timeout), "the link did not get there"

    # ------------------------------------------------------------------ serving
    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.removeprefix("/v1/fleet/")
        handler.moment = time.time() + self.skew  # type: ignore[attr-defined]  # noqa: TID251
        with self.changed:
            self.calls[path] += 1
            fault = self.fault(path, self.calls[path]) or ("none",)
            self.changed.notify_all()
        length = int(handler.headers["content-length"])
        if fault[0] == "hang-up":
            handler.rfile.read(min(length, fault[1]))
            handler.close_connection = True
            return
        body = handler.rfile.read(length)
        if fault[0] == "status":
            self._send(handler, fault[1], b"")
        elif fault[0] == "garbage":
            self._send(handler, 200, fault[1])
        else:
            status, content = self._handle(path, handler, body)
            if fault[0] == "swallow":
                handler.close_connection = True
                return
            self._send(handler, status, content, cut=fault[1] if fault[0] == "truncate" else None)
        with self.changed:
            self.changed.notify_all()

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, cut: int | None = None
    ) -> None:
        head = (
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n"
            f"Date: {formatdate(handler.moment, usegmt=True)}\r\n\r\n"
        )
        handler.wfile.write(head.encode() + (body if cut is None else body[:cut]))
        if cut is not None:
            handler.close_connection = True

    def _known(self, handler: BaseHTTPRequestHandler, request: Any) -> bool:
        headers = handler.headers
        public = base64.b64decode(headers["flwr-public-key"])
        moment = headers["flwr-timestamp"]
        age = handler.moment - dt.datetime.fromisoformat(moment).timestamp()
        signed = verify_signature(
            bytes_to_public_key(public),
            moment.encode(),
            base64.b64decode(headers["flwr-signature"]),
        )
        if not -5 < age < 305 or not signed:
            return False
        if hasattr(request, "public_key"):
            return bool(request.public_key == public)
        node = request.node.node_id if hasattr(request, "node") else request.node_id
        return public == self.public and node == NODE

    def _handle(self, path: str, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        request = REQUESTS[path].FromString(body)
        if handler.headers["content-type"] != PROTOBUF_MEDIA_TYPE:
            return 415, b""
        if not self._known(handler, request):
            return 401, b""
        with self._lock:
            made = getattr(self, "_" + path.replace("-", "_"))(request)
        return (made, b"") if isinstance(made, int) else (200, made.SerializeToString())

    def _activate_node(self, request: Any) -> Any:
        if request.public_key != self.public or self.online:
            return 412
        self.online = True
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def _deactivate_node(self, _request: Any) -> Any:
        if not self.online:
            return 412
        self.online = False
        return fleet_pb2.DeactivateNodeResponse()

    def _send_node_heartbeat(self, _request: Any) -> Any:
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=self.online)

    def _pull_messages(self, _request: Any) -> Any:
        response = fleet_pb2.PullMessagesResponse()
        if self.waiting:
            message, tree = self.waiting.popleft()
            bare = remove_content_from_message(message) if message.has_content() else message
            response.messages_list.append(message_to_proto(bare))
            response.message_object_trees.append(tree)
        return response

    def _pull_object(self, request: Any) -> Any:
        content = self.parts.get(request.object_id)
        self.pulled[request.object_id] += 1
        return message_pb2.PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )

    def _confirm_message_received(self, _request: Any) -> Any:
        return message_pb2.ConfirmMessageReceivedResponse()

    def _push_messages(self, request: Any) -> Any:
        message, tree = request.messages_list[0], request.message_object_trees[0]
        self.replies[message.metadata.reply_to_message_id] = (message, tree)
        names = [node.object_id for node in iterate_object_tree(tree)]
        missing = [name for name in dict.fromkeys(names) if name not in self.stored]
        session = f"session-{len(self.sessions)}"
        self.sessions[session] = set(missing)
        return fleet_pb2.PushMessagesResponse(objects_to_push=missing, session_id=session)

    def _push_object(self, request: Any) -> Any:
        wanted = request.object_id in self.sessions.get(request.session_id, ())
        self.pushed[request.object_id] += 1
        if wanted:
            self.stored[request.object_id] = request.object_content
        return message_pb2.PushObjectResponse(stored=wanted)


# ---------------------------------------------------------------------------- a running link
def quick(stop: threading.Event, seconds: float) -> None:
    """A pause that costs a test nothing."""
    stop.wait(min(seconds, 0.01))


class Running:
    """A link at work in a thread, with its fake hospital."""

    def __init__(
        self,
        pki: Path,
        address: str,
        state: Path,
        *,
        hospital: FakeHospital | None = None,
        world: LinkWorld | None = None,
        app: Any = None,
        **options: Any,
    ) -> None:
        self.hospital = hospital or FakeHospital()
        self.beats = 0
        self.link = FleetLink(
            address,
            pki / "ca.crt",
            pki / "transport.key",
            shell(lambda: self.hospital) if app is None else app,
            {},
            state=state,
            beat=self._beat,
            world=world or LinkWorld(pause=quick),
            **options,
        )
        self.stop = threading.Event()
        self.raised: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        self.beats += 1

    def _run(self) -> None:
        try:
            self.link.run(self.stop)
        except BaseException as error:  # noqa: BLE001
            self.raised.append(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()
        if self.raised:
            raise self.raised[0]

    def until(self, ready: Callable[[Any], bool]) -> Any:
        """The link's state once `ready` says so of it."""
        end = time.monotonic() + LONG_S
        while not ready(self.link.state()):
            assert time.monotonic() < end, self.link.state()
            assert self.thread.is_alive(), self.raised
            threading.Event().wait(0.005)
        return self.link.state()
