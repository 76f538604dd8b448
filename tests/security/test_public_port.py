"""The public port against thieves, liars and noise, over real TLS sockets."""

from __future__ import annotations

import gc
import math
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)

from client.link import LinkWorld
from common.cli import VERSION
from common.crypto.identity import SiteKey
from common.errors import Code
from common.protocol.envelope import COORDINATOR, sign_envelope
from common.skew import VERSION_HEADER
from common.world import ManualClock, SystemClock
from server.app import Exchange, Pace
from server.doors import PATHS, Wire, _mark
from tests.flower_node import TinyNode, public_line, question, records, reply, transport_key
from tests.security.coordinator import Up, hospital_link, real_coordinator
from tests.security.wired import Silent

STUDY = b"S" * 32
KEY = SiteKey.from_seed(b"c" * 32)
SITES = {site: SiteKey.from_seed(site.encode().ljust(32, b".")) for site in ("ash", "birch")}
MEDIA = {"content-type": "application/protobuf"}
SHORT = Wire(hold_s=0.2, body_s=0.5, head_s=0.5, most_answer=4 << 20, most_connections=40)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with real_coordinator(tmp_path_factory.mktemp("public"), SHORT) as made:
        yield made


@pytest.fixture
def nodes(up: Up) -> Iterator[dict[str, TinyNode]]:
    """Both hospitals, each with its own connection key."""
    made = {}
    for site in SITES:
        key = transport_key()
        up.flower.register(site, public_line(key))
        made[site] = TinyNode(up.flower.public_port, up.ca, key)
        made[site].activate()
    yield made
    for site, node in made.items():
        node.close()
        up.flower.unregister(site)


