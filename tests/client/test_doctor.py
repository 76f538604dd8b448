"""doctor at a hospital: what is broken is found and its fix named; what is healthy is not."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from client import doctor
from common.cli import VERSION, main
from common.errors import Code
from common.invite import new_transport
from common.keys import secret_file
from common.skew import VERSION_HEADER
from common.world import SystemEntropy, write_durably
from server.config import CoordinatorConfig
from server.pki import ensure_certificate, make_authority

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


def authority(folder: Path, *names: str) -> Path:
    config = CoordinatorConfig.model_validate(
        {"format": "wardround-coordinator/1", "state": "s", "names": names or ("127.0.0.1",)}
    )
    now = int(time.time())  # noqa: TID251
    make_authority(folder, "test", now)
    ensure_certificate(folder, config, now)
    return folder / "tls"


class Coordinator:
    """Answers 401 to everybody, with a date and, to known keys, its release."""

    def __init__(self, tls: Path) -> None:
        self.skew, self.release, self.seen = 0.0, VERSION, []
        told = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                told.seen.append(dict(self.headers))
                lines = ["HTTP/1.1 401 X", "Content-Length: 0", "Connection: close"]
                now = time.time() + told.skew  # noqa: TID251
                lines.append(f"Date: {formatdate(now, usegmt=True)}")
                if told.release:
                    lines.append(f"{VERSION_HEADER}: {told.release}")
                self.wfile.write(("\r\n".join(lines) + "\r\n\r\n").encode())
                self.close_connection = True

            def log_message(self, *_) -> None:
                pass

        class Server(HTTPServer):
            def handle_error(self, *_) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return authority(tmp_path_factory.mktemp("pki"), "127.0.0.1", "coordinator.test")


@pytest.fixture
def coordinator(tls) -> Iterator[Coordinator]:
    made = Coordinator(tls)
    yield made
    made.close()


class Hospital:
    """An enrolled hospital's folder."""

    def __init__(self, root: Path, url: str, ca: Path) -> None:
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        self.root, self.state, self.yaml = root, root / "state", root / "site.yaml"
        self.state.mkdir(mode=0o700)
        for name in ("identity", "vault"):
            secret_file(self.state / f"{name}.key", SystemEntropy())
        pem = new_transport().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_durably(self.state / "transport.key", [pem])
        shutil.copy(ca, self.state / "ca.crt")
        self.records = root / "records.csv"
        self.records.write_text("patient,text,label\n")
        self.records.chmod(0o600)
        self.settings = {
            "format": "wardround-site/1",
            "site": "north",
            "data": {"files": ["records.csv"]},
            "state": "state",
            "budget": {"epsilon": 8, "delta": 1e-5},
            "ceilings": {"epsilon": 3, "rounds": 9, "approved_studies": []},
            "device": "cpu",
        }
        self.set()
        self.pin(url=url)

    def set(self, **changes) -> None:
        self.yaml.write_text(json.dumps(self.settings | changes))

    def pin(self, **changes) -> None:
        pin = {
            "format": "wardround-pinned/1",
            "consortium": "test",
            "coordinator": "ab" * 32,
            "url": "127.0.0.1:1",
            "site": "north",
            "name": "North",
            "version": 1,
            "issued": 1_800_000_000,
        }
        write_durably(self.state / "coordinator.json", [json.dumps(pin | changes).encode()])

    def look(self, *, online: bool = True) -> dict[str, doctor.Finding]:
        return {item.name: item for item in doctor.findings(self.yaml, online=online)}

    def bad(self, *, online: bool = True) -> dict[str, doctor.Finding]:
        found = self.look(online=online)
        found.pop("time service", None)  # this machine's own
        return {name: item for name, item in found.items() if item.status != "ok"}


@pytest.fixture
def hospital(tmp_path, coordinator, tls) -> Hospital:
    return Hospital(tmp_path, f"127.0.0.1:{coordinator.port}", tls / "ca.crt")


