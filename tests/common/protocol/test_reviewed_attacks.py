"""Attacks that a review of the round machines found, played against a whole federation."""

from __future__ import annotations

from dataclasses import replace

from world import World

from common.crypto import labels
from common.crypto.digest import digest
from common.errors import Code
from common.protocol.wire import (
    Confirm,
    ConfirmSet,
    Dispute,
    Finished,
    Head,
    Participants,
    Ready,
    Upload,
    Witness,
    pack,
    pack_statement,
    sign,
    unpack_body,
    unpack_from_coordinator,
    unpack_from_site,
)

MAX_BYTES = 1 << 24
EVIL = "site-04"


def keys_of(world: World, site: str) -> dict[str, bytes]:
    return world.parties[site].daemon._machine.record.keys


def spoiled(world: World, message: ConfirmSet) -> ConfirmSet:
    """The same confirmations, but the colluder's tags are wrong (and signed)."""
    statements = []
    for signed in message.confirmations:
        confirm = unpack_body(Confirm, signed)
        wrong = Confirm(confirm.transcript, EVIL, dict.fromkeys(confirm.tags, bytes(16)))
        statements.append(sign(world.keys[EVIL], wrong) if confirm.site == EVIL else signed)
    return ConfirmSet(message.transcript, tuple(statements))


def test_no_site_masks_with_keys_that_it_has_revealed():
    # The coordinator and one colluder show a second, spoiled set of confirmations after the
    # first was accepted. A site that revealed its ephemeral keys now and went on would show
    # every update to the coordinator.
    world, revealed, held = World(4, patience=3), set(), []

    def network(sender, recipient, payload):
        sent = [(sender, recipient, payload)]
        if sender == "coordinator":
            message = unpack_from_coordinator(payload, MAX_BYTES)
            if isinstance(message, ConfirmSet) and recipient != EVIL:
                sent.append((sender, recipient, pack(spoiled(world, message))))
            return sent
        kind, signed = unpack_from_site(payload, MAX_BYTES)
        if kind is Dispute:
            revealed.add((sender, unpack_body(Dispute, signed).transcript))
            held.append(keys_of(world, sender))
            return []
        if kind is Upload:
            transcript = world.parties[sender].daemon._machine.record.transcript
            assert (sender, transcript) not in revealed
        return sent

    world.network = network
    world.start()
    world.run(400, until=lambda: len(revealed) >= 3)
    assert {site for site, _ in revealed} == {"site-01", "site-02", "site-03"}
    assert held == [{}] * len(held)


def lying_witness(n: int, liars: int) -> World:
    world = World(n)
    world.start()
    world.run(until=lambda: world.coordinator.driver.machine.phase == "ready")
    for liar in world.sites[-liars:]:
        machine = world.parties[liar].daemon._machine
        claims = {site: Witness(10**6, bytes(32)) for site in world.sites if site != liar}
        machine.state.record = replace(machine.record, witnessed=claims)
    world.run(600, until=lambda: bool(world.refusals) or world.aborts != [])
    return world


def ended(world: World) -> set[str]:
    return {s for s, p in world.parties.items() if p.daemon._machine.record.ended}


def test_one_false_witness_ends_no_other_hospitals_run():
    assert ended(lying_witness(4, 1)) == set()


def test_control_more_witnesses_than_can_collude_end_the_run():
    assert ended(lying_witness(4, 2)) >= {"site-01", "site-02"}


def test_a_dispute_before_its_time_or_with_oneself_does_not_stop_the_coordinator():
    for peer in ("site-01", EVIL):
        world = World(4)

        def network(sender, recipient, payload, world=world, peer=peer):
            sent = [(sender, recipient, payload)]
            if sender != EVIL:
                return sent
            kind, _ = unpack_from_site(payload, MAX_BYTES)
            handshake = world.parties[EVIL].daemon._machine.state.handshake
            if kind.__name__ == "EncapsulationUpload":
                early = sign(world.keys[EVIL], replace(handshake.dispute(EVIL), peer=peer))
                sent.insert(0, (sender, recipient, pack_statement(Dispute, early)))
            return sent

        world.network = network
        world.start()
        world.run()
        codes = {code for site, code in world.refusals if site == EVIL}
        assert codes == {Code.ROUND_OUT_OF_ORDER if peer != EVIL else Code.HANDSHAKE_TRANSCRIPT}
        assert len(world.rounds) == 4


def test_a_recovery_blob_that_does_not_open_convicts_its_owner_and_the_run_resumes():
    world = World(4)

    def network(sender, recipient, payload):
        if sender == EVIL:
            kind, message = unpack_from_site(payload, MAX_BYTES)
            if kind is Ready:
                blob = bytes(len(message.blob))
                head = replace(unpack_body(Head, message.head), blob=digest(labels.BLOB, blob))
                payload = pack(Ready(sign(world.keys[EVIL], head), blob, message.shares))
        lost = recipient == EVIL and isinstance(
            unpack_from_coordinator(payload, MAX_BYTES), Participants
        )
        return [] if lost else [(sender, recipient, payload)]

    world.network = network
    world.start()
    world.run(until=lambda: bool(world.coordinator.driver.machine.record.convicted))
    world.coordinator.start()  # from its journal
    world.run()
    assert world.coordinator.driver.machine.record.convicted == (EVIL,)
    assert all(EVIL not in result.survivors for result in world.rounds)
    world.check()


def test_a_site_that_was_absent_joins_with_keys_that_fit():
    world = World(5)
    world.start(absent=("site-05",))
    world.run(until=lambda: len(world.rounds) == 2)
    world.parties["site-05"].start()
    world.run()
    assert "site-05" in world.rounds[-1].survivors
    assert world.refusals == []


def test_an_unfinished_run_is_not_accepted_as_finished():
    world = World(4)
    world.start()
    world.run(until=lambda: len(world.rounds) == 1)
    run = world.coordinator.driver.machine.record.run
    world.parties["site-01"].receive(pack(Finished(world.terms.study, run, None, None)))
    assert world.parties["site-01"].worker.final is None
    world.run()
    assert world.parties["site-01"].worker.final.turn == world.terms.turns + 2


def test_control_an_undisturbed_run_refuses_nothing_and_convicts_nobody():
    world = World(4)
    world.start()
    world.run()
    assert world.refusals == []
    assert world.coordinator.driver.machine.record.convicted == ()
    assert len(world.rounds) == 4