class Driver:
    """Takes what the exchange lets through."""

    def __init__(self) -> None:
        self.machine = SimpleNamespace(next_wakeup=math.inf)
        self.got: list[tuple[str, bytes]] = []

    def start(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def receive(self, site: str, payload: bytes) -> None:
        self.got.append((site, payload))


class Coordinator:
    """An exchange over the real listener; the test turns the handle."""

    def __init__(self, up: Up) -> None:
        self.driver, self.watch, self.flower = Driver(), Silent(), up.flower
        self.exchange = Exchange(
            up.flower.grid(),
            KEY,
            STUDY,
            {site: key.public for site, key in SITES.items()},
            SystemClock(),
            registered=up.flower.site_of,
            watch=self.watch,
            pace=Pace(look_s=0.0, silence_s=math.inf, most_answer=1 << 20),
        )

    def turn(self) -> None:
        while self.exchange.step(self.driver):
            pass

    def hear(self, count: int = 1) -> None:
        """Until so many answers more were taken or refused."""
        want = len(self.driver.got) + len(self.watch.refusals) + count
        while len(self.driver.got) + len(self.watch.refusals) < want:
            if not self.exchange.step(self.driver):
                self.flower.wait(0.5)

    def forget_hello(self) -> None:
        """Ask anew at once; the pause against storms is not what is tested."""
        for node in self.exchange._nodes.values():
            if node.asked is None:
                node.greet, node.greeted = True, -math.inf
        self.turn()


@pytest.fixture
def asking(up: Up, nodes: dict[str, TinyNode]) -> Coordinator:
    made = Coordinator(up)
    made.turn()  # a hello is out to each
    return made


# ---------------------------------------------------------------------------- stolen headers


class Tap:
    """Remembers every signed request of a node, as somebody inside its TLS would see it."""

    def __init__(self, node: TinyNode) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        node.calls._client.event_hooks = {"request": [self.keep]}

    def keep(self, request: httpx.Request) -> None:
        self.seen.append((request.url.path, dict(request.headers), request.content))


def replayed(up: Up, path: str, headers: dict[str, str], body: bytes) -> httpx.Response:
    """The same request from another connection."""
    kept = {k: v for k, v in headers.items() if k not in {"host", "content-length"}}
    context = ssl.create_default_context(cafile=str(up.ca))
    url = f"https://127.0.0.1:{up.flower.public_port}{path}"
    return httpx.post(url, content=body, headers=kept, verify=context)


def test_no_request_that_was_served_is_served_again_to_another(up, nodes, asking):
    node = nodes["ash"]
    tap = Tap(node)
    came = node.pull()
    assert node.push(reply(came, SITES["ash"], "ash", (b"hello",)))
    asking.hear()
    assert {path.rpartition("/")[2] for path, _, _ in tap.seen} >= {
        "pull-messages",
        "pull-object",
        "confirm-message-received",
        "push-messages",
        "push-object",
    }
    for path, headers, body in tap.seen:
        again = replayed(up, path, headers, body)
        assert (again.status_code, again.content) == (401, b""), path
    assert asking.driver.got == [("ash", b"hello")]


def test_stolen_headers_do_not_serve_another_request_either(up, nodes, asking):
    """Flower signs the time alone: the body is the thief's to choose."""
    node = nodes["ash"]
    tap = Tap(node)
    metadata, tree = node.fetch()
    _, headers, _ = tap.seen[-1]
    bodies = {
        "pull-object": PullObjectRequest(
            node=node.me, run_id=metadata.run_id, object_id=tree.object_id
        ),
        "confirm-message-received": ConfirmMessageReceivedRequest(
            node=node.me, run_id=metadata.run_id, message_object_id=metadata.message_id
        ),
        "pull-messages": PullMessagesRequest(node=node.me),
    }
    for call, request in bodies.items():
        answer = replayed(up, f"/v1/fleet/{call}", headers, request.SerializeToString())
        assert answer.status_code == 401, call
    assert node.download(metadata, tree).has_content()  # control: nothing was spoilt


def test_control_a_moment_that_was_not_used_would_serve(up, nodes):
    """So it is the use that closes it, not something else about the other connection."""
    node = nodes["ash"]
    unsent: list[httpx.Request] = []
    real = node.calls._client.send
    node.calls._client.send = lambda request, **_: (
        unsent.append(request)
        or real(  # type: ignore[method-assign]
            httpx.Request("POST", request.url.copy_with(path="/nowhere"))
        )
    )
    with pytest.raises(httpx.HTTPStatusError):
        node.heartbeat()
    (request,) = unsent
    assert replayed(up, request.url.path, dict(request.headers), request.content).status_code == 200


def test_while_a_request_waits_its_headers_serve_nobody_else(up, nodes):
    node = nodes["ash"]
    tap = Tap(node)
    waits = threading.Thread(target=node.fetch)  # held: there is no question
    waits.start()
    while not tap.seen:
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)
    path, headers, body = tap.seen[-1]
    assert replayed(up, path, headers, body).status_code == 401
    waits.join()


def kept_after(up: Up, headers: dict[str, str]) -> bool:
    """Whether the door remembers this moment as used, once it has had the time to forget it.

    It forgets a refused one after the answer, which the caller may have before that.
    """
    used = up.flower._public_door._once._used
    mark = _mark(headers["flwr-public-key"], headers["flwr-timestamp"])
    for _ in range(200):
        if mark not in used:
            return False
        threading.Event().wait(0.01)
    return True


def test_a_refused_request_uses_nobodys_moment_up(up, nodes):
    """Somebody who knows a public key and guesses a moment cannot spend it for its owner."""
    node = nodes["ash"]
    tap = Tap(node)
    assert node.heartbeat()
    path, headers, body = tap.seen[-1]
    forged = {**headers, "flwr-timestamp": headers["flwr-timestamp"].replace("T", " ")}
    for _ in range(3):
        assert replayed(up, path, forged, body).status_code == 401
        assert not kept_after(up, forged)
    assert kept_after(up, headers)  # control: one that was served is remembered


def test_a_hospital_never_signs_one_moment_twice_and_follows_a_clock_that_is_set_back(up, tmp_path):
    wall = ManualClock(1_800_000_000.0)
    link = hospital_link(up, tmp_path, "elm", lambda *_: None, LinkWorld(wall=wall))

    def moment() -> str:
        return str(link._fleet._signed()["flwr-timestamp"])

    told = [moment() for _ in range(2000)]
    assert len(set(told)) == len(told)
    assert told == sorted(told)
    link._fleet._world = LinkWorld(wall=ManualClock(1_799_990_000.0))
    assert moment() < told[0]
    up.flower.unregister("elm")


