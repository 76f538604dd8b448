"""A coordinator and hospitals in folders of their own, enrolled by the product's own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import client.enrol
from common.invite import Invite, Join
from common.world import SystemEntropy, unix_seconds
from server import enrol
from server.config import CoordinatorConfig

ENTROPY = SystemEntropy()


@dataclass
class Consortium:
    """One coordinator; `now` is the time that both sides believe."""

    root: Path
    config: CoordinatorConfig
    now: int

    @property
    def state(self) -> Path:
        return self.root / "coordinator"

    def invite(self, site: str = "st-mary", name: str | None = None, days: int = 14) -> Invite:
        return enrol.invite(
            self.state,
            self.config,
            name=name or site.title(),
            site=site,
            url="localhost:8443",
            days=days,
            now=self.now,
            entropy=ENTROPY,
        )

    def hospital(self, site: str = "st-mary") -> Path:
        return self.root / "hospitals" / site

    def join(self, invite: Invite, folder: Path | None = None) -> Join:
        state = folder or self.hospital(invite.site)
        return client.enrol.join(state, invite, now=self.now, entropy=ENTROPY).answer

    def rotate(self, invite: Invite) -> Join:
        state = self.hospital(invite.site)
        return client.enrol.rotate(state, invite, now=self.now, entropy=ENTROPY).answer

    def admit(self, join: Join, said: str | None = None) -> enrol.Admitted:
        return enrol.admit(self.state, join, self.now, said=join.words if said is None else said)

    def enrol(self, *sites: str) -> None:
        for site in sites:
            self.admit(self.join(self.invite(site)))

    def signed_roster(self):
        from common.roster import SignedRoster

        return SignedRoster.load(self.state / "roster.json")


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Consortium]:
    """Founds a consortium in a folder."""

    def make(name: str = "lake", **settings) -> Consortium:
        config = CoordinatorConfig.model_validate(
            {
                "format": "wardround-coordinator/1",
                "state": "coordinator",
                "consortium": name.title(),
                **settings,
            }
        )
        made = Consortium(tmp_path / name, config, unix_seconds())
        enrol.initialise(config, made.state, now=made.now, entropy=ENTROPY)
        return made

    return make


@pytest.fixture
def lake(found) -> Consortium:
    """A coordinator, initialised; nobody is invited."""
    return found()