def test_control_a_healthy_hospital_has_nothing_to_fix(hospital, coordinator):
    assert hospital.bad() == {}
    found = hospital.look()
    assert set(found) >= {"coordinator", "clock", "admission", "versions", "keys", "records"}
    assert all(not item.fix for item in found.values() if item.status == "ok")
    told = {name.lower() for name in coordinator.seen[0]}
    assert doctor.PUBLIC_KEY_HEADER in told
    assert "flwr-signature" not in told  # nothing is signed, so nothing can be done with it


def test_without_a_network_nothing_is_asked(hospital, coordinator):
    assert "coordinator" not in hospital.look(online=False)
    assert coordinator.seen == []


# ---------------------------------------------------------------------------- the way there


def test_a_port_that_refuses_is_named(hospital):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    hospital.pin(url=f"127.0.0.1:{port}")
    (found,) = hospital.bad().values()
    assert (found.name, found.status) == ("coordinator", "fail")
    assert "refused" in found.detail
    assert "whether the coordinator runs" in found.fix


def test_a_port_that_is_blocked_is_named_with_its_address(hospital, monkeypatch):
    def silence(*_args, **_more):
        raise TimeoutError

    monkeypatch.setattr(doctor.socket, "create_connection", silence)
    found = hospital.bad()["coordinator"]
    assert "no answer" in found.detail
    assert "firewall" in found.fix
    assert "outgoing TCP to 127.0.0.1:" in found.fix


def test_a_name_that_is_unknown_is_named(hospital, monkeypatch):
    hospital.pin(url="coordinator.invalid:443")

    def unknown(*_args, **_more):
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(doctor.socket, "create_connection", unknown)
    assert "name is not known" in hospital.bad()["coordinator"].detail


def test_something_else_on_the_port_is_named(hospital):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hospital.pin(url=f"127.0.0.1:{listener.getsockname()[1]}")

        def rude() -> None:
            for _ in range(2):
                listener.accept()[0].close()

        thread = threading.Thread(target=rude)
        thread.start()
        found = hospital.bad()["coordinator"]
        thread.join()
    assert found.status == "fail"


# ---------------------------------------------------------------------------- proxies


