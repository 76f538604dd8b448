"""The schedule's world behind the real shells: every message of it is a signed Flower message.

The coordinator of the world (genuine or in an attacker's hands) speaks through `Exchange`, a
site's daemon through the ClientApp; the Grid is in this process, or a real one over TLS.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from schedule import Schedule
from world import SiteParty

from client.answer import Answer
from client.app import shell
from common.crypto.identity import SiteKey
from server.app import Exchange, Pace
from tests.flower_grid import InProcessGrid

COORDINATOR_KEY = SiteKey.from_seed(hashlib.sha256(b"coordinator").digest())


class Silent:
    """Watches the exchange, and remembers what it refused."""

    def __init__(self) -> None:
        self.refusals: list[tuple[Any, ...]] = []

    def arrived(self, site: str) -> None:
        pass

    def left(self, site: str) -> None:
        pass

    def answered(self, site: str, size: int, seconds: float, code: str) -> None:
        pass

    def refused(self, site: str, code: Any) -> None:
        self.refusals.append((site, code))

    def lost(self, site: str, code: str) -> None:
        self.refusals.append((site, code))


class Hospital:
    """One site of the world, as the ClientApp asks it."""

    def __init__(self, world: Wired, site: str) -> None:
        self.world, self.site = world, site
        self.key = world.keys[site]
        self.coordinator = COORDINATOR_KEY.public
        self.said: list[bytes] = []
        self.asking = False
        self.questions = 0

    def key_for(self, _study: bytes) -> SiteKey:
        return self.key

    def ask(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        assert study == self.world.terms.study
        self.asking, self.questions = True, self.questions + 1
        try:
            for payload in payloads:
                SiteParty.receive(self.world.parties[self.site], payload)
        finally:
            self.asking = False
        said, self.said = tuple(self.said), []
        return Answer(said)


class Driver:
    """What comes out of the exchange goes onto the world's wire."""

    def __init__(self, world: Wired) -> None:
        self.world = world
        self.machine = SimpleNamespace(next_wakeup=math.inf)

    def start(self) -> None:
        pass

    def tick(self) -> None:
        pass

    def receive(self, site: str, payload: bytes) -> None:
        self.world.arrive(site, payload)


class Wired(Schedule):
    """A schedule whose sites (all of them, or some) are behind the transport."""

    def __init__(
        self,
        *,
        grid: Any = None,
        registered: Callable[[int], str | None] = lambda _node: None,
        sites: Sequence[str] | None = None,
        clock: Any = None,
        pause: Callable[[float], object] = lambda _seconds: None,
        **settings: Any,
    ) -> None:
        super().__init__(5, **{"seed": "rogue", "rounds": 2, "spare": 20, **settings})
        self.hospitals = {site: Hospital(self, site) for site in sites or self.sites}
        self.watch = Silent()
        if grid is None:
            grid = InProcessGrid()
            for node, site in enumerate(self.hospitals, start=7):
                grid.apps[node] = shell(lambda site=site: self.hospitals[site])
                grid.come(node)
        self._pause = pause
        self._driver = Driver(self)
        self.exchange = Exchange(
            grid,
            COORDINATOR_KEY,
            self.terms.study,
            {site: self.keys[site].public for site in self.hospitals},
            self.clock if clock is None else clock,
            registered=registered,
            watch=self.watch,
            pace=Pace(look_s=0.0, silence_s=math.inf),
        )
        for site in self.hospitals:
            party = self.parties[site]
            party.receive = lambda payload, site=site: self.question(site, payload)  # type: ignore[method-assign]

    def question(self, site: str, payload: bytes) -> None:
        """One message of the coordinator, as a signed question; its answer is on the wire after."""
        self.reach(site)
        self.exchange.send(site, payload)
        self.settle()

    def reach(self, site: str) -> None:
        """Wait until the node of a site has said who it is."""
        while self.exchange._sites[site].node is None:
            if not self.exchange.step(self._driver):
                self._pause(0.2)

    def settle(self) -> None:
        while True:
            moved = self.exchange.step(self._driver)
            if not moved and self.exchange.quiet:
                return
            if not moved:
                self._pause(0.2)

    def post(self, sender: str, recipient: str, payload: bytes) -> None:
        """What a site says is the answer to a question; unasked, to a hello."""
        hospital = self.hospitals.get(sender)
        if hospital is None:
            super().post(sender, recipient, payload)
            return
        hospital.said.append(payload)
        if not hospital.asking:
            self.reach(sender)
            if hospital.said:
                node = self.exchange._nodes[self.exchange._sites[sender].node]
                node.greet, node.greeted = True, -math.inf
                self.settle()

    def arrive(self, site: str, payload: bytes) -> None:
        super().post(site, "coordinator", payload)
