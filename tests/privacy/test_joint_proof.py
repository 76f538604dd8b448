"""The obligations of the proof in docs/PRIVACY.md, "Joint", by enumeration of small cases."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from client.privacy import discrete
from client.privacy.discrete import DiscreteGaussian
from client.privacy.noise import SecureNoise
from common.accountant import DISCRETIZATION, DpEvent, epsilon
from common.errors import ConfigError
from common.joint import SLACK, joint_noise
from common.secagg.quantise import to_signed
from common.world import SystemEntropy

HONEST, PARTIES, STD = 4, 10, 6.0
TAU_SQUARED = 9
ROUNDING = 1e-12  # of float64 sums of a few thousand probabilities


# ---------------------------------------------------------------------- sensitivity


def rounded(signal, exponent, batch, cut):
    """What a hospital adds its share to, as the trainer computes it."""
    return np.clip(np.rint(signal * -math.ldexp(1 / batch, exponent)), -cut, cut)


def longest_move(size, moves, exponent=6, batch=32.0, cut=1 << 20):
    """(the longest L2 move of rounded sums seen over `moves`, the unrounded bound, sqrt(size))."""
    rng = np.random.default_rng(5)
    longest = 0.0
    for move in moves:
        for _ in range(40):
            others = rng.normal(0, 50, size)
            # The worst others lie just below a half, where a hair's breadth moves a whole step.
            grid = (np.rint(others * 2.0**exponent / batch) + 0.5 - 1e-9) * batch / 2.0**exponent
            for base in (others, grid, -grid):
                change = rounded(base + move, exponent, batch, cut) - rounded(
                    base, exponent, batch, cut
                )
                longest = max(longest, float(np.linalg.norm(change)))
    clip = max(float(np.linalg.norm(move)) for move in moves)
    return longest, clip * 2.0**exponent / batch, math.sqrt(size)


def moves(size, clip):
    rng = np.random.default_rng(6)
    spread = rng.normal(0, 1, (20, size))
    spread *= clip / np.linalg.norm(spread, axis=1, keepdims=True)
    even = np.full((1, size), clip / math.sqrt(size))
    single = np.eye(1, size) * clip
    return [*spread, *even, *single]


@pytest.mark.parametrize("cut", [1 << 20, 60, 1])
def test_one_patient_moves_rounded_and_cut_sums_by_no_more_than_the_bound(cut):
    for size in (1, 2, 9, 400):
        longest, moved, root = longest_move(size, moves(size, 3.0), cut=cut)
        assert longest <= moved + root


def test_the_bound_on_rounding_is_nearly_reached_and_without_its_root_it_is_wrong():
    # A hair more than a whole number of steps everywhere: every coordinate moves one step more.
    size, step = 400, 32.0 / 2**6
    for steps in (0, 1, 3):
        move = np.full(size, step * (steps + 1e-6))
        longest, moved, root = longest_move(size, [move])
        assert longest <= moved + root
        assert longest > 0.999 * (moved + root)
        # Control.
        assert longest > 1.3 * moved


@settings(max_examples=60, deadline=None)
@given(
    signal=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    move=st.lists(st.floats(-2, 2), min_size=12, max_size=12),
    cut=st.integers(1, 3000),
)
def test_no_pair_of_neighbours_is_found_that_moves_further(signal, move, cut):
    base, change = np.array(signal), np.array(move[: len(signal)])
    left, right = (rounded(each, 5, 8.0, cut) for each in (base, base + change))
    clip = SLACK * float(np.linalg.norm(change))
    assert np.linalg.norm(left - right) <= clip * 2**5 / 8 + math.sqrt(len(signal))


# ---------------------------------------------------------------------- sums of shares


def weights(variance, reach):
    """The law of N_Z(0, variance) on -reach .. reach, as Decimals of the running precision."""
    half = [(-(Decimal(k) ** 2) / (2 * variance)).exp() for k in range(1, reach + 1)]
    total = 1 + 2 * sum(half)
    return [weight / total for weight in [*reversed(half), Decimal(1), *half]]


def smoothing(variance):
    """Largest relative error of a convolution whose inner width squared is `variance`."""
    return 8 * (-2 * Decimal(math.pi) ** 2 * Decimal(variance)).exp()


def relative_error(first, second, factor, targets):
    """max over `targets` z of |P(factor * X + Y = z) / N_Z(z) - 1|, X and Y of these variances."""
    wide = factor**2 * first + second
    left, right = (
        weights(Decimal(each), math.ceil(25 * math.sqrt(each))) for each in (first, second)
    )
    middle, reach, span = len(left) // 2, len(right) // 2, math.ceil(25 * math.sqrt(wide))
    wanted = weights(Decimal(wide), span)
    worst = Decimal(0)
    for z in targets:
        near = (x for x in range(-middle, middle + 1) if abs(z - factor * x) <= reach)
        mass = sum(left[x + middle] * right[z - factor * x + reach] for x in near)
        worst = max(worst, abs(mass / wanted[z + span] - 1))
    return worst


@pytest.mark.parametrize("variance", [2, 4, 16])
def test_the_sum_of_two_shares_is_the_wider_discrete_gaussian(variance):
    with localcontext(prec=140):
        error = relative_error(variance, variance, 1, range(-12, 13))
        # Not idle: the error is there, and the bound is not far above it.
        assert smoothing(variance / 2) / 100 < error <= smoothing(variance / 2)
        # Control: shares of a third of a step are no shares of a Gaussian.
        assert relative_error(0.125, 0.125, 1, range(-1, 2)) > 0.01


def test_shares_of_many_hospitals_add_up_one_after_another():
    with localcontext(prec=140):
        for summed in (16, 32, 48):
            inner = Fraction(16 * summed, 16 + summed)
            bound = smoothing(Decimal(inner.numerator) / inner.denominator)
            assert relative_error(summed, 16, 1, range(-8, 9)) <= bound


@pytest.mark.parametrize(("variance", "factor"), [(9, 1), (16, 2), (36, 3)])
def test_a_wide_draw_of_two_narrow_ones_has_the_wide_law(variance, factor):
    with localcontext(prec=140):
        bound = smoothing(variance / (factor**2 + 1))
        assert bound / 100 < relative_error(variance, variance, factor, range(-15, 16)) <= bound


def test_control_too_wide_a_step_between_narrow_draws_shows():
    with localcontext(prec=60):
        assert relative_error(9, 9, 10, range(-15, 16)) > 0.1


def wide_distance(std, factor):
    """Total variation between factor * X + Y, X and Y from the real table, and N_Z(0, std**2)."""
    table = discrete._table(Fraction(std) ** 2 / (factor**2 + 1))
    reach, bits = table.reach, 2 * discrete.TABLE_BITS
    bounds = [0, *table.bounds, 1 << discrete.TABLE_BITS]
    law = [high - low for low, high in itertools.pairwise(bounds)]
    with localcontext(prec=100):
        # Far ratios from near ones: k**2 = (k - 1)**2 + (2k - 1), exp once.
        ratio, shrink = (-1 / (2 * Decimal(std) ** 2)).exp(), (-1 / Decimal(std) ** 2).exp()
        wanted = [Decimal(1)]
        for _ in range(math.ceil(16 * std)):
            wanted.append(wanted[-1] * ratio)
            ratio *= shrink
        total = 2 * sum(wanted) - 1
        whole = [int(weight / total * (1 << bits)) for weight in wanted]
    differences = 0
    for z in range(len(whole)):
        first = max(-reach, -((reach - z) // factor))
        last = min(reach, (z + reach) // factor)
        mass = sum(law[x + reach] * law[z - factor * x + reach] for x in range(first, last + 1))
        differences += abs(mass - whole[z]) * (1 if z == 0 else 2)
    return Fraction(differences, 2 << bits)


def test_the_real_samplers_whole_law_is_within_its_stated_distance():
    sampler = DiscreteGaussian(SecureNoise(SystemEntropy()), 1024.0)
    distance = wide_distance(1024.0, sampler._factor)
    assert 0 < distance <= sampler.distance
    # Control: a K four times too large leaves gaps that the same sum sees at once.
    assert wide_distance(1024.0, 4 * sampler._factor) > 0.01


# ---------------------------------------------------------------------- whole numbers and reals


def rounded_continuous(mean, std, tau, values):
    """The law of: draw x from N(mean, std**2 - tau**2), round it to N_Z with width tau about x.

    By the trapezoidal rule, whose error for Gaussians of these widths is below 1e-30.
    """
    inner = math.sqrt(std**2 - tau**2)
    step = min(tau, inner, 1.0) / 16
    x = mean + np.arange(-math.ceil(9 * inner / step), math.ceil(9 * inner / step) + 1) * step
    density = np.exp(-((x - mean) ** 2) / (2 * inner**2)) / (inner * math.sqrt(2 * math.pi))
    near = np.rint(x)[:, None] + np.arange(-40, 41)[None, :]
    normaliser = np.exp(-((near - x[:, None]) ** 2) / (2 * tau**2)).sum(axis=1)
    return np.array(
        [
            (density / normaliser * np.exp(-((y - x) ** 2) / (2 * tau**2))).sum() * step
            for y in values
        ]
    )


def whole_law(std, values):
    support = np.arange(-math.ceil(12 * std), math.ceil(12 * std) + 1)
    return np.exp(-(values**2) / (2 * std**2)) / np.exp(-(support**2) / (2 * std**2)).sum()


@pytest.mark.parametrize("mean", [0, 5, -2])
@pytest.mark.parametrize("tau", [0.7, 1.0, 1.25])
def test_whole_noise_is_real_noise_of_a_little_less_variance_rounded_at_random(mean, tau):
    values = np.arange(mean - 10, mean + 11)
    direct = whole_law(4.0, values - mean)
    ratio = rounded_continuous(mean, 4.0, tau, values) / direct
    bound = float(smoothing(tau**2)) + ROUNDING
    assert np.abs(ratio - 1).max() <= bound
    # Control: with hardly any width the rounding is no longer that of a Gaussian.
    poor = rounded_continuous(mean, 4.0, 0.2, values) / direct
    assert np.abs(poor - 1).max() > 1e-4


# ---------------------------------------------------------------------- divergence


def summed_shares(honest, std):
    """The law of the sum of `honest` shares on -r .. r, by plain convolution."""
    support = np.arange(-math.ceil(14 * std), math.ceil(14 * std) + 1)
    share = np.exp(-(support**2) / (2 * std**2))
    share /= share.sum()
    law = np.ones(1)
    for _ in range(honest):
        law = np.convolve(law, share)
    return law


def shifted(law, shift, rate):
    """(law, its mixture with itself moved by `shift`), on one support."""
    pad = abs(shift)
    before = np.pad(law, pad)
    moved = np.roll(before, shift)
    return before, (1 - rate) * before + rate * moved


def hockey_stick(left, right, bound):
    return float(np.maximum(left - math.exp(bound) * right, 0).sum())


def real_delta(law, shift, rate, bound):
    """Of one step of the whole-number mechanism: the larger of the two directions."""
    without, with_ = shifted(law, shift, rate)
    return max(hockey_stick(with_, without, bound), hockey_stick(without, with_, bound))


def charged_delta(sigma, rate, bound):
    """Of one step of the sampled Gaussian of noise multiplier sigma: closed form, both ways."""

    def threshold(ratio):
        return sigma**2 * math.log((ratio - 1 + rate) / rate) + 0.5

    growth, deltas = math.exp(bound), [0.0]
    at = threshold(growth)
    mixture = (1 - rate) * ndtr(-at / sigma) + rate * ndtr((1 - at) / sigma)
    deltas.append(mixture - growth * ndtr(-at / sigma))
    if 1 / growth > 1 - rate:
        at = threshold(1 / growth)
        mixture = (1 - rate) * ndtr(at / sigma) + rate * ndtr((at - 1) / sigma)
        deltas.append(ndtr(at / sigma) - growth * mixture)
    return float(max(deltas))


def charged_sigma(variance, sensitivity):
    return math.sqrt(variance - TAU_SQUARED) / sensitivity


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("sensitivity", [3, 15, 30])
def test_one_step_on_whole_numbers_leaks_no_more_than_what_is_charged(rate, sensitivity):
    law = summed_shares(HONEST, STD)
    # Control: shares sized for all hospitals, where only h are honest.
    short = summed_shares(HONEST, STD * math.sqrt(HONEST / PARTIES))
    sigma = charged_sigma(HONEST * STD**2, sensitivity)
    for bound in (0.0, 0.05, 0.3, 1.0, 3.0):
        charged = charged_delta(sigma, rate, bound)
        for shift in {1, sensitivity // 2, sensitivity, -sensitivity}:
            assert real_delta(law, shift, rate, bound) <= charged + ROUNDING
        if charged > 1e-9:
            assert real_delta(short, sensitivity, rate, bound) > charged
            # And what is charged is near: not a tenth of the noise is given away.
            nearly = charged_delta(math.sqrt(1.1 * HONEST) * STD / sensitivity, rate, bound)
            assert real_delta(law, sensitivity, rate, bound) > nearly


def test_more_survivors_than_counted_on_only_help():
    sigma = charged_sigma(HONEST * STD**2, 15)
    for survivors in (HONEST, HONEST + 1, PARTIES):
        law = summed_shares(survivors, STD)
        assert real_delta(law, 15, 0.3, 0.5) <= charged_delta(sigma, 0.3, 0.5)
    # Control: one fewer does not hold what is charged; such a round burns.
    assert real_delta(summed_shares(HONEST - 1, STD), 15, 0.3, 0.5) > charged_delta(sigma, 0.3, 0.5)


def test_whoever_knows_all_other_shares_faces_the_stated_part_of_the_noise():
    sensitivity, wanted = 15, 1.0
    share = math.sqrt((wanted * sensitivity) ** 2 / HONEST + TAU_SQUARED)
    for unknown in (1, 2, HONEST, 7):
        law = summed_shares(unknown, share)
        stated = wanted * math.sqrt(unknown / HONEST)
        for bound in (0.1, 1.0, 2.0):
            assert real_delta(law, sensitivity, 0.3, bound) <= charged_delta(stated, 0.3, bound)
    # Control: the last share alone does not give the multiplier of h shares.
    alone = summed_shares(1, share)
    assert real_delta(alone, sensitivity, 0.3, 1.0) > charged_delta(wanted, 0.3, 1.0)


def adaptive_delta(law, size, rate, bound):
    """Two steps, exactly; the second patient's direction depends on what the first step gave."""
    without, with_ = shifted(law, size, rate)
    up, down = shifted(law, size, rate)[1], shifted(law, -size, rate)[1]
    rising = np.arange(len(without)) % 3 != 0
    second = np.where(rising[:, None], up[None, :], down[None, :])
    left, right = with_[:, None] * second, without[:, None] * without[None, :]
    return max(hockey_stick(left, right, bound), hockey_stick(right, left, bound))


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_two_adaptive_steps_leak_no_more_than_the_accountant_charges(rate):
    law = summed_shares(HONEST, STD)
    short = summed_shares(HONEST, STD * math.sqrt(HONEST / PARTIES))
    sigma = charged_sigma(HONEST * STD**2, 15)
    for delta in (1e-2, 1e-5, 1e-8):
        charged = epsilon([DpEvent(sigma, rate, 2)], delta)
        assert adaptive_delta(law, 15, rate, charged) <= delta
        # Control.
        assert adaptive_delta(short, 15, rate, charged) > delta


