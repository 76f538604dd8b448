"""A federation without faults, and with the simplest ones."""

import pytest
from world import World


@pytest.mark.parametrize("n", [3, 4, 5, 10])
@pytest.mark.parametrize("bits", [24, 32])
def test_every_round_ends_in_the_exact_sum(n, bits):
    world = World(n, bits=bits)
    world.start()
    world.run()
    assert [r.kind for r in world.rounds] == ["train"] * 3 + ["evaluate"]
    assert all(r.survivors == tuple(world.sites) for r in world.rounds)
    assert world.refusals == []
    world.check()
    for party in world.parties.values():
        assert party.worker.final.state_digest == world.final.state_digest
