"""The coordinator's round machine: what it does when hospitals say no, break off or break down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rogue import (
    COLLUDER,
    VICTIM,
    federation,
    finish,
    halt,
    record,
    spend_budgets,
    to_coordinator,
    to_site,
)
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
    refusing(monkeypatch, COLLUDER, "site-02", code=Code.APPROVAL_STOPPED, after=1)
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
    refusing(monkeypatch, COLLUDER, "site-02", code=Code.APPROVAL_STOPPED, after=1)
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
    assert COLLUDER not in world.coordinator.driver.machine.state.declined
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


# ---------------------------------------------------------------- budgets that are spent

SPENDERS = (COLLUDER, "site-02")


def models(world) -> set[bytes]:
    return {p.worker.final.state_digest for p in world.parties.values() if p.worker.final}


def test_spent_budgets_end_the_run_with_the_model_of_the_last_complete_round(monkeypatch):
    refusing(monkeypatch, *SPENDERS, after=2)
    world = federation(rounds=4)
    world.start()
    finish(world)
    machine = world.coordinator.driver.machine
    assert (machine.phase, machine.ended) == ("done", Code.BUDGETS_SPENT)
    assert [r.kind for r in world.rounds] == ["train", "train"]
    assert world.final.state_digest == world.chains[-1].state_digest
    assert models(world) == {world.final.state_digest}
    assert all(party.worker.final is not None for party in world.parties.values())
    assert world.waits == []
    assert len(world.aborts) == 1
    assert not world.said.burns  # nobody is asked for anything more
    assert all(len(party.reserved) <= 3 for party in world.parties.values())
    for owner in ("coordinator", VICTIM):
        said = [e for e in world.events if e.startswith(f"{owner} run.finished")]
        assert len(said) == 1
        assert Code.BUDGETS_SPENT.label in said[0]


def test_a_run_that_ends_in_its_own_time_has_no_such_reason():
    world = federation()
    world.start()
    finish(world)
    assert world.coordinator.driver.machine.ended is None
    assert not any(Code.BUDGETS_SPENT.label in event for event in world.events)


@pytest.mark.parametrize("code", [Code.BUDGET_EXCEEDED, Code.BUDGET_STUDY, Code.BUDGET_PLAN])
def test_budgets_spent_before_any_round_end_the_run_with_the_studys_own_model(monkeypatch, code):
    refusing(monkeypatch, *SPENDERS, code=code)
    world = federation()
    world.start()
    finish(world)
    assert world.rounds == []
    assert models(world) == {world.final.state_digest}


def test_a_round_that_can_still_be_completed_is_completed_first():
    world = federation(rounds=4)
    halt(world, "Agree", "coordinator", sender=VICTIM)
    spend_budgets(world, *SPENDERS)
    assert world.coordinator.driver.machine.phase == "agree"
    finish(world)
    assert len(world.rounds) == 1
    assert set(SPENDERS) < set(world.rounds[0].survivors)
    assert world.aborts == []
    assert world.coordinator.driver.machine.ended is Code.BUDGETS_SPENT


@pytest.mark.parametrize("point", ["before-store", "after-store", "before-send", "after-send"])
def test_a_coordinator_that_crashes_while_it_ends_the_run_ends_it_again(monkeypatch, point):
    refusing(monkeypatch, *SPENDERS, after=1)
    world = federation(rounds=3)
    honest, crashed = world.fault_point, []

    def fault(party, at):
        if party.name == "coordinator" and at == point and len(crashed) < 3:
            machine = party.driver.machine
            if machine.ended is not None:
                crashed.append(at)
                world.crash(1.0)(party, at)
        honest(party, at)

    world.fault_point = fault
    world.start()
    finish(world)
    assert len(crashed) == 3
    assert models(world) == {world.chains[-1].state_digest}
    assert world.coordinator.driver.machine.ended is Code.BUDGETS_SPENT


def test_a_hospital_that_was_away_learns_of_the_end_and_needs_the_proof(monkeypatch):
    refusing(monkeypatch, *SPENDERS, after=1)
    world = federation(rounds=3)
    world.start(absent=("site-05",))
    while world.final is None:
        world.step()
    world.parties["site-05"].start()
    assert world.play()
    assert world.parties["site-05"].worker.final.state_digest == world.final.state_digest


def test_a_word_about_an_earlier_round_or_another_reason_ends_nothing():
    world = federation(rounds=3)
    halt(world, "RoundStart", VICTIM, nth=2)
    stale = [
        sign(world.keys[s], Refusal(world.terms.study, s, 1, Code.BUDGET_EXCEEDED.label, ""))
        for s in SPENDERS
    ]
    machine = world.coordinator.driver.machine
    for site, signed in zip(SPENDERS, stale, strict=True):
        to_coordinator(world, site, pack_statement(Refusal, signed))
    assert machine.record.spent == {}
    spend_budgets(world, *SPENDERS, code=Code.DATA_DECLINED)
    assert machine.record.spent == {}
    spend_budgets(world, COLLUDER)  # control: this is how it is said
    assert set(machine.record.spent) == {COLLUDER}


def test_a_hospital_that_says_hello_takes_its_word_back(monkeypatch):
    world = federation(rounds=3)
    halt(world, "Agree", "coordinator", sender=VICTIM)
    spend_budgets(world, *SPENDERS)
    machine = world.coordinator.driver.machine
    assert set(machine.record.spent) == set(SPENDERS)
    world.parties[COLLUDER].kill()
    world.parties[COLLUDER].start()
    while world.queue and set(machine.record.spent) == set(SPENDERS):
        world.deliver()
    assert set(machine.record.spent) == {"site-02"}
    finish(world)
    assert machine.ended is None
    assert len(world.rounds) == 4


def unproven(refusals, world) -> dict[str, tuple]:
    """Ended messages that prove nothing, by what is wrong with them."""
    first, second = refusals
    study, keys = world.terms.study, world.keys
    label = Code.BUDGET_EXCEEDED.label
    other = sign(keys["site-02"], Refusal(bytes(32), "site-02", 2, label, ""))
    reason = sign(keys["site-02"], Refusal(study, "site-02", 2, Code.APPROVAL_STOPPED.label, ""))
    forged = sign(keys[COLLUDER], Refusal(study, "site-02", 2, label, ""))
    unknown = sign(keys[COLLUDER], Refusal(study, "site-99", 2, label, ""))
    return {
        "no word": (), "one hospital's word": (first,), "the same word twice": (first, first),
        "another study": (first, other), "another reason": (first, reason),
        "a forged word": (first, forged), "no party": (first, unknown),
        "a damaged word": (first, replace(second, signature=bytes(64))),
    }  # fmt: skip


def test_a_coordinator_cannot_end_the_run_before_its_time_without_the_hospitals_word(monkeypatch):
    refusing(monkeypatch, *SPENDERS, after=1)
    world = federation(rounds=3)
    genuine = halt(world, "Ended", VICTIM)
    before = record(world, VICTIM)
    for what, refusals in unproven(genuine.refusals, world).items():
        reaction = to_site(world, VICTIM, replace(genuine, refusals=refusals))
        assert reaction.codes == [Code.END_UNPROVEN.label], what
        assert reaction.sent == []
        assert record(world, VICTIM) == before
        assert world.parties[VICTIM].worker.final is None
    to_site(world, VICTIM, genuine)
    assert world.parties[VICTIM].worker.final.state_digest == world.final.state_digest