def composed_epsilon(law, shift, rate, steps, delta):
    """Of many steps, by dp-accounting from the two laws themselves, rounded pessimistically."""
    without, with_ = shifted(law, shift, rate)
    kept = (without > 1e-60) & (with_ > 1e-60)
    lower, upper = (
        {int(at): math.log(each[at]) for at in np.flatnonzero(kept)} for each in (without, with_)
    )
    composed = pld.from_two_probability_mass_functions(
        lower, upper, value_discretization_interval=DISCRETIZATION, symmetric=False
    ).self_compose(steps)
    return composed.get_epsilon_for_delta(delta)


def test_fifty_steps_leak_no_more_than_the_accountant_charges():
    law = summed_shares(HONEST, STD)
    short = summed_shares(HONEST, STD * math.sqrt(HONEST / PARTIES))
    sigma = charged_sigma(HONEST * STD**2, 15)
    for rate in (0.05, 0.4):
        charged = epsilon([DpEvent(sigma, rate, 50)], 1e-5)
        real = composed_epsilon(law, 15, rate, 50, 1e-5)
        assert 0.85 * charged < real <= charged
        # Control.
        assert composed_epsilon(short, 15, rate, 50, 1e-5) > 1.2 * charged


@pytest.mark.parametrize("shift", [(15, 0), (9, 12), (-12, 9), (10, 11)])
def test_in_two_dimensions_an_oblique_move_leaks_no_more_than_a_straight_one(shift):
    assert math.hypot(*shift) <= 15
    sigma = charged_sigma(HONEST * STD**2, 15)

    def delta(law, rate, bound):
        pad = 15
        before = np.pad(law, pad)
        moved = [np.roll(before, by) for by in shift]
        without = before[:, None] * before[None, :]
        with_ = (1 - rate) * without + rate * moved[0][:, None] * moved[1][None, :]
        return max(hockey_stick(with_, without, bound), hockey_stick(without, with_, bound))

    law = summed_shares(HONEST, STD)
    short = summed_shares(HONEST, STD * math.sqrt(HONEST / PARTIES))
    for rate, bound in ((0.1, 0.2), (0.5, 1.0), (1.0, 2.0)):
        charged = charged_delta(sigma, rate, bound)
        assert delta(law, rate, bound) <= charged + ROUNDING
        # Control.
        assert delta(short, rate, bound) > charged


