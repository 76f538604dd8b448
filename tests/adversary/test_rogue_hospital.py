"""A malicious hospital: refused and named by the coordinator or by its peers; the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from rogue import (
    COLLUDER,
    RELEASES,
    VICTIM,
    federation,
    finish,
    flip,
    forged,
    halt,
    head_of,
    record,
    rehead,
    stranger,
    swap,
    to_coordinator,
    to_site,
)
from schedule import Schedule

import client.round.start
from common.crypto import labels
from common.crypto.digest import digest
from common.errors import AbortedRound, Code
from common.protocol.wire import (
    Agree,
    Burn,
    Confirm,
    Dispute,
    Encapsulations,
    EncapsulationUpload,
    Established,
    Head,
    Hello,
    Ready,
    Receipt,
    Refusal,
    RunKey,
    Signed,
    Unmask,
    Upload,
    Witness,
    pack,
    pack_statement,
    sign,
    unpack_body,
)

UPLOADS = (EncapsulationUpload, Ready, Upload)
Change = Callable[[Schedule, Any], Any]


def wire_bytes(kind: type[Any], message: Any) -> bytes:
    return pack(message) if kind in UPLOADS else pack_statement(kind, message)


@dataclass(frozen=True)
class Row:
    """`change` alters the n-th message of a kind that `sender` sends to the coordinator."""

    name: str
    kind: type[Any]
    change: Change
    code: Code
    nth: int = 1
    sender: str = COLLUDER


def restated(kind: type[Any], **changes: Any) -> Change:
    """The statement with other fields, under the site's own key."""

    def change(world: Schedule, signed: Signed) -> Signed:
        statement = unpack_body(kind, signed)
        return sign(world.keys[statement.site], replace(statement, **changes))

    return change


def falsified(kind: type[Any], **changes: Any) -> Change:
    """The statement under a stranger's key."""
    return lambda world, signed: forged(stranger(), replace(unpack_body(kind, signed), **changes))


def relabelled(kind: type[Any], label: str) -> Change:
    return lambda world, signed: forged(world.keys[COLLUDER], unpack_body(kind, signed), label)


def ready_with(**changes: Any) -> Change:
    return lambda world, ready: replace(ready, head=rehead(world, ready.head, **changes))


def receipt_with(**changes: Any) -> Change:
    def change(world: Schedule, upload: Upload) -> Upload:
        return replace(upload, receipt=restated(Receipt, **changes)(world, upload.receipt))

    return change


def unmask_with(change: Callable[[Unmask], Unmask]) -> Change:
    return lambda world, signed: sign(world.keys[COLLUDER], change(unpack_body(Unmask, signed)))


def anothers_name(world: Schedule, upload: Upload) -> Upload:
    receipt = replace(unpack_body(Receipt, upload.receipt), site=VICTIM)
    return replace(upload, receipt=sign(world.keys[COLLUDER], receipt))


def copied_key(world: Schedule, signed: Signed) -> Signed:
    return restated(RunKey, mlkem=first_key(world).mlkem)(world, signed)


def first_key(world: Schedule) -> RunKey:
    opening = world.coordinator.driver.machine.state.opening
    key: RunKey = unpack_body(RunKey, next(iter(opening._keys.values())))
    return key


def wrong_statement(world: Schedule, upload: EncapsulationUpload) -> EncapsulationUpload:
    statement: Encapsulations = unpack_body(Encapsulations, upload.statement)
    digests = {v: bytes(32) for v in statement.digests}
    return replace(
        upload, statement=sign(world.keys[COLLUDER], replace(statement, digests=digests))
    )


def foreign_transcript(world: Schedule, upload: EncapsulationUpload) -> EncapsulationUpload:
    statement = restated(Encapsulations, transcript=bytes(32))(world, upload.statement)
    return replace(upload, statement=statement)


