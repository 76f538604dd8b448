"""The coordinator's round machine: what it does when hospitals say no, break off or break down."""

from __future__ import annotations

import numpy as np
import pytest
from rogue import COLLUDER, VICTIM, federation, finish, halt, to_coordinator
from schedule import Schedule
from world import TracerWorker, World

from common.errors import Code, RefusedError
from common.protocol.wire import Refusal, pack_statement, sign


def refusing(monkeypatch, *names: str, code: Code = Code.BUDGET_EXCEEDED, after: int = 0) -> None:
    honest = TracerWorker.work

    def work(self, request):
        if self.site in names and request.round > after:
            raise RefusedError(code, "no")
        return honest(self, request)

    monkeypatch.setattr(TracerWorker, "work", work)


def test_a_hospital_whose_budget_is_spent_is_left_out_and_the_run_goes_on(monkeypatch):
    refusing(monkeypatch, COLLUDER, after=1)
    world = federation(rounds=3)
    world.start()
    assert world.play()
    world.check()
    assert world.aborts == []
    assert COLLUDER in world.rounds[0].survivors
    assert all(COLLUDER not in r.survivors for r in world.rounds[1:])


def test_too_many_refusals_end_the_run_at_once_with_their_names(monkeypatch):
    """Not one round more is burned than it takes to hear them: every round costs everybody."""
    refusing(monkeypatch, COLLUDER, "site-02", after=1)
    world = federation(rounds=3)
    world.start()
    for _ in range(5_000):
        if world.waits:
            break
        world.step()
    assert world.waits[0].code is Code.QUORUM_LOST
    assert COLLUDER in str(world.waits[0])
    assert "site-02" in str(world.waits[0])
    assert len(world.aborts) == 1
    assert all(len(party.reserved) <= 2 for party in world.parties.values())


def test_a_hospital_that_says_hello_again_is_asked_again(monkeypatch):
    refusing(monkeypatch, COLLUDER, "site-02", after=1)
    world = federation(rounds=3)
    world.start()
    while not world.waits:
        world.step()
    monkeypatch.undo()
    for site in (COLLUDER, "site-02"):
        world.parties[site].kill()
        world.parties[site].start()
    finish(world)
    assert len(world.rounds) == 4


def test_an_update_that_is_not_finite_costs_its_hospital_the_round_and_nobody_else(monkeypatch):
    honest = TracerWorker.work

    def work(self, request):
        worked = honest(self, request)
        if self.site == COLLUDER and request.round == 1:
            worked.update[0] = np.nan
        return worked

    monkeypatch.setattr(TracerWorker, "work", work)
    world = federation()
    world.start()
    assert world.play()
    world.check()
    assert [COLLUDER in r.survivors for r in world.rounds] == [False, True, True]
    assert any(Code.NON_FINITE.label in event for event in world.events)


def test_a_refusal_of_something_old_does_not_take_a_hospital_out_of_the_round():
    world = federation()
    halt(world, "Ready", "coordinator", nth=1, sender=VICTIM)
    world.queue.clear()
    stale = Refusal(world.terms.study, COLLUDER, 0, Code.MALFORMED.label, "")
    to_coordinator(world, COLLUDER, pack_statement(Refusal, sign(world.keys[COLLUDER], stale)))
    assert COLLUDER not in world.coordinator.driver.machine._declined
    finish(world)
    assert all(r.survivors == tuple(world.sites) for r in world.rounds)


def test_no_round_is_burned_while_too_few_hospitals_are_there():
    world = Schedule(4, seed="wait", rounds=2, spare=3)
    halt(world, "RoundStart", "site-01")
    for site in ("site-01", "site-02"):
        world.parties[site].kill()
        world.later(90.0, lambda s=site: world.restart(world.parties[s]))
    finish(world)
    assert len(world.aborts) == 1


def test_two_coordinators_restarts_between_any_two_writes_keep_the_chain():
    """The link and its base are written under the round's own name, before the record says so."""
    for point in ("before-blob", "after-blob", "before-store", "after-store"):
        world = Schedule(4, seed="chain", rounds=2, spare=10)
        calls = {"n": 0}
        honest = world.fault_point

        def fault(party, at, calls=calls, honest=honest, point=point, world=world):
            if party.name == "coordinator" and at == point and len(world.rounds) == 1:
                calls["n"] += 1
                if calls["n"] in {3, 5}:
                    world.crash(1.0)(party, at)
            honest(party, at)

        world.fault_point = fault
        world.start()
        finish(world)


@pytest.mark.parametrize("phase", ["handshake", "ready", "upload", "agree", "unmask"])
def test_the_coordinator_says_whom_it_waits_for(phase):
    world = federation(3)
    kind = {
        "handshake": "RunKey",
        "ready": "Ready",
        "upload": "Upload",
        "agree": "Agree",
        "unmask": "Unmask",
    }[phase]
    halt(world, kind, "coordinator", sender=VICTIM)
    machine = world.coordinator.driver.machine
    assert machine.phase == phase
    assert VICTIM in machine.waiting_for()


def test_a_site_that_dropped_out_once_is_waited_for_in_the_next_round():
    """The last in line, too: its Ready comes when everybody else's is there already."""
    world = World(5, rounds=3)
    last = world.sites[-1]
    coordinator = world.coordinator

    def network(sender, recipient, payload):
        driver = coordinator.driver
        lost = driver is not None and driver.machine.record.round == 1
        lost = lost and driver.machine.phase != "ready" and last in {sender, recipient}
        return [] if lost else [(sender, recipient, payload)]

    world.network = network
    world.start()
    world.run()
    assert last not in world.rounds[0].survivors
    assert all(last in result.survivors for result in world.rounds[1:])
    world.check()
