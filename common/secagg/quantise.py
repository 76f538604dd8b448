"""Updates as integers: a power-of-two grid, clipped so that the sum of all parties never wraps.

A value x becomes q = round(x * 2**exponent), a signed integer of at most `limit(bits, parties)`,
held in two's complement. Exponents are public, per tensor, and never derived from one
hospital's data. Source: PROTOCOL.md, "Arithmetic".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, DataError

RING_BITS: Final = (24, 32)
BLOCK_WORDS: Final = 1 << 16
MIN_EXPONENT: Final = -126  # 2**exponent is a normal float32, so scaling is exact
MAX_EXPONENT: Final = 127


def limit(bits: int, parties: int) -> int:
    """The greatest |q| such that the sum of `parties` of them fits in `bits` signed bits."""
    if bits not in (*RING_BITS, 64):
        raise ValueError(f"a ring has 24, 32 or 64 bits, not {bits}")
    if parties < 1:
        raise ValueError("a sum has at least one party")
    return ((1 << (bits - 1)) - 1) // parties


def exponent_for(range_: float, bits: int, parties: int) -> int:
    """The finest exponent at which every |x| <= range_ stays within the limit.

    Raises:
        ValueError: a range that is not finite and positive.
    """
    if not (math.isfinite(range_) and range_ > 0):
        raise ValueError("a range is finite and positive")
    ratio = Fraction(limit(bits, parties)) / Fraction(range_)
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    if ratio < Fraction(2) ** exponent:
        exponent -= 1
    return min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)


def quantise(
    values: NDArray[np.float32],
    exponent: int,
    *,
    bits: int,
    parties: int,
    out: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """One tensor on the grid 2**-exponent, as two's complement words.

    Shapes:
        values: (d,) float32; out and result: (d,) uint32.

    Guarantee: |q| <= limit(bits, parties) exactly; ties round to even; values beyond the
    limit saturate at it.

    Raises:
        DataError: NON_FINITE, for a NaN or an infinity.
    """
    return quantise_layout(
        values, exponents=[exponent], sizes=[values.size], bits=bits, parties=parties, out=out
    )


def quantise_layout(
    flat: NDArray[np.float32],
    *,
    exponents: Sequence[int],
    sizes: Sequence[int],
    bits: int,
    parties: int,
    out: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """A flat update on one grid per tensor; otherwise as `quantise`."""
    words = np.empty(flat.size, np.uint32) if out is None else out
    quantiser = Quantiser(flat, exponents=exponents, sizes=sizes, bits=bits, parties=parties)
    for start in range(0, flat.size, BLOCK_WORDS):
        stop = min(start + BLOCK_WORDS, flat.size)
        quantiser.block(start, stop, words[start:stop])
    if words.size != flat.size:
        raise ValueError("the output does not have the update's length")
    return words


class Quantiser:
    """Quantises a flat update piece by piece, in ascending order, while it is hot in cache."""

    __slots__ = ("_flat", "_limit", "_runs", "_scratch")

    def __init__(
        self,
        flat: NDArray[np.float32],
        *,
        exponents: Sequence[int],
        sizes: Sequence[int],
        bits: int,
        parties: int,
    ) -> None:
        if flat.ndim != 1 or flat.dtype != np.float32:
            raise TypeError("an update is one line of float32")
        if bits not in RING_BITS:
            raise ValueError(f"an update's ring has 24 or 32 bits, not {bits}")
        if sum(sizes) != flat.size or any(size < 0 for size in sizes):
            raise ValueError("the tensor sizes do not add up to the update's length")
        if any(not MIN_EXPONENT <= exponent <= MAX_EXPONENT for exponent in exponents):
            raise ValueError(f"exponents lie within {MIN_EXPONENT}..{MAX_EXPONENT}")
        self._flat = flat
        self._limit = limit(bits, parties)
        self._runs = _runs(exponents, sizes)
        self._scratch = np.empty(min(BLOCK_WORDS, flat.size), np.float32)

    def block(self, start: int, stop: int, out: NDArray[np.uint32]) -> None:
        """Write the words of flat[start:stop], at most BLOCK_WORDS of them, to `out`."""
        for first, last, exponent in self._pieces(start, stop):
            self._piece(
                self._flat[first:last], exponent, out[first - start : last - start].view(np.int32)
            )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        ends = self._runs[0]
        index = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            last = min(int(ends[index]), stop)
            yield start, last, self._runs[1][index]
            start = last
            index += 1

    def _piece(self, values: NDArray[np.float32], exponent: int, out: NDArray[np.int32]) -> None:
        peak = max(float(values.max()), -float(values.min()))  # NaN propagates into both
        if not math.isfinite(peak):
            raise DataError(
                Code.NON_FINITE, "The local update holds a NaN or an infinity; it was not sent."
            )
        scaled = self._scratch[: values.size]
        fits = math.ldexp(peak, exponent) <= self._limit
        with np.errstate(over="ignore"):
            np.multiply(values, np.float32(math.ldexp(1.0, exponent)), out=scaled)
        np.rint(scaled, out=scaled)
        if fits:
            out[...] = scaled
        else:
            # float32 cannot hold most limits and would round them up; float64 holds them all.
            out[...] = np.clip(scaled.astype(np.float64), -self._limit, self._limit)


def _runs(
    exponents: Sequence[int], sizes: Sequence[int]
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Where each run of equal exponents ends, and its exponent; empty tensors vanish."""
    ends: list[int] = []
    kept: list[int] = []
    at = 0
    for exponent, size in zip(exponents, sizes, strict=True):
        at += size
        if size == 0:
            continue
        if kept and kept[-1] == exponent:
            ends[-1] = at
        else:
            ends.append(at)
            kept.append(exponent)
    return np.array(ends, np.int64), tuple(kept)


def reduce_(words: NDArray[np.uint32], bits: int) -> None:
    """Reduce words modulo 2**bits, in place."""
    if bits not in RING_BITS:
        raise ValueError(f"an update's ring has 24 or 32 bits, not {bits}")
    if bits < 32:  # noqa: PLR2004 - the width of the word itself
        np.bitwise_and(words, np.uint32((1 << bits) - 1), out=words)


def to_signed(words: NDArray[np.uint32] | NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """The signed integers that a sum of words stands for, modulo 2**bits; exact."""
    if bits == 64 and words.dtype == np.uint64:  # noqa: PLR2004 - the width of the word itself
        return words.view(np.int64).copy()
    if bits not in RING_BITS or words.dtype != np.uint32:
        raise ValueError(f"{words.dtype} words hold no {bits}-bit ring")
    shift = 32 - bits
    # Up to the top of the word and back with sign: drops what lies above 2**bits.
    return ((words << np.uint32(shift)).view(np.int32) >> np.int32(shift)).astype(np.int64)
