"""The public arithmetic of joint noise: enough of it, on the finest grid, the same for everybody."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import Code, ConfigError
from common.joint import (
    RING_BITS,
    SHARE_FLOOR,
    SLACK,
    TAIL,
    JointNoise,
    audiences,
    joint_noise,
)

USUAL = {
    "parties": 10,
    "honest": 4,
    "parameters": 300_000,
    "clip_norm": 0.5,
    "expected_batch": 1000.0,
    "noise_multiplier": 1.0,
}
MARGIN = 9


def usual(**changes) -> JointNoise:
    return joint_noise(**{**USUAL, **changes})


def spread(noise, shares):
    """Standard deviation of the released gradient that so many shares give, in its own unit."""
    return math.ldexp(math.sqrt(shares) * noise.share_std, -noise.exponent)


def enough(share_std, shares, factor, given):
    """Whether k s**2 - 9 >= (factor * sigma * sensitivity)**2, to fifty digits."""
    with localcontext(prec=50):
        moved = (
            Decimal(SLACK)
            * Decimal(given["clip_norm"])
            * Decimal(2) ** given["exponent"]
            / Decimal(given["expected_batch"])
        )
        sensitivity = moved + Decimal(given["parameters"]).sqrt()
        wanted = (Decimal(given["noise_multiplier"]) * sensitivity) ** 2 * factor
        return shares * Decimal(share_std) ** 2 - MARGIN >= wanted


DRAWN = {
    "parties": st.integers(3, 1000),
    "part": st.floats(0.01, 1),
    "parameters": st.integers(1, 2**30),
    "clip_norm": st.floats(1e-4, 1e3),
    "expected_batch": st.floats(1, 1e6),
    "noise_multiplier": st.floats(0.3, 100),
}


def drawn(parties, part, **others):
    others |= {"parties": parties, "honest": math.ceil(part * (parties - 1))}
    try:
        noise = joint_noise(**others)
    except ConfigError as refusal:
        assert refusal.code == Code.JOINT_RING  # noqa: PT017 - most draws are meant to pass
        assume(False)
    return noise, {**others, "exponent": noise.exponent}


@settings(max_examples=150, deadline=None)
@given(**DRAWN)
def test_any_number_of_shares_is_noise_enough_for_its_audience(**parameters):
    noise, given_ = drawn(**parameters)
    honest = noise.honest
    for shares in {1, honest, honest + 1, given_["parties"]}:
        factor = Fraction(shares, honest)
        factor = Decimal(factor.numerator) / factor.denominator
        assert enough(noise.share_std, shares, factor * (1 - Decimal(2) ** -60), given_)
    # Controls: one share fewer than counted, and a share without its margin for whole numbers.
    # (Where all the margins together outweigh one share of noise, one fewer is enough: no control.)
    if honest > 1 and noise.share_std**2 > MARGIN * (honest + 1):
        assert not enough(noise.share_std, honest - 1, Decimal(1), given_)
    bare = math.sqrt(noise.share_std**2 - 2 * MARGIN)
    if noise.share_std < 1e5:  # floats hold the margin of nine to better than a tenth
        assert not enough(bare, honest, Decimal(1), given_)


@settings(max_examples=150, deadline=None)
@given(**DRAWN)
def test_the_grid_is_the_finest_that_holds_every_party(**parameters):
    noise, given_ = drawn(**parameters)
    most = (2 ** (RING_BITS - 1) - 1) // given_["parties"]
    assert noise.share_bound == math.ceil(TAIL * noise.share_std)
    assert noise.signal_bound == most - noise.share_bound
    assert noise.share_std >= SHARE_FLOOR
    # A hospital whose clipped gradients fill the whole expected batch, all alike, is not cut.
    assert noise.signal_bound >= math.ldexp(SLACK * given_["clip_norm"], noise.exponent)
    moved = math.ldexp(SLACK * given_["clip_norm"] / given_["expected_batch"], noise.exponent)
    root = math.sqrt(given_["parameters"])
    assert noise.sensitivity == pytest.approx(moved + root)
    assert noise.rounding == pytest.approx(root / moved)
    finer = given_["noise_multiplier"] * (2 * moved + root) / math.sqrt(noise.honest)
    room = most - TAIL * finer
    assert room < math.ldexp(1.6 * SLACK * given_["clip_norm"], noise.exponent + 1)


def test_everybody_computes_the_same_numbers():
    assert usual() == usual()
    # To the last bit, on every machine: only operations that IEEE 754 rounds correctly are used.
    noise = usual()
    assert noise.exponent == 28
    assert (noise.share_bound, noise.signal_bound) == (944298, 213804066)
    assert noise.share_std.hex() == "0x1.0779d58ec17a2p+16"
    assert noise != usual(noise_multiplier=1.0001)


def test_what_is_asked_for_moves_the_noise_the_right_way():
    noise = usual()
    released = spread(noise, noise.honest)
    # The noise of the released gradient is sigma C / B and, on a fine grid, hardly more.
    plain = USUAL["noise_multiplier"] * USUAL["clip_norm"] / USUAL["expected_batch"]
    assert plain < released < 1.01 * plain
    assert released == pytest.approx(plain * SLACK * (1 + noise.rounding), rel=1e-6)
    assert spread(usual(noise_multiplier=2.0), 4) == pytest.approx(2 * released, rel=1e-2)
    # More honest hospitals: smaller shares, the same sum.
    eight = usual(honest=8)
    assert eight.share_std < noise.share_std
    assert spread(eight, 8) == pytest.approx(released, rel=1e-2)
    # Calibrated for all ten where four are honest, the sum of four would be too quiet.
    assert spread(usual(honest=10), 4) < 0.65 * released
    # A fuller ring or a larger model: a coarser grid, or more rounding.
    assert usual(parties=100, honest=40).exponent < noise.exponent
    assert usual(parameters=3_000_000).rounding > 3 * noise.rounding
    assert usual(clip_norm=1.0).exponent == noise.exponent - 1
    assert usual(clip_norm=1.0).share_std == noise.share_std


@pytest.mark.parametrize(
    "changes",
    [
        {"expected_batch": 1e8},
        {"parties": 1000, "honest": 999, "expected_batch": 1e5},
        {"expected_batch": 1.0, "noise_multiplier": 1e6, "honest": 1},
    ],
)
def test_a_study_whose_noise_has_no_room_is_refused_with_the_numbers(changes):
    with pytest.raises(ConfigError) as refusal:
        usual(**changes)
    assert refusal.value.code == Code.JOINT_RING
    assert f"{changes['expected_batch']:g}" in str(refusal.value)


def test_the_stated_factors_are_those_of_the_shares_nobody_else_knows():
    stated = {each.name: each for each in audiences(10, 7, 3)}
    assert list(stated) == ["coordinator", "colluders", "all_others"]
    assert stated["coordinator"].factor == pytest.approx(math.sqrt(7 / 4))
    assert stated["colluders"].factor == 1
    assert stated["all_others"].factor == pytest.approx(1 / 2)
    assert "3 of 10" in stated["colluders"].told
    assert "9 other" in stated["all_others"].told
    # The noise that is really there holds each, at the narrowest shares that are allowed.
    given_ = {**USUAL, "parties": 10, "honest": 4, "parameters": 90, "expected_batch": 6e5}
    noise = joint_noise(**given_)
    assert noise.share_std < 3 * SHARE_FLOOR
    for name, shares in (("coordinator", 7), ("colluders", 4), ("all_others", 1)):
        factor = Decimal(stated[name].factor) ** 2
        assert enough(noise.share_std, shares, factor, {**given_, "exponent": noise.exponent})
    # Control: a margin of nine for the whole sum is not one for a share alone.
    thin = math.sqrt(noise.share_std**2 - MARGIN * 3 / 4)
    lone = Decimal(stated["all_others"].factor) ** 2
    assert not enough(thin, 1, lone, {**given_, "exponent": noise.exponent})
    assert enough(thin, 4, Decimal(1), {**given_, "exponent": noise.exponent})


def test_the_numbers_cannot_be_changed_after_they_are_agreed():
    noise = usual()
    with pytest.raises(AttributeError):
        noise.share_std = 1.0
    assert replace(noise) == noise