# ---------------------------------------------------------------------------- who says what


def test_an_answer_under_another_hospitals_name_or_key_is_refused(up, nodes, asking):
    """ash's node and connection key; birch's signature, birch's name, both, and its own."""
    node = nodes["ash"]
    wrong = [
        (SITES["birch"], "birch", Code.SIGNER_UNKNOWN),
        (SITES["birch"], "ash", Code.MESSAGE_SIGNATURE),
        (SITES["ash"], "birch", Code.SIGNER_UNKNOWN),
        (SiteKey.from_seed(b"x" * 32), "ash", Code.MESSAGE_SIGNATURE),
    ]
    for key, name, code in wrong:
        assert node.push(reply(node.pull(), key, name, (b"lie",)))
        asking.hear()
        assert asking.watch.refusals[-1] == ("ash", code)
        assert asking.driver.got == []
        asking.forget_hello()
    assert node.push(reply(node.pull(), SITES["ash"], "ash", (b"truth",)))
    asking.hear()
    assert asking.driver.got == [("ash", b"truth")]


def test_an_answer_that_was_given_before_is_refused_by_its_nonce(up, nodes, asking):
    node = nodes["ash"]
    first = node.pull()
    asked, _ = question(first)
    envelope = sign_envelope(
        SITES["ash"],
        study=STUDY,
        sender="ash",
        recipient=COORDINATOR,
        nonce=asked.nonce,
        payloads=(b"hello",),
    )
    assert node.push(Message(records(envelope, (b"hello",)), reply_to=first))
    asking.hear()
    asking.forget_hello()
    second = node.pull()
    assert node.push(Message(records(envelope, (b"hello",)), reply_to=second))
    asking.hear()
    assert asking.watch.refusals == [("ash", Code.MESSAGE_SIGNATURE)]
    assert asking.driver.got == [("ash", b"hello")]


def test_only_a_hospital_that_is_known_hears_the_release(up, nodes):
    node = nodes["ash"]
    told: list[httpx.Response] = []
    node.calls._client.event_hooks = {"response": [told.append]}
    assert node.heartbeat()
    assert told[-1].headers[VERSION_HEADER] == VERSION
    context = ssl.create_default_context(cafile=str(up.ca))
    with httpx.Client(base_url=f"https://127.0.0.1:{up.flower.public_port}", verify=context) as web:
        for path in [*sorted(PATHS), "/", "/docs"]:
            answer = web.post(path, content=b"", headers=MEDIA)
            assert VERSION_HEADER not in answer.headers
            assert VERSION not in str(answer.headers) + answer.text


# ---------------------------------------------------------------------------- bodies, at random


def mutated(draw: np.random.Generator, body: bytes) -> bytes:
    """A valid body with a few bytes changed, dropped, repeated or put in."""
    data = bytearray(body)
    for _ in range(int(draw.integers(1, 5))):
        at = int(draw.integers(0, max(1, len(data))))
        kind = int(draw.integers(0, 4))
        if kind == 0 and data:
            data[at % len(data)] ^= int(draw.integers(1, 256))
        elif kind == 1:
            del data[at : at + int(draw.integers(1, 9))]
        elif kind == 2:
            data[at:at] = data[at : at + int(draw.integers(1, 33))]
        else:
            data[at:at] = draw.bytes(int(draw.integers(1, 17)))
    return bytes(data)


