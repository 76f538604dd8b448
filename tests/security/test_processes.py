"""Real processes, as they are installed: what listens, what others on the machine can see, what logs say.

A coordinator and four hospitals whose records are wrong on purpose: their trainers read them, and
what is wrong with them quotes the canary. So no torch is needed, and everything runs that could
put a record into a log.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import client.enrol
from client.config import SiteConfig
from client.review import approve_study
from common.config import load
from common.errors import Code
from common.integrity import code_digest
from common.world import SystemEntropy, unix_seconds
from server import enrol
from server.config import CoordinatorConfig
from tests.client.hospital.conftest import SITES, _bundle, _write_site

ROOT = Path(__file__).parents[2]
CANARY = "kanarienvogel"
ENTROPY = SystemEntropy()
ENOUGH_S = 240.0


@dataclass
class Processes:
    """The folder of everybody, and the processes that run in it."""

    root: Path
    config: CoordinatorConfig
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    def state(self, name: str) -> Path:
        return self.coordinator if name == "coordinator" else self.root / name / "state"

    def pids(self, name: str) -> list[int]:
        """The process and all that it started."""
        found = [self.running[name].pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split()]
        return found

    def start(self, name: str, *words: str) -> None:
        (self.root / "told").mkdir(exist_ok=True)
        with (self.root / "told" / name).open("wb") as told:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "common.cli", *words],
                cwd=self.root,
                env={**os.environ, "PYTHONPATH": str(self.root / "code"), "OMP_NUM_THREADS": "1"},
                stdout=told,
                stderr=told,
            )

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(ready, what: str) -> None:
    end = time.monotonic() + ENOUGH_S
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def spoilt(folder: Path) -> None:
    """Every record's label becomes one that the study does not have, and quotes the canary."""
    path = folder / "labs.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow(row | {"pid": f"{CANARY}-{number}", "dx": f"{CANARY} of the lung"})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Processes]:
    root = tmp_path_factory.mktemp("processes")
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in ("common", "client", "server"):
        shutil.copytree(ROOT / package, root / "code" / package, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", root / "code")
    ports = free_ports(3)
    told = {
        "format": "wardround-coordinator/1",
        "state": "coordinator",
        "names": ["127.0.0.1", "localhost"],
        "listen": {"host": "0.0.0.0", "port": ports[0]},  # noqa: S104 - as in a deployment
        "admin": {"port": ports[1], "health": ports[2]},
    }
    (root / "coordinator.yaml").write_text(json.dumps(told))
    config = CoordinatorConfig.model_validate(told)
    made = Processes(root, config)
    now = unix_seconds()
    enrol.initialise(config, made.coordinator, now=now, entropy=ENTROPY)
    for site in SITES:
        (root / site).mkdir()
        _write_site(root / site, site)
        path = root / site / "site.yaml"
        plain = json.loads(path.read_text())
        plain["ceilings"]["require_privacy"] = False  # such a study has rounds to burn for nothing
        path.write_text(json.dumps(plain))
        invite = enrol.invite(
            made.coordinator, config, name=site.title(), site=site, url=f"127.0.0.1:{ports[0]}",
            days=2, now=now, entropy=ENTROPY,
        )  # fmt: skip
        answer = client.enrol.join(made.state(site), invite, now=now, entropy=ENTROPY).answer
        enrol.admit(made.coordinator, answer, now, said=answer.words)
    bundle = root / "bundle"
    # Every round burns; the run must outlive the tests.
    unbounded = dict.fromkeys(("epsilon", "delta", "clip_norm", "statistics_epsilon"))
    privacy = {"mode": "none", **unbounded}
    _bundle({"privacy": privacy, "training": {"spare_rounds": 300}}).save(bundle)
    enrol.publish(made.coordinator, bundle)
    code = str(root / "code")  # what will run, wherever these tests run
    for site in SITES:
        path = root / site / "site.yaml"
        with patch(
            "client.review.code_digest", lambda packages: code_digest(packages, search=[code])
        ):
            approve_study(bundle, load(path, SiteConfig), path, by="Dr. Grey", now=now)
        spoilt(root / site)
    made.start("coordinator", "server", "run", "bundle", "--linger", "0")
    for site in SITES:
        made.start(site, "client", "run", "--config", str(root / site / "site.yaml"))
    try:
        wait_for(
            lambda: all(declined(made, site) for site in SITES), "nobody looked at the records"
        )
        yield made
    finally:
        made.stop()


def declined(made: Processes, site: str) -> bool:
    """Whether the hospital's trainer has read the records, and refused them."""
    for name, process in made.running.items():
        assert process.poll() is None, (made.root / "told" / name).read_text()
    found = made.state(site).glob("studies/*/audit/*.jsonl")
    declined = re.compile(r'"code":"WR-2\d{3}"[^\n]*')
    return any(declined.search(path.read_text()) for path in found)


# ---------------------------------------------------------------------------- what listens


LOOPBACK, EVERYWHERE = "0100007F", "00000000"
MAPPED = "0000000000000000FFFF0000"  # IPv4 inside IPv6


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every listening TCP and every bound UDP socket of these processes."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(entry.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table, states in (("tcp", {"0A"}), ("tcp6", {"0A"}), ("udp", {"07"}), ("udp6", {"07"})):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[9] in inodes and cells[3] in states:
                address, port = cells[1].split(":")
                found.add((address.removeprefix(MAPPED), int(port, 16)))
    return found


def test_a_hospital_listens_on_nothing_and_its_trainers_neither(made):
    for site in SITES:
        assert listening(made.pids(site)) == set()


def test_the_coordinator_listens_on_one_public_port_and_on_loopback(made):
    """Also the control of the test above: what listens is found."""
    config = made.config
    assert listening(made.pids("coordinator")) == {
        (EVERYWHERE, config.listen.port),
        (LOOPBACK, config.admin.port),
        (LOOPBACK, config.admin.health),
    }


def outside() -> str:
    """An address of this machine that others could dial."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


def test_from_outside_only_the_public_port_is_there(made):
    address, config = outside(), made.config
    socket.create_connection((address, config.listen.port), timeout=5).close()
    for port in (config.admin.port, config.admin.health):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)


def test_the_operators_port_of_the_process_wants_its_token(made):
    base = f"http://127.0.0.1:{made.config.admin.port}"
    token = enrol.admin_token(made.coordinator)
    for path in ("/status", "/metrics"):
        assert httpx.get(base + path).status_code == 401
        assert httpx.get(base + path, headers={"authorization": "Bearer x"}).status_code == 401
        good = httpx.get(base + path, headers={"authorization": f"Bearer {token}"})
        assert good.status_code == 200


def test_the_health_port_tells_its_health_and_nothing_else(made):
    with grpc.insecure_channel(f"127.0.0.1:{made.config.admin.health}") as channel:
        told = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert told.status == health_pb2.HealthCheckResponse.SERVING
        for method in ("/flwr.proto.Control/ListRuns", "/flwr.proto.Fleet/PullMessages", "/x/y"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(method)(b"", timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---------------------------------------------------------------------------- what can be seen


def forms(secret: bytes) -> set[bytes]:
    """A secret as it might be written."""
    return {
        secret,
        secret.hex().encode(),
        base64.b64encode(secret).rstrip(b"="),
        repr(secret).encode(),
    }


def secrets_of(made: Processes, name: str) -> dict[str, set[bytes]]:
    """Every secret file of a party, in every form; of PEM files, the lines of the key itself."""
    found = {}
    state = made.state(name)
    for path in sorted([*state.glob("*.key"), *state.glob("tls/*.key"), *state.glob("*.token")]):
        content = path.read_bytes()
        if content.startswith(b"-----BEGIN"):
            lines = [line for line in content.splitlines() if line and b"-----" not in line]
            # The first line is every key's, and a short last one is padding.
            found[path.name] = {line for line in lines[1:] if len(line) >= 60}
            assert found[path.name]
        else:
            found[path.name] = forms(content.strip())
    return found


def shown(made: Processes, name: str) -> Iterator[tuple[str, bytes]]:
    """What other users of the machine, or whoever gets the logs, may see of a party."""
    for pid in made.pids(name):
        for what in ("cmdline", "environ", "comm", "status"):
            try:
                yield f"{what} of {pid}", Path(f"/proc/{pid}/{what}").read_bytes()
            except OSError:
                continue  # a trainer that has just ended
    yield "output", (made.root / "told" / name).read_bytes()
    state = made.state(name)
    for pattern in (
        "*.json",
        "*.jsonl",
        "*.log",
        "studies/*/audit/*",
        "runs/*/audit/*",
        "runs/*/*.json*",
    ):
        for path in state.glob(pattern):
            if path.is_file():
                yield str(path.relative_to(made.root)), path.read_bytes()


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def betrayed(places, wanted) -> list[tuple[str, str]]:
    """Where something is shown that must not be."""
    return [
        (place, name)
        for place, content in places
        for name, forms_ in wanted.items()
        if any(form in content for form in forms_)
    ]


@pytest.mark.parametrize("name", ["coordinator", *SITES])
def test_no_secret_is_in_ps_environ_or_logs(made, name):
    wanted = secrets_of(made, name)
    assert len(wanted) >= 3
    places = list(shown(made, name))
    assert any(place.startswith("environ") and content for place, content in places)
    assert any(place.endswith("log.jsonl") and content for place, content in places)
    assert betrayed(places, wanted) == []


def test_no_record_is_in_ps_environ_or_logs_of_a_hospital_and_nothing_of_it_at_the_coordinator(
    made,
):
    wanted = {"canary": {CANARY.encode(), CANARY.title().encode(), CANARY.encode().hex().encode()}}
    for site in SITES:
        assert betrayed(shown(made, site), wanted) == []
    assert betrayed(everything(made.coordinator), wanted) == []
    assert betrayed(shown(made, "coordinator"), wanted) == []


def test_no_secret_of_a_hospital_is_anywhere_at_the_coordinator_or_at_another(made):
    for site in SITES:
        wanted = secrets_of(made, site)
        assert betrayed(everything(made.coordinator), wanted) == []
        other = next(name for name in SITES if name != site)
        assert betrayed(everything(made.state(other)), wanted) == []


def test_control_a_planted_secret_is_found_wherever_it_is_planted(made):
    """A process that was given a key by its command line, its environment, or its log."""
    key = (made.state("north") / "identity.key").read_bytes()
    wanted = {"identity.key": forms(key), "canary": {CANARY.encode()}}
    child = subprocess.Popen(
        ["/bin/sleep", "60"], env={"KEY": key.hex()}, executable=shutil.which("sleep")
    )
    other = subprocess.Popen(["/bin/sh", "-c", "read x", CANARY], stdin=subprocess.PIPE)
    for process in (child, other):  # a process shows its words a moment after it has begun
        place = Path(f"/proc/{process.pid}/cmdline")
        wait_for(lambda place=place: place.read_bytes(), "no process came")
    log = made.state("north") / "log.jsonl"
    before = log.read_bytes()
    real = made.running["north"]
    try:
        made.running["north"] = child
        assert ("environ" in betrayed(shown(made, "north"), wanted)[0][0]) is True
        made.running["north"] = other
        assert ("cmdline" in betrayed(shown(made, "north"), wanted)[0][0]) is True
        made.running["north"] = real
        with log.open("ab") as file:
            file.write(base64.b64encode(key) + b"\n")
        assert ("north/state/log.jsonl", "identity.key") in betrayed(shown(made, "north"), wanted)
        assert betrayed(everything(made.root / "north"), wanted)  # its own records quote the canary
    finally:
        made.running["north"] = real
        log.write_bytes(before)
        for process in (child, other):
            process.kill()
            process.wait()
        other.stdin.close()


def test_what_a_party_keeps_is_for_its_owner_only(made):
    for name in ("coordinator", *SITES):
        state = made.state(name)
        assert state.stat().st_mode & 0o077 == 0
        secret = [*state.glob("*.key"), *state.glob("tls/*.key"), *state.glob("*.token")]
        assert all(path.stat().st_mode & 0o077 == 0 for path in secret)


def test_what_a_hospital_declined_for_its_records_left_as_one_code(made):
    """The coordinator learns that records are unfit, not how: its log has no other code of data."""
    codes = set()
    for path in made.coordinator.glob("runs/*/audit/coordinator.jsonl"):
        codes |= set(re.findall(r"WR-2\d{3}", path.read_text()))
    assert codes <= {Code.DATA_DECLINED.label}
    hospital = "".join(
        path.read_text() for path in made.state("north").glob("studies/*/audit/north.jsonl")
    )
    assert set(re.findall(r"WR-2\d{3}", hospital)) - {Code.DATA_DECLINED.label}
