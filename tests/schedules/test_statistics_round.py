"""The round before training: numeric features are counted under masks, the same for everybody."""

from dataclasses import replace

import numpy as np
import pytest
from schedule import play
from world import Crash, World

from client.round.chain import from_base
from common.errors import Code, ProtocolError
from common.protocol.terms import METRIC_BITS, STATISTIC_LANE
from common.protocol.transcript import Chain, advance, dump_state
from common.protocol.wire import RoundStart, pack, unpack_from_coordinator
from common.secagg.masking import Lane
from common.statistics import DEVIATION, MEAN
from common.tensors import state_digest
from server.round import collecting

KINDS = ["statistics", "train", "train", "train", "evaluate"]


def finals(world):
    return {p.worker.final.state_digest for p in world.parties.values()}


@pytest.mark.parametrize("n", [3, 5])
def test_statistics_are_counted_once_and_survive_every_training_round(n):
    world = World(n, features=2)
    world.start()
    world.run()
    assert [r.kind for r in world.rounds] == KINDS
    assert [r.turn for r in world.rounds] == [0, 1, 2, 3, 4]
    assert world.rounds[0].metrics is None
    world.check()
    assert finals(world) == {world.final.state_digest}
    counted = world.chains[0].state
    assert not np.array_equal(counted[MEAN], world.terms.initial[MEAN])
    for chain in world.chains:
        assert np.array_equal(chain.state[MEAN], counted[MEAN])
        assert np.array_equal(chain.state[DEVIATION], counted[DEVIATION])
    assert set(world.final.state) == set(world.terms.initial)


def test_a_study_without_features_has_no_such_round():
    world = World(3)
    assert world.terms.first_turn == 1
    assert Chain.genesis(world.terms, bytes(32)).turn == 1
    assert MEAN not in world.terms.initial


def test_turn_zero_has_exactly_one_lane_of_words():
    terms = World(3, features=4).terms
    assert terms.lanes(0) == (Lane(STATISTIC_LANE, METRIC_BITS, 12),)
    assert terms.kind(0) == "statistics"
    assert not terms.measures(0)
    assert STATISTIC_LANE not in {lane.lane_id for lane in terms.lanes(1)}


def test_words_without_a_layout_are_no_terms():
    with pytest.raises(ValueError, match="layout"):
        replace(World(3).terms, statistic_words=3)


def test_a_site_that_vanishes_while_counting_is_not_in_the_statistics():
    world = World(5, features=2)

    def network(sender, recipient, payload):
        driver = world.coordinator.driver
        counting = driver is not None and driver.machine.phase == "upload" and not world.rounds
        return (
            [] if counting and "site-05" in (sender, recipient) else [(sender, recipient, payload)]
        )

    world.network = network
    world.start()
    world.run()
    assert "site-05" not in world.rounds[0].survivors
    assert [r.kind for r in world.rounds] == KINDS
    world.check()
    assert len(finals(world)) == 1


