"""A malicious coordinator: each attack is refused with its own code, and nothing leaves by it.

After every refused message the genuine one is delivered, and the run has to finish: an attack
neither opens an update nor burns a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    to_site,
)
from schedule import Schedule, kind_of

from client.round.upload import attempt
from common.crypto import labels
from common.crypto.digest import encode
from common.errors import Code
from common.protocol.transcript import header_hash, participants_hash, survivors_hash
from common.protocol.wire import (
    Agree,
    Burn,
    BurnRequest,
    Confirm,
    Finished,
    HandshakeOpen,
    Head,
    Link,
    Participants,
    Receipt,
    RevealRequest,
    RoundStart,
    RunKey,
    Signed,
    Witness,
    dump_record,
    pack,
    sign,
    unpack_body,
    unpack_from_coordinator,
    unpack_from_site,
)

Attack = Callable[[Schedule], tuple[Any, Any]]
"""Brings the federation to the moment; returns (genuine message or None, hostile message)."""


@dataclass(frozen=True)
class Row:
    name: str
    attack: Attack
    code: Code
    settings: dict[str, Any] = field(default_factory=dict)


def at(kind: str, change: Callable[[Schedule, Any], Any], nth: int = 1) -> Attack:
    """Alter the n-th message of a kind on its way to the victim."""

    def attack(world: Schedule) -> tuple[Any, Any]:
        genuine = halt(world, kind, VICTIM, nth=nth)
        return genuine, change(world, genuine)

    return attack


def before(kind: str, make: Callable[[Schedule, Any], Any], nth: int = 1) -> Attack:
    """Slip another message in just before the n-th of a kind."""
    return at(kind, make, nth)


def after(kind: str, make: Callable[[Schedule, Any], Any], nth: int = 1) -> Attack:
    """Deliver the n-th message of a kind, then another one made from it."""

    def attack(world: Schedule) -> tuple[Any, Any]:
        genuine = halt(world, kind, VICTIM, nth=nth)
        to_site(world, VICTIM, genuine)
        return None, make(world, genuine)

    return attack


def signed_by(world: Schedule, site: str, statement: Any) -> Signed:
    return sign(world.keys[site], statement)


def index(world: Schedule, items: tuple[Signed, ...], kind: type[Any], site: str) -> int:
    return [unpack_body(kind, s).site for s in items].index(site)


# ---------------------------------------------------------------- handshake


def own_key_from_an_abandoned_opening(world: Schedule) -> tuple[Any, Any]:
    first = halt(world, "HandshakeOpen", VICTIM)
    old = to_site(world, VICTIM, first).sent[0][1]
    to_site(world, VICTIM, replace(first, epoch=first.epoch + 1))
    to_site(world, VICTIM, first)
    world.queue = type(world.queue)(q for q in world.queue if q[2] != old)
    genuine = halt(world, "RunKeys", VICTIM)
    keys = genuine.keys
    mine = index(world, keys, RunKey, VICTIM)
    return genuine, replace(genuine, keys=swap(keys, mine, unpack_from_site(old, 2**20)[1]))


def with_run_key(site: str, **changes: Any) -> Callable[[Schedule, Any], Any]:
    def change(world: Schedule, message: Any) -> Any:
        where = index(world, message.keys, RunKey, site)
        statement = replace(unpack_body(RunKey, message.keys[where]), **changes)
        return replace(message, keys=swap(message.keys, where, signed_by(world, site, statement)))

    return change


def copied_key(world: Schedule, message: Any) -> Any:
    other: RunKey = unpack_body(RunKey, message.keys[1])
    return with_run_key(COLLUDER, x25519=other.x25519)(world, message)


def forged_run_key(world: Schedule, message: Any) -> Any:
    where = index(world, message.keys, RunKey, "site-02")
    fake = forged(stranger(), unpack_body(RunKey, message.keys[where]))
    return replace(message, keys=swap(message.keys, where, fake))


def outsiders_confirmation(world: Schedule, message: Any) -> Any:
    extra = signed_by(world, "site-05", Confirm(message.transcript, "site-05", {}))
    return replace(message, confirmations=(extra, *message.confirmations[1:]))


def absent_fifth(attack: Attack) -> Attack:
    def run(world: Schedule) -> tuple[Any, Any]:
        world.start(absent=("site-05",))
        return attack(world)

    return run


def forged_confirmation(world: Schedule, message: Any) -> Any:
    said: Confirm = unpack_body(Confirm, message.confirmations[0])
    fake = forged(stranger(), said)
    return replace(message, confirmations=swap(message.confirmations, 0, fake))


HANDSHAKE = [
    Row("another study", at("HandshakeOpen", lambda w, m: replace(m, study=flip(m.study))), Code.HANDSHAKE_WRONG_STUDY),
    Row("a subset below the quorum", at("HandshakeOpen", lambda w, m: replace(m, members=(COLLUDER, "site-02", VICTIM))), Code.HANDSHAKE_MEMBERS),
    Row("the victim among colluders and invented hospitals", at("HandshakeOpen", lambda w, m: replace(m, members=(COLLUDER, VICTIM, "sybil-1", "sybil-2"))), Code.HANDSHAKE_MEMBERS),
    Row("one member counted twice", at("HandshakeOpen", lambda w, m: replace(m, members=(COLLUDER, COLLUDER, "site-02", VICTIM))), Code.HANDSHAKE_MEMBERS),
    Row("a handshake without the addressee", at("HandshakeOpen", lambda w, m: replace(m, members=tuple(s for s in m.members if s != VICTIM))), Code.HANDSHAKE_MEMBERS),
    Row("one epoch with other members", after("HandshakeOpen", lambda w, m: replace(m, members=m.members[:-1])), Code.HANDSHAKE_MEMBERS),
    Row("a second run of the study", before("RoundStart", lambda w, m: opening(w, run=flip(m.run), epoch=m.epoch + 1)), Code.RUN_SECOND),
    Row("a second run on the same model", before("RoundStart", lambda w, m: opening(w, run=flip(m.run), epoch=m.epoch + 1), nth=2), Code.RUN_SECOND),
    Row("an epoch that is over", before("RoundStart", lambda w, m: opening(w, epoch=m.epoch), nth=2), Code.HANDSHAKE_STALE),
    Row("a forged run key", at("RunKeys", forged_run_key), Code.HANDSHAKE_SIGNATURE),
    Row("a run key under another label", at("RunKeys", lambda w, m: replace(m, keys=swap(m.keys, 0, forged(w.keys[COLLUDER], unpack_body(RunKey, m.keys[0]), labels.CONFIRM)))), Code.HANDSHAKE_SIGNATURE),
    Row("the victim's own key replaced", own_key_from_an_abandoned_opening, Code.HANDSHAKE_OWN_KEY),
    Row("one hospital's ephemeral key under two names", at("RunKeys", copied_key), Code.HANDSHAKE_DUPLICATE_KEY),
    Row("a member's key left out", at("RunKeys", lambda w, m: replace(m, keys=m.keys[1:])), Code.HANDSHAKE_MEMBERS),
    Row("a run key of another run", at("RunKeys", with_run_key(COLLUDER, run=bytes(32))), Code.HANDSHAKE_STALE),
    Row("other run keys in one epoch", after("RunKeys", with_run_key(COLLUDER, nonce=bytes(32))), Code.HANDSHAKE_TRANSCRIPT),
    Row("an altered encapsulation", at("EncapsulationSet", lambda w, m: replace(m, ciphertexts={v: flip(c) for v, c in m.ciphertexts.items()})), Code.HANDSHAKE_ENCAPSULATION),
    Row("a forged encapsulation statement", at("EncapsulationSet", lambda w, m: replace(m, statements=swap(m.statements, 0, Signed(m.statements[0].body, bytes(64))))), Code.HANDSHAKE_SIGNATURE),
    Row("encapsulations left out", at("EncapsulationSet", lambda w, m: replace(m, statements=m.statements[1:])), Code.HANDSHAKE_MEMBERS),
    Row("encapsulations of another transcript", at("EncapsulationSet", lambda w, m: replace(m, transcript=flip(m.transcript))), Code.HANDSHAKE_TRANSCRIPT),
    Row("a forged confirmation", at("ConfirmSet", forged_confirmation), Code.HANDSHAKE_SIGNATURE),
    Row("a confirmation left out", at("ConfirmSet", lambda w, m: replace(m, confirmations=m.confirmations[1:])), Code.HANDSHAKE_MEMBERS),
    Row("a confirmation of a party outside the epoch", absent_fifth(at("ConfirmSet", outsiders_confirmation)), Code.HANDSHAKE_MEMBERS),
]  # fmt: skip


def opening(world: Schedule, **changes: Any) -> Any:
    seen = world.parties[VICTIM].daemon._machine.record
    return replace(HandshakeOpen(seen.study, seen.run, seen.epoch, tuple(world.sites)), **changes)


# ---------------------------------------------------------------- the start of a round


def altered_sum(link: Link) -> Link:
    return replace(link, sums=(memoryview(flip(bytes(link.sums[0]))), *link.sums[1:]))


def burned_then(make: Callable[[RoundStart, RoundStart], RoundStart]) -> Attack:
    """Let the victim work in round 2, burn that round, then open round 3 with a hostile start."""

    def attack(world: Schedule) -> tuple[Any, Any]:
        second = halt(world, "RoundStart", VICTIM, nth=2)
        world.queue.appendleft(("coordinator", VICTIM, pack(second)))
        to_hold = halt(world, "Participants", VICTIM)
        to_site(world, VICTIM, to_hold)
        burns = tuple(
            signed_by(world, s, Burn(second.study, second.run, 2, s)) for s in world.sites
        )
        to_site(world, VICTIM, BurnRequest(second.study, second.run, 2))
        return None, make(second, replace(second, round=3, burns=burns))

    return attack


def stale_link(world: Schedule, message: RoundStart) -> RoundStart:
    starts = [
        unpack_from_coordinator(w[2], 2**24) for w in world.wire if kind_of(w[2]) == "RoundStart"
    ]
    return replace(message, link=next(m.link for m in starts if m.link is not None))


def certified(world: Schedule, link: Link, **changes: Any) -> Link:
    """A link with other contents that everybody but the victim has signed."""
    link = replace(link, **changes)
    survivors = survivors_hash(participants_hash(header_hash(link.header), link.heads), link.roots)
    header = link.header
    agreements = tuple(
        signed_by(world, s, Agree(header.study, header.run, header.round, s, survivors))
        for s in world.sites
        if s != VICTIM
    )
    return replace(link, agreements=agreements)


def contradiction(world: Schedule, message: RoundStart) -> RoundStart:
    roots = {v: flip(root) for v, root in message.link.roots.items()}
    return replace(message, link=certified(world, message.link, roots=roots))


def restarted(change: Callable[[Schedule, Any], Any]) -> Attack:
    """The victim comes back without its model and is served another one."""

    def attack(world: Schedule) -> tuple[Any, Any]:
        halt(world, "RoundStart", VICTIM, nth=3)
        world.parties[VICTIM].kill()
        world.parties[VICTIM].start()
        genuine = halt(world, "RoundStart", VICTIM)
        assert genuine.base is not None
        return genuine, change(world, genuine)

    return attack


def no_base(world: Schedule, message: RoundStart) -> RoundStart:
    return replace(message, base=None)


def uncertified_retries(world: Schedule) -> tuple[Any, Any]:
    """With noise one retry may go without proof; the third attempt on one model may not."""
    start = halt(world, "RoundStart", VICTIM)
    to_site(world, VICTIM, start)
    upload_by_hand(world, 1)
    to_site(world, VICTIM, replace(start, round=2))
    upload_by_hand(world, 2)
    return None, replace(start, round=3)


def upload_by_hand(world: Schedule, number: int) -> None:
    """Bring the victim to an upload in a round that only it is in, by replaying its peers' part."""
    state = world.parties[VICTIM].daemon._machine.state
    state.record = replace(
        state.record,
        stage="uploaded",
        **dict(zip(("attempted", "attempts"), attempt(state, state.secrets.header), strict=True)),
    )
    state.secrets = None


