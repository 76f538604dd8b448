"""From the participants to the masked upload: heads, shares and ledgers are checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from client.round.effects import UPLOAD_BLOB, Effect, Release, Send, SendBlob
from client.round.shares import open_share, ratcheted, share_commitments, share_key
from client.round.state import RoundSecrets, SiteState
from common.crypto import labels
from common.crypto.digest import digest, tree_digest
from common.crypto.identity import verify
from common.crypto.mask import Words, add_streams
from common.errors import Code, ProtocolError
from common.protocol.effects import Note, PutBlob
from common.protocol.terms import UPDATE_LANE
from common.protocol.transcript import head_digest, participants_hash, upload_root
from common.protocol.wire import (
    PAIR_BYTES,
    TAG_BYTES,
    Head,
    Header,
    Participants,
    Receipt,
    Signed,
    Upload,
    Witness,
    pack,
    sign,
    unpack_body,
)
from common.secagg.masking import Lane, masked_planes, planes_over, stream_key, stream_keys
from common.secagg.masking import pack as pack_planes


def on_participants(state: SiteState, message: Participants) -> list[Effect]:
    """Check the participants and upload, once; repeat the kept upload after that."""
    seen = state.record
    if message.round in seen.burned:
        raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {message.round} was burned here.")
    if message.round != seen.round or seen.stage not in {"ready", "uploaded", "agreed", "done"}:
        raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Participants out of order.")
    digests = {_head_of(head).site: head_digest(head) for head in message.heads}
    participants = participants_hash(seen.header, digests)
    if seen.stage != "ready":
        if participants != seen.participants:
            raise ProtocolError(
                Code.PARTICIPANTS_EQUIVOCATED, "Another set of participants was shown."
            )
        return [SendBlob(UPLOAD_BLOB)]
    if state.secrets is None:
        raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "This site crashed in this round.")
    heads = _check_heads(state, message)
    shares = _open_shares(state, message, heads)
    witnessed = _check_ledgers(state, heads)
    return _mask(state, participants, heads, shares, witnessed)


def _head_of(signed: Signed) -> Head:
    head: Head = unpack_body(Head, signed)
    return head


def _check_heads(state: SiteState, message: Participants) -> dict[str, Head]:
    secrets = state.secrets
    if secrets is None:
        raise AssertionError("participants are checked in the ready stage only")
    heads: dict[str, Head] = {}
    for signed in message.heads:
        head = _head_of(signed)
        public = state.terms.roster.get(head.site)
        known = head.site == state.site or head.site in state.record.keys
        if public is None or not known or head.site in heads:
            raise ProtocolError(
                Code.PARTICIPANTS_UNKNOWN, f"{head.site} is no member of this epoch."
            )
        if not verify(public, signed.signature, Head.LABEL, signed.body):
            raise ProtocolError(Code.HEAD_SIGNATURE, f"The head of {head.site} is forged.")
        if head.header != secrets.header_hash or head.round != state.record.round:
            raise ProtocolError(
                Code.HEAD_MISMATCH, f"{head.site} is on another model or round.", culprit=head.site
            )
        heads[head.site] = head
    if state.site not in heads:
        raise ProtocolError(Code.PARTICIPANTS_WITHOUT_ME, "This site is not a participant.")
    if len(heads) < state.terms.quorum:
        raise ProtocolError(
            Code.PARTICIPANTS_QUORUM, f"{len(heads)} participants, {state.terms.quorum} needed."
        )
    if not any(signed == secrets.head for signed in message.heads):
        raise ProtocolError(Code.HEAD_ALTERED, "This site's own head was altered.")
    return heads


def _open_shares(
    state: SiteState, message: Participants, heads: Mapping[str, Head]
) -> dict[str, bytes]:
    """Decrypt and check every dealer's shares for this site before anything is uploaded."""
    secrets = state.secrets
    if secrets is None:
        raise AssertionError("shares are opened in the ready stage only")
    hashed, site = secrets.header_hash, state.site
    shares = {site: secrets.own_shares}
    for v, head in heads.items():
        if v == site:
            continue
        pair = head.pairs.get(site, b"")
        if pair[:TAG_BYTES] != secrets.tags[v]:
            raise ProtocolError(Code.HEAD_TAG, f"No common seed with {v}.", culprit=v)
        sealed = message.shares.get(v, b"")
        key = share_key(
            state.record.keys[v], hashed, v, site, head.self_commitment, head.recovery_commitment
        )
        if digest(labels.SEALED_SHARES, sealed) != pair[TAG_BYTES : TAG_BYTES + 32]:
            raise ProtocolError(Code.SHARE_UNREADABLE, f"The share of {v} was altered.")
        opened = open_share(key, sealed, hashed, v, site)
        if share_commitments(hashed, v, site, opened) != pair[TAG_BYTES + 32 : PAIR_BYTES]:
            raise ProtocolError(
                Code.SHARE_COMMITMENT, f"{v} dealt another share than it committed to.", culprit=v
            )
        shares[v] = opened
    return shares


def _check_ledgers(state: SiteState, heads: Mapping[str, Head]) -> dict[str, Witness]:
    """Compare everybody's ledger with what was seen before; raises on a rollback."""
    _check_own_ledger(state, heads)
    witnessed = dict(state.record.witnessed)
    for v, head in heads.items():
        if v == state.site:
            continue
        before = witnessed.get(v)
        if before is not None and (
            head.ledger.counter < before.counter
            or (head.ledger.counter == before.counter and head.ledger.head != before.head)
        ):
            raise ProtocolError(
                Code.LEDGER_ROLLBACK_PEER,
                f"{v} shows {head.ledger.counter} ledger rows after {before.counter}.",
                culprit=v,
            )
        witnessed[v] = head.ledger
    return witnessed


