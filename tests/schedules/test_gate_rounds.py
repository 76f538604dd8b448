"""Rounds with an acceptance gate: a poisoned model is rolled back at every party, whoever dies.

The model's quality follows from its tensors: every accepted turn of training adds 1 to the sum of
the sites' coordinates and a little accuracy; anything in the spare coordinate ruins it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import schedule
import world
from schedule import Schedule, storm

from common.gate import PREFIX, Gate
from common.metrics import METRIC_SCALE, ClassScoring
from common.protocol.transcript import load_state
from common.protocol.wire import RoundStart, unpack_from_coordinator

POISONER = "site-04"
TURNS = 4
POISON = -50.0


def gated_worker(poisoned):
    """A tracer that poisons in these turns, and measures what it is given."""

    class Worker(world.TracerWorker):
        def work(self, request):
            done = super().work(replace(request, measures=False))
            count = len(self.terms.parties)
            tracer = request.state["tracer"]
            update = done.update
            if update is not None and self.site == POISONER and request.turn in poisoned:
                update = update.copy()
                update[count] = POISON
            metrics = None
            if request.measures:
                turns = round(float(tracer[:count].sum()))
                hits = 10 if tracer[count:].any() else 50 + 5 * turns
                cells = [hits, 100 - hits, 0, 0, 30]
                metrics = np.array(cells, np.int64) * METRIC_SCALE
            return replace(done, update=update, metrics=metrics)

    return Worker


class Gated(Schedule):
    """A schedule whose study has a gate."""

    gate: Gate | None = Gate(0.04, ClassScoring(("no", "yes"), 8.0))

    def __init__(self, n, **settings):
        super().__init__(n, **settings)
        terms = self.terms
        initial = terms.initial
        if self.gate is not None:
            initial = self.gate.initial(initial, terms.exponents)
        self.terms = replace(terms, metric_words=5, gate=self.gate, initial=initial)

    def rejected(self):
        """The turns whose models were rolled back."""
        return [r.turn - 1 for r in self.rounds if r.rejected]

    def sums(self):
        """(how many turns of training are in the final model, what is in the spare coordinate)."""
        tracer = self.final.state["tracer"]
        count = len(self.sites)
        return round(float(tracer[:count].sum())), float(tracer[count])

    def check(self):
        self.said.check()
        for party in self.parties.values():
            assert len(party.reserved) == len(set(party.reserved)), "a round was reserved twice"
        finals = {
            p.worker.final.state_digest
            for p in self.parties.values()
            if p.up and p.worker.final is not None
        }
        assert finals == {self.final.state_digest}
        for result in self.rounds:
            if result.kind != "statistics":
                assert result.metrics is not None


class Ungated(Gated):
    gate = None


@pytest.fixture
def poisoned(monkeypatch):
    """Makes a schedule of four sites in which site-04 poisons these turns."""

    def make(*turns, kind=Gated, **settings):
        monkeypatch.setattr(world, "TracerWorker", gated_worker(turns))
        given = {"seed": "gate", "rounds": TURNS, "spare": 20, **settings}
        return kind(4, **given)

    return make


def finished(run, **options):
    run.start(**options)
    assert run.play()
    run.check()
    return run


def told(run, party):
    return [e for e in run.events if e.startswith(f"{party} model.rejected")]


@pytest.mark.parametrize("features", [0, 2])
def test_a_poisoned_turn_is_rolled_back_and_training_goes_on(poisoned, features):
    run = finished(poisoned(2, features=features))
    assert run.rejected() == [2]
    # Turn 2 is gone, and with it what turn 3 trained from its model.
    assert run.sums() == (TURNS - 2, 0.0)
    kinds = [r.kind for r in run.rounds if r.kind != "statistics"]
    assert kinds == [*["train"] * TURNS, "evaluate"]


def test_control_without_a_gate_the_poison_stays(poisoned):
    run = poisoned(2, kind=Ungated)
    run.start()
    assert run.play()
    turns, poison = run.sums()
    assert turns == TURNS
    assert poison < -3  # what the ring's range left of it
    assert not any("model.rejected" in event for event in run.events)
    assert not any(name.startswith(PREFIX) for name in run.final.state)


def test_every_party_writes_down_the_same_rejection(poisoned):
    run = finished(poisoned(2))
    left = {tuple(e.split(" ", 1)[1] for e in told(run, p)) for p in ["coordinator", *run.sites]}
    assert len(left) == 1
    assert len(next(iter(left))) == 1


def test_the_final_evaluation_rolls_the_last_model_back(poisoned):
    run = finished(poisoned(TURNS))
    assert run.rejected() == [TURNS]
    assert run.rounds[-1].kind == "evaluate"
    assert run.sums() == (TURNS - 1, 0.0)
    assert all(len(told(run, site)) == 1 for site in run.sites)


def test_a_persistent_poisoner_blocks_progress_and_nothing_more(poisoned):
    run = finished(poisoned(*range(1, TURNS + 1)))
    assert run.rejected() == [1, 3]
    assert run.sums() == (0, 0.0)
    assert np.array_equal(run.final.state["tracer"], run.terms.initial["tracer"])


def test_a_hospital_that_joins_after_a_rollback_gets_the_standing_model(poisoned):
    run = poisoned(2)
    run.start(absent=("site-03",))
    while not run.rejected():
        assert run.final is None
        run.deliver() if run.queue else run._pass_time()
    run.restart(run.parties["site-03"])
    assert run.play()
    run.check()
    assert run.sums() == (TURNS - 2, 0.0)
    assert "site-03" in run.rounds[-1].survivors
    assert "site-03" not in run.rounds[1].survivors
    served = [
        message.base
        for _, to, payload in run.wire
        if to == "site-03"
        and isinstance(
            message := unpack_from_coordinator(payload, run.terms.upload_bytes()), RoundStart
        )
        and message.base is not None
    ]
    assert served
    state = load_state(run.terms, served[0])
    assert set(state) == set(run.terms.initial)


def crash_points(make, party):
    run = make()
    finished(run)
    return run.points[party]


@pytest.mark.parametrize("party", ["coordinator", "site-01", "site-03"])
@pytest.mark.parametrize("poison", [1, 2])
def test_a_crash_at_any_point_rolls_back_the_same_model(poisoned, party, poison):
    """Two turns: the rollback happens in a training round, or in the final evaluation."""
    settings = {"rounds": 2}
    count = crash_points(lambda: poisoned(poison, **settings), party)
    assert count > 50
    for at in range(1 + poison, count + 1, 3):
        run = poisoned(poison, **settings)
        run.at_point[party, at] = run.crash(2.0)
        finished(run)
        assert run.crashes == [party], at
        assert run.rejected() == [poison], at
        assert run.sums() == (poison - 1, 0.0), at
        assert len(told(run, "site-02")) == 1, at


@pytest.mark.parametrize("private", [True, False])
def test_storms_leave_everybody_with_the_same_clean_model(monkeypatch, private):
    monkeypatch.setattr(schedule, "Schedule", Gated)
    monkeypatch.setattr(world, "TracerWorker", gated_worker((1, 3)))
    rolled = 0
    for seed in range(12):
        run = storm(seed, private=private)
        run.start(absent=run.absent)
        run.play()
        if run.final is None:
            continue
        run.check()
        assert run.sums()[1] == 0.0, seed
        rolled += bool(run.rejected())
    assert rolled >= 3
