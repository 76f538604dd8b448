"""Coordinator and colluders pool everything they have: within the bound they see the honest sum.

The attackers hold the whole wire, the coordinator's state, and every colluder's keys and
shares. They take every mask they can rebuild off the victim's upload; what is left must not be
its update. Past the bound the same hands do take it: the control.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from rogue import federation, halt, head_of, to_site
from schedule import Schedule, kind_of

from common.crypto import labels
from common.crypto.digest import expand
from common.crypto.mask import add_streams
from common.crypto.seal import unseal
from common.crypto.share import combine
from common.errors import Code
from common.protocol.transcript import head_digest, participants_hash
from common.protocol.wire import (
    SHARE_BYTES,
    Agree,
    Agreements,
    Participants,
    Receipt,
    Survivors,
    Unmask,
    Upload,
    sign,
    unpack_body,
    unpack_from_site,
)
from common.secagg.masking import Lane, stream_key, unpack
from common.secagg.quantise import to_signed


class Attackers:
    """The coordinator and some hospitals, in the first round, after the uploads."""

    def __init__(self, world: Schedule, colluders: tuple[str, ...]) -> None:
        self.world, self.colluders = world, colluders
        self.honest = [s for s in world.sites if s not in colluders]
        self.quorum = world.terms.quorum
        self.machine = world.coordinator.driver.machine
        self.lane: Lane = world.terms.lanes(1)[0]
        self.header = next(iter(self.machine.state.heads.values())).header
        self.participants = self.machine.state.participants
        self.seeds = {
            (c, v): expand(world.kept[c][v], labels.ROUND_SEED, self.header)
            for c in colluders
            for v in world.sites
            if v != c
        }
        self.self_shares: dict[str, dict[int, bytes]] = {v: {} for v in world.sites}
        self.recovery_shares: dict[str, dict[int, bytes]] = {v: {} for v in world.sites}
        for c in colluders:
            for dealer, opened in self.records[c].shares.items():
                point = world.terms.point(c)
                self.self_shares[dealer][point] = opened[:SHARE_BYTES]
                self.recovery_shares[dealer][point] = opened[SHARE_BYTES : 2 * SHARE_BYTES]

    @property
    def records(self) -> dict[str, Any]:
        return {c: self.world.parties[c].daemon._machine.record for c in self.colluders}

    def hear(self, unmask: Unmask) -> None:
        point = self.world.terms.point(unmask.site)
        for dealer, salted in unmask.self_shares.items():
            self.self_shares[dealer][point] = salted[:SHARE_BYTES]
        for dealer, salted in unmask.recovery_shares.items():
            self.recovery_shares[dealer][point] = salted[:SHARE_BYTES]

    def hear_the_wire(self) -> None:
        for _, to, payload in self.world.wire:
            if to == "coordinator" and kind_of(payload) == "Unmask":
                unmask: Unmask = unpack_body(Unmask, unpack_from_site(payload, 2**24)[1])
                if set(unmask.self_shares) | set(unmask.recovery_shares) <= set(self.world.sites):
                    self.hear(unmask)

    def self_secret(self, victim: str) -> bytes | None:
        shares = self.self_shares[victim]
        return combine(shares, self.quorum) if len(shares) >= self.quorum else None

    def seeds_of(self, victim: str) -> dict[str, bytes]:
        """Every pair seed of the victim that can be had: colluders', recovered dropouts', its own."""
        known = {c: seed for (c, v), seed in self.seeds.items() if v == victim}
        for dealer, shares in self.recovery_shares.items():
            if len(shares) >= self.quorum:
                key = expand(combine(shares, self.quorum), labels.BLOB_KEY, self.header, dealer)
                blob = unseal(key, self.machine.state.ready[dealer].blob, self.header, dealer)
                peers = [v for v in self.machine.record.members if v != dealer]
                opened = {v: blob[32 * i : 32 * i + 32] for i, v in enumerate(peers)}
                known.update(opened if dealer == victim else {dealer: opened[victim]})
        return known

    def strip(self, victim: str) -> np.ndarray:
        """The victim's upload without every mask that the attackers can rebuild."""
        words = unpack(self.upload(victim).planes[:2], self.lane.bits, self.lane.length)
        keys, signs = [], []
        secret = self.self_secret(victim)
        if secret is not None:
            keys.append(stream_key(secret, labels.SELF_STREAM, self.lane, self.participants))
            signs.append(-1)
        for v, seed in self.seeds_of(victim).items():
            keys.append(stream_key(seed, labels.PAIR_STREAM, self.lane, self.participants))
            signs.append(-1 if victim < v else 1)
        add_streams(words, keys, signs)
        return to_signed(words & np.uint32(2**self.lane.bits - 1), self.lane.bits)

    def upload(self, victim: str) -> Upload:
        for frm, to, payload in self.world.wire:
            if (frm, to, kind_of(payload)) == (victim, "coordinator", "Upload"):
                upload: Upload = unpack_from_site(payload, 2**24)[1]
                if unpack_body(Receipt, upload.receipt).participants == self.participants:
                    return upload
        raise AssertionError(f"{victim} did not upload")

    def reads(self, victim: str) -> bool:
        """Whether what is left is the tracer: one grid value at the victim's own coordinate."""
        left = self.strip(victim)
        return np.flatnonzero(left).tolist() == [self.world.terms.parties.index(victim)]


