"""doctor at the coordinator: what is broken is found and its fix named; what is healthy is not."""

from __future__ import annotations

import fcntl
import json
import socket
import ssl
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.cli import main
from common.world import SystemEntropy, unix_seconds
from server import doctor, enrol
from server.config import CoordinatorConfig


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Coordinator:
    """An initialised coordinator's folder."""

    def __init__(self, root: Path) -> None:
        self.yaml, self.state = root / "coordinator.yaml", root / "state"
        ports = [free_port() for _ in range(3)]
        self.settings = {
            "format": "wardround-coordinator/1",
            "state": "state",
            "names": ["127.0.0.1"],
            "listen": {"host": "127.0.0.1", "port": ports[0]},
            "admin": {"port": ports[1], "health": ports[2]},
        }
        self.set()
        config = CoordinatorConfig.model_validate(self.settings)
        enrol.initialise(config, self.state, now=unix_seconds(), entropy=SystemEntropy())

    def set(self, **changes) -> None:
        self.yaml.write_text(json.dumps(self.settings | changes))

    def look(self, *, online: bool = False) -> list[doctor.Finding]:
        return list(doctor.findings(self.yaml, online=online))

    def bad(self, *, online: bool = False) -> list[doctor.Finding]:
        own = {"time service", "hospitals"}  # this machine's; nobody is admitted
        return [f for f in self.look(online=online) if f.status != "ok" and f.name not in own]


@pytest.fixture
def coordinator(tmp_path, monkeypatch) -> Coordinator:
    return Coordinator(tmp_path)


def one(found: list[doctor.Finding]) -> doctor.Finding:
    (item,) = found
    return item


def test_control_a_healthy_coordinator_has_nothing_to_fix(coordinator):
    assert coordinator.bad(online=True) == []
    names = {item.name for item in coordinator.look(online=True)}
    assert names >= {"disk", "keys", "certificate", "ports", "names", "hospitals"}


def test_a_coordinator_that_is_not_initialised_is_told_how(coordinator, tmp_path):
    coordinator.set(state=str(tmp_path / "other"))
    found = coordinator.bad()
    assert found[0].name == "folder"
    (tmp_path / "other").mkdir()
    found = one(coordinator.bad())
    assert (found.name, found.status) == ("initialised", "fail")
    assert "server init" in found.fix


@pytest.mark.parametrize("name", ["identity.key", "admin.token", "tls/ca.key", "tls/server.key"])
def test_a_key_that_others_may_read_is_named(coordinator, name):
    path = coordinator.state / name
    path.chmod(0o640)
    found = one(coordinator.bad())
    assert (found.name, found.status) == ("keys", "fail")
    assert f"chmod 600 {path}" in found.fix


def test_a_lost_token_is_named(coordinator):
    (coordinator.state / "admin.token").unlink()
    assert one(coordinator.bad()).name == "initialised"


def test_a_certificate_that_does_not_fit_is_named_and_none_is_made(coordinator):
    path = coordinator.state / "tls" / "server.crt"
    before = path.read_bytes()
    coordinator.set(names=["coordinator.test"])
    found = one(coordinator.bad())
    assert (found.name, found.status) == ("certificate", "warn")
    assert "server renew" in found.fix
    assert path.read_bytes() == before


def test_a_damaged_authority_is_named(coordinator):
    (coordinator.state / "tls" / "ca.crt").write_text("none")
    assert one(coordinator.bad()).status == "fail"


@pytest.mark.parametrize(
    ("key", "part"), [("listen.port", 0), ("admin.port", 1), ("admin.health", 2)]
)
def test_a_port_that_is_taken_is_named(coordinator, key, part):
    settings = coordinator.settings
    ports = (settings["listen"]["port"], settings["admin"]["port"], settings["admin"]["health"])
    with socket.create_server(("127.0.0.1", ports[part])):
        found = one(coordinator.bad())
    assert (found.name, found.status) == ("ports", "fail")
    assert key in found.detail
    assert str(ports[part]) in found.fix
    assert coordinator.bad() == []


def test_an_address_that_is_not_this_machines_is_named(coordinator):
    coordinator.set(listen={"host": "192.0.2.7", "port": free_port()})
    found = one(coordinator.bad())
    assert (found.name, found.status) == ("ports", "fail")


def test_a_name_that_nobody_finds_is_named(coordinator, monkeypatch):
    coordinator.set(names=["coordinator.invalid"])
    real = socket.getaddrinfo

    def find(host, *args, **more):
        if host == "coordinator.invalid":
            raise socket.gaierror(-2, "unknown")
        return real(host, *args, **more)

    monkeypatch.setattr(doctor.socket, "getaddrinfo", find)
    found = {item.name: item for item in coordinator.bad(online=True)}["names"]
    assert found.status == "fail"
    assert "DNS" in found.fix
    assert "names" not in {item.name for item in coordinator.bad(online=False)}


class Running:
    """Holds the lock as the process does, and answers TLS, with our certificate or another's."""

    def __init__(self, coordinator: Coordinator, tls: Path | None) -> None:
        folder = coordinator.state / "flower"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.lock = (folder / "lock").open("wb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.listener: socket.socket | None = None
        if tls is None:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
        self.listener = socket.create_server(("127.0.0.1", coordinator.settings["listen"]["port"]))
        self.thread = threading.Thread(target=self.answer, args=(context,))
        self.thread.start()

    def answer(self, context: ssl.SSLContext) -> None:
        assert self.listener is not None
        client = self.listener.accept()[0]
        try:
            context.wrap_socket(client, server_side=True).close()
        except OSError:
            client.close()

    def close(self) -> None:
        self.lock.close()
        if self.listener is not None:
            self.thread.join()
            self.listener.close()


@pytest.mark.parametrize(
    ("whose", "says"), [("ours", ""), ("another", "another certificate"), (None, "no connection")]
)
def test_a_running_coordinator_is_dialled_as_hospitals_do(coordinator, tmp_path, whose, says):
    folder: Path | None = coordinator.state / "tls"
    if whose == "another":
        (tmp_path / "x").mkdir()
        folder = Coordinator(tmp_path / "x").state / "tls"
    running = Running(coordinator, folder if whose else None)
    found = coordinator.bad(online=True)
    running.close()
    if not says:
        assert found == []
        return
    assert one(found).name == "names"
    assert says in one(found).detail
    assert "firewall" in one(found).fix


def test_a_disk_that_is_nearly_full_is_named(coordinator, monkeypatch):
    from common import doctor as machine

    for free, status in ((10**12, []), (10**9, ["warn"]), (10**6, ["fail"])):
        monkeypatch.setattr(
            machine.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free)
        )
        assert [f.status for f in coordinator.bad() if f.name == "disk"] == status


def test_the_verb_picks_the_coordinators_side(coordinator, capsys):
    words = ["doctor", "--offline", "--config", str(coordinator.yaml)]
    assert main(words) == 0
    assert f"server run BUNDLE --config {coordinator.yaml}" in capsys.readouterr().out
    (coordinator.state / "identity.key").chmod(0o644)
    assert main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in report["findings"] if f["status"] == "fail"] == ["keys"]


def test_hospitals_that_are_missing_are_noticed(coordinator, monkeypatch):
    def told(count):
        return [SimpleNamespace(revoked=False)] * count + [SimpleNamespace(revoked=True)] * 5

    for count, status in ((2, "warn"), (3, "ok")):
        monkeypatch.setattr(doctor, "admitted", lambda _state, count=count: told(count))
        (found,) = [f for f in coordinator.look() if f.name == "hospitals"]
        assert found.status == status
