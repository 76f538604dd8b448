"""The first half of a round: who is ready, and the masked uploads, added as they come."""

from __future__ import annotations

from dataclasses import replace

from common.crypto import labels
from common.crypto.digest import digest, encode, flat_view, tree_digest
from common.crypto.identity import verify
from common.errors import Code, ProtocolError
from common.protocol.effects import PutBlob
from common.protocol.transcript import split_planes, upload_root
from common.protocol.wire import TAG_BYTES, Head, Ready, Receipt, Upload, unpack_body
from common.secagg.masking import add_packed
from server.round.asking import resend
from server.round.burning import abort
from server.round.effects import Effect
from server.round.record import READIES, READY_BLOB, SUM_BLOB
from server.round.state import CoordinatorState


def on_ready(state: CoordinatorState, site: str, message: Ready, now: float) -> list[Effect]:
    """Take a site's commitments and sealed shares."""
    seen = state.record
    head: Head = unpack_body(Head, message.head)
    if head.site != site or head.round != seen.round:
        raise ProtocolError(Code.ROUND_OUT_OF_ORDER, f"A Ready of {site} is out of order.")
    signature = message.head.signature
    if not verify(state.terms.roster[site], signature, Head.LABEL, message.head.body):
        raise ProtocolError(Code.HEAD_SIGNATURE, f"The head of {site} is forged.")
    known = state.ready.get(site)
    if known is not None and known.head.body != message.head.body:
        raise ProtocolError(Code.READY_DUPLICATE, f"{site} sent two different heads.", culprit=site)
    if seen.phase != "ready" or known is not None:
        return []
    _check_ready(state, site, head, message)
    state.ready[site], state.heads[site] = message, head
    state.absent.discard(site)
    if state.still_waiting(now):
        return []
    return close_ready(state, now)


def _check_ready(state: CoordinatorState, site: str, head: Head, message: Ready) -> None:
    if site not in state.record.members or head.header != state.hashed:
        raise ProtocolError(Code.HEAD_MISMATCH, f"{site} is on another round.", culprit=site)
    peers = set(state.record.members) - {site}
    exact = set(head.pairs) == peers and set(message.shares) == peers
    if not exact or digest(labels.BLOB, message.blob) != head.blob:
        raise ProtocolError(Code.HEAD_MISMATCH, f"The Ready of {site} does not fit its head.")
    for v, sealed in message.shares.items():
        promised = head.pairs[v][TAG_BYTES : TAG_BYTES + 32]
        if digest(labels.SEALED_SHARES, sealed) != promised:
            raise ProtocolError(
                Code.SHARE_UNREADABLE, f"The shares of {site} do not fit its head.", culprit=site
            )


def close_ready(state: CoordinatorState, now: float) -> list[Effect]:
    """Fix the participants and show them to each other."""
    _drop_disagreeing(state)
    if len(state.ready) < state.terms.quorum:
        return abort(state, now, Code.QUORUM_LOST)
    state.progress()
    blob = encode(READIES.dump(state.ready))
    state.sums = [lane.zeros() for lane in state.lanes]
    absent = sorted(set(state.record.members) - set(state.ready))
    kept = state.persist(phase="upload")
    state.set_timers(now)
    notes = [state.dropped(v, "ready") for v in absent]
    return [PutBlob(READY_BLOB, (blob,)), kept, *notes, *resend(state, set(state.ready))]


def _drop_disagreeing(state: CoordinatorState) -> None:
    """Leave out sites whose pair tags contradict others': masks would not cancel."""
    while True:
        conflicts = dict.fromkeys(state.heads, 0)
        for v, head in state.heads.items():
            for x, other in state.heads.items():
                if v < x and head.pairs[x][:TAG_BYTES] != other.pairs[v][:TAG_BYTES]:
                    conflicts[v] += 1
                    conflicts[x] += 1
        most = max(conflicts.values(), default=0)
        if most == 0:
            return
        # Nobody can tell who of a pair lies: both go, so a liar leaves with its victim.
        for v in [v for v, count in conflicts.items() if count == most]:
            del state.ready[v], state.heads[v]
            state.expect(v)


def on_upload(state: CoordinatorState, site: str, message: Upload, now: float) -> list[Effect]:
    """Check a masked upload against its receipt and add it; it is not kept."""
    if state.record.phase != "upload" or site in state.record.receipts:
        return []
    if site not in state.ready:
        raise ProtocolError(Code.SIGNER_UNKNOWN, f"{site} is not a participant.")
    receipt: Receipt = unpack_body(Receipt, message.receipt)
    signature = message.receipt.signature
    valid = verify(state.terms.roster[site], signature, Receipt.LABEL, message.receipt.body)
    if not valid or receipt.site != site or receipt.participants != state.participants:
        raise ProtocolError(Code.UPLOAD_SIGNATURE, f"The upload of {site} is not for now.")
    split = split_planes(state.lanes, message.planes)
    trees = [(lane, tree_digest(planes)) for lane, planes in split]
    if upload_root(trees) != receipt.root:
        raise ProtocolError(Code.UPLOAD_DIGEST, f"The upload of {site} was altered.")
    for accumulator, (lane, planes) in zip(state.sums, split, strict=True):
        add_packed(accumulator, planes, lane.bits)
    state.bytes_up += sum(plane.nbytes for plane in message.planes)
    state.record = replace(state.record, receipts={**state.record.receipts, site: message.receipt})
    if state.still_waiting(now):
        return []
    return close_uploads(state, now)


def close_uploads(state: CoordinatorState, now: float) -> list[Effect]:
    """Fix the survivors; the accumulator is durable before anybody hears of them."""
    if len(state.record.receipts) < state.terms.quorum:
        return abort(state, now, Code.QUORUM_LOST)
    state.progress()
    absent = sorted(set(state.ready) - set(state.record.receipts))
    kept = state.persist(phase="agree")
    state.set_timers(now)
    notes = [state.dropped(v, "upload") for v in absent]
    parts = tuple(flat_view(total) for total in state.sums)
    return [PutBlob(SUM_BLOB, parts), kept, *notes, *resend(state, set(state.record.receipts))]
