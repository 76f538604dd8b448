"""Faults that a run names while it goes on, or when it ends: each beside the run without them."""

from __future__ import annotations

from dataclasses import replace

from rogue import (
    COLLUDER,
    VICTIM,
    federation,
    finish,
    halt,
    swap,
    to_coordinator,
    to_site,
)
from schedule import Schedule, kind_of
from world import World

from client.handshake import Handshake
from common.errors import Code
from common.protocol.wire import (
    Confirm,
    Hello,
    Refusal,
    pack,
    pack_statement,
    sign,
    unpack_body,
)

CONVICT = "site-04"


def told(world: Schedule, who: str, code: Code, whom: str) -> int:
    """How often a party wrote down that another was refused for this."""
    return sum(
        event.startswith(f"{who} peer.refused") and code.label in event and f"'{whom}'" in event
        for event in world.events
    )


# ---------------------------------------------------------------- a wrong key confirmation
def test_a_wrong_confirmation_is_named_by_its_receiver_who_reveals_and_masks_nothing():
    world = federation()
    genuine = halt(world, "ConfirmSet", VICTIM)
    mine = unpack_body(Confirm, genuine.confirmations[0])
    assert mine.site == COLLUDER
    wrong = sign(world.keys[COLLUDER], replace(mine, tags={**mine.tags, VICTIM: bytes(16)}))
    shown = replace(genuine, confirmations=swap(genuine.confirmations, 0, wrong))
    reaction = to_site(world, VICTIM, shown)
    assert reaction.kinds == ["Dispute"]
    assert told(world, VICTIM, Code.HANDSHAKE_CONFIRMATION, COLLUDER) == 1
    seen = world.parties[VICTIM].daemon._machine.record
    assert (seen.keys, seen.transcript) == ({}, bytes(32))


def test_control_right_confirmations_name_nobody():
    world = federation()
    genuine = halt(world, "ConfirmSet", VICTIM)
    assert to_site(world, VICTIM, genuine).kinds == ["Established"]
    finish(world)
    assert not any(Code.HANDSHAKE_CONFIRMATION.label in event for event in world.events)


# ---------------------------------------------------------------- accusations
def accuse(world: Schedule, accuser: str, culprit: str, number: int = 0) -> None:
    refusal = Refusal(world.terms.study, accuser, number, Code.SHARE_COMMITMENT.label, culprit)
    payload = pack_statement(Refusal, sign(world.keys[accuser], refusal))
    assert to_coordinator(world, accuser, payload).codes == []


def test_one_accuser_is_written_down_and_believed_by_nobody():
    world = federation()
    halt(world, "Participants", VICTIM)
    for _ in range(3):  # however often it says so
        accuse(world, COLLUDER, VICTIM)
    assert told(world, "coordinator", Code.PEER_ACCUSED, VICTIM) == 3
    assert world.coordinator.driver.machine.record.convicted == ()


def test_accusing_oneself_or_a_stranger_is_no_accusation():
    world = federation()
    halt(world, "Participants", VICTIM)
    for culprit in (COLLUDER, "sybil-1", ""):
        accuse(world, COLLUDER, culprit)
    assert not any(Code.PEER_ACCUSED.label in event for event in world.events)


def test_a_site_that_more_than_may_conspire_accuse_is_left_out_of_the_rest_of_the_run():
    world = federation()
    participants = halt(world, "Participants", VICTIM)
    accusers = (COLLUDER, "site-02", "site-04")
    assert world.terms.colluders == len(accusers) - 1
    for number, accuser in enumerate(accusers, start=1):
        assert world.coordinator.driver.machine.record.convicted == ()
        accuse(world, accuser, "site-05")
        assert told(world, "coordinator", Code.PEER_ACCUSED, "site-05") == number
    assert world.coordinator.driver.machine.record.convicted == ("site-05",)
    world.queue.appendleft(("coordinator", VICTIM, pack(participants)))
    finish(world)
    assert all("site-05" not in done.survivors for done in world.rounds[1:])
    assert [done.kind for done in world.rounds] == ["train", "train", "evaluate"]


# ---------------------------------------------------------------- rounds used up
def lossy(world: Schedule, *, until: int) -> None:
    """Two hospitals' uploads never arrive before round `until`: every such round is burned."""
    weather = world.network

    def network(sender, recipient, payload):
        lost = sender in {COLLUDER, "site-02"} and kind_of(payload) == "Upload"
        if lost and world.coordinator.driver.machine.record.round < until:
            return []
        return weather(sender, recipient, payload)

    world.network = network


def test_a_run_whose_every_round_burns_ends_starved_and_no_round_is_worked_twice():
    world = federation(spare=2)
    lossy(world, until=10_000)
    world.start()
    assert not world.play()
    assert {error.code for error in world.waits} == {Code.RUN_STARVED}
    assert f"no round {world.terms.rounds + 1}" in str(world.waits[0])
    assert world.rounds == []
    world.check()
    for party in world.parties.values():
        assert len(party.reserved) <= world.terms.rounds, "the budget is spent on no further round"


def test_control_with_fewer_burns_than_spare_rounds_the_same_run_finishes():
    world = federation(spare=2)
    lossy(world, until=3)
    world.start()
    assert world.play()
    world.check()
    assert world.waits == []
    assert [done.round for done in world.rounds] == [3, 4, 5]


# ---------------------------------------------------------------- a convicted site
def epochs_of(monkeypatch, *, noisy: bool) -> int:
    """How many handshakes a run of four rounds takes after a site was convicted in the first."""
    world = World(6, rounds=4, c=1)
    finish_handshake, said = Handshake.finish, set()

    def lying(handshake, message):
        confirm = finish_handshake(handshake, message)
        if handshake.run_key.site != CONVICT:
            return confirm
        return replace(confirm, tags={**confirm.tags, "site-02": bytes(16)})

    def network(sender, recipient, payload):
        machine = None if world.coordinator.driver is None else world.coordinator.driver.machine
        if machine is None or not machine.record.convicted:
            return [(sender, recipient, payload)]
        if CONVICT in {sender, recipient}:
            return []
        sent = [(sender, recipient, payload)]
        if noisy and machine.record.phase == "upload" and machine.record.round not in said:
            said.add(machine.record.round)
            hello = Hello(world.terms.study, CONVICT, 0, 0, 0)
            sent.append(
                (CONVICT, "coordinator", pack_statement(Hello, sign(world.keys[CONVICT], hello)))
            )
        return sent

    monkeypatch.setattr(Handshake, "finish", lying)
    world.network = network
    world.start()
    world.run()
    machine = world.coordinator.driver.machine
    assert machine.record.convicted == (CONVICT,)
    assert bool(said) == noisy
    return machine.record.epoch


def test_a_convicted_site_that_keeps_saying_hello_forces_no_handshake(monkeypatch):
    assert epochs_of(monkeypatch, noisy=True) == epochs_of(monkeypatch, noisy=False)