def test_the_numbers_of_a_real_round_leak_no_more_than_what_is_charged():
    """The narrowest noise that is allowed, at its own sensitivity, by enumeration."""
    sigma, batch = 0.7, 4e4
    noise = joint_noise(
        parties=6,
        honest=3,
        parameters=90,
        clip_norm=0.5,
        expected_batch=batch,
        noise_multiplier=sigma,
    )
    assert noise.share_std < 5000
    std = math.sqrt(3) * noise.share_std
    law = whole_law(std, np.arange(-math.ceil(14 * std), math.ceil(14 * std) + 1))
    farthest = math.floor(noise.sensitivity)
    for bound in (0.1, 1.0, 3.0):
        charged = charged_delta(sigma, 0.2, bound)
        assert 0.99 * charged < real_delta(law, farthest, 0.2, bound) <= charged
    # Control: without the root of the rounding in it the noise is too small by that much.
    bare = whole_law(
        sigma * (noise.sensitivity - math.sqrt(90)),
        np.arange(-math.ceil(14 * std), math.ceil(14 * std) + 1),
    )
    assert real_delta(bare, farthest, 0.2, 1.0) > charged_delta(sigma, 0.2, 1.0)


# ---------------------------------------------------------------------- the ring

PARAMETERS = {
    "parties": st.integers(3, 1000),
    "share": st.floats(0.01, 1),
    "parameters": st.integers(1, 2**30),
    "clip_norm": st.floats(1e-4, 1e3),
    "expected_batch": st.floats(1, 1e6),
    "noise_multiplier": st.floats(0.3, 100),
}