START = [
    Row("a round of another run", at("RoundStart", lambda w, m: replace(m, run=flip(m.run))), Code.ROUND_WRONG_RUN),
    Row("a round of another study", at("RoundStart", lambda w, m: replace(m, study=flip(m.study))), Code.ROUND_WRONG_RUN),
    Row("an epoch that was never shaken", at("RoundStart", lambda w, m: replace(m, epoch=m.epoch + 1)), Code.HANDSHAKE_INCOMPLETE),
    Row("evaluation before training", at("RoundStart", lambda w, m: replace(m, kind="evaluate")), Code.ROUND_KIND),
    Row("a round beyond the study", at("RoundStart", lambda w, m: replace(m, round=w.terms.rounds + 1)), Code.ROUND_TOO_MANY),
    Row("round numbers skipped without proof", at("RoundStart", lambda w, m: replace(m, round=m.round + 2)), Code.BURN_CERTIFICATE),
    Row("one round skipped without proof, without noise", at("RoundStart", lambda w, m: replace(m, round=m.round + 1)), Code.BURN_CERTIFICATE, {"private": False}),
    Row("a burn certificate below the quorum", burned_then(lambda second, third: replace(third, round=4, burns=third.burns[:3])), Code.BURN_CERTIFICATE),
    Row("a burn certificate with forged names", burned_then(lambda second, third: replace(third, round=4, burns=tuple(Signed(b.body, bytes(64)) for b in third.burns))), Code.BURN_CERTIFICATE),
    Row("a retry of the same model without proof", burned_then(lambda second, third: replace(third, burns=())), Code.RETRY_UNCERTIFIED, {"private": False}),
    Row("a third attempt without proof, with noise", uncertified_retries, Code.RETRY_UNCERTIFIED),
    Row("the last certificate left out", at("RoundStart", lambda w, m: replace(m, link=None), nth=3), Code.LINK_STALE),
    Row("an older model than was applied", at("RoundStart", stale_link, nth=4), Code.LINK_STALE, {"rounds": 3}),
    Row("a link below the quorum", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, agreements=m.link.agreements[:3])), nth=2), Code.LINK_QUORUM),
    Row("one signer counted four times", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, agreements=m.link.agreements[:1] * 4)), nth=2), Code.LINK_QUORUM),
    Row("forged agreements in a link", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, agreements=tuple(Signed(a.body, bytes(64)) for a in m.link.agreements))), nth=2), Code.LINK_QUORUM),
    Row("a link with other survivors than were signed", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, roots={v: r for v, r in m.link.roots.items() if v != COLLUDER})), nth=2), Code.LINK_QUORUM),
    Row("a link of another run", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, header=replace(m.link.header, run=bytes(32)))), nth=2), Code.ROUND_WRONG_RUN),
    Row("a link that contradicts the victim's own agreement", at("RoundStart", contradiction, nth=2), Code.LINK_EQUIVOCATION),
    Row("another aggregate for a round already built on", burned_then(lambda second, third: replace(third, link=altered_sum(third.link))), Code.LINK_EQUIVOCATION),
    Row("an aggregate of the wrong length", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, sums=(m.link.sums[0][:-4], *m.link.sums[1:]))), nth=2), Code.LINK_MALFORMED),
    Row("an aggregate with too few lanes", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, sums=m.link.sums[1:])), nth=2), Code.LINK_MALFORMED),
    Row("lanes that the study does not have", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, header=replace(m.link.header, lanes=m.link.header.lanes * 2))), nth=2), Code.LINK_MALFORMED),
    Row("survivors that were no participants", at("RoundStart", lambda w, m: replace(m, link=replace(m.link, heads={})), nth=2), Code.LINK_MALFORMED),
    Row("no model for a site that is behind", restarted(no_base), Code.BASE_NEEDED),
    Row("another model for a site that is behind", restarted(lambda w, m: replace(m, base=memoryview(flip(bytes(m.base))))), Code.LINK_STATE),
    Row("a model of the wrong length", restarted(lambda w, m: replace(m, base=m.base[:-4])), Code.LINK_MALFORMED),
    Row("a round replayed", before("RoundStart", lambda w, m: replace(m, round=1, link=None), nth=3), Code.ROUND_REPLAY),
    Row("the end of the run before its end", at("RoundStart", lambda w, m: Finished(m.study, m.run, m.link, None), nth=2), Code.ROUND_KIND),
    Row("the end of the run without any round", at("RoundStart", lambda w, m: Finished(m.study, m.run, None, None)), Code.ROUND_KIND),
]  # fmt: skip


