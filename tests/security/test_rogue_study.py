"""A coordinator that asks for what no hospital here approved: over its own, real line."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest

from client.app import shell
from client.config import SiteConfig
from client.hospital import HospitalHost
from common.cli import VERSION
from common.config import load
from common.crypto.identity import SiteKey
from common.errors import Code
from common.world import SystemClock, SystemEntropy
from server.app import Exchange, Pace
from tests.security.coordinator import hospital_link, real_coordinator
from tests.security.wired import Silent


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A coordinator's listener and north's line; the host behind the line is the test's."""
    place = SimpleNamespace(host=None)
    folder = tmp_path_factory.mktemp("study")
    stop = threading.Event()
    with real_coordinator(folder) as up:
        link = hospital_link(up, folder, "north", shell(lambda: place.host))
        thread = threading.Thread(target=link.run, args=(stop,))
        thread.start()
        place.up, place.link = up.flower, link
        yield place
        stop.set()
        thread.join()


class Asker:
    """One coordinator's exchange about one study; what reaches its driver, and what does not."""

    def __init__(self, line, key: SiteKey, study: bytes, north: bytes) -> None:
        self.got: list[bytes] = []
        self.watch = Silent()
        self._up = line.up
        self.machine = SimpleNamespace(next_wakeup=math.inf)
        self.exchange = Exchange(
            line.up.grid(),
            key,
            study,
            {"north": north},
            SystemClock(),
            registered=line.up.site_of,
            watch=self.watch,
            pace=Pace(look_s=0.0, silence_s=math.inf),
        )

    def receive(self, site: str, payload: bytes) -> None:
        self.got.append(payload)

    def tick(self) -> None:
        pass

    def start(self) -> None:
        pass

    def hello(self) -> Code | str:
        """Ask who is there; the code that came instead of an answer, or nothing."""
        while not (self.got or self.watch.refusals or self.told):
            if not self.exchange.step(self):
                self._up.wait(0.5)
        return self.told or (self.watch.refusals[-1][1] if self.watch.refusals else "")

    @property
    def told(self) -> str:
        return self.exchange.presence()["north"].code


@pytest.fixture
def approved(consortium, line, local):
    """North approved the consortium's study; returns what makes its host."""
    consortium.approve("north")

    def make() -> HospitalHost:
        line.host = consortium.host("north", maker=local)
        return line.host

    return make


def asked(line, consortium, *, key=None, study=None) -> Asker:
    key = consortium.coordinator if key is None else key
    study = consortium.bundle.digest if study is None else study
    return Asker(line, key, study, consortium.keys["north"].public)


def test_control_an_approved_study_is_answered(line, consortium, approved):
    approved()
    asker = asked(line, consortium)
    assert asker.hello() == ""
    assert len(asker.got) == 1
    assert line.link.state().peer_version == VERSION


def test_a_study_that_nobody_approved_gets_a_code_and_no_byte_more(line, consortium, approved):
    approved()
    asker = asked(line, consortium, study=bytes(32))
    assert asker.hello() == Code.APPROVAL_STUDY.label
    assert asker.got == []
    assert not list(consortium.state("north").glob("studies/*/journal/*"))


def test_another_coordinators_question_is_not_answered_at_all(line, consortium, approved):
    """It holds the address and the TLS key, but not the key that the hospital pinned."""
    approved()
    asker = asked(line, consortium, key=SiteKey.generate(SystemEntropy()))
    assert asker.hello() == Code.MESSAGE_SIGNATURE.label
    assert asker.got == []


def _rogue_offer(consortium):
    rogue = SiteKey.generate(SystemEntropy())
    return consortium.publish(name="rogue", signer=rogue)


def _newer_roster(consortium):
    """The same study; the coordinator has exchanged a peer's key since."""
    other = SiteKey.generate(SystemEntropy())
    return consortium.publish(name="newer", version=2, south=other.public)


@pytest.mark.parametrize(
    ("make", "code"),
    [(_rogue_offer, Code.ROSTER_SIGNATURE), (_newer_roster, Code.APPROVAL_FORGED)],
)
def test_another_offer_or_roster_than_was_approved_stops_the_study(
    line,
    consortium,
    approved,
    make,
    code,
):
    import shutil

    (folder,) = consortium.state("north").glob("studies/*")
    source = make(consortium)
    for name in ("roster.json", "offer.json"):
        shutil.copy(source / name, folder / "bundle" / name)
    approved()
    asker = asked(line, consortium)
    assert asker.hello() == code.label
    assert asker.got == []


def test_a_kill_switch_is_obeyed_over_the_line(line, consortium, approved):
    host = approved()
    consortium.config("north").kill_switch_file(consortium.yaml("north")).touch()
    asker = asked(line, consortium)
    assert asker.hello() == Code.APPROVAL_STOPPED.label
    assert asker.got == []
    assert host.stopped()


ABOVE = [
    ({"epsilon": 7.9}, Code.APPROVAL_EPSILON),
    ({"delta": 1e-6}, Code.APPROVAL_DELTA),
    ({"rounds": 1}, Code.APPROVAL_ROUNDS),
    ({"minimum_sites": 5}, Code.APPROVAL_PARTIES),
    ({"approved_backbones": []}, Code.APPROVAL_BACKBONE),
    ({"approved_code": []}, Code.APPROVAL_CODE),
    ("code", Code.APPROVAL_CODE),
    ({}, None),
]


@pytest.mark.parametrize(("ceilings", "code"), ABOVE, ids=str)
def test_a_study_above_a_ceiling_or_other_code_is_not_worked_on(
    line,
    consortium,
    approved,
    local,
    monkeypatch,
    tmp_path,
    ceilings,
    code,
):
    """One round of four hospitals, north over its real line; the last row is the control."""
    from tests.client.hospital.conftest import SITES, Fleet

    for site in SITES[:1] + SITES[2:]:
        consortium.approve(site)
        consortium.host(site, maker=local)
    if ceilings == "code":
        monkeypatch.setattr("client.hospital.code_digest", lambda _packages: bytes(32))
    elif ceilings:
        consortium.change("north", ceilings=ceilings)
    host = approved()
    assert load(consortium.yaml("north"), SiteConfig).site == "north"
    fleet = Fleet(consortium, tmp_path / "coordinator")
    asker = asked(line, consortium)
    asker.receive = lambda _site, payload: fleet.network.post("north", payload)  # type: ignore[method-assign]

    def settle() -> None:
        while asker.exchange.step(asker) or not asker.exchange.quiet:
            line.up.wait(0.2)

    def hello() -> None:
        while asker.exchange._sites["north"].node is None:
            if not asker.exchange.step(asker):
                line.up.wait(0.2)
        settle()

    def ask(payload: bytes) -> None:
        asker.exchange.send("north", payload)
        settle()

    handle = fleet.network.sites["north"]
    handle.start, handle.receive = hello, ask
    try:
        fleet.run(rounds=1)
    finally:
        fleet.close()
    assert ("north" in fleet.completed[0].survivors) is (code is None)
    (audit,) = consortium.state("north").glob("studies/*/audit/north.jsonl")
    assert code is None or code.label in audit.read_text()
    assert host.site == "north"