def _check_own_ledger(state: SiteState, heads: Mapping[str, Head]) -> None:
    """Compare what the others have witnessed with this site's ledger.

    Up to c peers may lie together: they stop this site for the round and are named. More
    than c of them cannot all lie: the ledger was rolled back, and the run ends here.
    """
    said = {
        v: (mine.counter, mine.head)
        for v, head in heads.items()
        if v != state.site and (mine := head.witnessed.get(state.site)) is not None
    }
    # Honest peers have all witnessed the same row: it is looked up once.
    missing = {row for row in set(said.values()) if not state.ledger_contains(*row)}
    accusers = [v for v, row in said.items() if row in missing]
    if not accusers:
        return
    proven = len(accusers) > state.terms.colluders
    raise ProtocolError(
        Code.LEDGER_ROLLBACK,
        f"{', '.join(accusers)} witnessed rows of this site's ledger that are not there.",
        culprit=None if proven else accusers[0],
    )


def _mask(
    state: SiteState,
    participants: bytes,
    heads: Mapping[str, Head],
    shares: dict[str, bytes],
    witnessed: dict[str, Witness],
) -> list[Effect]:
    secrets = state.secrets
    if secrets is None:
        raise AssertionError("masking happens in the ready stage only")
    peers = [v for v in sorted(heads) if v != state.site]
    seeds = [secrets.seeds[v] for v in peers]
    signs = [1, *(1 if state.site < v else -1 for v in peers)]
    planes: list[Any] = []
    trees: list[tuple[Lane, bytes]] = []
    for lane in secrets.header.lanes:
        keys = [
            stream_key(secrets.self_secret, labels.SELF_STREAM, lane, participants),
            *stream_keys(seeds, labels.PAIR_STREAM, lane, participants),
        ]
        lane_planes, tree = _masked(state, lane, secrets, keys, signs)
        planes.extend(lane_planes)
        trees.append((lane, tree))
    root = upload_root(trees)
    receipt = sign(state.key, Receipt(participants, state.site, root))
    upload = Upload(receipt, tuple(memoryview(plane).cast("B") for plane in planes))
    state.secrets = None  # b, the seeds and the update end here
    attempted = attempt(state, secrets.header)
    kept = state.persist(
        stage="uploaded",
        confirmed=state.record.version,
        participants=participants,
        cohort=tuple(sorted(heads)),
        shares=shares,
        witnessed=witnessed,
        attempted=attempted[0],
        attempts=attempted[1],
        # Nothing after the upload needs this round's pair keys: the ratchet ends them here.
        keys=ratcheted(state.record.keys, state.record.ratchet, state.record.round + 1),
        ratchet=state.record.round + 1,
    )
    payload = pack(upload)
    note = Note(
        "round.uploaded",
        {
            "round": secrets.header.round,
            "kind": secrets.header.kind,
            "uh1": participants.hex(),
            "root": root.hex(),
            "bytes_up": len(payload),
        },
    )
    return [
        PutBlob(UPLOAD_BLOB, (payload,)),
        kept,
        Release(secrets.header.round),
        note,
        Send(payload),
    ]


def _masked(
    state: SiteState, lane: Lane, secrets: RoundSecrets, keys: Sequence[bytes], signs: Sequence[int]
) -> tuple[Sequence[Any], bytes]:
    """One lane's masked planes and their tree digest."""
    if lane.lane_id in secrets.words:
        counted = secrets.words[lane.lane_id]
        if counted is None or counted.shape != (lane.length,):
            raise AssertionError("a lane of words has words of the study's length")
        return _masked_words(counted.view(np.uint64).copy(), lane, keys, signs)
    if lane.lane_id != UPDATE_LANE or secrets.update is None:
        raise AssertionError("a training round has an update")
    # Words carry their share of the noise already; real numbers would not.
    if (secrets.update.dtype == np.int32) != state.terms.joint:
        raise AssertionError("a joint update is words, and no other is")
    if state.terms.joint:
        if secrets.update.shape != (lane.length,):
            raise AssertionError("a joint update has the study's length")
        return _masked_words(secrets.update.view(np.uint32), lane, keys, signs)
    real = cast("NDArray[np.float32]", secrets.update)
    weight = np.float32(state.terms.weights[state.site])
    update = real if weight == 1 else real * weight
    return masked_planes(
        update,
        exponents=secrets.header.exponents,
        sizes=state.terms.layout.sizes,
        bits=lane.bits,
        parties=len(state.terms.roster),
        keys=keys,
        signs=signs,
        out=planes_over(update, lane.bits),
    )


def _masked_words(
    words: Words, lane: Lane, keys: Sequence[bytes], signs: Sequence[int]
) -> tuple[Sequence[Any], bytes]:
    """The planes of words that are masked in place, and their tree digest."""
    add_streams(words, keys, signs)
    planes = pack_planes(words, lane.bits)
    return planes, tree_digest(planes)


def attempt(state: SiteState, header: Header) -> tuple[bytes, tuple[int, ...]]:
    """What the record holds after an upload in this round: (the model's attempt, its rounds)."""
    seen = state.record
    attempted = digest(labels.ATTEMPT, header.kind, header.turn, header.state)
    earlier = seen.attempts if attempted == seen.attempted else ()
    return attempted, (*earlier, header.round)