# ---------------------------------------------------------------- participants


def reheaded(site: str, **changes: Any) -> Callable[[Schedule, Participants], Participants]:
    def change(world: Schedule, message: Participants) -> Participants:
        where = index(world, message.heads, Head, site)
        return replace(
            message,
            heads=swap(message.heads, where, rehead(world, message.heads[where], **changes)),
        )

    return change


def without(*names: str) -> Callable[[Schedule, Participants], Participants]:
    return lambda world, message: replace(
        message, heads=tuple(h for h in message.heads if head_of(h).site not in names)
    )


def sybil_head(world: Schedule, message: Participants) -> Participants:
    fake = forged(stranger(), replace(head_of(message.heads[0]), site="sybil-1"))
    return replace(message, heads=(*message.heads, fake))


def forged_head(label: str | None = None) -> Callable[[Schedule, Participants], Participants]:
    def change(world: Schedule, message: Participants) -> Participants:
        key = stranger() if label is None else world.keys[COLLUDER]
        return replace(
            message, heads=swap(message.heads, 0, forged(key, head_of(message.heads[0]), label))
        )

    return change


def rolled_back_witness(world: Schedule, message: Participants) -> Participants:
    heads = []
    for signed in message.heads:
        head = head_of(signed)
        lie = {**head.witnessed, VICTIM: Witness(99, bytes(32))}
        heads.append(signed if head.site == VICTIM else rehead(world, signed, witnessed=lie))
    return replace(message, heads=tuple(heads))


