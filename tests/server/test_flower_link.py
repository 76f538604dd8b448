"""The two shells together: the coordinator's exchange and hospitals' links over real TLS."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Context, RecordDict

from client.answer import Answer
from client.app import shell
from client.flower import FleetLink
from common.crypto.identity import SiteKey
from common.errors import Code, DataError
from common.world import ManualClock, SystemClock
from server.app import Exchange, Pace, app, bind
from server.flower import FlowerCoordinator, Wire
from tests.flower_grid import InProcessGrid
from tests.flower_node import public_line, transport_key
from tests.server.test_flower import make_tls

STUDY = b"S" * 32
COORDINATOR_KEY = SiteKey.from_seed(b"c" * 32)
SITES = ("ash", "birch")
KEYS = {site: SiteKey.from_seed(site.encode().ljust(32, b".")) for site in SITES}
ROSTER = {site: key.public for site, key in KEYS.items()}


class Hospital:
    def __init__(self, site: str) -> None:
        self.site, self.key = site, KEYS[site]
        self.coordinator = COORDINATOR_KEY.public
        self.asked: list[tuple[bytes, ...]] = []

    def key_for(self, _study: bytes) -> SiteKey:
        return self.key

    def ask(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        assert study == STUDY
        self.asked.append(tuple(payloads))
        if hello:
            return Answer((b"hello",))
        if payloads == (b"fail",):
            raise DataError(Code.USAGE, "patient 4711 is odd")
        return Answer(tuple(payload[::-1] for payload in payloads))


class Driver:
    """Four steps with everybody, each when the step before is answered by all."""

    def __init__(self, sites: Sequence[str], steps: Sequence[bytes]) -> None:
        self.machine = SimpleNamespace(next_wakeup=math.inf)
        self.sites, self.steps = set(sites), list(steps)
        self.got: list[tuple[str, bytes]] = []
        self.left: set[str] = set(sites)
        self.exchange: Any = None

    def start(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def receive(self, site: str, payload: bytes) -> None:
        self.got.append((site, payload))
        self.left.discard(site)
        if not self.left and self.steps:
            self.left = set(self.sites)
            step = self.steps.pop(0)
            for name in sorted(self.sites):
                self.exchange.send(name, step)

    def over(self) -> bool:
        return not self.left and not self.steps


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *told: self.seen.append((name, *told))


def exchange(driver: Driver, grid: Any, clock: Any, **settings: Any) -> Exchange:
    driver.exchange = Exchange(
        grid, COORDINATOR_KEY, STUDY, ROSTER, clock, watch=Watch(), **settings
    )
    return driver.exchange


STEPS = (b"one", b"two", b"three" * 50_000, b"four")


def replies(driver: Driver, site: str) -> list[bytes]:
    return [payload for name, payload in driver.got if name == site]


def test_both_shells_understand_each_other_in_one_process():
    grid = InProcessGrid()
    hospitals = [Hospital(site) for site in SITES]
    for node, hospital in enumerate(hospitals, start=7):
        grid.come(node)
        grid.apps[node] = shell(lambda hospital=hospital: hospital)
    clock = ManualClock()
    driver = Driver(SITES, STEPS)
    made = exchange(driver, grid, clock, registered=lambda _node: None, pace=Pace(look_s=0.0))
    bind(lambda given: made.serve(driver, driver.over))
    app(grid, Context(1, 1, {}, RecordDict(), {}))
    for site in SITES:
        assert replies(driver, site) == [b"hello", *(step[::-1] for step in STEPS)]


def test_a_fault_at_a_hospital_comes_as_a_code_without_its_text():
    grid = InProcessGrid()
    grid.come(7)
    grid.apps[7] = shell(lambda: Hospital("ash"))
    driver = Driver(["ash"], [b"fail"])
    made = exchange(
        driver, grid, ManualClock(), registered=lambda _node: None, pace=Pace(look_s=0.0)
    )
    for _ in range(4):
        made.step(driver)
    assert made.presence()["ash"].code == Code.DATA_DECLINED.label
    assert "4711" not in str(made._watch.seen)


def test_a_question_of_another_coordinator_is_answered_with_a_code_only():
    grid = InProcessGrid()
    grid.come(7)
    hospital = Hospital("ash")
    hospital.coordinator = SiteKey.from_seed(b"x" * 32).public
    grid.apps[7] = shell(lambda: hospital)
    driver = Driver(["ash"], [])
    made = exchange(
        driver, grid, ManualClock(), registered=lambda _node: None, pace=Pace(look_s=0.0)
    )
    made.step(driver)
    made.step(driver)
    assert hospital.asked == []
    assert driver.got == []
    assert ("lost", "", Code.MESSAGE_SIGNATURE.label) in made._watch.seen


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[tuple[FlowerCoordinator, list[Hospital]]]:
    tls, ca = make_tls(tmp_path / "tls")
    up = FlowerCoordinator(
        tmp_path / "flower",
        listen=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        tls=tls,
        admin_token="t",
        wire=Wire(hold_s=1.0),
    )
    up.start()
    stop, threads, hospitals = threading.Event(), [], []
    for site in SITES:
        key = transport_key()
        up.register(site, public_line(key))
        path = tmp_path / f"{site}.key"
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        hospital = Hospital(site)
        link = FleetLink(
            f"127.0.0.1:{up.public_port}",
            ca,
            path,
            shell(lambda hospital=hospital: hospital),
            {},
            state=tmp_path / site,
            beat=lambda: None,
        )
        hospitals.append(hospital)
        threads.append(threading.Thread(target=link.run, args=(stop,)))
        threads[-1].start()
    yield up, hospitals
    stop.set()
    for thread in threads:
        thread.join()
    up.stop()


def test_both_shells_understand_each_other_over_the_wire(federation):
    up, hospitals = federation
    driver = Driver(SITES, STEPS)
    made = exchange(
        driver,
        up.grid(),
        SystemClock(),
        registered=up.site_of,
        silence=up.silence,
        pace=Pace(poll_s=0.5, look_s=0.1),
        pause=up.wait,
    )
    made.serve(driver, driver.over)
    for hospital in hospitals:
        assert replies(driver, hospital.site) == [b"hello", *(step[::-1] for step in STEPS)]
        assert hospital.asked == [(), *((step,) for step in STEPS)]
        assert made.presence()[hospital.site].online
    up.unregister("ash")
    made.forget("ash")
    made.step(driver)
    assert not made.presence()["ash"].online
    assert made.presence()["birch"].online