def valid_bodies(node: TinyNode, run: int) -> dict[str, bytes]:
    me, name = node.me, "ab" * 32
    tree = ObjectTree(object_id=name, children=[ObjectTree(object_id="cd" * 32)] * 3)
    return {
        "pull-messages": PullMessagesRequest(node=me).SerializeToString(),
        "push-messages": PushMessagesRequest(
            node=me, message_object_trees=[tree], clientapp_runtime_list=[1.0]
        ).SerializeToString(),
        "pull-object": PullObjectRequest(node=me, run_id=run, object_id=name).SerializeToString(),
        "push-object": PushObjectRequest(
            node=me, run_id=run, object_id=name, session_id="s", object_content=b"x" * 50
        ).SerializeToString(),
        "confirm-message-received": ConfirmMessageReceivedRequest(
            node=me, run_id=run, message_object_id=name
        ).SerializeToString(),
        "send-node-heartbeat": SendNodeHeartbeatRequest(
            node=me, heartbeat_interval=30
        ).SerializeToString(),
    }


def signed(node: TinyNode, call: str, body: bytes) -> int:
    """Post any body under a good signature."""
    client = node.calls._client
    url = f"{node.calls._base_url}/v1/fleet/{call}"
    asked = client.build_request("POST", url, content=body, headers=MEDIA)
    context = SimpleNamespace(request=asked, rpc_method="", message=PullMessagesRequest())
    answer = node.calls._interceptors[1].intercept(context, lambda c: client.send(c.request))
    return answer.status_code


def on_disk(folder: Path) -> int:
    objects = folder / "objects"
    return sum(path.stat().st_size for path in objects.rglob("*") if path.is_file())


def memory() -> int:
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_random_bodies_of_a_hospital_neither_stop_nor_fill_the_coordinator(up, nodes):
    draw = np.random.default_rng(7)
    node = nodes["ash"]
    run = up.flower.grid().run.run_id
    bodies = valid_bodies(node, run)
    for call, body in bodies.items():  # warm, so that memory is what it is
        signed(node, call, body)
    before, files = memory(), on_disk(up.folder)
    statuses = set()
    for number in range(300):
        call = list(bodies)[number % len(bodies)]
        body = (
            draw.bytes(int(draw.integers(0, 400)))
            if number % 5 == 0
            else mutated(draw, bodies[call])
        )
        statuses.add(signed(node, call, body))
    assert statuses <= {200, 400, 401, 403, 404, 413, 415, 422}, statuses
    assert len(statuses) > 1
    assert on_disk(up.folder) == files
    assert memory() - before < 48 << 20
    assert node.heartbeat()


HOSTILE = {
    "nothing": RecordDict(),
    "no envelope": RecordDict({"payload-0": ArrayRecord()}),
    "an envelope that is no settings": RecordDict({"envelope": MetricRecord({"a": 1})}),
    "an envelope of another form": RecordDict({"envelope": ConfigRecord({"study": "text"})}),
    "an envelope with one field more": "more",
    "more payloads than it says": "extra",
    "fewer payloads than it says": "fewer",
    "a count below zero": -1,
    "a count beyond the bound": 65,
    "a huge count": 2**62,
    "a payload of floats": Array(
        dtype="float32", shape=(2,), stype="wardround.bytes", data=b"x" * 8
    ),
    "a payload that lies about its length": Array(
        dtype="uint8", shape=(10**12,), stype="wardround.bytes", data=b"x"
    ),
    "a payload of many dimensions": Array(
        dtype="uint8", shape=tuple([1] * 64), stype="wardround.bytes", data=b"x"
    ),
    "a payload to unpickle": Array(
        dtype="uint8", shape=(4,), stype="numpy.ndarray", data=b"\x80\x04N."
    ),
    "an answer above its bound": Array(
        dtype="uint8", shape=(2 << 20,), stype="wardround.bytes", data=bytes(2 << 20)
    ),
}