PARTICIPANTS = [
    Row("three participants where four are the quorum", at("Participants", without(COLLUDER, "site-02")), Code.PARTICIPANTS_QUORUM),
    Row("participants without the addressee", at("Participants", without(VICTIM)), Code.PARTICIPANTS_WITHOUT_ME),
    Row("an invented participant", at("Participants", sybil_head), Code.PARTICIPANTS_UNKNOWN),
    Row("a participant counted twice", at("Participants", lambda w, m: replace(m, heads=(*m.heads[1:], m.heads[1]))), Code.PARTICIPANTS_UNKNOWN),
    Row("a forged head", at("Participants", forged_head()), Code.HEAD_SIGNATURE),
    Row("a head signed as a receipt", at("Participants", forged_head(labels.UPLOAD)), Code.HEAD_SIGNATURE),
    Row("a head signed as an agreement", at("Participants", forged_head(labels.AGREE)), Code.HEAD_SIGNATURE),
    Row("a participant on another model", at("Participants", reheaded(COLLUDER, header=bytes(32))), Code.HEAD_MISMATCH),
    Row("a participant of another round", at("Participants", reheaded(COLLUDER, round=2)), Code.HEAD_MISMATCH),
    Row("the victim's own head replaced", at("Participants", reheaded(VICTIM, nonce=bytes(32))), Code.HEAD_ALTERED),
    Row("an altered share", at("Participants", lambda w, m: replace(m, shares={v: flip(s) for v, s in m.shares.items()})), Code.SHARE_UNREADABLE),
    Row("swapped shares", at("Participants", lambda w, m: replace(m, shares=dict(zip(m.shares, reversed(m.shares.values()), strict=True)))), Code.SHARE_UNREADABLE),
    Row("shares held back", at("Participants", lambda w, m: replace(m, shares={})), Code.SHARE_UNREADABLE),
    Row("other participants after the upload", after("Participants", without(COLLUDER)), Code.PARTICIPANTS_EQUIVOCATED),
    Row("another round's participants", at("Participants", lambda w, m: replace(m, round=m.round + 1)), Code.ROUND_OUT_OF_ORDER),
    Row("participants of the round before", before("Participants", lambda w, m: replace(m, round=1), nth=2), Code.ROUND_OUT_OF_ORDER),
]  # fmt: skip


