"""What the adversarial review requires (docs/PROTOCOL.md, section 10), each against its hole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from world import SeededEntropy, World

from client.round.effects import Worked
from client.round.machine import SiteRound
from client.round.shares import share_key
from common.errors import Code, ProtocolError
from common.protocol.wire import (
    Burn,
    BurnRequest,
    Confirm,
    HandshakeOpen,
    Head,
    Ready,
    RoundStart,
    pack,
    pack_statement,
    sign,
    unpack_body,
    unpack_from_coordinator,
    unpack_from_site,
)

MAX_BYTES = 1 << 24
ME, EVIL = "site-01", "site-04"


def refused(machine: SiteRound, message: object) -> Code:
    """The code of the refusal; the site's record stays as it was."""
    before = machine.record
    with pytest.raises(ProtocolError) as error:
        machine.handle(pack(message))
    assert machine.record == before
    return error.value.code


def machine_of(world: World, site: str = ME) -> SiteRound:
    return world.parties[site].daemon._machine


def world_at(stage: str, number: int = 1, **settings) -> World:
    """A federation whose first site stands at a stage of a round."""
    world = World(4, **settings)
    world.start()

    def there() -> bool:
        record = machine_of(world).record
        return (record.stage, record.round) == (stage, number)

    world.run(until=there)
    assert there()
    return world


def started(world: World, number: int, **changes) -> RoundStart:
    """The coordinator's first RoundStart, with another number."""
    for sender, _, payload in world.wire:
        if sender == "coordinator":
            message = unpack_from_coordinator(payload, MAX_BYTES)
            if isinstance(message, RoundStart):
                return replace(message, round=number, **changes)
    raise AssertionError("no round has begun")


# ------------------------------------------------- 1: the parties and the run are the study's
def test_a_subset_of_the_parties_below_the_quorum_is_refused():
    world = World(10)
    world.start()
    machine, study, run = machine_of(world), world.terms.study, bytes([1]) * 32
    quorum = world.terms.quorum
    for members in (
        world.sites[:3], world.sites[: quorum - 1], world.sites[1 : quorum + 2],
        [*world.sites[:quorum], "stranger"], list(reversed(world.sites)), [ME] * quorum,
    ):  # fmt: skip
        assert (
            refused(machine, HandshakeOpen(study, run, 5, tuple(members))) is Code.HANDSHAKE_MEMBERS
        )
    allowed = HandshakeOpen(study, run, 5, tuple(world.sites[:quorum]))
    assert machine.handle(pack(allowed))  # control: a quorum is enough


def test_a_second_run_of_the_study_is_refused():
    world = world_at("uploaded")
    other = bytes([1]) * 32
    opened = HandshakeOpen(world.terms.study, other, 9, tuple(world.sites))
    assert refused(machine_of(world), opened) is Code.RUN_SECOND
    assert refused(machine_of(world), started(world, 2, run=other)) is Code.ROUND_WRONG_RUN
    assert machine_of(world).handle(pack(replace(opened, run=machine_of(world).record.run)))


# ------------------------------------------------------------- 2: burn and agree exclude each other
def burn_request(world: World, number: int) -> BurnRequest:
    return BurnRequest(world.terms.study, machine_of(world).record.run, number)


def test_a_site_that_agreed_never_burns_that_round():
    world = world_at("agreed")
    assert refused(machine_of(world), burn_request(world, 1)) is Code.BURN_AFTER_AGREE


def test_a_site_that_burned_never_takes_part_in_that_round():
    world = world_at("uploaded")
    survivors = next(
        payload
        for sender, to, payload in played(world_at("agreed"))
        if to == ME and tag(payload) == "Survivors"
    )
    machine = machine_of(world)
    machine.handle(pack(burn_request(world, 1)))
    before = machine.record
    with pytest.raises(ProtocolError) as error:
        machine.handle(survivors)
    assert error.value.code is Code.AGREE_AFTER_BURN
    assert machine.record == before


def played(world: World) -> list[tuple[str, str, bytes]]:
    return [entry for entry in world.wire if entry[0] == "coordinator"]


def tag(payload: bytes) -> str:
    return type(unpack_from_coordinator(payload, MAX_BYTES)).__name__


def burns_of(world: World, number: int, signers: list[str]) -> tuple:
    run = machine_of(world).record.run
    return tuple(sign(world.keys[s], Burn(world.terms.study, run, number, s)) for s in signers)


@pytest.mark.parametrize(
    ("private", "number", "code"),
    [(False, 2, Code.RETRY_UNCERTIFIED), (True, 3, Code.BURN_CERTIFICATE)],
)
def test_the_same_model_is_not_trained_again_without_a_certificate(private, number, code):
    world = world_at("uploaded", private=private)
    machine = machine_of(world)
    assert refused(machine, started(world, number)) is code
    too_few = started(world, number, burns=burns_of(world, 1, world.sites[1:3]))
    assert refused(machine, too_few) is code
    twice = started(world, number, burns=burns_of(world, 1, [*world.sites[1:3], "site-02"]))
    assert refused(machine, twice) is code
    enough = started(world, number, burns=burns_of(world, 1, world.sites[1:]))
    assert machine.handle(pack(enough))  # control: a quorum's word lets it go on


