"""The hospital's line over real loopback TLS: what it trusts, what it survives, what it sends."""

from __future__ import annotations

import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from client.app import Answer, opened
from client.flower import FleetLink
from client.link import LinkLimits, LinkWorld, backoff, chosen_proxy
from common.errors import Code, ConfigError, StorageError
from common.world import ManualClock, WallClock
from tests.fleet_double import (
    LONG_S,
    FakeHospital,
    FleetDouble,
    Running,
    make_pki,
    question,
    quick,
)

MIB = 1 << 20
BIG = os.urandom(11 * MIB)  # three chunks


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def fleet(pki):
    with closing(FleetDouble(pki)) as double:
        yield double


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def payloads(reply):
    return opened(reply.content)[1]


def chunks(double, name):
    """The large parts of a question."""
    return {part for part, content in double.parts.items() if content.startswith(b"ArrayChunk")}


# ---------------------------------------------------------------------------- it works
def test_a_question_is_fetched_answered_and_brought_back(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path) as running:
        hello = fleet.put(question(kind="query.hello", recipient=""))
        assert payloads(fleet.reply_to(hello)) == (b"hello",)
        for kind in ("query.step", "train.step"):
            step = fleet.put(question((b"abc", BIG, b""), kind=kind))
            assert payloads(fleet.reply_to(step)) == (b"cba", BIG[::-1], b"")
        state = running.until(lambda state: state.connected)
    assert state.code is None
    assert state.waiting_because == ""
    assert abs(state.clock_offset_s) < 3
    assert state.bytes_down > len(BIG)  # the second copy of the payload came from neither side
    assert state.bytes_up > len(BIG)
    assert running.beats > 0


def test_nothing_of_a_question_stays_on_disk_once_it_is_answered(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path):
        fleet.reply_to(fleet.put(question((BIG,))))
        fleet.reply_to(fleet.put(question((b"small",))))  # the first is surely finished
        assert list((tmp_path / "link" / "parts").iterdir()) == []


def test_a_stop_is_obeyed_while_the_hospital_still_works(fleet, pki, tmp_path):
    release, entered = threading.Event(), threading.Event()

    def slow(_):
        entered.set()
        release.wait(60)
        return Answer((b"late",))

    with Running(pki, fleet.address, tmp_path, hospital=FakeHospital(slow)) as running:
        name = fleet.put(question((b"x",)))
        assert entered.wait(30)
        running.stop.set()
        running.thread.join(30)
        assert not running.thread.is_alive()
    release.set()
    assert name not in fleet.replies
    assert not fleet.online  # it said goodbye


def test_heartbeats_go_on_while_the_hospital_works(fleet, pki, tmp_path):
    release = threading.Event()

    def slow(_):
        release.wait(60)
        return Answer((b"done",))

    with Running(pki, fleet.address, tmp_path, hospital=FakeHospital(slow)) as running:
        name = fleet.put(question((b"x",)))
        fleet.wait(lambda: bool(fleet.calls["confirm-message-received"]))
        so_far = fleet.calls["send-node-heartbeat"]
        fleet.wait(lambda: fleet.calls["send-node-heartbeat"] >= so_far + 5)
        assert running.link.state().connected
        release.set()
        assert payloads(fleet.reply_to(name)) == (b"done",)


def test_polling_slows_down_when_nothing_happens_and_never_below_two_seconds(fleet, pki, tmp_path):
    waits: list[float] = []

    def record(stop, seconds):
        if threading.current_thread() is not beating[0]:
            waits.append(seconds)
        quick(stop, seconds)

    beating = [None]
    world = LinkWorld(pause=record, heartbeat_s=1e9)
    with Running(pki, fleet.address, tmp_path, world=world):
        fleet.wait(lambda: fleet.calls["pull-messages"] > 20)
    polls = [wait for wait in waits if wait < 1e8]
    assert polls[0] <= 0.07
    assert polls[:19] == sorted(polls[:19])
    assert max(polls) == 2.0