# ---------------------------------------------------------------- survivors, agreements, burning


def receipt_for(participants: bytes, site: str) -> Receipt:
    return Receipt(participants, site, bytes(32))


def survivors_with(
    site: str, make: Callable[[Schedule, Signed], Signed]
) -> Callable[[Schedule, Any], Any]:
    def change(world: Schedule, message: Any) -> Any:
        where = index(world, message.receipts, Receipt, site)
        return replace(
            message, receipts=swap(message.receipts, where, make(world, message.receipts[where]))
        )

    return change


def elsewhere(world: Schedule, signed: Signed) -> Signed:
    return signed_by(world, COLLUDER, receipt_for(bytes(32), COLLUDER))


def other_root(world: Schedule, signed: Signed) -> Signed:
    return signed_by(world, COLLUDER, replace(unpack_body(Receipt, signed), root=bytes(32)))


def survivors_without(*names: str) -> Callable[[Schedule, Any], Any]:
    return lambda world, message: replace(
        message,
        receipts=tuple(r for r in message.receipts if unpack_body(Receipt, r).site not in names),
    )


def agreements_with(
    make: Callable[[Schedule, Any], tuple[Signed, ...]],
) -> Callable[[Schedule, Any], Any]:
    return lambda world, message: replace(message, agreements=make(world, message))