def hostile_answer(asked: Message, what: Any) -> Message:
    payloads: tuple[bytes, ...] = (b"hello",)
    good = reply(asked, SITES["ash"], "ash", payloads).content
    if isinstance(what, RecordDict):
        return Message(what, reply_to=asked)
    fields = dict(good["envelope"])
    if isinstance(what, Array):
        made = {"envelope": good["envelope"], "payload-0": ArrayRecord({"data": what})}
    elif what == "more":
        made = {**good, "envelope": ConfigRecord({**fields, "more": 1})}
    elif what == "extra":
        made = {**good, "payload-1": good["payload-0"]}
    elif what == "fewer":
        made = {"envelope": good["envelope"]}
    else:
        made = {**good, "envelope": ConfigRecord({**fields, "payloads": what})}
    return Message(RecordDict(made), reply_to=asked)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_reaches_nobody(up, nodes, asking, name):
    node = nodes["ash"]
    assert node.push(hostile_answer(node.pull(), HOSTILE[name]))
    asking.hear()
    assert asking.driver.got == []
    assert len(asking.watch.refusals) == 1
    asking.forget_hello()
    assert node.push(reply(node.pull(), SITES["ash"], "ash", (b"hello",)))
    asking.hear()
    assert asking.driver.got == [("ash", b"hello")]
    assert on_disk(up.folder) < 1 << 16  # what was refused is not kept


def test_an_error_of_a_hospital_with_text_of_its_choice_passes_no_text_on(up, nodes, asking):
    node = nodes["ash"]
    assert node.push(Message(Error(9, "patient 4711 " * 100), reply_to=node.pull()))
    asking.hear()
    assert "4711" not in str(asking.watch.refusals)


# ---------------------------------------------------------------------------- slow callers


def connected(up: Up) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(up.ca))
    plain = socket.create_connection(("127.0.0.1", up.flower.public_port), timeout=20)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def heard(line: ssl.SSLSocket) -> bytes:
    """Everything until the other side hangs up."""
    told = b""
    try:
        while part := line.recv(4096):
            told += part
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return told


def signed_head(node: TinyNode, length: int) -> bytes:
    """The head of a request under a good signature, which promises a body."""
    kept: list[httpx.Request] = []
    client = node.calls._client
    asked = client.build_request(
        "POST", f"{node.calls._base_url}/v1/fleet/pull-messages", content=b"", headers=MEDIA
    )
    context = SimpleNamespace(request=asked, rpc_method="", message=PullMessagesRequest())
    answer = SimpleNamespace(status_code=200, is_success=True)
    node.calls._interceptors[1].intercept(context, lambda c: kept.append(c.request) or answer)
    lines = [f"{k}: {v}" for k, v in kept[0].headers.items() if k != "content-length"]
    lines = ["POST /v1/fleet/pull-messages HTTP/1.1", *lines, f"content-length: {length}", "", ""]
    return "\r\n".join(lines).encode()


WHOLE = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["first", "second"])
@pytest.mark.parametrize("start", [b"", WHOLE[:40]], ids=["silent", "half"])
def test_a_caller_that_never_finishes_its_head_is_hung_up_on(up, nodes, before, start):
    with connected(up) as line:
        if before:
            line.sendall(before)
            assert b" 404 " in line.recv(4096)
        if before and not start:
            return  # an idle line between two requests may wait longer: links keep theirs
        line.sendall(start)
        assert heard(line) == b""
    assert nodes["ash"].heartbeat()


def test_a_body_that_never_ends_is_hung_up_on_and_a_strangers_is_not_awaited(up, nodes):
    with connected(up) as line:
        line.sendall(signed_head(nodes["ash"], 1000) + b"x" * 10)
        assert b" 408 " in heard(line)
    with connected(up) as line:
        line.sendall(
            b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nx"
        )
        assert b" 401 " in heard(line)


def test_callers_who_fill_every_place_are_gone_soon_and_hospitals_are_back(up, nodes):
    most = SHORT.most_connections
    lines = [connected(up) for _ in range(most + 2)]
    try:
        fresh = TinyNode(up.flower.public_port, up.ca, nodes["ash"].key)
        fresh.node_id = nodes["ash"].node_id
        with pytest.raises(httpx.HTTPStatusError) as full:  # control: they do hurt
            fresh.heartbeat()
        assert full.value.response.status_code == 503
        for line in lines:
            assert heard(line) == b""
        assert fresh.heartbeat()
        fresh.close()
    finally:
        for line in lines:
            line.close()
