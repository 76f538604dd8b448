"""Trouble in joint rounds: updates are words of the 32-bit ring, on one grid from first to last."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from schedule import Schedule, play
from world import TRACER_EXPONENT, TracerWorker

import client.round.upload
from client.round.effects import Worked
from common.errors import Code
from common.secagg.quantise import limit

JOINT = {"bits": 32, "joint": True}
CHUNK = 20
UNDECIDED_AT_MOST = 2
CRASHES = {"seed": "joint-crashes", "rounds": 2, "spare": 20, **JOINT}
EVERY = 6


@pytest.mark.parametrize("first", range(2000, 2120, CHUNK))
def test_a_joint_run_ends_or_says_exactly_whom_it_waits_for(first):
    undecided = []
    for seed in range(first, first + CHUNK):
        world = play(seed, **JOINT)
        assert {chain.exponents for chain in world.chains} <= {(TRACER_EXPONENT,)}, seed
        if world.final is None:
            assert world.gone, f"seed {seed}: every site is there and the run did not end"
            assert {w.code for w in world.waits} <= {Code.ROUND_UNDECIDED, Code.QUORUM_LOST}, seed
            undecided.append(seed)
    assert len(undecided) <= UNDECIDED_AT_MOST, undecided


def test_the_same_trouble_with_real_numbers_moves_the_grid():
    """The control of the assertion above: without `joint` the grid follows the last sum."""
    world = play(2003, bits=32)
    assert (TRACER_EXPONENT,) not in {chain.exponents for chain in world.chains}


def points():
    world = Schedule(4, **CRASHES)
    world.start()
    assert world.play()
    return dict(world.points)


@pytest.mark.parametrize("party", ["coordinator", "site-01", "site-04"])
def test_a_crash_at_any_point_loses_no_joint_round(party):
    count = points()[party]
    assert count > 50
    for at in range(1, count + 1, EVERY):
        world = Schedule(4, **CRASHES)
        world.at_point[party, at] = world.crash(33.0)
        world.start()
        assert world.play(), (party, at)
        assert world.crashes == [party], (party, at)
        world.check()


SIZE = 64


def loud(update_of):
    """A hospital whose update is what the function says of (round, index)."""

    class Loud(TracerWorker):
        def work(self, request):
            done = super().work(request)
            index = self.terms.parties.index(self.site)
            update = None if done.update is None else update_of(request.round, index)
            return Worked(update, done.metrics, done.ledger)

    return Loud


@pytest.fixture
def sums(monkeypatch):
    """Plays two rounds of loud hospitals; gives the world and the sums that it released."""
    import world as schedules

    narrow = schedules.make_terms

    def run(update_of, *, absent=()):
        monkeypatch.setattr(schedules, "TracerWorker", loud(update_of))
        monkeypatch.setattr(
            schedules,
            "make_terms",
            lambda sites, keys, **settings: narrow(
                sites, keys, **{**settings, "extra": SIZE - len(sites)}
            ),
        )
        world = Schedule(5, seed="loud", rounds=2, **JOINT)
        world.start(absent=absent)
        world.run(until=lambda: len(world.rounds) == 2)
        states = [world.terms.initial["tracer"], *(c.state["tracer"] for c in world.chains)]
        return world, [
            after.astype(np.float64) - before for before, after in itertools.pairwise(states)
        ]

    return run


def wild(number, index):
    most = limit(32, 5)
    return np.random.default_rng([number, index]).integers(-most, most + 1, SIZE).astype(np.int32)


@pytest.mark.parametrize("absent", [(), ("site-03",)])
def test_the_released_sum_is_the_whole_numbers_of_the_survivors(sums, absent):
    world, moved = sums(wild, absent=absent)
    for result, change in zip(world.rounds, moved, strict=True):
        index = [world.terms.parties.index(site) for site in result.survivors]
        assert len(index) == 5 - len(absent)
        exact = sum(wild(result.round, i).astype(np.int64) for i in index)
        found = change * 2.0**TRACER_EXPONENT * len(index)
        assert np.abs(found - exact).max() <= 2**-20 * np.abs(exact).max()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_words_of_everybody_do_not_wrap_and_one_more_each_does(sums, sign):
    most = sign * limit(32, 5)
    _, moved = sums(lambda *_: np.full(SIZE, most, np.int32))
    assert moved[0] * 2.0**TRACER_EXPONENT == pytest.approx(np.full(SIZE, most), rel=1e-6)
    # Control.
    _, wrapped = sums(lambda *_: np.full(SIZE, most + sign, np.int32))
    assert (np.sign(wrapped[0]) == -sign).all()


def spoken(world):
    """Which plain words of any hospital's first two rounds are on the wire or on a disk."""
    seen = [payload for _, _, payload in world.wire]
    for party in [world.coordinator, *world.parties.values()]:
        seen += [*party.disk.blobs.values(), party.disk.record or b""]
    plain = {
        wild(number, index).tobytes()[at : at + 16]
        for number in (1, 2)
        for index in range(5)
        for at in range(0, 4 * SIZE, 16)
    }
    return sum(piece in blob for blob in seen for piece in plain)


def test_no_hospitals_words_are_on_the_wire_or_on_a_disk(sums, monkeypatch):
    assert spoken(sums(wild)[0]) == 0
    # Control: without masks they are there, all of them.
    monkeypatch.setattr(client.round.upload, "add_streams", lambda *_: None)
    monkeypatch.setattr("server.round.opening.open_sum", lambda *_: None)
    assert spoken(sums(wild)[0]) >= 2 * 5 * 4 * SIZE // 16


@pytest.mark.parametrize("kind", ["numbers under a joint study", "words under another"])
def test_an_update_of_the_wrong_kind_is_never_uploaded(monkeypatch, kind):
    joint = kind.startswith("numbers")
    wrong = np.float32 if joint else np.int32
    monkeypatch.setattr("world.TracerWorker", loud(lambda *_: np.ones(7, wrong)))
    world = Schedule(4, seed="wrong", rounds=1, bits=32, joint=joint)
    world.start()
    with pytest.raises(AssertionError, match="a joint update is words, and no other is"):
        world.run(until=lambda: bool(world.rounds))
    assert not world.said.uploads


@pytest.mark.parametrize("shape", [(6,), (8,), (7, 1)])
def test_joint_words_of_another_length_are_never_uploaded(monkeypatch, shape):
    monkeypatch.setattr("world.TracerWorker", loud(lambda *_: np.ones(shape, np.int32)))
    world = Schedule(4, seed="wrong", rounds=1, **JOINT)
    world.start()
    with pytest.raises(AssertionError, match="the study's length"):
        world.run(until=lambda: bool(world.rounds))
    assert not world.said.uploads