ROWS = [
    # ---- handshake
    Row("a forged run key", RunKey, falsified(RunKey), Code.HANDSHAKE_SIGNATURE),
    Row("a run key in another's name", RunKey, restated(RunKey, epoch=9), Code.HANDSHAKE_STALE),
    Row("a run key of another study", RunKey, restated(RunKey, study=bytes(32)), Code.HANDSHAKE_STALE),
    Row("an X25519 key of small order", RunKey, restated(RunKey, x25519=bytes(32)), Code.BAD_AGREEMENT),
    Row("an ML-KEM key off its modulus", RunKey, restated(RunKey, mlkem=b"\xff" * 1184), Code.BAD_AGREEMENT),
    Row("another hospital's ephemeral key", RunKey, copied_key, Code.HANDSHAKE_DUPLICATE_KEY, sender="site-02"),
    Row("ciphertexts that its own statement denies", EncapsulationUpload, wrong_statement, Code.HANDSHAKE_ENCAPSULATION),
    Row("ciphertexts held back", EncapsulationUpload, lambda w, m: replace(m, ciphertexts={}), Code.HANDSHAKE_ENCAPSULATION),
    Row("encapsulations of another transcript", EncapsulationUpload, foreign_transcript, Code.HANDSHAKE_TRANSCRIPT),
    Row("a forged confirmation", Confirm, falsified(Confirm), Code.HANDSHAKE_SIGNATURE),
    Row("a confirmation of another transcript", Confirm, restated(Confirm, transcript=bytes(32)), Code.HANDSHAKE_TRANSCRIPT),
    Row("a confirmation signed as an establishment", Confirm, relabelled(Confirm, labels.ESTABLISHED), Code.HANDSHAKE_SIGNATURE),
    Row("a forged establishment", Established, falsified(Established), Code.HANDSHAKE_SIGNATURE),
    Row("an establishment of another transcript", Established, restated(Established, transcript=bytes(32)), Code.HANDSHAKE_TRANSCRIPT),
    # ---- ready
    Row("a forged head", Ready, lambda w, m: replace(m, head=forged(stranger(), head_of(m.head))), Code.HEAD_SIGNATURE),
    Row("a head on another model", Ready, ready_with(header=bytes(32)), Code.HEAD_MISMATCH),
    Row("a head of another round", Ready, ready_with(round=2), Code.ROUND_OUT_OF_ORDER),
    Row("a head in another's name", Ready, lambda w, m: replace(m, head=forged(w.keys[COLLUDER], replace(head_of(m.head), site=VICTIM))), Code.ROUND_OUT_OF_ORDER),
    Row("a blob that its head denies", Ready, lambda w, m: replace(m, blob=flip(m.blob)), Code.HEAD_MISMATCH),
    Row("shares for some peers only", Ready, lambda w, m: replace(m, shares={v: s for v, s in m.shares.items() if v != VICTIM}), Code.HEAD_MISMATCH),
    Row("shares that its head denies", Ready, lambda w, m: replace(m, shares={v: flip(s) for v, s in m.shares.items()}), Code.SHARE_UNREADABLE),
    # ---- upload
    Row("a forged receipt", Upload, lambda w, m: replace(m, receipt=forged(stranger(), unpack_body(Receipt, m.receipt))), Code.UPLOAD_SIGNATURE),
    Row("an upload in another's name", Upload, anothers_name, Code.UPLOAD_SIGNATURE),
    Row("an upload for other participants", Upload, receipt_with(participants=bytes(32)), Code.UPLOAD_SIGNATURE),
    Row("a receipt signed as a head", Upload, lambda w, m: replace(m, receipt=forged(w.keys[COLLUDER], unpack_body(Receipt, m.receipt), labels.READY)), Code.UPLOAD_SIGNATURE),
    Row("a root that is not the upload's", Upload, receipt_with(root=bytes(32)), Code.UPLOAD_DIGEST),
    Row("an altered plane", Upload, lambda w, m: replace(m, planes=(memoryview(flip(bytes(m.planes[0]))), *m.planes[1:])), Code.UPLOAD_DIGEST),
    Row("a truncated plane", Upload, lambda w, m: replace(m, planes=(m.planes[0][:-2], *m.planes[1:])), Code.UPLOAD_SHAPE),
    Row("a plane of one word", Upload, lambda w, m: replace(m, planes=(m.planes[0][:2], *m.planes[1:])), Code.UPLOAD_SHAPE),
    Row("a plane too many", Upload, lambda w, m: replace(m, planes=(*m.planes, m.planes[0])), Code.UPLOAD_SHAPE),
    Row("swapped planes", Upload, lambda w, m: replace(m, planes=m.planes[::-1]), Code.UPLOAD_SHAPE),
    Row("swapped lanes", Upload, lambda w, m: replace(m, planes=(m.planes[2], *m.planes[:2])), Code.UPLOAD_SHAPE, nth=2),
    # ---- closing
    Row("a forged agreement", Agree, falsified(Agree), Code.AGREEMENT_SIGNATURE),
    Row("an agreement to other survivors", Agree, restated(Agree, survivors=bytes(32)), Code.AGREEMENT_SIGNATURE),
    Row("an agreement signed as a burn", Agree, relabelled(Agree, labels.BURN), Code.AGREEMENT_SIGNATURE),
    Row("forged shares", Unmask, falsified(Unmask), Code.MESSAGE_SIGNATURE),
    Row("shares for other survivors", Unmask, restated(Unmask, survivors=bytes(32)), Code.MESSAGE_SIGNATURE),
    Row("a share held back", Unmask, unmask_with(lambda u: replace(u, self_shares={v: s for v, s in u.self_shares.items() if v != VICTIM})), Code.UNMASK_SHAPE),
    Row("a share too many", Unmask, unmask_with(lambda u: replace(u, recovery_shares={VICTIM: u.self_shares[VICTIM]})), Code.UNMASK_SHAPE),
    Row("a wrong share of a peer's secret", Unmask, unmask_with(lambda u: replace(u, self_shares={**u.self_shares, VICTIM: flip(u.self_shares[VICTIM], 5)})), Code.SHARE_COMMITMENT),
    Row("a wrong share of its own secret", Unmask, unmask_with(lambda u: replace(u, self_shares={**u.self_shares, COLLUDER: bytes(49)})), Code.SHARE_COMMITMENT),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_coordinator_refuses_it_and_the_round_goes_on(row):
    world = federation()
    genuine = halt(world, row.kind.__name__, "coordinator", nth=row.nth, sender=row.sender)
    hostile = wire_bytes(row.kind, row.change(world, genuine))
    machine = world.coordinator.driver.machine
    before = machine.record
    sums = [total.copy() for total in machine.state.sums]
    reaction = to_coordinator(world, row.sender, hostile)
    assert reaction.codes == [row.code.label]
    assert reaction.sent == []
    assert machine.record == before
    assert all((a == b).all() for a, b in zip(sums, machine.state.sums, strict=True))
    world.queue.appendleft((row.sender, "coordinator", wire_bytes(row.kind, genuine)))
    finish(world)
    assert all(r.survivors == tuple(world.sites) for r in world.rounds)


ANY_TIME = [
    ("a forged hello", Hello, lambda w: Hello(w.terms.study, COLLUDER, 1, 1, 0), Code.MESSAGE_SIGNATURE, stranger),
    ("a hello in another's name", Hello, lambda w: Hello(w.terms.study, VICTIM, 1, 1, 0), Code.MESSAGE_SIGNATURE, None),
    ("a hello of another study", Hello, lambda w: Hello(bytes(32), COLLUDER, 1, 1, 0), Code.MESSAGE_SIGNATURE, None),
    ("a forged refusal", Refusal, lambda w: Refusal(w.terms.study, COLLUDER, 1, Code.ROUND_REPLAY.label, ""), Code.MESSAGE_SIGNATURE, stranger),
    ("a refusal of another study", Refusal, lambda w: Refusal(bytes(32), COLLUDER, 1, Code.ROUND_REPLAY.label, ""), Code.MESSAGE_SIGNATURE, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "make", "code", "key"), ANY_TIME, ids=[r[0] for r in ANY_TIME]
)
def test_a_false_word_about_itself_is_refused(name, kind, make, code, key):
    world = federation()
    halt(world, "Ready", "coordinator", sender=COLLUDER)
    signer = world.keys[COLLUDER] if key is None else key()
    reaction = to_coordinator(world, COLLUDER, pack_statement(kind, sign(signer, make(world))))
    assert reaction.codes == [code.label]
    assert reaction.sent == []


def test_a_stranger_is_not_heard():
    world = federation()
    halt(world, "Ready", "coordinator", sender=COLLUDER)
    hello = pack_statement(Hello, sign(stranger(), Hello(world.terms.study, "sybil-1", 0, 0, 0)))
    assert to_coordinator(world, "sybil-1", hello).codes == [Code.SIGNER_UNKNOWN.label]


def test_a_forged_burn_is_refused():
    world = federation()
    for site in ("site-04", "site-05"):
        world.gone.add(site)
    halt(world, "Ready", "coordinator", sender="site-02")
    for site in world.gone:
        world.parties[site].kill()
    burn = halt(world, "Burn", "coordinator", sender=COLLUDER)
    statement: Burn = unpack_body(Burn, burn)
    for bad in (
        forged(stranger(), statement),
        sign(world.keys[COLLUDER], replace(statement, round=2)),
        sign(world.keys[COLLUDER], replace(statement, site=VICTIM)),
        forged(world.keys[COLLUDER], statement, labels.AGREE),
    ):
        reaction = to_coordinator(world, COLLUDER, pack_statement(Burn, bad))
        assert reaction.codes == [Code.MESSAGE_SIGNATURE.label]
    assert COLLUDER not in world.coordinator.driver.machine.state.burns


def test_a_second_head_in_one_round_is_refused_and_named():
    world = federation()
    ready = halt(world, "Ready", "coordinator", sender=COLLUDER)
    to_coordinator(world, COLLUDER, pack(ready))
    second = replace(ready, head=rehead(world, ready.head, nonce=bytes(32)))
    assert to_coordinator(world, COLLUDER, pack(second)).codes == [Code.READY_DUPLICATE.label]
    forgery = replace(ready, head=forged(stranger(), replace(head_of(ready.head), nonce=bytes(32))))
    assert to_coordinator(world, COLLUDER, pack(forgery)).codes == [Code.HEAD_SIGNATURE.label]
    finish(world)


def drop_out(world: Schedule) -> Upload:
    """The colluder dies with its first upload on the way."""
    upload: Upload = halt(world, "Upload", "coordinator", sender=COLLUDER)
    world.parties[COLLUDER].kill()
    world.gone.add(COLLUDER)
    return upload


def test_a_late_upload_changes_nothing():
    world = federation()
    upload = drop_out(world)
    while world.coordinator.driver.machine.phase == "upload":
        world.step()
    machine = world.coordinator.driver.machine
    sums = [total.copy() for total in machine.state.sums]
    before = machine.record
    assert to_coordinator(world, COLLUDER, pack(upload)).sent == []
    assert machine.record == before
    assert all((a == b).all() for a, b in zip(sums, machine.state.sums, strict=True))
    world.play()
    world.check()
    assert COLLUDER not in world.rounds[0].survivors


# ---------------------------------------------------------------- what peers find


def peers_find(world: Schedule, code: Code) -> None:
    message = halt(world, "Participants", VICTIM)
    before = record(world, VICTIM)
    reaction = to_site(world, VICTIM, message)
    assert reaction.codes == [code.label]
    assert not RELEASES & set(reaction.kinds)
    assert record(world, VICTIM) == before


def dishonest_seal(
    monkeypatch, holder: str | None, alter: Callable[[bytes], bytes], *, after: bool
) -> None:
    honest = client.round.start.seal

    def seal(key, plaintext, *associated):
        mine = associated[1:] == (COLLUDER, holder) if holder else associated[1:] == (COLLUDER,)
        if not mine:
            return honest(key, plaintext, *associated)
        if after:
            return alter(honest(key, plaintext, *associated))
        return honest(key, alter(plaintext), *associated)

    monkeypatch.setattr(client.round.start, "seal", seal)


def test_a_share_that_does_not_decrypt_is_found_before_the_upload(monkeypatch):
    dishonest_seal(monkeypatch, VICTIM, flip, after=True)
    peers_find(federation(), Code.SHARE_UNREADABLE)


def test_a_share_that_its_commitment_denies_is_found_before_the_upload(monkeypatch):
    dishonest_seal(monkeypatch, VICTIM, flip, after=False)
    peers_find(federation(), Code.SHARE_COMMITMENT)


def test_a_pair_tag_that_differs_is_found_by_the_coordinator_and_by_the_peer():
    world = federation()
    ready = halt(world, "Ready", "coordinator", sender=COLLUDER)
    pairs = head_of(ready.head).pairs
    lie = rehead(world, ready.head, pairs={**pairs, VICTIM: flip(pairs[VICTIM])})
    participants = halt(world, "Participants", VICTIM)
    reaction = to_site(world, VICTIM, replace(participants, heads=swap(participants.heads, 0, lie)))
    assert reaction.codes == [Code.HEAD_TAG.label]
    other = federation()
    ready = halt(other, "Ready", "coordinator", sender=COLLUDER)
    others = halt(other, "Ready", "coordinator", sender="site-02")
    pairs = {v: flip(p) for v, p in head_of(ready.head).pairs.items()}
    for site, message in (
        (COLLUDER, replace(ready, head=rehead(other, ready.head, pairs=pairs))),
        ("site-02", others),
    ):
        to_coordinator(other, site, pack(message))
    assert other.play()
    other.check()
    assert COLLUDER not in other.rounds[0].survivors
    assert set(other.rounds[0].survivors) == set(other.sites) - {COLLUDER}


def test_a_peer_with_an_older_ledger_is_named():
    world = federation()
    genuine = halt(world, "Participants", VICTIM, nth=2)
    where = [head_of(h).site for h in genuine.heads].index(COLLUDER)
    for ledger in (Witness(0, bytes(32)), Witness(1, bytes(32))):
        head = rehead(world, genuine.heads[where], ledger=ledger)
        reaction = to_site(world, VICTIM, replace(genuine, heads=swap(genuine.heads, where, head)))
        assert reaction.codes == [Code.LEDGER_ROLLBACK_PEER.label]
        assert reaction.kinds == []


def test_one_liar_about_a_ledger_cannot_end_the_run_of_another_hospital():
    world = federation()
    genuine = halt(world, "Participants", VICTIM)
    head = rehead(world, genuine.heads[0], witnessed={VICTIM: Witness(99, bytes(32))})
    reaction = to_site(world, VICTIM, replace(genuine, heads=swap(genuine.heads, 0, head)))
    assert reaction.codes == [Code.LEDGER_ROLLBACK.label]
    assert world.parties[VICTIM].ended == ""
    world.queue.appendleft(("coordinator", VICTIM, pack(genuine)))
    finish(world)


# ---------------------------------------------------------------- convictions


def convicted(world: Schedule, code: Code) -> None:
    """The run ends without the culprit, who is named, and with every other update."""
    world.start()
    assert world.play()
    world.check()
    assert world.coordinator.driver.machine.record.convicted == (COLLUDER,)
    assert any(
        "coordinator peer.refused" in e and code.label in e and COLLUDER in e for e in world.events
    )
    assert all(COLLUDER not in r.survivors for r in world.rounds)
    assert [r.kind for r in world.rounds] == ["train", "train", "evaluate"]


def test_a_dealer_whose_shares_do_not_rebuild_its_secret_is_convicted(monkeypatch):
    world = federation()
    honest = client.round.start.split

    def split(secret, threshold, points, entropy):
        chosen = bytes(32) if entropy is world.entropy[COLLUDER] else secret
        return honest(chosen, threshold, points, entropy)

    monkeypatch.setattr(client.round.start, "split", split)
    convicted(world, Code.SHARE_DEALER)


@pytest.mark.parametrize("after", [True, False], ids=["sealed wrongly", "wrong seeds"])
def test_a_dropout_whose_recovery_blob_is_bad_is_convicted(monkeypatch, after):
    dishonest_seal(monkeypatch, None, lambda data: flip(data, 40), after=after)
    world = federation()
    drop_out(world)
    assert world.play()
    world.check()
    assert world.coordinator.driver.machine.record.convicted == (COLLUDER,)
    assert any(Code.RECOVERY_BLOB.label in e for e in world.events)
    assert all(COLLUDER not in r.survivors for r in world.rounds)


def test_a_conviction_survives_the_coordinators_restart(monkeypatch):
    dishonest_seal(monkeypatch, None, flip, after=True)
    world = federation()
    drop_out(world)
    while not world.coordinator.driver.machine.record.convicted:
        world.step()
    world.coordinator.kill()
    world.coordinator.start()
    assert world.play()
    world.check()


def test_a_wrong_encapsulation_names_its_sender():
    world = federation()
    genuine = halt(world, "EncapsulationUpload", "coordinator", sender=COLLUDER)
    statement: Encapsulations = unpack_body(Encapsulations, genuine.statement)
    wrong = flip(genuine.ciphertexts[VICTIM])
    digests = {**statement.digests, VICTIM: digest(labels.CIPHERTEXT, wrong)}
    hostile = EncapsulationUpload(
        sign(world.keys[COLLUDER], replace(statement, digests=digests)),
        {**genuine.ciphertexts, VICTIM: wrong},
    )
    world.queue.appendleft((COLLUDER, "coordinator", pack(hostile)))
    assert world.play()
    world.check()
    assert world.coordinator.driver.machine.record.convicted == (COLLUDER,)
    assert all(set(r.survivors) == set(world.sites) - {COLLUDER} for r in world.rounds)


def dispute(world: Schedule, site: str, peer: str) -> bytes:
    handshake = world.parties[site].daemon._machine.state.handshake
    x25519, seed = handshake._ephemeral.reveal()
    statement = Dispute(handshake.transcript, site, peer, x25519, seed)
    return pack_statement(Dispute, sign(world.keys[site], statement))


@pytest.mark.parametrize(("liar", "peer"), [("site-01", "site-03"), ("site-03", "site-01")])
def test_a_false_dispute_convicts_the_liar(liar, peer):
    world = federation()
    halt(world, "Established", "coordinator", sender=liar)
    reaction = to_coordinator(world, liar, dispute(world, liar, peer))
    assert reaction.codes == []
    assert world.play()
    world.check()
    assert world.coordinator.driver.machine.record.convicted == (liar,)


def test_a_dispute_before_its_time_or_with_oneself_is_refused():
    world = federation()
    halt(world, "Confirm", "coordinator", sender=VICTIM)
    early = to_coordinator(world, VICTIM, dispute(world, VICTIM, COLLUDER))
    assert early.codes == [Code.ROUND_OUT_OF_ORDER.label]
    with_itself = to_coordinator(world, VICTIM, dispute(world, VICTIM, VICTIM))
    assert with_itself.codes == [Code.HANDSHAKE_TRANSCRIPT.label]


def test_more_cheats_than_the_quorum_allows_end_the_run_with_their_names():
    world = federation(4)
    halt(world, "Established", "coordinator", sender="site-01")
    machine = world.coordinator.driver.machine
    machine.state.record = replace(machine.record, convicted=("site-02",))
    to_coordinator(world, "site-01", dispute(world, "site-01", "site-03"))
    judged = halt(world, "Dispute", "coordinator", sender="site-03")
    with pytest.raises(AbortedRound, match="site-01, site-02") as caught:
        machine.handle("site-03", pack_statement(Dispute, judged), 0.0)
    assert caught.value.code is Code.DISPUTE_LOST


def test_the_table_has_its_rows():
    assert len(ROWS) + len(ANY_TIME) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert Head.LABEL != Receipt.LABEL