@pytest.mark.parametrize("victim", ["site-02", "coordinator"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
def test_a_crash_while_counting_ends_in_the_same_model_for_all(victim, at):
    world = World(4, features=1, spare=20)
    seen, dead = [0], []

    def fault(party, point):
        if party.name == victim and not dead and not world.rounds:
            seen[0] += 1
            if seen[0] == at + 6:  # past the handshake's first writes
                dead.append(party)
                raise Crash

    world.fault = fault
    world.start()
    for _ in range(20_000):
        if world.final is not None and not world.queue:
            break
        if dead and not dead[0].up:
            dead[0].start()
        world.step()
    assert dead, "the crash never came"
    assert world.final is not None
    assert [r.kind for r in world.rounds] == KINDS
    world.check()
    assert len(finals(world)) == 1


def test_a_coordinator_that_dies_after_counting_goes_on_from_the_statistics():
    world = World(3, features=2)
    dead = []

    def fault(party, point):
        if party.name == "coordinator" and len(world.rounds) == 1 and not dead:
            dead.append(party)
            raise Crash

    world.fault = fault
    world.start()
    while world.final is None or world.queue:
        if dead and not dead[0].up:
            dead[0].start()
        world.step()
    assert dead
    assert [r.kind for r in world.rounds] == KINDS
    world.check()
    assert len(finals(world)) == 1


@pytest.mark.parametrize("private", [True, False])
def test_twenty_storms_leave_everybody_with_the_same_statistics(private):
    """Faults of every kind, turn 0 included; `play` checks what must hold."""
    counted = 0
    for seed in range(20):
        world = play(seed, features=2, private=private)
        counted += any(result.kind == "statistics" for result in world.rounds)
        digests = {chain.state[MEAN].tobytes() for chain in world.chains}
        assert len(digests) <= 1, seed
    assert counted >= 18


def served(world, site):
    """The last RoundStart that a site was sent."""
    found = [p for a, b, p in world.wire if b == site]
    messages = [unpack_from_coordinator(p, world.terms.upload_bytes()) for p in found]
    return next(m for m in reversed(messages) if isinstance(m, RoundStart))


def test_a_coordinator_that_shows_another_normalisation_is_refused():
    """The state's digest covers the statistics: another mean is another model."""
    world = World(4, features=2)
    world.start()
    world.run(
        until=lambda: len(world.rounds) == 2 and world.queue and world.queue[0][1] == "site-01"
    )
    start = served(world, "site-01")
    world.parties["site-01"].kill()
    world.parties["site-01"].start()  # it has lost its state and needs it served
    state = world.parties["site-01"].daemon._machine.state
    base = world.chains[0].state
    shown = dict(base)
    shown[MEAN] = shown[MEAN] + np.float32(0.01)
    with pytest.raises(ProtocolError) as caught:
        from_base(state, start.link, memoryview(dump_state(world.terms, shown)))
    assert caught.value.code is Code.LINK_STATE
    honest = from_base(state, start.link, memoryview(dump_state(world.terms, base)))
    assert honest.state_digest == start.link.header.state


@pytest.mark.parametrize("hostile", [False, True])
def test_hospitals_that_are_shown_two_normalisations_never_mask_together(monkeypatch, hostile):
    """Honest or hostile, a coordinator cannot bring them into one sum: their heads differ."""
    world = World(4, features=2)
    world.start()
    world.run(until=lambda: len(world.rounds) == 1)
    forged = []

    def network(sender, recipient, payload):
        if recipient == "site-01" and b"RoundStart" in payload[:64] and not forged:
            message = unpack_from_coordinator(payload, world.terms.upload_bytes())
            words = np.frombuffer(message.link.sums[0], "<u8").copy()
            words[0] += np.uint64(12345)
            forged.append(replace(message.link, sums=(memoryview(words).cast("B"),)))
            return [(sender, recipient, pack(replace(message, link=forged[0])))]
        return [(sender, recipient, payload)]

    if hostile:
        monkeypatch.setattr(collecting, "_check_ready", lambda *_: None)
        monkeypatch.setattr(collecting, "_drop_disagreeing", lambda _: None)
    letters = [world.queue.popleft() for _ in range(len(world.queue))]
    world.network = network
    world.queue.extend(new for letter in letters for new in network(*letter))
    try:
        world.run(limit=400, until=lambda: len(world.rounds) > 1 or len(world.aborts) > 0)
    except AssertionError:
        assert hostile, "an honest coordinator goes on"
    assert forged
    refused = [
        event
        for event in world.events
        if "head-mismatch" in event or Code.HEAD_MISMATCH.label in event
    ]
    if hostile:
        assert any(event.startswith("site-0") for event in refused)
        assert len(world.rounds) == 1
    else:
        assert ("site-01", Code.HEAD_MISMATCH) in world.refusals
        assert "site-01" not in world.rounds[1].survivors


def test_the_same_sums_give_the_same_state_in_every_order_and_twice():
    world = World(3, features=3)
    world.start()
    world.run(until=lambda: len(world.rounds) == 1)
    link = world.coordinator.driver.machine.state.link
    genesis = Chain.genesis(world.terms, state_digest(world.terms.initial))
    first = advance(world.terms, genesis, link, state_digest)
    again = advance(world.terms, genesis, link, state_digest)
    assert first.state_digest == again.state_digest == world.chains[0].state_digest
    assert first.exponents == genesis.exponents