def resigned(world: Schedule, message: Any, **changes: Any) -> tuple[Signed, ...]:
    statements = [unpack_body(Agree, a) for a in message.agreements]
    return tuple(signed_by(world, s.site, replace(s, **changes)) for s in statements)


def burn_in(number: int | None = None, **changes: Any) -> Callable[[Schedule, Any], Any]:
    def make(world: Schedule, message: Any) -> Any:
        seen = world.parties[VICTIM].daemon._machine.record
        return replace(
            BurnRequest(seen.study, seen.run, seen.round if number is None else number), **changes
        )

    return make


def burned_round(make: Callable[[Schedule, Any], Any], kind: str) -> Attack:
    """Burn the open round at the victim when a message arrives; that message then comes too late."""

    def attack(world: Schedule) -> tuple[Any, Any]:
        genuine = halt(world, kind, VICTIM)
        to_site(world, VICTIM, burn_in()(world, genuine))
        return None, make(world, genuine)

    return attack


def rotten(world: Schedule, message: Any) -> bytes:
    return b"l" + pack(message)[1:9] + b"?" * 40


def oversized(world: Schedule, message: Any) -> bytes:
    return pack(message) + bytes(world.terms.upload_bytes())


def reordered_fields(world: Schedule, message: Any) -> bytes:
    return encode((type(message).__name__, *reversed(dump_record(message))))