class Proxy:
    """Answers CONNECT: passes on to this machine, or says no."""

    def __init__(self, *, refuses: bool) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.refuses, self.calls = refuses, 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client:
            head = client.recv(4096)
            if not head:
                return
            self.calls += 1
            if self.refuses:
                client.sendall(b"HTTP/1.1 403 no\r\nContent-Length: 0\r\n\r\n")
                return
            port = int(head.split()[1].rpartition(b":")[2])
            client.sendall(b"HTTP/1.1 200 fine\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as server:
                other = threading.Thread(target=copy, args=(server, client), daemon=True)
                other.start()
                copy(client, server)
                other.join()

    def close(self) -> None:
        # Closing alone would leave the accepting thread one more caller.
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture(params=["environment", "site.yaml"])
def through(request, hospital, coordinator, monkeypatch):
    """Makes the hospital go through a proxy, to a name that only the proxy finds."""

    def use(port: int) -> str:
        hospital.pin(url=f"coordinator.test:{coordinator.port}")
        if request.param == "environment":
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:geheim@127.0.0.1:{port}")
        else:
            hospital.set(link={"proxy": f"http://127.0.0.1:{port}"})
        return request.param

    return use


def test_control_a_proxy_that_works_is_used(hospital, through):
    proxy = Proxy(refuses=False)
    through(proxy.port)
    assert hospital.bad() == {}
    assert hospital.look()["proxy"].status == "ok"
    assert proxy.calls
    proxy.close()


def test_a_proxy_that_refuses_is_named_without_its_password(hospital, through):
    proxy = Proxy(refuses=True)
    way = through(proxy.port)
    (found,) = hospital.bad().values()
    proxy.close()
    assert (found.name, found.status) == ("proxy", "fail")
    assert "CONNECT" in found.fix
    assert ("NO_PROXY=coordinator.test" in found.fix) == (way == "environment")
    assert ("link.proxy" in found.detail) == (way == "site.yaml")
    assert "geheim" not in str(found)


def test_a_proxy_that_is_not_there_is_named(hospital, through):
    proxy = Proxy(refuses=True)
    proxy.close()
    way = through(proxy.port)
    (found,) = hospital.bad().values()
    assert (found.name, found.status) == ("proxy", "fail")
    assert ("NO_PROXY=coordinator.test" in found.fix) == (way == "environment")


def test_no_proxy_goes_past_a_proxy_that_is_broken(hospital, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "coordinator.test")
    hospital.pin(url="coordinator.test:443")
    asked = []

    def remembers(address, **_more):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(doctor.socket, "create_connection", remembers)
    assert set(hospital.bad()) == {"coordinator"}
    monkeypatch.delenv("NO_PROXY")
    assert set(hospital.bad()) == {"proxy"}
    assert asked == [("coordinator.test", 443), ("127.0.0.1", 1)]


def test_a_proxy_address_that_is_none_is_named(hospital, monkeypatch):
    hospital.pin(url="coordinator.test:443")
    monkeypatch.setenv("HTTPS_PROXY", "ftp://user:geheim@x")
    found = hospital.bad()["proxy"]
    assert found.status == "fail"
    assert "geheim" not in str(found)


# ---------------------------------------------------------------------------- certificate, clock


def test_another_authority_is_named(hospital, tmp_path_factory):
    other = authority(tmp_path_factory.mktemp("other"))
    shutil.copy(other / "ca.crt", hospital.state / "ca.crt")
    (found,) = hospital.bad().values()
    assert (found.name, found.status) == ("certificate", "fail")
    assert "telephone" in found.fix


def test_a_certificate_for_other_names_is_named(hospital, coordinator):
    hospital.pin(url=f"localhost:{coordinator.port}")
    (found,) = hospital.bad().values()
    assert found.name == "certificate"
    assert "`names`" in found.fix


def test_a_damaged_authority_file_is_named(hospital):
    (hospital.state / "ca.crt").write_text("no certificate")
    (found,) = hospital.bad().values()
    assert (found.name, found.status) == ("enrolment", "fail")


@pytest.mark.parametrize(
    ("skew", "status"),
    [
        (0.0, None),
        (-250.0, "fail"),
        (-3.0, "warn"),
        (100.0, "warn"),
        (48 * 3600.0, "fail"),
        (400.0, "fail"),
    ],
)
def test_a_clock_that_is_off_is_named_with_its_offset(hospital, coordinator, skew, status):
    coordinator.skew = skew
    found = hospital.bad()
    if status is None:
        assert found == {}
        return
    assert found["clock"].status == status
    assert ("behind" if skew > 0 else "ahead of") in found["clock"].detail
    assert int(re.match(r"\d+", found["clock"].detail)[0]) == pytest.approx(abs(skew), abs=2)
    assert "Set the clock" in found["clock"].fix


def test_the_window_is_the_coordinators_own():
    """Flower's, of the installed release; read as text: Flower is not loaded here."""
    from importlib.util import find_spec

    place = find_spec("flwr").submodule_search_locations[0]
    text = Path(place, "common", "constant.py").read_text()
    behind = int(re.search(r"^TIMESTAMP_TOLERANCE = (\d+)", text, re.MULTILINE)[1])
    ahead = int(re.search(r"^SYSTEM_TIME_TOLERANCE = (\d+)", text, re.MULTILINE)[1])
    assert (-behind, ahead - 1) == doctor.TAKEN
    text = Path(place, "supercore", "constant.py").read_text()
    assert doctor.PUBLIC_KEY_HEADER in text.lower()


# ---------------------------------------------------------------------------- admission, versions


def test_a_key_that_the_coordinator_does_not_know_is_named(hospital, coordinator):
    coordinator.release = ""
    (found,) = hospital.bad().values()
    assert (found.name, found.status, found.fix) == ("admission", "fail", Code.NOT_ADMITTED.remedy)


def test_an_older_key_that_is_known_is_enough(hospital, coordinator):
    """After a rotation that the coordinator has not admitted yet."""
    transport = hospital.state / "transport.key"
    shutil.copy(transport, hospital.state / "transport-1.key")
    coordinator.release = ""
    assert set(hospital.bad()) == {"admission"}
    assert len(coordinator.seen) == 2


@pytest.mark.parametrize(
    ("other", "status"), [("0.1.7", "ok"), ("0.2.0", "ok"), ("0.3.0", "warn"), ("1.1.0", "warn")]
)
def test_versions_more_than_one_minor_apart_are_noticed(hospital, coordinator, other, status):
    assert VERSION.startswith("0.1.")
    coordinator.release = other
    found = hospital.look()["versions"]
    assert found.status == status
    assert other in found.detail


def test_the_status_warns_as_well(hospital, capsys):
    for other, far in ((VERSION, False), ("0.9.0", True)):
        link = {"peer_version": other}
        (hospital.state / "status.json").write_text(json.dumps({"link": link}))
        assert main(["client", "status", "--config", str(hospital.yaml)]) == 0
        assert ("0.9.0" in capsys.readouterr().out) is far


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["identity", "transport", "vault", "identity-1"])
def test_a_key_that_others_may_read_is_named_and_nothing_is_dialled(hospital, coordinator, name):
    path = hospital.state / f"{name}.key"
    if not path.exists():
        shutil.copy(hospital.state / "identity.key", path)
    path.chmod(0o644)
    (found,) = hospital.bad().values()
    assert (found.name, found.status) == ("keys", "fail")
    assert f"chmod 600 {path}" in found.fix
    assert coordinator.seen == []