# ---------------------------------------------------------------------------- whom it trusts
def test_only_the_pinned_authority_is_trusted(fleet, pki, tmp_path, monkeypatch):
    other = make_pki(tmp_path / "other")
    (other / "transport.key").write_bytes((pki / "transport.key").read_bytes())
    # What a system or an environment trusts besides changes nothing.
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca.crt"))
    name = fleet.put(question((b"x",)))
    with Running(other, fleet.address, tmp_path / "a") as running:
        state = running.until(lambda state: state.code is Code.SERVER_CERTIFICATE)
    assert not state.connected
    assert state.last_heard is None
    assert fleet.calls.total() == 0
    with Running(pki, fleet.address, tmp_path / "b"):  # control
        assert payloads(fleet.reply_to(name)) == (b"x",)


def test_a_certificate_for_another_name_is_refused(tmp_path):
    pki = make_pki(tmp_path / "pki", names=("other.test",))
    with (
        closing(FleetDouble(pki)) as double,
        Running(pki, f"localhost:{double.port}", tmp_path) as running,
    ):
        running.until(lambda state: state.code is Code.SERVER_CERTIFICATE)
        assert double.calls.total() == 0


def test_nothing_below_tls_1_3_is_spoken(pki, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server.crt", pki / "server.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    shaken: list[str] = []
    tries = threading.Semaphore(0)

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                try:
                    with context.wrap_socket(client, server_side=True) as secured:
                        shaken.append(secured.version())
                except OSError:
                    pass
                tries.release()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        with Running(pki, f"127.0.0.1:{port}", tmp_path) as running:
            assert all(tries.acquire(timeout=30) for _ in range(2))
            state = running.until(lambda state: state.code is Code.UNREACHABLE)
        assert not shaken
        assert state.last_heard is None
        # Control: the same server is there for somebody who does speak 1.2.
        old = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            old.wrap_socket(raw, server_hostname="localhost") as secured,
        ):
            assert secured.version() == "TLSv1.2"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda pki: (pki / "ca.crt").write_text("no"), Code.LINK_SETTINGS),
        (lambda pki: (pki / "ca.crt").unlink(), Code.LINK_SETTINGS),
        (lambda pki: (pki / "transport.key").write_text("no"), Code.LINK_SETTINGS),
        (lambda pki: (pki / "transport.key").chmod(0o644), Code.KEY_FILE_OPEN),
    ],
)
def test_files_that_cannot_be_used_are_named_at_once(tmp_path, spoil, code):
    pki = make_pki(tmp_path / "pki")
    spoil(pki)
    with pytest.raises((ConfigError, StorageError)) as caught:
        FleetLink("localhost:1", pki / "ca.crt", pki / "transport.key", None, {}, state=tmp_path)
    assert caught.value.code is code


@pytest.mark.parametrize("address", ["", "a b:1", "user@host:1", "host:1/path", "host:port"])
def test_an_address_that_is_none_is_named(pki, tmp_path, address):
    with pytest.raises(ConfigError) as caught:
        FleetLink(address, pki / "ca.crt", pki / "transport.key", None, {}, state=tmp_path)
    assert caught.value.code is Code.LINK_SETTINGS


