"""The invariants must be able to fail: broken machines, each of which they have to catch."""

import numpy as np
import pytest
from schedule import Schedule, kind_of

import client.round.machine
import server.round.collecting
from client.daemon import SiteDaemon
from client.round.effects import SendBlob
from common.crypto import mask
from common.protocol.effects import Persist
from common.protocol.wire import BurnRequest, Survivors, pack


def run(world: Schedule) -> Schedule:
    world.start()
    world.play()
    return world


def test_a_faultless_run_passes_every_check():
    run(Schedule(4, seed="control", rounds=2)).check()


def test_a_site_that_masks_differently_on_a_retry_is_caught(monkeypatch):
    honest = SiteDaemon._one

    def remask(self, effect):
        if isinstance(effect, SendBlob):
            kept = bytearray(self._journal.get_blob(effect.name))
            kept[-1] ^= 1
            self._send(bytes(kept))
            return []
        return honest(self, effect)

    monkeypatch.setattr(SiteDaemon, "_one", remask)
    world = Schedule(4, seed="control", rounds=2)
    deliver = world.post

    def twice(sender, recipient, payload):
        deliver(sender, recipient, payload)
        if kind_of(payload) == "Participants":
            deliver(sender, recipient, payload)

    world.post = twice
    run(world)
    with pytest.raises(AssertionError, match="two different things"):
        world.check()


def test_a_site_that_does_not_persist_its_agreement_is_caught(monkeypatch):
    honest = SiteDaemon._one

    def forgetful(self, effect):
        if isinstance(effect, Persist) and self._machine.record.stage == "agreed":
            return []
        return honest(self, effect)

    monkeypatch.setattr(SiteDaemon, "_one", forgetful)
    world = burn_after_crash_in_agree()
    with pytest.raises(AssertionError, match="burned and agreed"):
        world.said.check()


def test_a_site_that_persists_its_agreement_is_not(monkeypatch):
    burn_after_crash_in_agree().said.check()


def burn_after_crash_in_agree() -> Schedule:
    world = Schedule(4, seed="control", rounds=2)
    world.start()
    while not world.said.agrees:
        world.deliver()
    (site, at), *_ = world.said.agrees
    party = world.parties[site]
    party.kill()
    party.start()
    record = party.daemon._machine.record
    party.receive(pack(BurnRequest(record.study, record.run, at)))
    return world


def test_an_unmasked_upload_is_caught_in_the_sum(monkeypatch):
    class Nothing(mask.Streams):
        def add(self, target):
            return

    monkeypatch.setattr("common.secagg.masking.Streams", Nothing)
    with pytest.raises(AssertionError):
        run(Schedule(4, seed="control", rounds=2)).check()


def test_an_upload_counted_twice_is_caught_in_the_sum(monkeypatch):
    honest = server.round.collecting.add_packed

    def twice(accumulator, planes, bits):
        honest(accumulator, planes, bits)
        if bits == 64:
            np.add(accumulator, 1, out=accumulator)

    monkeypatch.setattr(server.round.collecting, "add_packed", twice)
    with pytest.raises(AssertionError):
        run(Schedule(4, seed="control", rounds=2)).check()


def test_a_budget_reserved_twice_is_caught(monkeypatch):
    world = Schedule(4, seed="control", rounds=2)
    run(world)
    world.parties["site-01"].reserved.append(1)
    with pytest.raises(AssertionError, match="reserved twice"):
        world.check()


def test_both_secrets_of_one_site_are_caught():
    world = run(Schedule(4, seed="control", rounds=2))
    world.said.recovery_shares["site-01", 1].add("site-02")
    with pytest.raises(AssertionError, match="both secrets"):
        world.check()


def test_a_stray_exception_is_not_swallowed(monkeypatch):
    def broken(state, message):
        raise KeyError("a bug")

    monkeypatch.setitem(client.round.machine.HANDLERS, Survivors, broken)
    with pytest.raises(KeyError):
        run(Schedule(4, seed="control", rounds=2))