def test_a_key_that_is_missing_is_named(hospital):
    (hospital.state / "vault.key").unlink()
    (found,) = hospital.bad().values()
    assert found.name == "keys"
    assert "vault.key" in found.detail


def test_a_hospital_that_has_not_joined_is_told_how(hospital):
    (hospital.state / "coordinator.json").unlink()
    (found,) = hospital.bad().values()
    assert (found.name, found.fix) == ("enrolment", Code.NOT_ENROLLED.remedy)


def test_another_hospitals_folder_is_named(hospital):
    hospital.pin(site="south")
    (found,) = hospital.bad(online=False).values()
    assert found.name == "enrolment"
    assert "south" in found.detail


def test_records_that_are_missing_or_open_are_named(hospital):
    hospital.records.chmod(0o604)
    assert hospital.bad(online=False)["records"].status == "warn"
    hospital.records.unlink()
    assert hospital.bad(online=False)["records"].status == "fail"


def test_a_kill_switch_that_is_on_is_named(hospital):
    (hospital.state / "stop").touch()
    assert "client start" in hospital.bad(online=False)["kill switch"].fix


def test_a_disk_that_is_nearly_full_is_named(hospital, monkeypatch):
    from common import doctor as machine

    for free, status in ((10**12, None), (10**9, "warn"), (10**6, "fail")):
        monkeypatch.setattr(
            machine.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free)
        )
        found = hospital.bad(online=False)
        assert (found["disk"].status if "disk" in found else None) == status


# ---------------------------------------------------------------------------- the verb


def test_the_verb_picks_the_hospitals_side(hospital, coordinator, capsys):
    assert main(["doctor", "--config", str(hospital.yaml)]) == 0
    assert f"client review BUNDLE --config {hospital.yaml}" in capsys.readouterr().out
    coordinator.release = ""
    assert main(["doctor", "--json", "--config", str(hospital.yaml)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in report["findings"] if f["status"] == "fail"] == ["admission"]


def test_without_a_network_nothing_heavy_is_loaded(hospital):
    code = (
        "import sys; from common.cli import main\n"
        f"assert main(['doctor', '--offline', '--config', {str(hospital.yaml)!r}]) == 0\n"
        "heavy = {'flwr', 'torch', 'httpx', 'pyarrow', 'grpc', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, stdout=subprocess.DEVNULL)
