"""The second half of a round: agreements, shares, the opened sum and the next model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.crypto.digest import encode_parts, flat_view
from common.crypto.identity import verify
from common.crypto.mask import Words
from common.errors import Code, ProtocolError
from common.protocol.codec import dump_record
from common.protocol.effects import DropBlob, Note, PutBlob
from common.protocol.transcript import (
    advance,
    certified_survivors,
    head_digest,
    metric_sum,
    rejection,
    state_parts,
)
from common.protocol.wire import Agree, Link, Signed, Unmask, unpack_body
from common.secagg.masking import Lane
from common.secagg.quantise import reduce_
from common.tensors import state_digest
from server.round.asking import released
from server.round.begin import begin_round
from server.round.burning import leave_undecided
from server.round.effects import Completed, Effect, SendTo
from server.round.record import READY_BLOB, SUM_BLOB, chain_blobs
from server.round.state import CoordinatorState
from server.unmask import OpenRound, check_unmask, open_sum


def on_agree(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Count an agreement; a quorum of them releases the shares."""
    seen = state.record
    if seen.phase not in {"agree", "unmask"} or site not in seen.receipts:
        return []
    agree: Agree = unpack_body(Agree, message)
    expected = (seen.study, seen.run, seen.round, site, state.survivors)
    fields = (agree.study, agree.run, agree.round, agree.site, agree.survivors)
    valid = verify(state.terms.roster[site], message.signature, Agree.LABEL, message.body)
    if not valid or fields != expected:
        raise ProtocolError(Code.AGREEMENT_SIGNATURE, f"The agreement of {site} is not valid.")
    if seen.phase == "unmask":
        return [SendTo(site, released(state))]
    agreements = {**seen.agreements, site: message}
    if len(agreements) < state.terms.quorum:
        state.record = replace(seen, agreements=agreements)
        return []
    state.progress()
    kept = state.persist(phase="unmask", agreements=agreements)
    state.set_timers(now)
    return [kept, *(SendTo(v, released(state)) for v in sorted(agreements))]


def on_unmask(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Check a survivor's shares; a quorum of them opens the sum."""
    if state.record.phase != "unmask" or site in state.unmasks:
        return []
    unmask: Unmask = unpack_body(Unmask, message)
    opened = _open_round(state)
    survivors = state.survivors
    valid = verify(state.terms.roster[site], message.signature, Unmask.LABEL, message.body)
    if not valid or unmask.site != site or unmask.survivors != survivors:
        raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The shares of {site} are not for now.")
    check_unmask(opened, unmask)
    state.unmasks[site] = unmask
    if len(state.unmasks) < state.terms.quorum:
        return []
    return _complete(state, now, opened)


def _open_round(state: CoordinatorState) -> OpenRound:
    return OpenRound(
        state.hashed,
        state.participants,
        state.record.members,
        state.heads,
        {v: r.blob for v, r in state.ready.items()},
        tuple(sorted(state.record.receipts)),
        state.lanes,
    )


def _complete(state: CoordinatorState, now: float, opened: OpenRound) -> list[Effect]:
    answers = [state.unmasks[v] for v in sorted(state.unmasks)]
    try:
        open_sum(state.terms, opened, answers, state.sums)
    except ProtocolError as error:
        return _convict(state, now, error)
    state.progress()
    sums, state.sums = state.sums, []  # from here they are the link's
    link = Link(
        state.header,
        {v: head_digest(r.head) for v, r in state.ready.items()},
        state.roots,
        tuple(state.record.agreements[v] for v in sorted(state.record.agreements)),
        tuple(_published(lane, total) for lane, total in zip(state.lanes, sums, strict=True)),
    )
    base, survivors = state.chain.state, certified_survivors(link)
    state.move(advance(state.terms, state.chain, link, state_digest, survivors))
    seen = state.record
    completed = Completed(
        seen.round,
        link.header.turn,
        link.header.kind,
        tuple(sorted(state.heads)),
        opened.survivors,
        state.bytes_up,
        metric_sum(state.terms, link),
        state.chain.rejected,
    )
    note = Note(
        "round.completed",
        {
            "round": seen.round,
            "kind": link.header.kind,
            "uh2": survivors.hex(),
            "commit": state.chain.prev.hex(),
            "model": state.chain.state_digest.hex(),
            "survivors": opened.survivors,
            "dropouts": opened.dropouts,
            "quorum": state.terms.quorum,
            "bytes_up": state.bytes_up,
        },
    )
    judged = [rejection(seen.round, state.chain)] if state.chain.rejected else []
    # Under this round's own names: until the record says so, the last round's still count.
    link_blob, base_blob = chain_blobs(seen.round)
    blobs: list[Effect] = [
        PutBlob(base_blob, state_parts(state.terms, base)),
        PutBlob(link_blob, encode_parts(dump_record(link))),
    ]
    old = chain_blobs(seen.version)
    kept = state.persist(phase="idle", version=seen.round, burns=(), uncertified=0)
    drops: list[Effect] = [DropBlob(name) for name in (READY_BLOB, SUM_BLOB, *old)]
    return [*blobs, kept, *drops, note, *judged, completed, *begin_round(state, now)]


def _convict(state: CoordinatorState, now: float, error: ProtocolError) -> list[Effect]:
    """A dealer's shares are provably wrong: the round stays undecided, the dealer is out."""
    culprit = error.culprit
    if culprit is None:
        raise AssertionError("a sum that does not open names the dealer") from error
    kept = state.exclude(culprit)
    note = Note("peer.refused", {"site": culprit, "code": error.code.label, "phase": "unmask"})
    return [kept, note, *leave_undecided(state, now)]


def _published(lane: Lane, total: Words) -> memoryview:
    """A lane's sum as it is published: reduced to the ring."""
    if total.itemsize == 4:  # noqa: PLR2004 - a lane of 24 or 32 bits
        reduce_(total.view(np.uint32), lane.bits)
    return flat_view(total)