def parameters_of(parties, share, **others):
    try:
        return joint_noise(parties=parties, honest=math.ceil(share * (parties - 1)), **others)
    except ConfigError:
        assume(False)


def ring_sum(words):
    """The sum that the secure sum gives: words of 32 bits, added modulo 2**32, read signed."""
    total = np.zeros(1, np.uint32)
    for word in words:
        total += np.array([word], np.int64).astype(np.uint32)
    return int(to_signed(total, 32)[0])


@settings(max_examples=100, deadline=None)
@given(**PARAMETERS)
def test_no_sum_of_all_parties_wraps_in_the_ring(parties, **others):
    noise = parameters_of(parties, **others)
    most = noise.signal_bound + noise.share_bound
    assert parties * most <= 2**31 - 1
    for sign in (1, -1):
        assert ring_sum([sign * most] * parties) == sign * most * parties
    # Control: one party that is not cut makes the sum wrap.
    wild = 2**31 - most * (parties - 1)
    assert ring_sum([most] * (parties - 1) + [wild]) != most * (parties - 1) + wild


@settings(max_examples=10, deadline=None)
@given(**PARAMETERS)
def test_every_share_that_a_round_may_need_can_be_drawn_within_its_bound(parties, **others):
    noise = parameters_of(parties, **others)
    sampler = DiscreteGaussian(SecureNoise(SystemEntropy()), noise.share_std)
    assert sampler.bound <= noise.share_bound
    words = np.full(100, noise.signal_bound, np.int32)
    sampler.add_to(words)
    assert np.abs(words.astype(np.int64)).max() <= noise.signal_bound + noise.share_bound
    assert sampler.distance <= 2.0**-109
