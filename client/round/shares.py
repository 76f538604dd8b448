"""The shares of a round's secrets, what they are sealed with, and the ratchet of the pair keys."""

from __future__ import annotations

from collections.abc import Mapping

from common.crypto import labels
from common.crypto.digest import expand, hkdf_expand, labelled
from common.crypto.seal import unseal
from common.errors import Code, ProtocolError
from common.protocol.transcript import share_commitment
from common.protocol.wire import SALT_BYTES, SHARE_BYTES

OPEN_SHARES = 2 * SHARE_BYTES + 2 * SALT_BYTES


def share_commitments(header: bytes, dealer: str, holder: str, opened: bytes) -> bytes:
    """The salted commitments to a holder's self share and recovery share, 64 bytes."""
    if len(opened) != OPEN_SHARES:
        raise ProtocolError(Code.SHARE_UNREADABLE, f"The share of {dealer} has a wrong length.")
    return share_commitment(
        labels.SHARE_SELF, header, dealer, holder, self_share(opened)
    ) + share_commitment(labels.SHARE_RECOVERY, header, dealer, holder, recovery_share(opened))


def open_share(key: bytes, sealed: bytes, header: bytes, dealer: str, holder: str) -> bytes:
    """A dealer's shares; it signed the digest of these very bytes, so failing is its fault."""
    try:
        return unseal(key, sealed, header, dealer, holder)
    except ProtocolError:
        raise ProtocolError(
            Code.SHARE_UNREADABLE, f"The share of {dealer} does not open.", culprit=dealer
        ) from None


def self_share(opened: bytes) -> bytes:
    """A holder's salted share of the dealer's self secret."""
    return opened[:SHARE_BYTES] + opened[2 * SHARE_BYTES : 2 * SHARE_BYTES + SALT_BYTES]


def recovery_share(opened: bytes) -> bytes:
    """A holder's salted share of the dealer's recovery secret."""
    return opened[SHARE_BYTES : 2 * SHARE_BYTES] + opened[2 * SHARE_BYTES + SALT_BYTES :]


def share_key(
    pair: bytes,
    header: bytes,
    dealer: str,
    holder: str,
    self_commitment: bytes,
    recovery_commitment: bytes,
) -> bytes:
    """The key that seals a dealer's shares for one holder in one round.

    The commitments are in it: a rolled-back dealer that deals again uses another key.
    """
    return expand(
        pair, labels.SHARE_KEY, header, dealer, holder, self_commitment, recovery_commitment
    )


def ratcheted(keys: Mapping[str, bytes], start: int, stop: int) -> dict[str, bytes]:
    """The pair keys moved forward from round index `start` to `stop`; there is no way back."""
    moved = dict(keys)
    for index in range(start, stop):
        purpose = labelled(labels.RATCHET, index)
        moved = {v: hkdf_expand(key, purpose) for v, key in moved.items()}
    return moved
