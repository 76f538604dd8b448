"""The resident process: who starts it, who may speak to it, and that there is never a second."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

import client.app
from client import resident
from client.answer import Answer
from client.app import opened
from client.config import SiteConfig
from client.folders import HospitalFolder
from client.hospital import HospitalHost
from client.resident import Relay, Resident, relay_for
from common.config import load
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, ProtocolError, StorageError, WardroundError
from common.protocol.envelope import COORDINATOR, Envelope, check_envelope, sign_envelope
from server.enrol import coordinator_key
from tests.fleet_double import COORDINATOR_KEY, STUDY, FakeHospital, question
from tests.flower.consortium import Consortium

OTHER = SiteKey.from_seed(b"R" * 32)


def signed(
    *payloads: bytes, key: SiteKey = COORDINATOR_KEY, to: str = "north", study: bytes = STUDY
) -> Envelope:
    return sign_envelope(
        key,
        study=study,
        sender=COORDINATOR,
        recipient=to,
        nonce=b"n" * 16,
        payloads=payloads,
    )


# ---------------------------------------------------------------------------- in this process
def bare_site(root: Path) -> Path:
    """A site.yaml and its folder; nobody is enrolled."""
    root.mkdir(parents=True, exist_ok=True)
    plain = {
        "format": "wardround-site/1",
        "site": "north",
        "data": {"files": ["labs.csv"]},
        "state": "state",
        "budget": {"epsilon": 12, "delta": 1e-5},
        "ceilings": {"epsilon": 10, "delta": 1e-5, "rounds": 20, "approved_studies": []},
    }
    path = root / "site.yaml"
    path.write_text(json.dumps(plain))
    (root / "state").mkdir(mode=0o700)
    return path


NEVER = ("false",)
"""A program that starts no resident."""


@contextlib.contextmanager
def served(hospital: Any, path: Path, **options: Any) -> Iterator[Resident]:
    """A resident in a thread."""
    folder = HospitalFolder(load(path, SiteConfig).state_folder(path))
    made = Resident(hospital, folder, **options)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return bare_site(tmp_path / "north")


def test_a_question_is_relayed_and_its_answer_signed_by_the_resident(path: Path):
    hospital = FakeHospital()
    payload = os.urandom(3 << 20)
    with served(hospital, path):
        envelope, answers = Relay(path, command=NEVER).answered(
            signed(payload, b""), (payload, b""), hello=False
        )
    check_envelope(
        envelope,
        answers,
        public=hospital.key.public,
        study=STUDY,
        sender="north",
        recipient=COORDINATOR,
        nonce=b"n" * 16,
    )
    assert answers == (payload[::-1], b"")
    assert hospital.asked == [(STUDY, (payload, b""), False)]


def test_one_memory_answers_all_questions_and_the_relays_share_nothing(path: Path):
    """What a stock SuperNode would lose: a secret of the last message."""
    kept: list[bytes] = []

    def reply(payloads: tuple[bytes, ...]) -> Answer:
        kept.extend(payloads)
        return Answer(tuple(kept))

    with served(FakeHospital(reply), path):
        for number, payload in enumerate((b"a", b"b", b"c"), start=1):
            _, answers = Relay(path, command=NEVER).answered(
                signed(payload), (payload,), hello=False
            )
            assert len(answers) == number


@pytest.mark.parametrize(
    ("envelope", "hello"),
    [
        (signed(b"abc", key=OTHER), False),
        (signed(b"abd"), False),
        (signed(b"abc", to="south"), False),
        (signed(b"abc", to=""), False),
        (signed(b"abc"), True),
    ],
)
def test_the_resident_itself_refuses_what_the_coordinator_did_not_sign(
    path: Path, envelope: Envelope, hello: bool
):
    hospital = FakeHospital()
    with served(hospital, path):
        relay = Relay(path, command=NEVER)
        with pytest.raises(ProtocolError):
            relay.answered(envelope, (b"abc",), hello=hello)
        assert hospital.asked == []
        relay.answered(signed(b"abc"), (b"abc",), hello=False)  # control
    assert len(hospital.asked) == 1


def test_the_socket_is_for_the_hospitals_own_user(path: Path):
    with served(FakeHospital(), path):
        mode = (path.parent / "state" / "resident.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_deep_folder_has_a_socket_too(tmp_path: Path):
    path = bare_site(tmp_path / ("d" * 90) / ("e" * 90))
    with served(FakeHospital(), path):
        assert Relay(path, command=NEVER).answered(signed(), (), hello=False)[1] == ()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"WRR1\xff\xff\xff\xff",
        b"WRR1\x00\x00\x00\x01x",
        resident._HEAD.pack(b"WRR1", len(head := resident.encode({"hello": 1, "sizes": (1,)})))
        + head,
        resident._HEAD.pack(b"WRR1", len(head := resident.encode({"sizes": (-1,)}))) + head,
        resident._HEAD.pack(b"WRR1", len(head := resident.encode({"sizes": (1 << 60,)}))) + head,
        resident._HEAD.pack(b"WRR1", len(head := resident.encode([1, 2]))) + head,
    ],
)
def test_junk_on_the_socket_reaches_nobody_and_ends_nothing(path: Path, junk: bytes):
    hospital = FakeHospital()
    with served(hospital, path):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(path.parent / "state" / "resident.sock"))
            line.sendall(junk)
            line.shutdown(socket.SHUT_WR)
            line.recv(1 << 16)
        assert hospital.asked == []
        assert Relay(path, command=NEVER).answered(signed(b"x"), (b"x",), hello=False)[1] == (b"x",)


def test_a_fault_of_ours_is_a_signed_code_and_the_resident_stays(path: Path):
    def failing(payloads: tuple[bytes, ...]) -> Answer:
        raise ValueError("Erika Mustermann")

    with served(FakeHospital(failing), path):
        for _ in range(2):
            envelope, answers = Relay(path, command=NEVER).answered(
                signed(b"x"), (b"x",), hello=False
            )
            assert (envelope.code, answers) == (Code.INTERNAL_FAULT.label, ())


def test_who_ends_before_it_answers_is_named_as_lost(path: Path):
    folder = HospitalFolder(path.parent / "state")
    listener = resident._listening(resident._socket(folder))

    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(StorageError) as raised:
        Relay(path, command=NEVER).answered(signed(), (), hello=False)
    thread.join()
    listener.close()
    assert raised.value.code is Code.RESIDENT_LOST


def test_after_long_silence_the_resident_ends_and_takes_its_socket_along(path: Path):
    folder = HospitalFolder(path.parent / "state")
    Resident(FakeHospital(), folder, idle_s=0.05).run()  # returns by itself
    assert not resident._socket(folder).exists()


def test_a_resident_does_not_end_while_somebody_is_starting_one(path: Path):
    folder = HospitalFolder(path.parent / "state")
    made = Resident(FakeHospital(), folder)
    lock = resident._start_lock(folder)
    resident.fcntl.flock(lock, resident.fcntl.LOCK_EX)
    assert not made._left()
    os.close(lock)
    assert made._left()  # control
    made._listener.close()


def test_a_program_that_starts_nothing_is_named_as_lost(path: Path):
    with pytest.raises(StorageError) as raised:
        Relay(path, command=NEVER).answered(signed(), (), hello=False)
    assert raised.value.code is Code.RESIDENT_LOST


# ---------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"wardround-site": 7},
        {"wardround-site": "site.yaml"},
        {"wardround-site": "/does/not/exist.yaml"},
    ],
)
def test_a_supernode_that_names_no_hospital_is_told_so(config: dict[str, Any]):
    with pytest.raises(ConfigError) as raised:
        relay_for(config)
    assert raised.value.code is Code.RESIDENT_SETTING


@pytest.mark.parametrize("idle", [0, -1, True, "long", float("nan")])
def test_a_silence_that_is_no_time_is_refused(path: Path, idle: object):
    assert relay_for({"wardround-site": str(path), "wardround-idle-s": 3})._idle_s == 3
    with pytest.raises(ConfigError):
        relay_for({"wardround-site": str(path), "wardround-idle-s": idle})


def reply_of(app: Any, node: dict[str, Any], run: dict[str, Any]) -> str:
    context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run)
    reply = app(question((b"abc",)), context)
    return reply.error.reason if reply.has_error() else opened(reply.content)[0].code


def test_the_app_asks_the_hospital_that_its_own_node_names_and_never_one_of_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(client.app, "_BOUND", [])
    named = {"wardround-site": str(path)}
    with served(FakeHospital(), path):
        assert reply_of(client.app.app, named, {}) == ""  # control: it is found
        assert reply_of(client.app.app, {}, named) == Code.RESIDENT_SETTING.label


def test_the_resident_inherits_neither_flowers_settings_nor_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("FLWR_HOME", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("WARDROUND_KEPT", "x")
    kept = resident._environment()
    assert kept["WARDROUND_KEPT"] == "x"
    assert not {"FLWR_HOME", "HTTPS_PROXY", "https_proxy"} & set(kept)


def test_the_resident_loads_neither_flower_nor_torch():
    told = (
        "import client.resident, client.hospital, sys; print({'flwr', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", told],
        env=resident._environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------- the real process
@pytest.fixture
def real(consortium: Consortium) -> Iterator[Callable[..., Relay]]:
    """Relays of an enrolled hospital; what they start is ended."""

    def make(**options: Any) -> Relay:
        return Relay(consortium.yaml("north"), **options)

    yield make
    number = holder(consortium)
    if number is not None:
        os.kill(number, signal.SIGTERM)
        gone(number)


def beat(consortium: Consortium) -> int:
    return int(json.loads((consortium.home("north") / "heartbeat.json").read_text())["pid"])


def holder(consortium: Consortium) -> int | None:
    try:
        number = beat(consortium)
        os.kill(number, 0)
    except (OSError, ValueError):
        return None
    return number


def gone(number: int, seconds: float = 30.0) -> None:
    """Wait until a process is no more: its end of a pidfd becomes readable."""
    try:
        handle = os.pidfd_open(number)
    except ProcessLookupError:
        return
    with contextlib.closing(os.fdopen(handle, "rb", buffering=0)) as watched:
        assert resident.select.select([watched], [], [], seconds)[0]


def hello(consortium: Consortium) -> Envelope:
    return signed(key=coordinator_key(consortium.state), to="", study=consortium.bundle.digest)


def test_the_first_question_starts_one_process_and_the_next_ones_find_it(
    consortium: Consortium, real: Callable[..., Relay]
):
    asked = hello(consortium)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(real().answered(asked, (), hello=True)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    first = beat(consortium)
    for envelope, answers in found:
        assert (envelope.sender, envelope.code, len(answers)) == ("north", "", 1)
    # While it lives nobody else opens the hospital's journal.
    yaml = consortium.yaml("north")
    with pytest.raises(StorageError) as raised:
        HospitalHost(load(yaml, SiteConfig), yaml, coordinator=bytes(32))
    assert raised.value.code is Code.FOLDER_IN_USE
    # Killed, it leaves its socket behind; the next question starts another.
    os.kill(first, signal.SIGKILL)
    gone(first)
    assert (consortium.home("north") / "resident.sock").exists()
    envelope, answers = real().answered(asked, (), hello=True)
    assert (envelope.code, len(answers)) == ("", 1)
    assert beat(consortium) != first
    told = (consortium.home("north") / "resident.log").read_bytes()
    assert told == b"", told


def test_beside_the_daemon_no_resident_starts_and_the_relay_says_why(
    consortium: Consortium, real: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch
):
    yaml = consortium.yaml("north")
    host = HospitalHost(
        load(yaml, SiteConfig), yaml, coordinator=coordinator_key(consortium.state).public
    )
    try:
        with pytest.raises(WardroundError) as raised:
            real().answered(hello(consortium), (), hello=True)
    finally:
        host.close()
    assert raised.value.code is Code.FOLDER_IN_USE
    assert not (consortium.home("north") / "resident.sock").exists()
