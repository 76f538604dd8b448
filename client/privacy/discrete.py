"""Whole-number noise: draws of the discrete Gaussian, exact to far below anything measurable.

A narrow Gaussian comes from a table of its distribution function, to 128 bits, computed with
Python's integers. A wide one is K * x + y of two narrow draws x and y, which has the same law as
the wide one to a relative error of 2**-253. The table is read with 32 uniform bits; where they
tie with an entry, 96 more decide. Nothing here depends on data.

Source: Micciancio and Walter 2017 (convolution), Canonne, Kamath and Steinke 2020 (the discrete
Gaussian in privacy); docs/PRIVACY.md, "Joint".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.privacy.noise import SecureNoise
from common.joint import TAIL

__all__ = ["TABLE_BITS", "DiscreteGaussian"]

TABLE_BITS: Final = 128
"""Probabilities are whole multiples of 2**-TABLE_BITS."""

_READ_BITS = 32
_REST_BITS = TABLE_BITS - _READ_BITS
_GUIDE_BITS = 16
_WORK_BITS = 320
_GUARD_BITS = 64
_CUT_BITS = 200
_SMOOTHING = 3  # tau**2 / 3 == 3: the convolution's inner width tau is at least three
_SINGLE = 1024.0
_NARROWEST, _WIDEST = 0.5, 2.0**26
_CHUNK = 1 << 15
_CROWDED = np.int32(-(1 << 31))
_LAST = (1 << _READ_BITS) - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The distribution function of N_Z(0, variance) on -reach .. reach, and a guide to it.

    A uniform u of 128 bits stands for the value -reach + (how many `bounds` are at most u).
    The guide knows, for the first 16 bits of u, that value but for bounds inside the bucket: one
    of them is named in `only`; where there are several, `below` is _CROWDED.

    Shapes:
        bounds: 2 * reach ascending integers; heads: (2 * reach,) their first 32 bits.
        below, only: (65536,).
    """

    reach: int
    bounds: tuple[int, ...]
    heads: NDArray[np.uint32]
    below: NDArray[np.int32]
    only: NDArray[np.uint32]

    def draw(self, noise: SecureNoise, count: int) -> NDArray[np.int32]:
        """`count` draws, an even number, each from 32 bits of the keystream or from 128."""
        heads = noise.uint64(count // 2).view(np.uint32)
        bucket = (heads >> np.uint32(_READ_BITS - _GUIDE_BITS)).astype(np.intp)
        values = self.below.take(bucket)
        only = self.only.take(bucket)
        values += heads > only
        ties = heads == only
        crowded = np.flatnonzero(values < -self.reach)
        if crowded.size:
            self._search(heads, crowded, values, ties)
        if ties.any():
            for index in np.flatnonzero(ties):
                values[index] = self._break_tie(int(heads[index]), noise)
        return values

    def _search(
        self,
        heads: NDArray[np.uint32],
        crowded: NDArray[np.intp],
        values: NDArray[np.int32],
        ties: NDArray[np.bool_],
    ) -> None:
        wanted = heads[crowded]
        left = np.searchsorted(self.heads, wanted, side="left")
        values[crowded] = left - self.reach
        ties[crowded] = self.heads.take(left, mode="clip") == wanted

    def _break_tie(self, head: int, noise: SecureNoise) -> int:
        first, second = (int(word) for word in noise.uint64(2))
        rest = ((first << 64) | second) >> (TABLE_BITS - _REST_BITS)
        return bisect_right(self.bounds, (head << _REST_BITS) | rest) - self.reach


class DiscreteGaussian:
    """The discrete Gaussian N_Z(0, std**2): P(k) in proportion to exp(-k**2 / (2 * std**2)).

    Units: whole numbers of the grid.
    Guarantee: |draw| <= `bound` <= ceil(TAIL * std); draws are independent, and in total
        variation within `distance` <= 2**-109 of the law; the number of words taken from the
        keystream depends on the keystream alone.

    Raises:
        ValueError: a std outside 0.5 .. 2**26, or one whose draws could pass the bound.
    """

    def __init__(self, noise: SecureNoise, std: float) -> None:
        if not _NARROWEST <= std <= _WIDEST:
            raise ValueError(f"a standard deviation lies in {_NARROWEST} .. {_WIDEST:g}")
        self._noise = noise
        self._factor = _factor(std)
        self._table = _table(Fraction(std) ** 2 / (self._factor**2 + 1))
        self.std = std
        self.bound: Final = (self._factor + 1) * self._table.reach
        if self.bound > math.ceil(TAIL * std):
            raise ValueError("a draw could lie beyond the bound of the ring's arithmetic")
        # Every bound is off by half a unit, so a probability by one, and half their sum counts; one
        # entry more stands for what the fixed point and the convolution add.
        entries = (2 * self._table.reach + 2) * (2 if self._factor else 1)
        self.distance: Final = math.ldexp(entries, -TABLE_BITS - 1)

    def sample(self, count: int) -> NDArray[np.int64]:
        """Independent draws, (count,)."""
        drawn = np.empty(count, np.int64)
        for start in range(0, count, _CHUNK):
            part = drawn[start : start + _CHUNK]
            part[...] = self._draw(part.size)
        return drawn

    def add_to(self, words: NDArray[np.int32]) -> None:
        """Add a fresh draw to every word, in place and modulo 2**32.

        Raises:
            TypeError: words that are not one line of int32.
        """
        if words.ndim != 1 or words.dtype != np.int32:
            raise TypeError("noise is added to one line of int32")
        for start in range(0, words.size, _CHUNK):
            part = words[start : start + _CHUNK]
            part += self._draw(part.size)

    def _draw(self, count: int) -> NDArray[np.int32]:
        if not self._factor:
            return self._table.draw(self._noise, count + count % 2)[:count]
        pairs = self._table.draw(self._noise, 2 * count)
        wide, narrow = pairs[:count], pairs[count:]
        wide *= np.int32(self._factor)
        wide += narrow
        return wide


def _factor(std: float) -> int:
    """K of K * x + y: the largest with an inner width of three, or 0 where one table is enough.

    A table for std / sqrt(K**2 + 1) has an inner width of std / (K**2 + 1).
    """
    return 0 if std < _SINGLE else math.isqrt(int(std) // _SMOOTHING - 1)


@lru_cache(maxsize=4)
def _table(variance: Fraction) -> _Table:
    tails = _tails(variance)
    bounds = (*reversed(tails), *((1 << TABLE_BITS) - tail for tail in tails))
    reach = len(tails)
    heads = np.array([bound >> _REST_BITS for bound in bounds], np.uint32)
    starts = np.arange((1 << _GUIDE_BITS) + 1, dtype=np.uint64) << np.uint64(
        _READ_BITS - _GUIDE_BITS
    )
    before = np.searchsorted(heads.astype(np.uint64), starts, side="left")
    inside = np.diff(before)
    below = (before[:-1] - reach).astype(np.int32)
    below[inside > 1] = _CROWDED
    # The last head of all lies in the last bucket, which is crowded: no empty bucket can tie.
    only = np.where(inside == 1, heads.take(before[:-1], mode="clip"), np.uint32(_LAST))
    return _Table(reach, bounds, heads, below, only)


def _tails(variance: Fraction) -> list[int]:
    """P(X > k) for k = 0, 1, .. in units of 2**-TABLE_BITS, to the nearest, until it is zero.

    Weights follow w(k + 1) = w(k) * r(k) and r(k + 1) = r(k) * exp(-1 / variance), in fixed
    point of 320 bits: of w the relative error stays below k**2 * 2**-318.
    """
    ratio, shrink = _exp_of_minus(1 / (2 * variance)), _exp_of_minus(1 / variance)
    weights = [1 << _WORK_BITS]
    while weights[-1] >> (_WORK_BITS - _CUT_BITS):
        weights.append(weights[-1] * ratio >> _WORK_BITS)
        ratio = ratio * shrink >> _WORK_BITS
    total = 2 * sum(weights) - weights[0]
    beyond, tails = 0, []
    for weight in reversed(weights[1:]):
        beyond += weight
        tails.append(((beyond << (TABLE_BITS + 1)) + total) // (2 * total))
    tails.reverse()
    return tails[: next((at for at, tail in enumerate(tails) if not tail), len(tails))]


def _exp_of_minus(value: Fraction) -> int:
    """exp(-value) in units of 2**-_WORK_BITS; value > 0."""
    bits = _WORK_BITS + _GUARD_BITS
    one = 1 << bits
    halvings = max(0, math.ceil(value).bit_length())
    small = (value.numerator << bits) // (value.denominator << halvings)
    total = term = one
    order = 0
    while term:
        order += 1
        term = (term * small >> bits) // order
        total += -term if order % 2 else term
    for _ in range(halvings):
        total = total * total >> bits
    return total >> _GUARD_BITS