def after_the_uploads(world: Schedule, dropout: str | None = None) -> None:
    world.start()
    while world.coordinator.driver.machine.phase != "upload":
        world.step()
    # Colluders do not erase: these are the pair keys before the ratchet takes them away.
    world.kept = {s: dict(p.daemon._machine.record.keys) for s, p in world.parties.items()}
    if dropout is not None:
        halt(world, "Upload", "coordinator", sender=dropout)
        world.parties[dropout].kill()
        world.gone.add(dropout)
    while world.coordinator.driver.machine.phase != "agree":
        world.step()


def completed(world: Schedule, colluders: tuple[str, ...]) -> Attackers:
    """Pool the shares before the round closes, then listen until everything was said."""
    attackers = Attackers(world, colluders)
    frozen = (attackers.machine.state.ready, attackers.participants, attackers.header)
    while not world.rounds:
        world.step()
    attackers.hear_the_wire()
    attackers.machine.state.ready, attackers.participants, attackers.header = frozen
    return attackers


@pytest.mark.parametrize("drops", [False, True], ids=["all upload", "one drops out"])
@pytest.mark.parametrize("n", [4, 5])
def test_every_coalition_within_the_bound_reads_no_update(n, drops):
    sites = federation(n).sites
    bound = federation(n).terms.colluders
    dropout = sites[-1] if drops else None
    for size in range(bound + 1):
        for colluders in combinations([s for s in sites if s != dropout], size):
            world = federation(n, rounds=1)
            after_the_uploads(world, dropout)
            attackers = completed(world, colluders)
            for victim in attackers.honest:
                if victim != dropout:
                    assert attackers.self_secret(victim) is not None, "survivors' self masks open"
                    assert not attackers.reads(victim), (colluders, victim)


def test_three_hospitals_withstand_one_colluder():
    for colluder in federation(3).sites:
        world = federation(3, rounds=1)
        after_the_uploads(world)
        attackers = completed(world, (colluder,))
        assert not any(attackers.reads(victim) for victim in attackers.honest)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_others_together_read_the_last_one(n):
    """Control: n - 1 colluders are past every bound, and the same code reads the update."""
    sites = federation(n).sites
    for victim in sites:
        world = federation(n, rounds=1)
        after_the_uploads(world)
        attackers = completed(world, tuple(s for s in sites if s != victim))
        assert attackers.reads(victim)


def split_view(
    world: Schedule, colluders: tuple[str, ...], victims: tuple[str, ...]
) -> tuple[Attackers, list[list[str]]]:
    """Show two honest hospitals two sets of survivors, each without the other one."""
    after_the_uploads(world)
    attackers = Attackers(world, colluders)
    receipts = attackers.machine.record.receipts
    number = attackers.machine.record.round
    codes: list[list[str]] = []
    world.queue.clear()
    shown = {
        victim: [s for s in world.sites if s == victim or s not in victims] for victim in victims
    }
    agreed = {
        victim: to_site(world, victim, Survivors(number, tuple(receipts[s] for s in names)))
        for victim, names in shown.items()
    }
    for victim, reaction in agreed.items():
        if reaction.codes:
            codes.append(reaction.codes)
            continue
        mine = unpack_from_site(reaction.sent[0][1], 2**24)[1]
        seen = world.parties[victim].daemon._machine.record
        pooled = [mine, *(attackers_agree(world, c, seen) for c in colluders)]
        final = to_site(world, victim, Agreements(number, tuple(pooled)))
        codes.append(final.codes)
        for _, payload in final.sent:
            attackers.hear(unpack_body(Unmask, unpack_from_site(payload, 2**24)[1]))
    return attackers, codes


def attackers_agree(world: Schedule, colluder: str, seen: Any) -> Any:
    return sign(
        world.keys[colluder], Agree(seen.study, seen.run, seen.round, colluder, seen.survivors)
    )


def test_a_split_view_fails_within_the_bound():
    world = federation(4, rounds=1)
    attackers, codes = split_view(world, ("site-04",), ("site-01", "site-02"))
    assert codes == [[Code.AGREEMENT_QUORUM.label]] * 2
    assert not attackers.reads("site-01")
    assert not attackers.reads("site-02")


def test_a_split_view_succeeds_with_one_colluder_past_the_bound():
    """Control: two colluders of four (the bound is one) sign two sets, and both updates open."""
    world = federation(4, rounds=1)
    assert world.terms.colluders == 1
    attackers, codes = split_view(world, ("site-03", "site-04"), ("site-01", "site-02"))
    assert codes == [[], []]
    assert attackers.self_secret("site-01") is not None
    assert attackers.reads("site-01")
    assert attackers.reads("site-02")


def test_equivocated_participants_leave_the_victims_upload_closed():
    """The victim is shown fewer participants than the others: its receipt is of no use to them."""
    world = federation(5, rounds=1)
    genuine: Participants = halt(world, "Participants", "site-03")
    fewer = replace(genuine, heads=genuine.heads[1:])
    assert to_site(world, "site-03", fewer).kinds == ["Upload"]
    shown = {head_of(h).site: head_digest(h) for h in genuine.heads}
    record = world.parties["site-03"].daemon._machine.record
    assert participants_hash(record.header, shown) != record.participants
    world.play()
    world.check()
    assert all("site-03" not in r.survivors for r in world.rounds[:1])
