"""Joint privacy: noise added once inside the secure sum, in shares of whole numbers.

With `privacy.mode: joint` a round is one large-batch DP-SGD step of all hospitals together.
A hospital's contribution is the descent direction u = -(sum of its clipped gradients) / B on
the public grid 2**-exponent, plus its share of the noise: whole numbers, before masks are added.
The shares are sized so that those of h = Q - c honest survivors are noise enough.

This module holds the public arithmetic, the same for every party; docs/PRIVACY.md, "Joint", has
the proof. Nothing here sees data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from common.errors import Code, ConfigError

__all__ = [
    "RING_BITS",
    "SHARE_FLOOR",
    "SLACK",
    "TAIL",
    "Audience",
    "JointNoise",
    "audiences",
    "joint_noise",
]

RING_BITS: Final = 32
"""Joint updates need the wider ring: the grid must be fine against the root of d."""

TAIL: Final = 14
"""A share never exceeds this many of its standard deviations: what lies beyond weighs 2**-128."""

SHARE_FLOOR: Final = 64.0
"""The smallest standard deviation of a share, in grid units: above it sums of shares are Gaussian
to within 2**-58000 (docs/PRIVACY.md, lemma 2)."""

SLACK: Final = 1.001
"""Clipped sums are float32; their rounding may move one by a thousandth of C."""

_REACH = 1.5
_SMOOTHING = 9.0
_ABOVE = 1 + 2.0**-40


@dataclass(frozen=True, slots=True)
class JointNoise:
    """The public numbers of a joint round.

    Units: `sensitivity` and what follows it in grid units of 2**-exponent; `rounding` is a part.

    Attributes:
        exponent: of the grid, one for all tensors and all rounds.
        honest: h, the honest survivors that are counted on.
        sensitivity: how far one patient moves the sum, L2: C * 2**exponent / B + sqrt(d).
        share_std: standard deviation of one hospital's share.
        share_bound: no share is larger, by construction.
        signal_bound: a contribution is cut at this, coordinate by coordinate, before its share is
            added, so that the sum over all parties never wraps.
        rounding: how much larger the noise is because sums are rounded to the grid; 0.01 is one
            per cent.
    """

    exponent: int
    honest: int
    sensitivity: float
    share_std: float
    share_bound: int
    signal_bound: int
    rounding: float


def joint_noise(
    *,
    parties: int,
    honest: int,
    parameters: int,
    clip_norm: float,
    expected_batch: float,
    noise_multiplier: float,
) -> JointNoise:
    """The finest grid on which the ring holds every party's contribution, and the noise on it.

    Guarantee: with u cut at `signal_bound` and shares within `share_bound`, the sum of `parties`
        contributions never wraps; the shares of any k hospitals together have at least the
        variance (noise_multiplier * sensitivity)**2 * k / honest and, k times, a margin for
        their whole numbers.

    Raises:
        ConfigError: JOINT_RING, where no grid is fine enough for the lemmas to hold.
    """
    # Only who plans or trains pays for numpy; checking a study does not.
    from common.secagg.quantise import MAX_EXPONENT, MIN_EXPONENT, limit

    most = limit(RING_BITS, parties)
    step = SLACK * clip_norm / expected_batch
    root = math.sqrt(parameters)

    def at(exponent: int) -> JointNoise:
        moved = math.ldexp(step, exponent)
        sensitivity = moved + root
        # Nine more in every share: the price of whole numbers against reals, whoever's shares are
        # left (docs/PRIVACY.md, "Joint"). A last factor outweighs the rounding of these floats.
        least = (noise_multiplier * sensitivity) ** 2 / honest + _SMOOTHING
        std = math.sqrt(least) * _ABOVE
        bound = math.ceil(TAIL * std)
        return JointNoise(exponent, honest, sensitivity, std, bound, most - bound, root / moved)

    def fits(noise: JointNoise) -> bool:
        reach = math.ldexp(_REACH * SLACK * clip_norm, noise.exponent)
        return noise.signal_bound >= reach

    # As much as fits: a finer grid costs nothing and brings the rounding's part down.
    for exponent in range(MAX_EXPONENT, MIN_EXPONENT - 1, -1):
        noise = at(exponent)
        if fits(noise):
            break
    else:
        noise = at(MIN_EXPONENT)
    # A grid as coarse as a patient's part would drown it in rounding.
    if not fits(noise) or noise.share_std < SHARE_FLOOR or noise.rounding > 1:
        raise ConfigError(
            Code.JOINT_RING,
            f"{parties} hospitals with expected_batch {expected_batch:g} leave a 32-bit ring no "
            f"room for noise over {parameters} parameters.",
        )
    return noise


@dataclass(frozen=True, slots=True)
class Audience:
    """Somebody whom the guarantee is stated against.

    Attributes:
        name: a stable word for files.
        told: who that is, in words.
        factor: the noise multiplier that holds against it, over the study's.
    """

    name: str
    told: str
    factor: float


def audiences(parties: int, quorum: int, colluders: int) -> tuple[Audience, ...]:
    """Against whom joint noise protects how well: the more conspire, the less noise is unknown.

    The study's noise multiplier is the one for `colluders` hospitals: what the ledger charges.
    """
    honest = quorum - colluders
    return (
        Audience(
            "coordinator", "the coordinator and everybody outside", math.sqrt(quorum / honest)
        ),
        Audience("colluders", f"the coordinator with {colluders} of {parties} hospitals", 1.0),
        Audience(
            "all_others",
            f"the coordinator with all {parties - 1} other hospitals",
            1 / math.sqrt(honest),
        ),
    )
