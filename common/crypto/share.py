"""Shamir's secret sharing over the field of p = 2**256 + 297 elements.

p is the least prime above 2**256, so every 32-byte secret is a field element. Python's
integers are not constant-time: a share is evaluated once per round inside the site, and
nothing an adversary sees is timed that finely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from common.errors import Code, ProtocolError
from common.ports import Entropy

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
MAX_POINT: Final = 65535


def split(
    secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy
) -> dict[int, bytes]:
    """One 33-byte share of `secret` for every point; any `threshold` of them recover it.

    Guarantee: fewer than `threshold` shares are independent of the secret.

    Raises:
        ValueError: a secret that is not 32 bytes, points that are not distinct and in
            1..65535, or a threshold outside 1..len(points).

    Source: Shamir, "How to share a secret", CACM 1979.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError("a shared secret has 32 bytes")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} is not within 1..{len(points)}")
    coefficients = [_field_element(entropy) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))  # highest power first, constant last
    return {x: _evaluate(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in points}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind `shares`, from the `threshold` lowest points among them.

    Raises:
        ValueError: fewer than `threshold` shares, or points outside 1..65535.
        ProtocolError: BAD_SHARE, for a share that is no field element, or shares that do
            not belong together (as far as that shows).
    """
    points = tuple(sorted(shares)[:threshold])
    _check_points(points)
    if not 1 <= threshold == len(points):
        raise ValueError(f"{len(points)} shares cannot meet threshold {threshold}")
    weights = _weights_at_zero(points)
    total = sum(weight * _share_value(shares[x]) for weight, x in zip(weights, points, strict=True))
    secret = total % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError(Code.BAD_SHARE, "The shares do not belong to one secret.")
    return secret.to_bytes(SECRET_BYTES, "big")


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < x <= MAX_POINT for x in points):
        raise ValueError("share points are distinct integers in 1..65535")


def _field_element(entropy: Entropy) -> int:
    """A uniform field element: 257-bit draws, rejected above p (about every other one)."""
    while True:
        drawn = int.from_bytes(entropy.take(SHARE_BYTES), "big") & (2**257 - 1)
        if drawn < PRIME:
            return drawn


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    y = 0
    for coefficient in coefficients:
        y = (y * x + coefficient) % PRIME
    return y


def _share_value(share: bytes) -> int:
    if len(share) != SHARE_BYTES:
        raise ProtocolError(Code.BAD_SHARE, "A share does not have 33 bytes.")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise ProtocolError(Code.BAD_SHARE, "A share is not a field element.")
    return value


@lru_cache(maxsize=64)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0; the same survivors recover many secrets in a round."""
    weights = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