CLOSING = [
    Row("a survivor that was no participant", at("Survivors", lambda w, m: replace(m, receipts=(*m.receipts, forged(stranger(), receipt_for(bytes(32), "sybil-1"))))), Code.SURVIVORS_UNKNOWN),
    Row("a survivor counted twice", at("Survivors", lambda w, m: replace(m, receipts=(*m.receipts[1:], m.receipts[1]))), Code.SURVIVORS_UNKNOWN),
    Row("survivors without the addressee", at("Survivors", survivors_without(VICTIM)), Code.SURVIVORS_WITHOUT_ME),
    Row("survivors below the quorum", at("Survivors", survivors_without(COLLUDER, "site-02")), Code.SURVIVORS_QUORUM),
    Row("a receipt for other participants", at("Survivors", survivors_with(COLLUDER, elsewhere)), Code.RECEIPT_SIGNATURE),
    Row("a forged receipt", at("Survivors", survivors_with("site-02", lambda w, s: Signed(s.body, bytes(64)))), Code.RECEIPT_SIGNATURE),
    Row("a receipt signed as a head", at("Survivors", survivors_with(COLLUDER, lambda w, s: forged(w.keys[COLLUDER], unpack_body(Receipt, s), labels.READY))), Code.RECEIPT_SIGNATURE),
    Row("a second set of survivors", after("Survivors", survivors_without(COLLUDER)), Code.SURVIVORS_EQUIVOCATED),
    Row("a second root of one survivor", after("Survivors", survivors_with(COLLUDER, other_root)), Code.SURVIVORS_EQUIVOCATED),
    Row("survivors before the upload", at("Participants", lambda w, m: encode(("Survivors", m.round, ()))), Code.ROUND_OUT_OF_ORDER),
    Row("survivors of the round before", before("Survivors", lambda w, m: replace(m, round=1), nth=2), Code.ROUND_OUT_OF_ORDER),
    Row("agreement after burning", burned_round(lambda w, m: m, "Survivors"), Code.AGREE_AFTER_BURN),
    Row("upload after burning", burned_round(lambda w, m: m, "Participants"), Code.AGREE_AFTER_BURN),
    Row("burning after agreement", after("Survivors", burn_in()), Code.BURN_AFTER_AGREE),
    Row("burning after unmasking", after("Agreements", burn_in()), Code.BURN_AFTER_AGREE),
    Row("burning a completed round", before("Participants", burn_in(1), nth=2), Code.ROUND_REPLAY),
    Row("burning beyond the study", before("Participants", burn_in(10_000)), Code.ROUND_TOO_MANY),
    Row("burning in another run", before("Participants", burn_in(run=bytes(32))), Code.ROUND_WRONG_RUN),
    Row("three agreements where four are the quorum", at("Agreements", agreements_with(lambda w, m: m.agreements[:3])), Code.AGREEMENT_QUORUM),
    Row("one agreement counted four times", at("Agreements", agreements_with(lambda w, m: m.agreements[:1] * 4)), Code.AGREEMENT_SIGNER),
    Row("an agreement by nobody", at("Agreements", agreements_with(lambda w, m: (*m.agreements[1:], forged(stranger(), replace(unpack_body(Agree, m.agreements[0]), site="sybil-1"))))), Code.AGREEMENT_SIGNER),
    Row("forged agreements", at("Agreements", agreements_with(lambda w, m: tuple(Signed(a.body, bytes(64)) for a in m.agreements))), Code.AGREEMENT_SIGNATURE),
    Row("agreements to other survivors", at("Agreements", agreements_with(lambda w, m: resigned(w, m, survivors=bytes(32)))), Code.AGREEMENT_SIGNATURE),
    Row("agreements of another round", at("Agreements", agreements_with(lambda w, m: resigned(w, m, round=2))), Code.AGREEMENT_SIGNATURE),
    Row("agreements of another run", at("Agreements", agreements_with(lambda w, m: resigned(w, m, run=bytes(32)))), Code.AGREEMENT_SIGNATURE),
    Row("agreements before agreeing", at("Survivors", lambda w, m: encode(("Agreements", m.round, ()))), Code.ROUND_OUT_OF_ORDER),
    Row("an oversized message", at("Participants", oversized), Code.OVERSIZED),
    Row("a malformed message", at("Participants", rotten), Code.MALFORMED),
    Row("fields in another order", at("Survivors", reordered_fields), Code.MALFORMED),
    Row("an unknown kind of message", at("Survivors", lambda w, m: encode(("Confess", m.round))), Code.MALFORMED),
    Row("bytes after the message", at("Survivors", lambda w, m: pack(m) + b"x"), Code.MALFORMED),
]  # fmt: skip

ROWS = [*HANDSHAKE, *START, *PARTICIPANTS, *CLOSING]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_attack_is_refused_with_its_code_and_nothing_leaves(row):
    world = federation(**row.settings)
    genuine, hostile = row.attack(world)
    before_it = record(world, VICTIM)
    reaction = to_site(world, VICTIM, hostile)
    assert reaction.codes == [row.code.label]
    assert not RELEASES & set(reaction.kinds)
    assert record(world, VICTIM) == before_it
    if genuine is not None:
        world.queue.appendleft(("coordinator", VICTIM, pack(genuine)))
        finish(world)


def test_the_table_has_its_rows():
    assert len(ROWS) >= 60
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({row.code for row in ROWS}) >= 40


# ---------------------------------------------------------------- what a table row cannot say


def test_a_revealed_epoch_never_masks_anything():
    """A colluder's second, wrong confirmation makes the victim reveal: its keys must be dead."""
    world = federation()
    genuine = halt(world, "ConfirmSet", VICTIM)
    to_site(world, VICTIM, genuine)
    start = halt(world, "RoundStart", VICTIM)
    wrong = signed_by(world, COLLUDER, Confirm(genuine.transcript, COLLUDER, {VICTIM: bytes(16)}))
    hostile = replace(genuine, confirmations=swap(genuine.confirmations, 0, wrong))
    assert to_site(world, VICTIM, hostile).kinds == ["Dispute"]
    refused = to_site(world, VICTIM, start)
    assert refused.codes == [Code.HANDSHAKE_INCOMPLETE.label]
    assert "Ready" not in refused.kinds


