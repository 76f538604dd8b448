"""A coordinator at the end of its run: it waits for who has not been told, and for nobody else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from common.crypto.identity import SiteKey
from common.errors import Code
from common.protocol.wire import BurnRequest, pack
from common.world import ManualClock
from server.app import Exchange, Pace
from server.service import Farewell
from tests.flower_grid import InProcessGrid
from tests.flower_node import reply
from tests.security.wired import Silent

STUDY = b"S" * 32
KEYS = {site: SiteKey.from_seed(site.encode().ljust(32, b".")) for site in ("ash", "birch")}
NODES = {7: "ash", 8: "birch"}
LINGER = 3600.0
PAUSE = 5.0


class Machine:
    """Tells whoever says hello after the end that it is over; as the round machine does."""

    def __init__(self) -> None:
        self.machine = SimpleNamespace(next_wakeup=math.inf)
        self.exchange: Exchange | None = None
        self.done = False

    def start(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def receive(self, site: str, payload: bytes) -> None:
        if payload == b"hello" and self.done and self.exchange is not None:
            self.exchange.send(site, goodbye(site))


def goodbye(site: str) -> bytes:
    return pack(BurnRequest(STUDY, site.encode().ljust(32, b"."), 1))


class Scene:
    """A real exchange with two hospitals, both heard; the clock is the test's."""

    def __init__(self) -> None:
        self.grid, self.clock, self.machine = InProcessGrid(), ManualClock(), Machine()
        self.clock.skip_to(100.0)
        self.exchange = Exchange(
            self.grid,
            SiteKey.from_seed(b"c" * 32),
            STUDY,
            {site: key.public for site, key in KEYS.items()},
            self.clock,
            registered=NODES.get,
            watch=Silent(),
            pace=Pace(look_s=0.0, silence_s=60.0),
        )
        self.machine.exchange = self.exchange
        self.farewell = Farewell(LINGER)
        self.ended = math.inf
        for node in NODES:
            self.grid.come(node)
        self.step()
        for node in NODES:
            self.answer(node, b"hello")
        self.wait()

    def step(self) -> None:
        self.exchange.step(self.machine)

    def wait(self, seconds: float = PAUSE) -> None:
        self.clock.skip_to(self.clock.now() + seconds)
        self.step()

    def answer(self, node: int, *payloads: bytes, code: str = "") -> None:
        asked, site = self.grid.last(node), NODES[node]
        self.grid.answer(asked, reply(asked, KEYS[site], site, payloads, code))
        self.step()

    def end(self) -> None:
        """As the driver: messages go into outboxes, then the end is written down."""
        for site in KEYS:
            self.exchange.send(site, goodbye(site))
        self.machine.done = True
        self.ended = self.clock.now()
        self.step()

    @property
    def over(self) -> bool:
        return self.farewell.over(self.clock.now(), self.ended, set(KEYS), self.exchange.presence())


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_when_all_have_answered_to_the_end_nobody_lingers(scene: Scene):
    scene.end()
    assert not scene.over
    scene.answer(7)
    assert not scene.over
    scene.wait()
    scene.answer(8)
    assert scene.over
    assert scene.clock.now() - scene.ended == PAUSE


def test_the_end_is_told_after_it_is_written_down_though_it_is_sent_before(scene: Scene):
    """What is sent lies in an outbox until the next step, so the question is the younger one."""
    before = scene.exchange.presence()["ash"].last_sent
    scene.exchange.send("ash", goodbye("ash"))
    assert scene.exchange.presence()["ash"].last_sent == before
    scene.machine.done, scene.ended = True, scene.clock.now()
    scene.step()
    assert scene.exchange.presence()["ash"].last_sent >= scene.ended


def test_an_answer_from_before_the_end_does_not_count(scene: Scene):
    scene.exchange.send("ash", b"a round's message")
    scene.step()
    scene.wait()
    scene.answer(7)
    scene.wait()
    scene.end()
    scene.answer(8)
    assert not scene.over


def test_a_question_that_was_lost_told_nobody(scene: Scene):
    """The hospital was killed with the question on its way: it is told again when it is back."""
    scene.end()
    scene.answer(8)
    scene.grid.go(7)
    scene.wait()
    assert not scene.over
    scene.grid.come(7, "t1")
    scene.wait()
    scene.answer(7, b"hello")
    assert not scene.over, "it said hello; the end is on its way"
    scene.answer(7)
    assert scene.over


def test_a_hospital_that_could_not_keep_the_end_is_waited_for(scene: Scene):
    scene.end()
    scene.answer(8)
    scene.answer(7, code=Code.JOURNAL_WRITE.label)
    assert not scene.over
    scene.wait(61.0)  # silent for long: it is asked again
    scene.answer(7, b"hello")
    scene.answer(7)
    assert scene.over


def test_a_hospital_that_was_told_and_went_or_closed_is_not_waited_for(scene: Scene):
    scene.end()
    scene.answer(7)
    assert not scene.over
    scene.wait(61.0)
    scene.answer(7, code=Code.APPROVAL_STOPPED.label)
    scene.grid.go(7)
    scene.wait()
    assert not scene.over
    scene.answer(8)
    assert scene.over


def test_who_never_comes_is_waited_for_as_long_as_was_said_and_no_longer(scene: Scene):
    scene.end()
    scene.answer(7)
    scene.clock.skip_to(scene.ended + LINGER - 1)
    assert not scene.over
    scene.clock.skip_to(scene.ended + LINGER)
    assert scene.over


def test_nobody_waits_for_a_hospital_that_is_not_wanted_any_more(scene: Scene):
    scene.end()
    scene.answer(7)
    heard = scene.exchange.presence()
    assert not scene.farewell.over(scene.clock.now(), scene.ended, {"ash", "birch"}, heard)
    assert scene.farewell.over(scene.clock.now(), scene.ended, {"ash"}, heard)
