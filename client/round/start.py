"""A round begins: RoundStart is checked, the work is asked for, and its secrets are dealt."""

from __future__ import annotations

from dataclasses import replace

from client.round.chain import certified, chain_for, check_retry, check_run, completion, header_of
from client.round.effects import UPLOAD_BLOB, Effect, Send, Work, Worked
from client.round.shares import ratcheted, share_commitments, share_key
from client.round.state import RoundSecrets, SiteState
from common.crypto import labels
from common.crypto.digest import digest, expand, hkdf_expand, labelled
from common.crypto.seal import seal
from common.crypto.share import split
from common.errors import Code, ProtocolError
from common.protocol.effects import DropBlob, Note
from common.protocol.terms import METRIC_LANE, STATISTIC_LANE
from common.protocol.transcript import header_hash, link_survivors
from common.protocol.wire import SALT_BYTES, TAG_BYTES, Head, Link, Ready, RoundStart, pack, sign


def on_start(state: SiteState, message: RoundStart) -> list[Effect]:
    """Check that a round may begin here, and ask for its work."""
    check_run(state, message.study, message.run)
    again = _again(state, message)
    if again is not None:
        return again
    _check_epoch(state, message.epoch)
    chain, survivors = chain_for(state, message.run, message.link, message.base)
    header = header_of(state, message, chain)
    check_retry(state, chain, header, certified(state, message.burns))
    completed = completion(state, message.link, chain, survivors)
    state.chain = chain
    state.pending = (header, header_hash(header))
    state.secrets = None
    if state.handshake is not None and state.handshake.epoch == state.record.epoch:
        state.handshake = None  # ephemeral keys go at the first round of the epoch
    forgotten = [r for r in state.record.burned if r > chain.version]
    kept = state.persist(
        round=message.round,
        stage="started",
        header=state.pending[1],
        keys=ratcheted(state.record.keys, state.record.ratchet, message.round),
        ratchet=message.round,
        participants=bytes(32),
        cohort=(),
        shares={},
        survivors=bytes(32),
        survivor_set=(),
        sent={},
        version=chain.version,
        prev=chain.prev,
        agreed={k: v for k, v in state.record.agreed.items() if int(k) > chain.version},
        burned=tuple(forgotten),
    )
    work = Work(
        message.round,
        chain.turn,
        chain.state,
        trains=header.kind == "train",
        measures=state.terms.measures(chain.turn),
        counts=header.kind == "statistics",
        counted=_counted(state.site, message.link),
    )
    note = Note(
        "round.started",
        {
            "round": message.round,
            "kind": header.kind,
            "model": chain.state_digest.hex(),
            "header": state.pending[1].hex(),
        },
    )
    return [kept, DropBlob(UPLOAD_BLOB), *completed, note, work]


def _counted(site: str, link: Link | None) -> int:
    """The round of a checked link whose survivors include this site; 0 where they do not."""
    return link.header.round if link is not None and site in link_survivors(link) else 0


def _again(state: SiteState, message: RoundStart) -> list[Effect] | None:
    """The answer to a repeated RoundStart, or None where the round is new."""
    seen = state.record
    if message.round > seen.round:
        return None
    if message.round < seen.round:
        raise ProtocolError(Code.ROUND_REPLAY, f"Round {message.round} is over.")
    if state.secrets is not None:
        return [Send(state.secrets.ready)]
    if seen.stage in {"uploaded", "agreed", "done"}:
        return []  # a late copy: the coordinator has gone on
    raise ProtocolError(Code.ROUND_REPLAY, f"Round {message.round} was begun before.")


def _check_epoch(state: SiteState, epoch: int) -> None:
    if epoch != state.record.epoch or not state.record.keys:
        raise ProtocolError(
            Code.HANDSHAKE_INCOMPLETE, f"Epoch {epoch} is not established at this site."
        )


def worked(state: SiteState, round_number: int, result: Worked) -> list[Effect]:
    """Commit to fresh secrets and share them, once the work is done."""
    if state.pending is None or state.pending[0].round != round_number:
        return []
    header, hashed = state.pending
    terms, site = state.terms, state.site
    peers = sorted(state.record.keys)
    secret, recovery = state.entropy.take(32), state.entropy.take(32)
    purpose = labelled(labels.ROUND_SEED, hashed)
    seeds = {v: hkdf_expand(state.record.keys[v], purpose) for v in peers}
    tags = {v: expand(seeds[v], labels.PAIR_TAG, length=TAG_BYTES) for v in peers}
    blob = seal(
        expand(recovery, labels.BLOB_KEY, hashed, site),
        b"".join(seeds[v] for v in peers),
        hashed,
        site,
    )
    self_commitment = digest(labels.SELF_COMMITMENT, hashed, site, secret)
    recovery_commitment = digest(labels.RECOVERY_COMMITMENT, hashed, site, recovery)
    points = {v: terms.point(v) for v in terms.parties}
    self_shares = split(secret, terms.quorum, tuple(points.values()), state.entropy)
    recovery_shares = split(recovery, terms.quorum, tuple(points.values()), state.entropy)
    salts = state.entropy.take(2 * SALT_BYTES * (len(peers) + 1))
    sealed: dict[str, bytes] = {}
    pairs: dict[str, bytes] = {}
    opened: dict[str, bytes] = {}
    for index, v in enumerate([*peers, site]):
        salt = salts[2 * SALT_BYTES * index : 2 * SALT_BYTES * (index + 1)]
        opened[v] = self_shares[points[v]] + recovery_shares[points[v]] + salt
    for v in peers:
        key = share_key(state.record.keys[v], hashed, site, v, self_commitment, recovery_commitment)
        sealed[v] = seal(key, opened[v], hashed, site, v)
        shares_digest = digest(labels.SEALED_SHARES, sealed[v])
        pairs[v] = tags[v] + shares_digest + share_commitments(hashed, site, v, opened[v])
    head = Head(
        hashed,
        header.round,
        site,
        self_commitment,
        recovery_commitment,
        digest(labels.BLOB, blob),
        state.entropy.take(32),
        share_commitments(hashed, site, site, opened[site]),
        pairs,
        result.ledger,
        dict(state.record.witnessed),
    )
    signed = sign(state.key, head)
    ready = pack(Ready(signed, blob, sealed))
    state.secrets = RoundSecrets(
        header,
        hashed,
        secret,
        seeds,
        tags,
        opened[site],
        signed,
        ready,
        result.update,
        {METRIC_LANE: result.metrics, STATISTIC_LANE: result.statistics},
    )
    state.pending = None
    # Nothing to persist: what is new is in memory only, and a crash now makes a dropout.
    state.record = replace(state.record, stage="ready")
    return [Send(ready)]
