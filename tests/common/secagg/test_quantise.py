from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, DataError
from common.secagg.quantise import (
    BLOCK_WORDS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    exponent_for,
    limit,
    quantise,
    quantise_layout,
    reduce_,
    to_signed,
)

RINGS = [24, 32]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def slow(values, exponent: int, bits: int, parties: int) -> list[int]:
    """Exact rational arithmetic: scale, round half to even, clip."""
    bound = limit(bits, parties)
    scaled = [round(Fraction(float(x)) * Fraction(2) ** exponent) for x in values]
    return [max(-bound, min(bound, q)) for q in scaled]


@given(
    st.lists(FLOATS, max_size=30),
    st.integers(MIN_EXPONENT, MAX_EXPONENT),
    st.sampled_from(RINGS),
    st.integers(1, 100),
)
def test_quantising_is_exact_scaling_rounding_and_clipping(values, exponent, bits, parties):
    words = quantise(np.array(values, np.float32), exponent, bits=bits, parties=parties)
    assert words.dtype == np.uint32
    assert words.view(np.int32).tolist() == slow(values, exponent, bits, parties)


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("sign", [1, -1])
def test_all_max_updates_never_wrap_for_any_number_of_parties(bits, sign):
    huge = np.array([3.0e38, 1.0e9, 2.0**31, 2.0**24], np.float32) * np.float32(sign)
    for parties in range(3, 101):
        words = quantise(huge, 40, bits=bits, parties=parties)
        total = np.zeros(4, np.uint32)
        for _ in range(parties):
            total += words
        expected = sign * limit(bits, parties) * parties
        assert abs(expected) <= (1 << (bits - 1)) - 1
        assert to_signed(total, bits).tolist() == [expected] * 4


def test_clipping_in_float32_is_the_control_that_wraps():
    wrapped = []
    for parties in range(3, 101):
        bound = np.float32(limit(32, parties))
        clipped = int(np.clip(np.float32(3e38), -bound, bound))
        if clipped * parties > 2**31 - 1:
            wrapped.append(parties)
    assert wrapped


@given(st.sampled_from([24, 32, 64]), st.integers(1, 1000))
def test_the_limit_is_the_greatest_that_cannot_wrap(bits, parties):
    bound = limit(bits, parties)
    assert bound * parties <= 2 ** (bits - 1) - 1 < (bound + 1) * parties


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, BLOCK_WORDS, BLOCK_WORDS + 9])
def test_a_number_that_is_not_finite_is_the_hospitals_own_error(bad, at):
    values = np.zeros(BLOCK_WORDS + 10, np.float32)
    assert not quantise(values, 3, bits=24, parties=3).any()
    values[at] = bad
    with pytest.raises(DataError) as caught:
        quantise(values, 3, bits=24, parties=3)
    assert caught.value.code is Code.NON_FINITE


@given(st.floats(1e-30, 1e30), st.sampled_from(RINGS), st.integers(3, 100))
def test_an_exponent_is_the_finest_that_holds_its_range(range_, bits, parties):
    exponent = exponent_for(range_, bits, parties)
    exact = Fraction(range_)
    assert exact * Fraction(2) ** exponent <= limit(bits, parties)
    if exponent < MAX_EXPONENT:
        assert exact * Fraction(2) ** (exponent + 1) > limit(bits, parties)


@pytest.mark.parametrize("range_", [0.0, -1.0, math.inf, math.nan])
def test_a_range_is_finite_and_positive(range_):
    with pytest.raises(ValueError, match="range"):
        exponent_for(range_, 24, 3)


@given(
    st.lists(st.tuples(st.integers(-5, 25), st.integers(0, 9)), max_size=12), st.integers(0, 999)
)
def test_a_layout_is_its_tensors_one_after_another(tensors, seed):
    sizes = [size for _, size in tensors]
    exponents = [exponent for exponent, _ in tensors]
    flat = np.random.default_rng(seed).normal(size=sum(sizes)).astype(np.float32)
    words = quantise_layout(flat, exponents=exponents, sizes=sizes, bits=24, parties=5)
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    each = [quantise(p, e, bits=24, parties=5) for p, e in zip(parts, exponents, strict=True)]
    assert np.array_equal(words, np.concatenate([*each, np.empty(0, np.uint32)]))


def test_tensors_that_cross_blocks_keep_their_grids():
    sizes = [BLOCK_WORDS - 3, 7, 2 * BLOCK_WORDS, 1]
    exponents = [10, 3, 12, 0]
    flat = np.random.default_rng(1).normal(size=sum(sizes)).astype(np.float32)
    words = quantise_layout(flat, exponents=exponents, sizes=sizes, bits=32, parties=3)
    scale = np.repeat(np.exp2(np.array(exponents, np.float64)), sizes)
    assert np.array_equal(words.view(np.int32), np.rint(flat.astype(np.float64) * scale))


def test_a_layout_that_does_not_fit_is_our_own_error():
    flat = np.zeros(4, np.float32)
    for arguments in (
        {"exponents": [0], "sizes": [3], "bits": 24},
        {"exponents": [0, 0], "sizes": [4], "bits": 24},
        {"exponents": [128], "sizes": [4], "bits": 24},
        {"exponents": [0], "sizes": [4], "bits": 64},
        {"exponents": [0], "sizes": [4], "bits": 24, "out": np.zeros(5, np.uint32)},
    ):
        with pytest.raises(ValueError, match=r"zip|sizes|exponents|ring|length"):
            quantise_layout(flat, parties=3, **arguments)
    with pytest.raises(TypeError):
        quantise(flat.astype(np.float64), 0, bits=24, parties=3)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.sampled_from(RINGS))
def test_reducing_and_reading_signs_are_arithmetic_modulo_the_ring(values, bits):
    words = np.array(values, np.uint32)
    half, ring = 1 << (bits - 1), 1 << bits
    expected = [(value + half) % ring - half for value in values]
    assert to_signed(words, bits).tolist() == expected
    reduce_(words, bits)
    assert words.tolist() == [value % ring for value in values]
    assert to_signed(words, bits).tolist() == expected


def test_64_bit_words_are_read_as_signed_and_widths_must_match():
    words = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert to_signed(words, 64).tolist() == [0, 1, -(2**63), -1]
    for bits, wrong in ((64, words.astype(np.uint32)), (32, words), (16, words)):
        with pytest.raises(ValueError, match="ring"):
            to_signed(wrong, bits)
