"""The in-process transport: nothing of a hospital is seen before it is durable."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from common.world import ManualClock
from server.network import InProcessNetwork, SiteHandle, WireTap


@dataclass
class Coordinator:
    """Notes what it is given, and whether all that hospitals stored was durable by then."""

    dirty: set
    seen: list = field(default_factory=list)
    machine: object = field(
        default_factory=lambda: SimpleNamespace(
            phase="ready", next_wakeup=5.0, record=SimpleNamespace(round=1)
        )
    )

    def receive(self, site, payload):
        self.seen.append((site, bool(self.dirty)))

    def tick(self):
        self.seen.append(("tick", bool(self.dirty)))


def played(*, settles):
    """Three hospitals store and answer one broadcast; (what was seen, number of syncs)."""
    dirty, syncs = set(), []

    def settle():
        if dirty:
            syncs.append(len(dirty))
            dirty.clear()

    network = InProcessNetwork(ManualClock(), WireTap(1 << 20), *([settle] if settles else []))
    coordinator = network.driver = Coordinator(dirty)
    for name in ("a", "b", "c"):

        def receive(payload, name=name):
            dirty.add(name)
            network.from_site(name).send("coordinator", b"answer")

        network.sites[name] = SiteHandle(lambda: None, receive, lambda: None, up=True)
        network.send(name, b"broadcast")
    for _ in range(6):
        network.step()
    dirty.add("a")
    network.step()
    return coordinator.seen, syncs


@pytest.mark.parametrize("settles", [True, False])
def test_the_coordinator_sees_only_what_is_durable_and_a_broadcast_costs_one_sync(settles):
    seen, syncs = played(settles=settles)
    # Without settling the same schedule shows it what a power cut could take back.
    assert [unsafe for _, unsafe in seen] == [not settles] * 4
    assert [who for who, _ in seen] == ["a", "b", "c", "tick"]
    assert syncs == ([3, 1] if settles else [])
