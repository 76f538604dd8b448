"""Normalisation statistics of numeric features: what is summed under masks, and what it means.

A feature with public bounds [low, high] is scaled to x = clip((value - low) / (high - low), 0, 1).
A patient's records share a weight of 1; a missing value contributes nothing. The words are, one
block of F after the other, the sums of u = x - 1/2, of u squared, and of a quarter of the weight
present, in fixed point. Every party turns the same sums into the same mean and deviation.

Centred values and a light count need a third of the noise that x, x squared and 1 would: one
patient moves the words by sqrt(3F/8) instead of sqrt(3F), and a noised count only scales a small u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DEVIATION",
    "DEVIATION_FLOOR",
    "MEAN",
    "PREFIX",
    "STATISTIC_SCALE",
    "StatisticsLayout",
    "normalised",
    "patient_words",
    "scaled",
]

Array = NDArray[np.float32]

PREFIX: Final = "statistics/"
MEAN: Final = PREFIX + "mean"
DEVIATION: Final = PREFIX + "deviation"

STATISTIC_SCALE: Final = 2**16
"""Fixed point: one patient is this many units."""

DEVIATION_FLOOR: Final = 2.0**-6
"""The smallest deviation, as a part of the declared range: a constant or drowned feature stays
bounded (within 64) after normalisation instead of being blown up."""

_DEVIATION_CEILING: Final = 0.5  # no distribution on [0, 1] has a larger one
_MIDDLE: Final = 0.5
_COUNT_WEIGHT: Final = 0.25
_KNOWN_ERRORS: Final = 3.0  # a count below so many standard errors of its noise tells nothing


@dataclass(frozen=True, slots=True)
class StatisticsLayout:
    """The statistics of `features` numeric features.

    Args:
        noise: the noise multiplier by which every site noises its words; 0 without DP.

    Shapes: the words are (3F,) int64; mean and deviation are (F,) float32, in units of the
        declared range.
    """

    features: int
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.features < 1 or not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError("statistics describe at least one feature, with noise from 0 up")

    @property
    def words(self) -> int:
        """How many words a site contributes."""
        return 3 * self.features

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the words to one patient, in patients (not in words)."""
        # By feature: (1/2)**2 of u, (1/4)**2 of u squared, (1/4)**2 of the count.
        return math.sqrt(self.features * (0.25 + 0.0625 + _COUNT_WEIGHT**2))

    def initial(self) -> dict[str, Array]:
        """The state's tensors before the statistics round: the identity."""
        shape = (self.features,)
        return {MEAN: np.zeros(shape, np.float32), DEVIATION: np.ones(shape, np.float32)}

    def resolve(self, total: NDArray[np.int64], sites: int) -> dict[str, Array]:
        """The state's tensors from the sum of the words of `sites` sites.

        Noised sums can contradict each other: the mean is cut to [0, 1], the deviation to
        [1/64, 1/2], and a variance below its own noise is taken to be that noise, or a feature
        that drowned in it would be blown up. A feature with less than one patient present, or
        with too few to be seen through the noise, gets 1/2 and 1/2.

        Guarantee: float64 add, multiply, divide and square root by element, each rounded once
            as IEEE 754 says, then one rounding to float32: the same bits on every machine.

        Raises:
            ValueError: the sum has another length.
        """
        if total.shape != (self.words,) or sites < 1:
            raise ValueError("the statistics' sum has another length than the layout")
        counted = total.astype(np.float64) / STATISTIC_SCALE
        first, second, present = counted.reshape(3, self.features)
        error = self.noise * self.sensitivity * math.sqrt(sites)
        present = present / _COUNT_WEIGHT
        known = present >= max(1.0, _KNOWN_ERRORS * error / _COUNT_WEIGHT)
        patients = np.where(known, present, 1.0)
        centre = np.clip(first / patients, -_MIDDLE, _MIDDLE)
        variance = second / patients - centre * centre
        lowest = np.maximum(error / patients, DEVIATION_FLOOR**2)
        deviation = np.minimum(np.sqrt(np.maximum(variance, lowest)), _DEVIATION_CEILING)
        return {
            MEAN: np.where(known, centre + _MIDDLE, _MIDDLE).astype(np.float32),
            DEVIATION: np.where(known, deviation, _DEVIATION_CEILING).astype(np.float32),
        }


def scaled(
    values: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values in units of their declared range, cut to [0, 1]; a missing one (NaN) stays missing.

    Shapes: values (n, F), low and high (F,); returns (n, F).
    """
    # Halved before subtracting, so that bounds near the largest float do not overflow.
    part = (values / 2 - low / 2) / (high / 2 - low / 2)
    return np.clip(part, 0.0, 1.0)


def normalised(part: NDArray[np.float64], mean: Array, deviation: Array) -> Array:
    """What a model is given: (x - mean) / deviation, and 0 where a value is missing.

    Shapes: part (n, F) as `scaled` gives it; mean and deviation (F,); returns (n, F) float32.
    """
    values = (part - mean.astype(np.float64)) / deviation.astype(np.float64)
    return np.nan_to_num(values, nan=0.0).astype(np.float32)


def patient_words(part: NDArray[np.float64]) -> NDArray[np.int64]:
    """The words of one patient from the scaled values of his records.

    Shapes: part (records, F) in [0, 1] or NaN; returns (3F,) int64.
    Guarantee: with and without a patient the sums differ by at most `sensitivity` *
        STATISTIC_SCALE in L2, however many records he has. Words are whole before they are
        summed: the sum does not depend on any order.
    """
    there = ~np.isnan(part)
    centred = np.where(there, part - _MIDDLE, 0.0)
    moments = np.stack([centred, centred * centred, there * _COUNT_WEIGHT])
    # A sorted sum: a patient's words must not depend on the order of his records either.
    mean = np.sort(moments, axis=1).sum(axis=1).reshape(-1) / max(len(part), 1)
    bound = np.repeat([_MIDDLE, _MIDDLE**2, _COUNT_WEIGHT], part.shape[1])
    words: NDArray[np.int64] = np.rint(np.clip(mean, -bound, bound) * STATISTIC_SCALE).astype(
        np.int64
    )
    return words
