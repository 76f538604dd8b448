"""Opening a round's sum: check the shares, rebuild the secrets, subtract the streams.

Pure arithmetic on what survivors released. Shares are checked one by one against what their
dealers committed to, so a bad one names its sender; shares that all fit and still rebuild a
wrong secret convict their dealer (docs/PROTOCOL.md, "Unmask").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.crypto import labels
from common.crypto.digest import digest, expand
from common.crypto.mask import Words, add_streams
from common.crypto.seal import unseal
from common.crypto.share import combine
from common.errors import Code, ProtocolError
from common.protocol.terms import Terms
from common.protocol.transcript import share_commitment
from common.protocol.wire import SHARE_BYTES, TAG_BYTES, Head, Unmask
from common.secagg.masking import Lane, stream_key

_SELF = slice(TAG_BYTES + 32, TAG_BYTES + 64)
_RECOVERY = slice(TAG_BYTES + 64, TAG_BYTES + 96)


@dataclass(frozen=True)
class OpenRound:
    """What the coordinator knows of a round when it opens the sum."""

    header: bytes
    participants: bytes
    members: tuple[str, ...]
    heads: Mapping[str, Head]
    blobs: Mapping[str, bytes]
    survivors: tuple[str, ...]
    lanes: tuple[Lane, ...]

    @property
    def dropouts(self) -> tuple[str, ...]:
        """Participants whose upload is not in the sum."""
        return tuple(v for v in sorted(self.heads) if v not in self.survivors)


def check_unmask(opened: OpenRound, unmask: Unmask) -> None:
    """Whether an answer holds exactly the right shares. Raises ProtocolError naming its sender."""
    holder = unmask.site
    exact = set(unmask.self_shares) == set(opened.survivors) and set(unmask.recovery_shares) == set(
        opened.dropouts
    )
    if not exact:
        raise ProtocolError(
            Code.UNMASK_SHAPE, f"{holder} released other shares than asked.", culprit=holder
        )
    for label, shares, part, own in (
        (labels.SHARE_SELF, unmask.self_shares, _SELF, slice(0, 32)),
        (labels.SHARE_RECOVERY, unmask.recovery_shares, _RECOVERY, slice(32, 64)),
    ):
        for dealer, salted in shares.items():
            head = opened.heads[dealer]
            promised = head.own[own] if dealer == holder else head.pairs[holder][part]
            if share_commitment(label, opened.header, dealer, holder, salted) != promised:
                raise ProtocolError(
                    Code.SHARE_COMMITMENT,
                    f"{holder} released a wrong share of {dealer}.",
                    culprit=holder,
                )


def open_sum(
    terms: Terms, opened: OpenRound, answers: Sequence[Unmask], accumulators: Sequence[Words]
) -> None:
    """Subtract every mask from the accumulators, in place.

    Raises ProtocolError naming a dealer whose committed shares do not rebuild its secret.
    """
    chosen = answers[: terms.quorum]
    points = {unmask.site: terms.point(unmask.site) for unmask in chosen}
    secrets: list[tuple[bytes, str, int]] = []
    for v in opened.survivors:
        shares = {points[u.site]: u.self_shares[v][:SHARE_BYTES] for u in chosen}
        secret = _rebuild(terms, shares, v)
        if digest(labels.SELF_COMMITMENT, opened.header, v, secret) != (
            opened.heads[v].self_commitment
        ):
            raise _convicted(v)
        secrets.append((secret, labels.SELF_STREAM, -1))
    for v in opened.dropouts:
        shares = {points[u.site]: u.recovery_shares[v][:SHARE_BYTES] for u in chosen}
        for x, seed in _seeds(terms, opened, v, shares).items():
            if x in opened.survivors:
                # Survivor x added +stream where x < v, else -stream: take that back.
                secrets.append((seed, labels.PAIR_STREAM, -1 if x < v else 1))
    for lane, accumulator in zip(opened.lanes, accumulators, strict=True):
        keys = [stream_key(s, label, lane, opened.participants) for s, label, _ in secrets]
        add_streams(accumulator, keys, [sign for _, _, sign in secrets])


def _rebuild(terms: Terms, shares: Mapping[int, bytes], dealer: str) -> bytes:
    try:
        return combine(shares, terms.quorum)
    except ProtocolError:
        raise _convicted(dealer) from None


def _seeds(
    terms: Terms, opened: OpenRound, dropout: str, shares: Mapping[int, bytes]
) -> dict[str, bytes]:
    """A dropout's pair seeds, from its recovery blob."""
    recovery = _rebuild(terms, shares, dropout)
    head = opened.heads[dropout]
    if digest(labels.RECOVERY_COMMITMENT, opened.header, dropout, recovery) != (
        head.recovery_commitment
    ):
        raise _convicted(dropout)
    key = expand(recovery, labels.BLOB_KEY, opened.header, dropout)
    try:
        blob = unseal(key, opened.blobs[dropout], opened.header, dropout)
    except ProtocolError:
        raise _bad_blob(dropout) from None
    peers = [v for v in opened.members if v != dropout]
    if len(blob) != 32 * len(peers):
        raise _bad_blob(dropout)
    seeds = {v: blob[32 * i : 32 * (i + 1)] for i, v in enumerate(peers)}
    for v in opened.survivors:
        tag = expand(seeds[v], labels.PAIR_TAG, length=TAG_BYTES)
        if opened.heads[v].pairs[dropout][:TAG_BYTES] != tag:
            raise _bad_blob(dropout)
    return seeds


def _convicted(dealer: str) -> ProtocolError:
    return ProtocolError(
        Code.SHARE_DEALER,
        f"{dealer} dealt shares that do not fit its own commitment.",
        culprit=dealer,
    )


def _bad_blob(site: str) -> ProtocolError:
    return ProtocolError(
        Code.RECOVERY_BLOB, f"The recovery blob of {site} holds wrong seeds.", culprit=site
    )
