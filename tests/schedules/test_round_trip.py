"""A federation without faults, and with the simplest ones."""

from dataclasses import replace

import pytest
from world import World

from common.protocol.terms import Terms
from common.protocol.transcript import Chain, advance
from common.tensors import state_digest


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


def test_the_parties_of_one_process_share_the_arithmetic_and_the_model_of_a_link(monkeypatch):
    applied = []
    real = Terms.apply
    monkeypatch.setattr(Terms, "apply", lambda *given: applied.append(1) or real(*given))
    world = World(5)
    world.start()
    world.run()
    assert len(applied) == 3, "once for each training round, not once for each party"
    finals = [party.worker.final for party in world.parties.values()]
    assert all(final.state_digest == state_digest(final.state) for final in finals)
    assert not any(value.flags.writeable for value in finals[0].state.values())


def test_another_study_does_not_get_the_chain_that_this_one_computed():
    world = World(5)
    world.start()
    world.run(until=lambda: len(world.rounds) == 1)
    link = world.coordinator.driver.machine.state.link
    terms = world.terms
    genesis = Chain.genesis(terms, state_digest(terms.initial))
    first = advance(terms, genesis, link, state_digest)
    assert advance(terms, genesis, link, state_digest) is first
    heavier = replace(terms, weights={**terms.weights, min(terms.weights): 0.25})
    assert advance(heavier, genesis, link, state_digest).state_digest != first.state_digest
