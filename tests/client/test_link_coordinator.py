"""The hospital's line and the real embedded coordinator: what only the two together can show."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.app import Message

from client.app import opened, sealed
from client.link import LinkWorld
from common.errors import Code
from common.protocol.envelope import COORDINATOR, sign_envelope
from server.flower import FlowerCoordinator, TlsFiles, Wire
from tests.fleet_double import COORDINATOR_KEY, LONG_S, STUDY, Running, make_pki, quick

# Flower's own, about how it configures its migrations.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")

MIB = 1 << 20
BIG = os.urandom(23 * MIB)  # five parts


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return make_pki(tmp_path_factory.mktemp("pki"))


def public_line(pki: Path) -> bytes:
    """The public half of the transport key, as the coordinator registers it."""
    key = load_ssh_private_key((pki / "transport.key").read_bytes(), None)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


class Coordinator:
    """The embedded coordinator, its grid, and how a test asks one question."""

    def __init__(self, folder: Path, pki: Path, port: int = 0) -> None:
        self.flower = FlowerCoordinator(
            folder,
            listen=("127.0.0.1", port),
            admin=("127.0.0.1", 0),
            tls=TlsFiles(pki / "server.crt", pki / "server.key"),
            admin_token="t0ken-of-the-operator",
            wire=Wire(hold_s=0.2),
        )
        self.flower.start()
        self.flower.register("north", public_line(pki))
        self.grid = self.flower.grid()
        self.port = self.flower.public_port
        self.address = f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self.flower.stop()

    def ask(self, payloads=(), kind="query.step"):
        """Push a question; its name."""
        waited = threading.Event()
        for _ in range(int(LONG_S / 0.01)):
            nodes = [node.node_id for node in self.grid.get_nodes()]
            if nodes:
                break
            waited.wait(0.01)
        recipient = "north" if payloads else ""
        envelope = sign_envelope(
            COORDINATOR_KEY,
            study=STUDY,
            sender=COORDINATOR,
            recipient=recipient,
            nonce=os.urandom(16),
            payloads=payloads,
        )
        message = Message(sealed(envelope, payloads), nodes[0], kind, ttl=3600)
        return next(iter(self.grid.push_messages([message])))

    def reply(self, name):
        for _ in range(int(LONG_S / 0.05)):
            for found in self.grid.pull_messages([name]):
                return found
            self.flower.wait(0.05)
        raise AssertionError("no answer came")

    def answer(self, payloads=(), kind="query.step"):
        return opened(self.reply(self.ask(payloads, kind)).content)[1]


def test_questions_of_every_kind_and_size_are_answered(pki, tmp_path):
    with (
        closing(Coordinator(tmp_path / "co", pki)) as coordinator,
        Running(pki, coordinator.address, tmp_path / "site", world=LinkWorld()) as running,
    ):
        assert coordinator.answer(kind="query.hello") == (b"hello",)
        assert coordinator.answer((b"abc", b"", b"x")) == (b"cba", b"", b"x")
        assert coordinator.answer((BIG,), "train.step") == (BIG[::-1],)
        assert running.link.state().code is None


def test_a_revoked_key_is_out_at_once_and_a_new_one_is_let_in(pki, tmp_path):
    new = make_pki(tmp_path / "new")
    (new / "ca.crt").write_bytes((pki / "ca.crt").read_bytes())
    with closing(Coordinator(tmp_path / "co", pki)) as coordinator:
        with Running(pki, coordinator.address, tmp_path / "site") as running:
            assert coordinator.answer((b"abc",)) == (b"cba",)
            coordinator.flower.unregister("north")
            state = running.until(lambda state: state.code is Code.NOT_ADMITTED)
            assert not state.connected
        coordinator.flower.register("north", public_line(new))
        with Running(new, coordinator.address, tmp_path / "site"):
            assert coordinator.answer((b"abd",)) == (b"dba",)


def test_a_coordinator_restarted_in_the_middle_takes_only_what_it_lacks(pki, tmp_path):
    pushed, gone = threading.Event(), threading.Event()
    with closing(Coordinator(tmp_path / "co", pki)) as first:
        port = first.port
        running = Running(pki, first.address, tmp_path / "site", world=LinkWorld(pause=quick))
        original = running.link._fleet.push_part

        def push_part(run, session, name, content):
            if pushed.is_set():
                gone.wait(LONG_S)
            done = original(run, session, name, content)
            if done and len(content) > MIB:
                pushed.set()
            return done

        running.link._fleet.push_part = push_part
        first.ask((BIG,))
        assert pushed.wait(LONG_S)
    gone.set()
    with running, closing(Coordinator(tmp_path / "co", pki, port)) as second:
        before = running.link.state().bytes_up
        assert second.answer((BIG,)) == (BIG[::-1],)
        # At least the part that had come for certain was not sent a second time.
        assert running.link.state().bytes_up - before < len(BIG) - 4 * MIB


CHILD = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from client.link import LinkLimits
from tests.fleet_double import Running
pki, address, state, rate = sys.argv[2:6]
limits = LinkLimits(bits_per_second=int(rate)) if rate != "0" else None
from client.link import LinkWorld
with Running(Path(pki), address, Path(state), world=LinkWorld(), limits=limits) as running:
    running.until(lambda state: state.connected)
    print("up", flush=True)
    sys.stdin.read()
    print(running.link.state().bytes_down, flush=True)
"""


def child(pki, coordinator, state, rate=0):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD,
            str(Path.cwd()),
            str(pki),
            coordinator.address,
            str(state),
            str(rate),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_hospital_killed_in_the_middle_goes_on_with_what_its_disk_has(pki, tmp_path):
    parts = tmp_path / "site" / "link" / "parts"
    with closing(Coordinator(tmp_path / "co", pki)) as coordinator:
        # 80 Mbit/s: two and a half seconds for all of it, so that the kill falls in between.
        with child(pki, coordinator, tmp_path / "site", 80_000_000) as hospital:
            assert hospital.stdout.readline() == "up\n"
            name = coordinator.ask((BIG,))
            waited = threading.Event()
            for _ in range(int(LONG_S / 0.01)):
                if list(parts.glob("*[0-9a-f]")):
                    break
                waited.wait(0.01)
            hospital.kill()
            hospital.stdin.close()
            hospital.stdout.close()
        kept = sum(path.stat().st_size for path in parts.glob("*[0-9a-f]"))
        assert MIB < kept < len(BIG)
        with child(pki, coordinator, tmp_path / "site") as hospital:
            assert hospital.stdout.readline() == "up\n"
            # The coordinator hands the very question out again.
            assert opened(coordinator.reply(name).content)[1] == (BIG[::-1],)
            hospital.stdin.close()
            down = int(hospital.stdout.readline())
            hospital.stdout.close()
        assert down < len(BIG) - kept + MIB