def test_a_demanded_reveal_kills_the_epoch_and_later_ones_are_refused():
    world = federation()
    start = halt(world, "RoundStart", VICTIM)
    transcript = world.parties[VICTIM].daemon._machine.record.transcript
    assert to_site(world, VICTIM, RevealRequest(transcript, COLLUDER)).kinds == ["Dispute"]
    assert to_site(world, VICTIM, start).codes == [Code.HANDSHAKE_INCOMPLETE.label]
    assert to_site(world, VICTIM, RevealRequest(transcript, COLLUDER)).codes == [
        Code.HANDSHAKE_STALE.label
    ]


def test_no_key_can_be_revealed_once_the_first_round_has_begun():
    world = federation()
    halt(world, "Participants", VICTIM)
    transcript = world.parties[VICTIM].daemon._machine.record.transcript
    reaction = to_site(world, VICTIM, RevealRequest(transcript, COLLUDER))
    assert reaction.codes == [Code.HANDSHAKE_STALE.label]
    assert reaction.kinds == []


def test_a_hospital_shown_another_aggregate_finds_itself_alone():
    """Another sum in one hospital's link gives it another model: no two heads fit together."""
    world = federation()
    genuine = halt(world, "RoundStart", VICTIM, nth=2)
    ready = to_site(world, VICTIM, replace(genuine, link=altered_sum(genuine.link)))
    assert ready.kinds == ["Ready"]
    heads = halt(world, "Participants", COLLUDER)
    mine = world.parties[VICTIM].daemon._machine.state.secrets.head
    reaction = to_site(
        world,
        VICTIM,
        replace(heads, heads=(*(h for h in heads.heads if head_of(h).site != VICTIM), mine)),
    )
    assert reaction.codes == [Code.HEAD_MISMATCH.label]
    assert reaction.kinds == []


def test_a_rolled_back_ledger_that_more_than_c_peers_witnessed_ends_the_run():
    world = federation()
    genuine = halt(world, "Participants", VICTIM)
    reaction = to_site(world, VICTIM, rolled_back_witness(world, genuine))
    assert reaction.codes == [Code.LEDGER_ROLLBACK.label]
    assert not RELEASES & set(reaction.kinds)
    assert world.parties[VICTIM].daemon._machine.record.ended == Code.LEDGER_ROLLBACK.label
    assert to_site(world, VICTIM, genuine).codes == [Code.RUN_ENDED.label]


def test_a_restored_older_ledger_is_found_by_the_others_in_the_next_round():
    world = federation()
    halt(world, "RoundStart", VICTIM, nth=2)
    party = world.parties[VICTIM]
    party.kill()
    del party.ledger[-1]
    party.ledger.append(b"another history")
    party.start()
    world.play()
    assert any(VICTIM in e and Code.LEDGER_ROLLBACK.label in e for e in world.events)


def test_burning_is_bounded_and_ends_with_a_named_cause():
    """A coordinator (or one hospital) that burns every round is stopped by each hospital itself."""
    world = federation(spare=3)
    start = halt(world, "RoundStart", VICTIM)
    for number in range(1, 6):
        to_site(world, VICTIM, BurnRequest(start.study, start.run, number))
    reaction = to_site(world, VICTIM, replace(start, round=6))
    assert reaction.codes == [Code.BURNS_EXHAUSTED.label]
    assert reaction.kinds == []


def test_a_repeated_start_brings_the_same_commitment_bytes():
    world = federation()
    start = halt(world, "RoundStart", VICTIM)
    first = to_site(world, VICTIM, start)
    assert first.kinds == ["Ready"]
    assert to_site(world, VICTIM, start).sent == first.sent


def test_repeated_questions_bring_the_same_bytes():
    world = federation()
    for kind, answer in (
        ("Participants", "Upload"),
        ("Survivors", "Agree"),
        ("Agreements", "Unmask"),
    ):
        message = halt(world, kind, VICTIM)
        first = to_site(world, VICTIM, message)
        assert first.kinds == [answer]
        assert to_site(world, VICTIM, message).sent == first.sent