# ---------------------------------------------------------------------------- proxies
class Proxy:
    """A tiny CONNECT proxy that finds every name on this machine."""

    def __init__(self, *, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> None:
        self.seen: list[bytes] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            self.seen.append(head)
            client.sendall(self._answer)
            if b" 200 " not in self._answer:
                return
            port = int(head.split()[1].rpartition(b":")[2])
            with socket.create_connection(("127.0.0.1", port)) as server:
                pair = {client: server, server: client}
                while True:
                    for ready in select.select(list(pair), [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        pair[ready].sendall(data)


@pytest.mark.parametrize("way", ["told", "environment"])
def test_an_https_proxy_is_used(fleet, pki, tmp_path, monkeypatch, way):
    with closing(Proxy()) as proxy:
        address = f"http://user:geheim@127.0.0.1:{proxy.port}"
        world = LinkWorld(pause=quick, proxy=address if way == "told" else None)
        if way == "environment":
            monkeypatch.setenv("HTTPS_PROXY", address)
        with Running(pki, f"coordinator.test:{fleet.port}", tmp_path, world=world):
            assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)
    assert proxy.seen
    assert all(b"CONNECT coordinator.test:" in head for head in proxy.seen)
    assert b"Proxy-Authorization" in proxy.seen[0]


def test_loopback_is_never_proxied_and_no_proxy_is_heeded(fleet, pki, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with Running(pki, fleet.address, tmp_path):
        assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)
    assert chosen_proxy("localhost", "http://proxy:3128") is None
    assert chosen_proxy("hub.example.org", None) == "http://127.0.0.1:1"
    monkeypatch.setenv("NO_PROXY", "hub.example.org")
    assert chosen_proxy("hub.example.org", None) is None
    assert chosen_proxy("hub.example.org", "proxy:3128") == "http://proxy:3128"


def test_a_proxy_that_refuses_is_named_and_its_password_is_not(fleet, pki, tmp_path):
    with closing(Proxy(answer=b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")) as proxy:
        world = LinkWorld(pause=quick, proxy=f"http://user:geheim@127.0.0.1:{proxy.port}")
        with Running(pki, f"coordinator.test:{fleet.port}", tmp_path, world=world) as running:
            state = running.until(lambda state: state.code is Code.PROXY_REFUSED)
    assert "geheim" not in repr(state)


def test_a_proxy_address_that_is_none_is_refused_without_repeating_it():
    with pytest.raises(ConfigError) as caught:
        chosen_proxy("hub.example.org", "gopher://user:geheim@x")
    assert caught.value.code is Code.LINK_SETTINGS
    assert "geheim" not in caught.value.report()


# ---------------------------------------------------------------------------- weather
def test_a_coordinator_that_is_away_is_waited_for(pki, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Running(pki, f"127.0.0.1:{port}", tmp_path) as running:
        state = running.until(lambda state: state.code is Code.UNREACHABLE)
        assert not state.connected
        with closing(FleetDouble(pki, port=port)) as double:
            assert payloads(double.reply_to(double.put(question((b"x",))))) == (b"x",)
            assert running.until(lambda state: state.connected).code is None
        running.until(lambda state: state.code is Code.UNREACHABLE)
        with closing(FleetDouble(pki, port=port)) as double:
            double.online = True  # its memory of us survived
            assert payloads(double.reply_to(double.put(question((b"y",))))) == (b"y",)


def test_the_pause_between_tries_grows_evenly_to_a_minute_and_stays_there():
    waits = [backoff(tries) for tries in range(10_000)]
    assert waits == sorted(waits)
    assert waits[0] < 1
    assert waits[20] == waits[-1] == 60


FAULTS = {
    "500": ("status", 500),
    "502": ("status", 502),
    "404": ("status", 404),
    "429": ("status", 429),
    "302": ("status", 302),
    "garbage": ("garbage", b"\xff<html>blocked by policy</html>"),
    "truncated": ("truncate", 3),
    "hang-up": ("hang-up", 10),
    "lost answer": ("swallow",),
}
TRANSFERS = (
    "pull-object",
    "confirm-message-received",
    "push-messages",
    "push-object",
    "send-node-heartbeat",
    "activate-node",
    "pull-messages",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_anywhere_costs_a_repeat_and_no_question(fleet, pki, tmp_path, fault):
    # Where an answer is lost, Flower believes what it did: a row is online, a message delivered.
    lossy = fault in {"truncated", "lost answer"}

    def some(path, n):
        if lossy and (path == "pull-messages" or (path == "activate-node" and n > 1)):
            return None
        return FAULTS[fault] if n in {1, 3} and path in TRANSFERS else None

    fleet.fault = some
    world = LinkWorld(pause=quick, heartbeat_s=0.01)
    with Running(pki, fleet.address, tmp_path, world=world) as running:
        if lossy:
            fleet.wait(lambda: fleet.calls["activate-node"] >= 2)
            fleet.online = False  # the row has run out
        name = fleet.put(question((b"abc", BIG)))
        assert payloads(fleet.reply_to(name)) == (b"cba", BIG[::-1])
        assert len(running.hospital.asked) == 1
        running.until(lambda state: state.connected and state.code is None)


def test_an_answer_without_end_is_cut_off(fleet, pki, tmp_path):
    fleet.fault = lambda path, n: (
        ("garbage", bytes(9 * MIB)) if path == "pull-messages" and n == 1 else None
    )
    with Running(pki, fleet.address, tmp_path) as running:
        fleet.wait(lambda: fleet.calls["pull-messages"] >= 2)
        assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)
    assert running.link.state().bytes_down < 9 * MIB


def test_a_run_that_is_over_drops_its_question_and_the_next_is_answered(fleet, pki, tmp_path):
    for path in ("pull-object", "confirm-message-received", "push-messages", "push-object"):
        seen = fleet.calls[path]
        fleet.fault = lambda called, n, path=path, seen=seen: (
            ("status", 403) if called == path and n == seen + 1 else None
        )
        with Running(pki, fleet.address, tmp_path / path):
            lost = fleet.put(question((b"lost", path.encode())))
            fleet.wait(lambda path=path, seen=seen: fleet.calls[path] > seen)
            name = fleet.put(question((b"next", path.encode())))
            assert payloads(fleet.reply_to(name))[0] == b"txen"
            _, tree = fleet.replies.get(lost, (None, None))
            assert tree is None or any(
                part not in fleet.stored
                for part in [tree.object_id, *(child.object_id for child in tree.children)]
            )


def test_an_answer_the_coordinator_will_not_take_does_not_block_the_line(fleet, pki, tmp_path):
    def refuse(path, _):
        first = fleet.calls["push-messages"] == 1
        return ("status", 413) if path == "push-object" and first else None

    fleet.fault = refuse
    with Running(pki, fleet.address, tmp_path):
        fleet.put(question((b"too large",)))
        fleet.wait(lambda: fleet.calls["push-object"] >= 5)
        assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)


# ---------------------------------------------------------------------------- clocks and keys
@pytest.mark.parametrize(
    ("hours", "told"), [(48, "48 h 0 min behind"), (-48, "48 h 0 min ahead of")]
)
def test_a_clock_that_is_off_is_named_with_its_offset(fleet, pki, tmp_path, hours, told):
    fleet.skew = hours * 3600.0
    name = fleet.put(question((b"x",)))
    with Running(pki, fleet.address, tmp_path) as running:
        state = running.until(lambda state: state.code is Code.CLOCK_OFF)
        assert told in state.waiting_because
        assert state.clock_offset_s == pytest.approx(-hours * 3600, abs=3)
        assert fleet.calls["pull-messages"] == 0
        fleet.skew = 0.0  # the clock is set: nothing else is needed
        assert payloads(fleet.reply_to(name)) == (b"x",)


def test_a_clock_that_goes_wrong_in_the_middle_of_an_upload_costs_nothing(fleet, pki, tmp_path):
    def jump(path, n):
        if path == "push-object" and n == 3:
            fleet.skew = 7200.0

    fleet.fault = jump
    with Running(pki, fleet.address, tmp_path) as running:
        name = fleet.put(question((BIG,)))
        running.until(lambda state: state.code is Code.CLOCK_OFF)
        fleet.skew = 0.0
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
        assert len(running.hospital.asked) == 1


def test_a_revoked_hospital_is_told_so_and_waits(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path) as running:
        running.until(lambda state: state.connected)
        admitted, fleet.public = fleet.public, None
        state = running.until(lambda state: state.code is Code.NOT_ADMITTED)
        assert not state.connected
        assert "transport key" in state.waiting_because or "activate" in state.waiting_because
        fleet.public, fleet.online = admitted, False  # admitted again
        assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)


def test_a_row_that_a_crash_left_online_is_freed_first(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path):
        fleet.wait(lambda: fleet.online)
    fleet.online = True  # as after kill -9: no goodbye
    before = fleet.calls["activate-node"]
    with Running(pki, fleet.address, tmp_path):
        fleet.wait(lambda: fleet.calls["pull-messages"] > 2)
    assert fleet.calls["activate-node"] == before + 1
    # Control: without its own memory of the row the hospital has to wait for Flower to forget.
    fleet.online = True
    (tmp_path / "link" / "node").unlink()
    with Running(pki, fleet.address, tmp_path) as running:
        running.until(lambda state: state.code is Code.NOT_ADMITTED)
        fleet.online = False
        running.until(lambda state: state.connected)


def test_a_coordinator_that_forgot_the_node_gets_it_back(fleet, pki, tmp_path):
    with Running(pki, fleet.address, tmp_path) as running:
        running.until(lambda state: state.connected)
        fleet.online = False  # the answer to a heartbeat is now: who are you?
        fleet.wait(lambda: fleet.calls["activate-node"] >= 2)
        assert payloads(fleet.reply_to(fleet.put(question((b"x",))))) == (b"x",)


# ---------------------------------------------------------------------------- cuts
def test_a_cut_download_goes_on_without_fetching_a_finished_part_again(fleet, pki, tmp_path):
    cut = [4, 5, 6]

    def fault(path, n):
        return ("truncate", MIB) if path == "pull-object" and n - 6 in cut else None

    fleet.fault = fault
    with Running(pki, fleet.address, tmp_path) as running:
        name = fleet.put(question((BIG,)))
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
    large = chunks(fleet, name)
    assert len(large) == 3
    assert sum(fleet.pulled[part] for part in large) <= 3 + len(cut)
    assert running.link.state().bytes_down < len(BIG) + len(cut) * 5.3 * MIB


def test_a_restarted_hospital_fetches_only_what_its_disk_lacks(fleet, pki, tmp_path):
    def fault(path, n):
        return ("status", 503) if path == "pull-object" and n > 7 else None

    fleet.fault = fault
    with Running(pki, fleet.address, tmp_path) as running:
        fleet.put(question((BIG,), nonce=b"1" * 16))
        parts = tmp_path / "link" / "parts"
        running.until(lambda _: len(list(parts.glob("*[0-9a-f]"))) == 2)
    kept = {path.name for path in parts.iterdir()}
    assert len(kept) == 2
    fleet.fault = lambda _path, _n: None
    so_far = dict(fleet.pulled)
    with Running(pki, fleet.address, tmp_path) as running:
        # The coordinator asks anew, with another nonce; the payload's parts are the same.
        name = fleet.put(question((BIG,), nonce=b"2" * 16))
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
    assert all(fleet.pulled[part] == so_far[part] for part in kept)
    assert running.link.state().bytes_down < 6 * MIB


def test_a_part_damaged_on_disk_is_fetched_again(fleet, pki, tmp_path):
    fleet.fault = lambda path, n: ("status", 503) if path == "pull-object" and n > 7 else None
    with Running(pki, fleet.address, tmp_path) as running:
        fleet.put(question((BIG,)))
        running.until(lambda state: state.code is Code.SERVER_FAULT)
    for path in (tmp_path / "link" / "parts").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    fleet.fault = lambda _path, _n: None
    with Running(pki, fleet.address, tmp_path):
        assert payloads(fleet.reply_to(fleet.put(question((BIG,))))) == (BIG[::-1],)


def test_a_cut_upload_goes_on_with_what_is_missing_and_asks_the_hospital_once(fleet, pki, tmp_path):
    def fault(path, n):
        if path == "push-object" and n in {1, 2, 5}:
            return ("hang-up", MIB)
        if path == "push-messages" and n == 1:
            return ("swallow",)
        return None

    fleet.fault = fault
    with Running(pki, fleet.address, tmp_path) as running:
        name = fleet.put(question((BIG,)))
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
        assert len(running.hospital.asked) == 1
    assert max(fleet.pushed.values()) == 1  # counted once the whole body had come


def test_a_push_session_that_expired_is_opened_again(fleet, pki, tmp_path):
    def fault(path, n):
        if path == "push-object" and n == 3:
            fleet.sessions.clear()

    fleet.fault = fault
    with Running(pki, fleet.address, tmp_path) as running:
        name = fleet.put(question((BIG,)))
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
        assert len(running.hospital.asked) == 1
    assert fleet.calls["push-messages"] == 2


def test_a_full_disk_is_named_and_waited_out(fleet, pki, tmp_path, monkeypatch):
    import client.link

    full = threading.Event()
    full.set()
    write = client.link.write_durably

    def limited(path, parts, *, durable=True):
        if full.is_set():
            raise StorageError(Code.JOURNAL_WRITE, "no space")
        write(path, parts, durable=durable)

    monkeypatch.setattr(client.link, "write_durably", limited)
    with Running(pki, fleet.address, tmp_path) as running:
        name = fleet.put(question((BIG,)))
        running.until(lambda state: state.code is Code.JOURNAL_WRITE)
        full.clear()
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)


# ---------------------------------------------------------------------------- limits
class VirtualPause:
    """Advances a clock instead of waiting; one thread at a time, as time would."""

    def __init__(self, clock):
        self.clock = clock
        self.lock = threading.Lock()

    def __call__(self, stop, seconds):
        if seconds > 1e6:  # the heartbeats of this test
            stop.wait(60)
            return
        with self.lock:
            self.clock.skip_to(self.clock.now() + seconds)
        stop.wait(0.0005)


@pytest.mark.parametrize("megabits", [4, 80])
def test_the_bandwidth_cap_holds(fleet, pki, tmp_path, megabits):
    clock = ManualClock()
    world = LinkWorld(clock=clock, pause=VirtualPause(clock), heartbeat_s=1e9)
    limits = LinkLimits(bits_per_second=megabits * 1_000_000)
    with Running(pki, fleet.address, tmp_path, world=world, limits=limits) as running:
        fleet.wait(lambda: fleet.calls["pull-messages"] > 0)
        before, start = running.link.state(), clock.now()
        name = fleet.put(question((BIG,)))
        fleet.reply_to(name)
        after, end = running.link.state(), clock.now()
    slack = 1 << 19  # one slice of each worker, and what an idle moment saves up
    for carried in (after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down):
        assert len(BIG) < carried <= (end - start) * megabits * 1e6 / 8 + slack
    assert end - start > 2 * len(BIG) * 8 / (megabits * 1e6) - 1  # down, then up


@pytest.mark.parametrize(("megabits", "most"), [(4, 1), (None, 3)])
def test_a_thin_line_carries_one_part_at_a_time(fleet, pki, tmp_path, megabits, most):
    clock = ManualClock()
    world = LinkWorld(clock=clock, pause=VirtualPause(clock), heartbeat_s=1e9)
    limits = LinkLimits(bits_per_second=megabits and megabits * 1_000_000)
    at_once, seen, lock = [0], [0], threading.Lock()
    together = threading.Barrier(most)
    with Running(pki, fleet.address, tmp_path, world=world, limits=limits) as running:
        original = running.link._fleet.push_part

        def push_part(run, session, name, content):
            with lock:
                at_once[0] += 1
                seen[0] = max(seen)
                seen.append(at_once[0])
            if len(content) > MIB / 2:
                together.wait(LONG_S)
            done = original(run, session, name, content)
            with lock:
                at_once[0] -= 1
            return done

        running.link._fleet.push_part = push_part
        name = fleet.put(question((BIG,)))
        assert payloads(fleet.reply_to(name)) == (BIG[::-1],)
    assert max(seen) == most


def test_without_a_cap_nothing_is_waited_for(fleet, pki, tmp_path):
    clock = ManualClock()
    world = LinkWorld(clock=clock, pause=VirtualPause(clock), heartbeat_s=1e9)
    with Running(pki, fleet.address, tmp_path, world=world):
        fleet.wait(lambda: fleet.calls["pull-messages"] > 0)
        name = fleet.put(question((BIG,)))
        fleet.wait(lambda: bool(fleet.calls["pull-object"]))
        start = clock.now()
        fleet.reply_to(name)
        assert clock.now() - start < 10  # polls only; 4 Mbit/s would take 46 s


def test_large_transfers_wait_for_the_window_and_small_ones_do_not(fleet, pki, tmp_path):
    wall = ManualClock(WallClock().now())
    hour = time.localtime(wall.now()).tm_hour
    limits = LinkLimits(window=((hour + 2) % 24, (hour + 4) % 24))
    world = LinkWorld(wall=wall, pause=quick)
    with Running(pki, fleet.address, tmp_path, world=world, limits=limits) as running:
        small = fleet.put(question((b"small",)))
        assert payloads(fleet.reply_to(small)) == (b"llams",)
        large = fleet.put(question((BIG,)))
        state = running.until(lambda state: state.code is Code.WINDOW_CLOSED)
        assert state.connected
        beats = fleet.calls["send-node-heartbeat"]
        fleet.wait(lambda: fleet.calls["send-node-heartbeat"] > beats + 3)
        assert not any(
            fleet.pulled[part] for part in chunks(fleet, large) if len(fleet.parts[part]) > MIB
        )
        fleet.skew += 2.5 * 3600
        wall.skip_to(wall.now() + 2.5 * 3600)
        assert payloads(fleet.reply_to(large)) == (BIG[::-1],)
        running.until(lambda state: state.code is None)


def test_a_large_answer_waits_for_the_window_too(fleet, pki, tmp_path):
    wall = ManualClock(WallClock().now())
    hour = time.localtime(wall.now()).tm_hour
    limits = LinkLimits(window=((hour + 2) % 24, (hour + 4) % 24))
    hospital = FakeHospital(lambda _: Answer((BIG,)))
    world = LinkWorld(wall=wall, pause=quick)
    with Running(
        pki, fleet.address, tmp_path, world=world, limits=limits, hospital=hospital
    ) as running:
        name = fleet.put(question((b"small",)))
        running.until(lambda state: state.code is Code.WINDOW_CLOSED)
        assert fleet.calls["push-messages"] == fleet.calls["push-object"] == 0
        fleet.skew += 2.5 * 3600
        wall.skip_to(wall.now() + 2.5 * 3600)
        assert payloads(fleet.reply_to(name)) == (BIG,)


def test_a_window_may_pass_midnight():
    night = LinkLimits(window=(22, 6))
    assert [hour for hour in range(24) if night.open_at(hour)] == [0, 1, 2, 3, 4, 5, 22, 23]
    assert [hour for hour in range(24) if LinkLimits(window=(1, 3)).open_at(hour)] == [1, 2]
    assert LinkLimits().open_at(12)


@pytest.mark.parametrize("limits", [{"bits_per_second": 0}, {"window": (3, 25)}])
def test_limits_that_mean_nothing_are_refused(limits):
    with pytest.raises(ConfigError) as caught:
        LinkLimits(**limits)
    assert caught.value.code is Code.LINK_SETTINGS


# ---------------------------------------------------------------------------- no listener
CHILD = """
import sys, threading, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1].split(":")
from tests.fleet_double import FakeHospital, Running
pki, address, state, extra = sys.argv[2:6]
if extra == "listen":
    import socket
    kept = socket.create_server(("127.0.0.1", 0))
with Running(Path(pki), address, Path(state)) as running:
    running.until(lambda state: state.connected)
    print("up", flush=True)
    sys.stdin.read()
"""


def listening(pid: int) -> set[str]:
    """The listening sockets (TCP, UDP, unix) that a process holds."""
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink()) if link.is_symlink() else ""
        if target.startswith("socket:["):
            held.add(target[8:-1])
    found = set()
    for table, column in (("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9)):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if (fields[3] == "0A" or table.startswith("udp")) and fields[column] in held:
                found.add(f"{table} {fields[1]}")
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in held and int(fields[3], 16) & 0x10000:
            found.add(f"unix {fields[6]}")
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
@pytest.mark.parametrize("extra", ["quiet", "listen"])
def test_the_hospitals_process_listens_on_nothing(fleet, pki, tmp_path, extra):
    path = str(Path.cwd())
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, path, str(pki), fleet.address, str(tmp_path), extra],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout.readline() == "up\n"
            found = listening(child.pid)
        finally:
            child.stdin.close()
            child.stdout.close()
            child.wait(60)
    assert bool(found) == (extra == "listen"), found  # "listen" is the control
