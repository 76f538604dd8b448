"""The hospital's round machine: what it keeps, what it forgets, what it says again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rogue import VICTIM, federation, finish, halt, record, to_site

from client.round.machine import SiteRound
from client.round.record import SiteRecord
from common.errors import Code, ProtocolError
from common.protocol.wire import BurnRequest, pack


def secrets(world):
    held = world.parties[VICTIM].daemon._machine.state.secrets
    return [held.self_secret, *held.seeds.values()]


def test_a_record_is_read_back_as_it_was_written():
    world = federation()
    halt(world, "Agreements", VICTIM)
    seen = world.parties[VICTIM].daemon._machine.record
    assert SiteRecord.load(seen.dump()) == seen


def test_another_studys_journal_is_refused():
    world = federation()
    halt(world, "Participants", VICTIM)
    other = replace(world.terms, study=bytes(32))
    with pytest.raises(ProtocolError) as caught:
        SiteRound(
            other, VICTIM, world.keys[VICTIM], world.entropy[VICTIM],
            ledger_contains=lambda _count, _head: True, record=record(world, VICTIM),
        )  # fmt: skip
    assert caught.value.code is Code.RUN_SECOND


def test_round_secrets_are_never_on_the_disk():
    world = federation()
    message = halt(world, "Participants", VICTIM)
    held = secrets(world)
    disk = world.parties[VICTIM].disk
    for kind in ("Survivors", "Agreements", "RoundStart"):
        image = (disk.record or b"") + b"".join(disk.blobs.values())
        assert not any(secret in image for secret in held), kind
        world.queue.appendleft(("coordinator", VICTIM, pack(message)))
        message = halt(world, kind, VICTIM)


def test_pair_keys_on_the_disk_are_not_those_of_a_closed_round():
    world = federation()
    halt(world, "Participants", VICTIM)
    before = dict(world.parties[VICTIM].daemon._machine.record.keys)
    halt(world, "RoundStart", VICTIM)
    world.deliver()
    image = world.parties[VICTIM].disk.record
    assert not any(key in image for key in before.values())


def test_a_site_that_crashes_before_its_upload_sits_the_round_out_and_comes_back():
    world = federation()
    halt(world, "Participants", VICTIM)
    world.parties[VICTIM].kill()
    world.parties[VICTIM].start()
    finish(world)
    assert [VICTIM in r.survivors for r in world.rounds] == [False, True, True]


def test_a_late_copy_of_a_start_is_not_a_refusal():
    world = federation()
    start = halt(world, "RoundStart", VICTIM)
    world.queue.appendleft(("coordinator", VICTIM, pack(start)))
    halt(world, "Survivors", VICTIM)
    reaction = to_site(world, VICTIM, start)
    assert reaction.codes == []
    assert reaction.sent == []


def test_an_opening_that_nobody_signed_leaves_the_established_epoch_in_use():
    world = federation()
    start = halt(world, "RoundStart", VICTIM)
    before = record(world, VICTIM)
    opening = next(p for _, to, p in world.wire if to == VICTIM)
    from common.protocol.wire import unpack_from_coordinator

    higher = replace(unpack_from_coordinator(opening, 2**20), epoch=2**30)
    assert to_site(world, VICTIM, higher).kinds == ["RunKey"]
    assert record(world, VICTIM) == before
    assert to_site(world, VICTIM, start).kinds == ["Ready"]


def test_burning_a_later_round_leaves_the_open_one_alone():
    world = federation()
    genuine = halt(world, "Participants", VICTIM)
    seen = world.parties[VICTIM].daemon._machine.record
    assert to_site(world, VICTIM, BurnRequest(seen.study, seen.run, 2)).kinds == ["Burn"]
    assert to_site(world, VICTIM, genuine).kinds == ["Upload"]
    second = halt(world, "RoundStart", VICTIM)
    assert to_site(world, VICTIM, second).codes == [Code.AGREE_AFTER_BURN.label]
    finish(world)
    assert [VICTIM in r.survivors for r in world.rounds] == [True, False, True]


def test_a_site_that_missed_every_handshake_can_burn_and_learns_the_final_model():
    world = federation()
    world.start(absent=(VICTIM,))
    while world.final is None:
        world.step()
    late = world.parties[VICTIM]
    late.start()
    world.play()
    assert late.worker.final.state_digest == world.final.state_digest


def test_a_damaged_aggregate_is_replaced_before_it_is_built_on():
    world = federation(4)
    genuine = halt(world, "RoundStart", VICTIM, nth=2)
    sums = bytearray(genuine.link.sums[0])
    sums[0] ^= 1
    damaged = replace(
        genuine, link=replace(genuine.link, sums=(memoryview(bytes(sums)), *genuine.link.sums[1:]))
    )
    assert to_site(world, VICTIM, damaged).kinds == ["Ready"]
    finish(world)
    assert VICTIM in world.rounds[-1].survivors