# ------------------------------------------------------------------- 8: a rollback re-uses no key
def test_a_site_that_was_rolled_back_deals_under_other_keys():
    world = world_at("ready")
    record, start = machine_of(world).record, started(world, 1)
    earlier = replace(record, round=0, stage="idle", ratchet=0)
    heads = []
    for seed in ("first", "second"):
        machine = SiteRound(
            world.terms, ME, world.keys[ME], SeededEntropy(seed), ledger_contains=lambda *_: True,
            record=earlier.dump(),
        )  # fmt: skip
        machine.handle(pack(start))
        effects = machine.worked(1, Worked(np.zeros(world.terms.layout.size, np.float32), None))
        kind, ready = unpack_from_site(effects[-1].payload, MAX_BYTES)
        assert kind is Ready
        heads.append(unpack_body(Head, ready.head))
    one, two = heads
    assert one.header == two.header
    assert one.nonce != two.nonce
    used = {
        share_key(bytes(32), h.header, ME, EVIL, h.self_commitment, h.recovery_commitment)
        for h in heads
    }
    assert len(used) == 2


# -------------------------------------------------------- 10: a dispute names the one who lied
@pytest.mark.parametrize("liar", ["site-01", "site-04"])
def test_a_wrong_key_confirmation_convicts_its_signer_and_the_others_go_on(liar):
    world = World(4)

    def network(sender, recipient, payload):
        if sender == liar:
            kind, signed = unpack_from_site(payload, MAX_BYTES)
            if kind is Confirm:
                confirm = unpack_body(Confirm, signed)
                wrong = replace(confirm, tags=dict.fromkeys(confirm.tags, bytes(16)))
                payload = pack_statement(Confirm, sign(world.keys[liar], wrong))
        return [(sender, recipient, payload)]

    world.network = network
    world.start()
    world.run()
    assert world.coordinator.driver.machine.record.convicted == (liar,)
    assert len(world.rounds) == 4
    assert all(liar not in result.survivors for result in world.rounds)
    world.check()


# --------------------------------------------------------------- 11: what never touches a disk
def test_no_record_of_a_site_ever_holds_a_round_secret():
    world, stored, taken, seeds, pair_keys = World(4), [], set(), set(), set()
    for site, party in world.parties.items():
        store, take = party.disk.store, world.entropy[site].take

        def kept(record, *rest, store=store, **named):
            stored.append(bytes(record))
            return store(record, *rest, **named)

        def drawn(count, take=take):
            secret = take(count)
            if count in {
                32,
                64,
            }:  # b, e, ephemeral keys (and public nonces); shares and salts differ
                taken.add(secret)
            return secret

        party.disk.store = kept
        world.entropy[site].take = drawn
    world.start()

    def look() -> bool:
        for party in world.parties.values():
            machine = party.daemon._machine
            if machine.state.secrets is not None:
                seeds.update(machine.state.secrets.seeds.values())
            pair_keys.update(machine.record.keys.values())
        return False

    world.run(until=look)
    everything = b"".join(stored)
    assert len(taken) > 50
    assert len(seeds) > 20
    assert [secret for secret in taken | seeds if secret in everything] == []
    assert any(key in everything for key in pair_keys)  # control: the search finds what is kept
    final = [party.disk.record for party in world.parties.values()]
    assert not any(key in record for key in pair_keys for record in final)


def test_pair_keys_of_a_closed_round_are_gone_from_the_record():
    world = world_at("ready")
    keys = dict(machine_of(world).record.keys)
    world.run(until=lambda: machine_of(world).record.stage == "done")
    held = machine_of(world).record
    assert held.ratchet == 2
    assert not set(keys.values()) & set(held.keys.values())
    assert held.shares == {}


# --------------------------------------------------------- 12: the chain is enforced by the site
def test_a_coordinator_that_serves_another_base_is_refused():
    world = world_at("uploaded", 2)
    link = next(
        m.link for m in (unpack_from_coordinator(p, MAX_BYTES) for _, to, p in played(world) if to == ME)
        if isinstance(m, RoundStart) and m.round == 2
    )  # fmt: skip
    machine = SiteRound(
        world.terms, ME, world.keys[ME], SeededEntropy("x"), ledger_contains=lambda *_: True,
        record=replace(machine_of(world).record, version=1, round=1, stage="idle").dump(),
    )  # fmt: skip
    size = 4 * sum(value.size for value in world.terms.initial.values())
    start = started(world, 2, link=link)
    assert refused(machine, start) is Code.BASE_NEEDED
    assert refused(machine, replace(start, base=memoryview(b"\1" * size))) is Code.LINK_STATE
    assert refused(machine, replace(start, link=None)) is Code.LINK_STALE
    other = replace(link, sums=(memoryview(bytes(len(link.sums[0]))),))
    assert refused(machine, replace(start, link=other)) is Code.LINK_EQUIVOCATION
    assert machine.handle(pack(replace(start, base=memoryview(bytes(size)))))  # the study's zeros
