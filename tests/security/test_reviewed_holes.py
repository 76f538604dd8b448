"""Holes that a review of the deployed code found: each is closed, each with its control."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree

from client.app import Answer
from client.link import LinkLimits, LinkWorld
from client.review import approve_study
from client.site import switch_is_on
from common.errors import Code, ConfigError, DataError, RefusedError
from common.world import ManualClock, WallClock
from server.doors import _HALF_OPEN, Wire
from server.service import _Station, _wire
from tests.fleet_double import FakeHospital, FleetDouble, Running, make_pki, question, quick
from tests.flower_node import TinyNode, public_line, transport_key
from tests.security.coordinator import Up, real_coordinator

MIB = 1 << 20
BIG = os.urandom(6 * MIB)
MOST = 4 * MIB
SHORT = Wire(hold_s=0.2, body_s=2.0, most_answer=MOST, most_connections=8, each_at_once=3)


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def fleet(pki):
    with closing(FleetDouble(pki)) as double:
        yield double


@pytest.fixture
def up(tmp_path):
    with real_coordinator(tmp_path, SHORT) as made:
        yield made


def node_of(up: Up, site: str) -> TinyNode:
    key = transport_key()
    up.flower.register(site, public_line(key))
    node = TinyNode(up.flower.public_port, up.ca, key)
    node.activate()
    return node


# ---------------------------------------------------------------- what the link still holds


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "control"])
def test_an_answer_that_waits_for_the_night_does_not_leave_after_a_stop(
    fleet, pki, tmp_path, stopped
):
    wall, on = ManualClock(WallClock().now()), threading.Event()
    world = LinkWorld(wall=wall, pause=quick)
    hour = time.localtime(wall.now()).tm_hour
    limits = LinkLimits(window=((hour + 2) % 24, (hour + 4) % 24))
    hospital = FakeHospital(lambda _: Answer((BIG,)))
    with Running(
        pki,
        fleet.address,
        tmp_path,
        world=world,
        limits=limits,
        hospital=hospital,
        may_leave=lambda _study: not on.is_set(),
    ) as running:
        name = fleet.put(question((b"small",)))
        running.until(lambda state: state.code is Code.WINDOW_CLOSED)
        if stopped:
            on.set()
        before = fleet.calls["activate-node"]
        fleet.skew += 2.5 * 3600
        wall.skip_to(wall.now() + 2.5 * 3600)
        if stopped:
            # It comes anew, so that the coordinator does not wait for what will not come.
            fleet.wait(lambda: fleet.calls["activate-node"] > before)
            assert fleet.calls["push-messages"] == fleet.calls["push-object"] == 0
        else:
            fleet.reply_to(name)


def test_a_stop_in_the_middle_of_an_upload_ends_it(fleet, pki, tmp_path):
    on = threading.Event()
    hospital = FakeHospital(lambda _: Answer((BIG,)))

    def fault(path, _count):
        if path == "push-object":
            on.set()

    fleet.fault = fault
    limits = LinkLimits(bits_per_second=10_000_000_000)
    with Running(
        pki,
        fleet.address,
        tmp_path,
        limits=limits,
        hospital=hospital,
        may_leave=lambda _study: not on.is_set(),
    ) as running:
        running.link._together = lambda names, work: [work(name) for name in names]
        before = fleet.calls["activate-node"]
        fleet.put(question((b"small",)))
        fleet.wait(lambda: fleet.calls["activate-node"] > max(1, before))
        assert fleet.calls["push-object"] == 1


def test_a_code_still_leaves_after_a_stop(fleet, pki, tmp_path):
    hospital = FakeHospital(lambda _: Answer((), Code.APPROVAL_STOPPED))
    with Running(pki, fleet.address, tmp_path, hospital=hospital, may_leave=lambda _study: False):
        fleet.reply_to(fleet.put(question((b"small",))))


def test_a_switch_that_cannot_be_looked_at_is_on(tmp_path, monkeypatch):
    switch = tmp_path / "stop"
    assert not switch_is_on(switch)  # control
    assert not switch_is_on(tmp_path / "file" / "stop")

    def denied(_path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "lstat", denied)
    assert switch_is_on(switch)


def test_an_approval_taken_back_while_a_question_is_worked_on_lets_nothing_leave(consortium):
    consortium.approve("north")
    (approval,) = consortium.state("north").glob("studies/*/approval.json")
    host, study = consortium.host("north"), consortium.bundle.digest
    assert host.ask(study, (), hello=True).payloads  # control
    assert host.may_leave(study)
    answer = host._answer

    def slow(*given, **options):
        made = answer(*given, **options)
        assert made.payloads
        approval.rename(approval.with_name("withdrawn-1.json"))
        return made

    host._answer = slow
    told = host.ask(study, (), hello=True)
    assert (told.payloads, told.code) == ((), Code.APPROVAL_STUDY)
    assert not host.may_leave(study)


def test_what_is_approved_is_what_was_reviewed(consortium):
    folder, path = consortium.publish(), consortium.yaml("north")
    given = {"by": "Dr. Grey", "now": 1}
    with pytest.raises(RefusedError) as caught:
        approve_study(folder, consortium.config("north"), path, reviewed="0" * 16, **given)
    assert caught.value.code is Code.APPROVAL_STUDY
    assert list(consortium.state("north").glob("studies/*/approval.json")) == []
    seen = consortium.bundle.digest.hex()[:16]
    approved, new = approve_study(folder, consortium.config("north"), path, reviewed=seen, **given)
    assert new
    assert approved.bundle.digest == consortium.bundle.digest


def test_a_review_fetches_no_model_whatever_a_study_names(monkeypatch):
    import huggingface_hub

    from client.tasks.backbone import backbone_digest

    asked: list[bool] = []

    def download(_name, *, local_files_only, **_options):
        asked.append(local_files_only)
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError) as caught:
        backbone_digest("somebody/anything")
    assert caught.value.code is Code.MODEL_UNREACHABLE
    assert asked == [True]


def test_a_question_that_cannot_even_be_declined_does_not_end_the_line(fleet, pki, tmp_path):
    """A kind of message that Flower does not know makes its reader raise."""
    with Running(pki, fleet.address, tmp_path):
        message = question((b"x",))
        message.metadata.__dict__["_message_type"] = "evil"
        fleet.put(message)
        fleet.wait(lambda: fleet.calls["pull-messages"] > 3)
        fleet.waiting.clear()
        fleet.reply_to(fleet.put(question((b"abc",))))


# ---------------------------------------------------------------- one hospital against the others


def test_a_hospital_that_lies_about_a_part_does_not_stop_anothers_question(up):
    liar, other = node_of(up, "ash"), node_of(up, "birch")
    grid = up.flower.grid()
    common = ArrayRecord({"data": Array("uint8", (3,), "s", b"abc")})
    late = Message(RecordDict({"payload-0": common}), other.node_id, "query.step")
    (victim,) = (
        n
        for n in iterate_object_tree(get_object_tree(common))
        if len(n.children) == 1 and n.object_id == common.object_id
    )
    grid.push_messages([Message(RecordDict(), liar.node_id, "query.step")])
    asked = liar.pull()
    answer = Message(RecordDict({"payload-0": common}), reply_to=asked)
    forged = get_object_tree(answer)
    for part in iterate_object_tree(forged):
        if part.object_id == victim.object_id:
            del part.children[:]  # "it has no parts"
    told = announced(liar, answer, forged)
    assert victim.object_id in told.objects_to_push  # control: the lie was taken
    (name,) = grid.push_messages([late])
    assert name
    assert other.pull().content["payload-0"]["data"].data == b"abc"
    liar.close()
    other.close()


def announced(node, answer, tree):
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest

    answer.metadata.__dict__["_message_id"] = tree.object_id
    return node.calls.PushMessages(
        PushMessagesRequest(
            node=node.me,
            messages_list=[message_to_proto(remove_content_from_message(answer))],
            message_object_trees=[tree],
        )
    )


@pytest.mark.parametrize("copies", [1, 30])
def test_an_array_named_by_many_records_is_not_unfolded_beyond_the_bound(up, copies):
    node, grid = node_of(up, "ash"), up.flower.grid()
    array = Array("uint8", (MIB,), "s", os.urandom(MIB))
    (name,) = grid.push_messages([Message(RecordDict(), node.node_id, "query.step")])
    records = {f"payload-{i}": ArrayRecord({f"data-{i}": array}) for i in range(copies)}
    assert node.push(Message(RecordDict(records), reply_to=node.pull()))
    (came,) = grid.pull_messages([name])
    assert came.has_error() is (copies > 1)
    node.close()


def test_no_hospital_has_room_for_more_than_one_answer_of_the_study():
    wire = _wire(10 * MIB, 5)
    assert wire.most_answer == 10 * MIB
    assert wire.most_disk < Wire().most_disk
    assert wire.most_disk >= 2 * 5 * wire.most_answer  # control: everybody has room


def test_one_hospitals_open_calls_are_bounded_and_others_are_served(up):
    greedy, other = node_of(up, "ash"), node_of(up, "birch")
    lines = [slow_call(up, greedy) for _ in range(SHORT.each_at_once)]
    fresh = TinyNode(up.flower.public_port, up.ca, greedy.key)
    fresh.node_id = greedy.node_id
    with pytest.raises(httpx.HTTPStatusError) as full:
        fresh.heartbeat()
    assert full.value.response.status_code == 503
    assert other.heartbeat()
    for line in lines:
        line.close()
    for node in (greedy, other, fresh):
        node.close()


def slow_call(up: Up, node: TinyNode) -> ssl.SSLSocket:
    """A call whose body does not come; returns once the door waits for it."""
    from tests.security.test_public_port import connected, signed_head

    door, key = up.flower._public_door, next(iter(up.flower._keys))
    before = door._busy[key]
    line = connected(up)
    line.sendall(signed_head(node, 1000) + b"x")
    while door._busy[key] == before:
        threading.Event().wait(0.005)
    return line


def test_a_hospital_that_comes_anew_on_and_on_is_not_greeted_each_time():
    from tests.server.test_exchange import Scene

    scene = Scene()
    for turn in range(20):
        scene.grid.come(1, f"t{turn}")
        scene.step()
    assert scene.grid.count(1) == 4  # control: one who restarts a few times need not wait
    scene.clock.skip_to(scene.clock.now() + 2.0)
    scene.step()
    assert scene.grid.count(1) == 5


# ---------------------------------------------------------------- strangers


def test_headers_with_two_moments_are_not_served_again(up):
    node = node_of(up, "ash")
    taken: list[httpx.Request] = []
    node.calls._client.event_hooks = {"request": [taken.append]}
    assert node.heartbeat()
    request = taken[-1]
    kept = [(k, v) for k, v in request.headers.multi_items() if k != "host"]
    moment = next((k, v) for k, v in kept if "timestamp" in k)
    context = ssl.create_default_context(cafile=str(up.ca))
    url = f"https://127.0.0.1:{up.flower.public_port}{request.url.path}"
    for headers in (kept, [*kept, moment], [(moment[0], "2020-01-01T00:00:00+00:00"), *kept]):
        again = httpx.post(url, content=request.content, headers=headers, verify=context)
        assert again.status_code == 401
    node.close()


def test_an_unknown_key_is_not_listened_to_at_activation_either(up):
    context = ssl.create_default_context(cafile=str(up.ca))
    raw = socket.create_connection(("127.0.0.1", up.flower.public_port), timeout=10)
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as line:
        line.sendall(
            b"POST /v1/fleet/activate-node HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx"
        )
        assert line.recv(100).startswith(b"HTTP/1.1 401")


def test_handshakes_that_nobody_ends_take_no_hospitals_place(up):
    port = up.flower.public_port
    most = SHORT.most_connections + _HALF_OPEN
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(most + 40)]
    try:
        node = node_of(up, "ash")  # its handshake is let in, and theirs make room
        assert node.heartbeat()
        node.close()
        held[0].settimeout(10)
        assert held[0].recv(1) == b""
    finally:
        for one in held:
            one.close()


# ---------------------------------------------------------------- keys that must be out


def test_a_kill_between_two_keys_of_a_site_leaves_only_the_newer_one(tmp_path):
    old, new = transport_key(), transport_key()
    with real_coordinator(tmp_path, SHORT) as up:
        up.flower.register("ash", public_line(old))
        strike = up.flower._strike
        up.flower._strike = lambda *_a, **_k: None  # killed there
        up.flower.register("ash", public_line(new))
        assert len(up.flower._keys) == 2  # control: both are in the database
        up.flower._strike = strike
        up.flower.register("ash", public_line(new))
        (header,) = up.flower._keys
        assert len(up.flower._state.registered()) == 1
        assert up.flower._keys[header][0] == "ash"


class Door:
    """Registered keys, one of which cannot be."""

    def __init__(self) -> None:
        self.out: list[str] = []

    def register(self, site: str, _transport: bytes) -> None:
        if site == "ash":
            raise ConfigError(Code.TRANSPORT_KEY, "The transport key of ash was used before.")

    def unregister(self, site: str) -> None:
        self.out.append(site)


def test_one_key_that_cannot_be_used_keeps_nobody_who_was_revoked_in(monkeypatch):
    told: list[tuple[str, object]] = []
    log = SimpleNamespace(
        info=lambda event, **_f: told.append((event, None)),
        warning=lambda event, code=None, **_f: told.append((event, code)),
    )
    station = object.__new__(_Station)
    station._service = SimpleNamespace(state=None, log=log)
    station._flower, station._exchange = Door(), None
    station._known, station._revoked = {}, ()
    station._run = SimpleNamespace(keys={"ash": b"A", "birch": b"B", "cedar": b"C", "elm": b"E"})
    none: frozenset[bytes] = frozenset()
    found = [
        SimpleNamespace(site="ash", transport=b"a", revoked=False, struck=none),
        SimpleNamespace(site="birch", transport=b"b", revoked=True, struck={b"B"}),
        # Admitted again with other keys: the study still lists the one it was put out with.
        SimpleNamespace(site="cedar", transport=b"c", revoked=False, struck={b"C"}),
        SimpleNamespace(site="elm", transport=b"e", revoked=False, struck={b"an older key"}),
    ]
    monkeypatch.setattr("server.service.admitted", lambda _state: found)
    station._admit()
    assert station._flower.out == ["birch", "cedar"]
    assert ("site.refused", Code.TRANSPORT_KEY) in told
    assert set(station._known) == {"ash", "elm"}


@pytest.mark.parametrize(
    "fault",
    [ConfigError(Code.LISTENER_TLS, "x."), OSError(), RuntimeError("changed size")],
    ids=["ours", "disk", "a look at what changes"],
)
def test_a_duty_of_the_watch_that_fails_costs_no_other(fault):
    codes: list[Code] = []
    station = object.__new__(_Station)
    station._service = SimpleNamespace(
        log=SimpleNamespace(warning=lambda _event, code: codes.append(code))
    )

    def duty() -> None:
        raise fault

    station._tried(duty)
    assert len(codes) == 1
