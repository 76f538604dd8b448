"""The discrete Gaussian: its table, its law, its freshness, and what happens on a tie."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from client.privacy import discrete
from client.privacy.discrete import TABLE_BITS, DiscreteGaussian
from client.privacy.noise import SecureNoise
from common.joint import TAIL
from common.world import SeededEntropy, SystemEntropy

WHOLE = 1 << TABLE_BITS
DRAWS = 400_000
STDS = [0.7, 6.0, 300.0, 1500.0, 47_000.5, 3e6]
LIMIT = 1e-6


def seeded(std, name="discrete"):
    return DiscreteGaussian(SecureNoise(SeededEntropy(name)), std)


def distribution(std, edges):
    """P(X <= edge) of N_Z(0, std**2): summed where it is narrow; at most 1e-8 off where wide."""
    if std < 1000:
        support = np.arange(-math.ceil(12 * std), math.ceil(12 * std) + 1)
        weights = np.exp(-(support**2) / (2 * std**2))
        summed = np.cumsum(weights) / weights.sum()
        return summed[np.clip(edges - support[0], 0, len(support) - 1)]
    return special.ndtr((edges + 0.5) / std)


def p_value(draws, std):
    """Of a chi-square test over bins of about equal probability, and both tails."""
    edges = np.unique(np.rint(std * stats.norm.ppf(np.linspace(0, 1, 202)[1:-1])).astype(np.int64))
    outer = math.ceil(4.2 * std)
    edges = np.concatenate([[-outer], edges, [outer]])
    below = distribution(std, edges)
    wanted = np.diff(np.concatenate([[0.0], below, [1.0]])) * len(draws)
    ranks = np.searchsorted(edges, draws, side="left")
    seen = np.bincount(ranks, minlength=len(edges) + 1)
    # The outermost bins expect five draws each; what lies far beyond them shows in the tail test.
    return stats.chisquare(seen, wanted * (seen.sum() / wanted.sum())).pvalue


def moments(draws, std):
    """z of the mean, and z of the variance; both are standard normal for the right law."""
    count = len(draws)
    exact = draws.astype(np.float64)
    return (
        exact.mean() / (std / math.sqrt(count)),
        ((exact**2).mean() / std**2 - 1) / math.sqrt(2 / count),
    )


def reference(std, reach):
    """P(X = k) for k = 0 .. reach, to a hundred digits, from Decimal's own exponential."""
    with localcontext(prec=100):
        twice = 2 * Decimal(std) ** 2
        weights = [(-(Decimal(k) ** 2) / twice).exp() for k in range(math.ceil(22 * std))]
        total = 2 * sum(weights) - 1
        return [weight / total for weight in weights[: reach + 1]]


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("std", [0.5, 1.0, 6.25, 57.3, 400.0])
def test_the_table_is_symmetric_whole_and_right_to_the_last_bit(std):
    table = discrete._table(Fraction(std) ** 2)
    bounds = table.bounds
    assert len(bounds) == 2 * table.reach
    assert list(bounds) == sorted(bounds)
    assert all(low + high == WHOLE for low, high in zip(bounds, reversed(bounds), strict=True))
    steps = np.diff(np.array([0, *bounds, WHOLE], dtype=object))
    assert sum(steps) == WHOLE
    assert steps[0] > 0
    # Every bound is the nearest to the true one, so a probability is off by one unit at most.
    wanted = reference(std, table.reach)
    with localcontext(prec=100):
        units = [Decimal(int(step)) for step in steps[table.reach :]]
        errors = [abs(unit - value * WHOLE) for unit, value in zip(units, wanted, strict=True)]
        assert max(errors[:-1]) <= Decimal("1.0001")
        beyond = (1 - wanted[0]) / 2 - sum(wanted[1:])
        assert beyond * WHOLE <= Decimal("0.5001")
        # Control: the same reference sees a standard deviation that is off by 2**-100.
        other = reference(Decimal(std) * (1 + Decimal(2) ** -100), 1)
        assert abs(other[0] - wanted[0]) * WHOLE > 2


def test_the_exponential_is_right_to_three_hundred_bits():
    for value in (Fraction(1, 10**9), Fraction(1, 3), Fraction(2), Fraction(19, 7)):
        with localcontext(prec=120):
            exact = (-Decimal(value.numerator) / Decimal(value.denominator)).exp() * 2**320
            assert abs(Decimal(discrete._exp_of_minus(value)) - exact) < 2


@pytest.mark.parametrize("std", [0.5, 30.0, 1023.9, 1024.0, 5e4, 2.0**26])
def test_widths_multiply_up_to_the_one_asked_for(std):
    factor = discrete._factor(std)
    variance = Fraction(std) ** 2 / (factor**2 + 1)
    assert variance * (factor**2 + 1) == Fraction(std) ** 2
    if factor:
        assert variance / (factor**2 + 1) >= 9  # the inner width tau, squared
        assert discrete._factor(std) >= 15  # so that (K + 1) reaches fit into the tail
    sampler = seeded(std)
    assert sampler.bound <= math.ceil(TAIL * std)
    assert sampler.distance <= 2.0**-109
    assert sampler.std == std


@pytest.mark.parametrize("std", [0.0, 0.3, -4.0, 2.0**27, math.nan, math.inf])
def test_widths_without_a_table_are_refused(std):
    with pytest.raises(ValueError, match="lies in"):
        seeded(std)


def test_a_sampler_whose_draws_could_pass_the_bound_is_refused(monkeypatch):
    monkeypatch.setattr(discrete, "_factor", lambda std: 1)  # x + y reaches root two too far
    with pytest.raises(ValueError, match="beyond the bound"):
        seeded(2000.0)


# ---------------------------------------------------------------------- the law


@pytest.mark.parametrize("std", STDS)
def test_draws_have_the_law_of_the_discrete_gaussian(std):
    sampler = seeded(std)
    draws = sampler.sample(DRAWS)
    assert draws.dtype == np.int64
    assert draws.shape == (DRAWS,)
    assert p_value(draws, std) > LIMIT
    assert max(map(abs, moments(draws, std))) < 5
    assert np.abs(draws).max() <= sampler.bound
    # Control: the same tests see a width that is 2 % off.
    wrong = seeded(1.02 * std).sample(DRAWS)
    assert p_value(wrong, std) < LIMIT
    assert abs(moments(wrong, std)[1]) > 5


def test_wide_draws_are_not_all_multiples_and_every_remainder_is_alike():
    sampler = seeded(47_000.5)
    draws = sampler.sample(DRAWS)
    factor = sampler._factor
    assert factor > 100
    for modulus in (2, 3, factor, factor + 1):
        assert stats.chisquare(np.bincount(draws % modulus)).pvalue > LIMIT
    # Control: without the narrow part all are multiples of K.
    coarse = draws // factor * factor
    assert stats.chisquare(np.bincount(coarse % factor, minlength=factor)).pvalue < LIMIT


def test_the_tail_has_its_weight():
    draws, std = seeded(300.0).sample(3_000_000), 300.0
    beyond = int((np.abs(draws) > 4 * std).sum())
    wanted = 2 * distribution(std, np.array([-4 * 300 - 1]))[0] * len(draws)
    assert wanted > 150
    assert abs(beyond - wanted) < 5 * math.sqrt(wanted)


def test_control_a_table_cut_at_four_sigma_is_caught(monkeypatch):
    whole = discrete._tails

    def cut(variance):
        return whole(variance)[: int(4 * math.sqrt(variance))]

    monkeypatch.setattr(discrete, "_tails", cut)
    table = discrete._table.__wrapped__(Fraction(300) ** 2)
    draws = table.draw(SecureNoise(SeededEntropy("cut")), 3_000_000)
    beyond = int((np.abs(draws) > 1200).sum())
    wanted = 2 * distribution(300.0, np.array([-1201]))[0] * len(draws)
    assert abs(beyond - wanted) > 5 * math.sqrt(wanted)
    # And the table's own test sees it: what lies beyond the reach weighs far more than a unit.
    with localcontext(prec=100):
        wanted = reference(300.0, table.reach)
        assert ((1 - wanted[0]) / 2 - sum(wanted[1:])) * WHOLE > 2**100


# ---------------------------------------------------------------------- freshness


def correlation(left, right):
    return abs(float(np.corrcoef(left, right)[0, 1]))


def test_draws_do_not_hang_together_and_no_two_calls_repeat():
    noise = SecureNoise(SeededEntropy("fresh"))
    sampler = DiscreteGaussian(noise, 2000.0)
    first, second = sampler.sample(50_000), sampler.sample(50_000)
    noise.renew()
    third = sampler.sample(50_000)
    fourth = DiscreteGaussian(SecureNoise(SystemEntropy()), 2000.0).sample(50_000)
    everything = [first, second, third, fourth]
    limit = 6 / math.sqrt(50_000)
    for at, left in enumerate(everything):
        for lag in (1, 2, 1 << 14, 1 << 15):
            assert correlation(left[:-lag], left[lag:]) < 6 / math.sqrt(50_000 - lag)
        for right in everything[:at]:
            assert correlation(left, right) < limit
            assert correlation(np.abs(left), np.abs(right)) < limit
    # Control: a sampler that takes its keystream from the start again is caught.
    again = [DiscreteGaussian(SecureNoise(SeededEntropy("x")), 2000.0) for _ in range(2)]
    assert correlation(again[0].sample(50_000), again[1].sample(50_000)) > limit


@pytest.mark.parametrize("std", [40.0, 5000.0])
@pytest.mark.parametrize("count", [0, 1, 2, 32_767, 32_769])
def test_any_number_of_draws_can_be_had(std, count):
    draws = seeded(std).sample(count)
    assert draws.shape == (count,)
    words = np.full(count, 2**31 - 1, np.int32)
    seeded(std).add_to(words)
    # The same draws, modulo 2**32.
    assert ((words.astype(np.int64) - (2**31 - 1) - draws) % 2**32 == 0).all()


@pytest.mark.parametrize(
    "words", [np.zeros(4, np.int64), np.zeros((2, 2), np.int32), np.zeros(4, np.float32)]
)
def test_noise_is_added_to_words_alone(words):
    with pytest.raises(TypeError, match="int32"):
        seeded(5.0).add_to(words)


# ---------------------------------------------------------------------- ties


class Keystream:
    """Gives out the words it was told to, in order."""

    def __init__(self, words):
        self.words = list(words)

    def uint64(self, count):
        given, self.words = self.words[:count], self.words[count:]
        return np.array(given, np.uint64)


def pair(low, high):
    return (high << 32) | low


@pytest.mark.parametrize("std", [6.25, 300.0])
def test_a_tie_with_a_bound_is_decided_by_the_bits_below(std):
    """For every kind of bucket: one bound in it, several, and the crowds at both ends."""
    table = discrete._table(Fraction(std) ** 2)
    reach, quiet = table.reach, 0x4000_0000  # a head that ties with nothing
    assert quiet not in set(table.heads.tolist())
    calm = int(np.searchsorted(table.heads, quiet)) - reach
    crowded = 0
    for at in [*range(0, 2 * reach, max(1, reach // 97)), reach - 1, reach, 2 * reach - 1]:
        bound, head = table.bounds[at], int(table.heads[at])
        crowded += int(table.below[head >> 16] == discrete._CROWDED)
        rest = bound & ((1 << 96) - 1)
        for below, value in ((rest, at + 1 - reach), (rest - 1, at - reach)):
            if not 0 <= below < 1 << 96:
                continue
            words = [pair(quiet, head), below >> 32, (below & 0xFFFF_FFFF) << 32]
            drawn = table.draw(Keystream(words), 2)
            # As many bounds as are at most the whole uniform, those with the same head included.
            assert drawn.tolist() == [
                calm,
                sum(b <= (head << 96) | below for b in table.bounds) - reach,
            ]
            assert drawn[1] == value or table.bounds.count(bound) > 1
    assert 0 < crowded < 2 * reach


def test_without_a_tie_the_head_decides_and_nothing_more_is_drawn():
    table = discrete._table(Fraction(300) ** 2)
    taken = set(table.heads.tolist())
    beside = {head + step for head in taken for step in (-1, 1)} - taken
    heads = sorted(head for head in beside if 0 <= head < 1 << 32)
    heads = heads[: len(heads) // 2 * 2]
    stream = Keystream(
        [pair(low, high) for low, high in zip(heads[::2], heads[1::2], strict=True)] + [7, 7]
    )
    drawn = table.draw(stream, len(heads))
    assert stream.words == [7, 7]
    exact = [np.searchsorted(table.heads, head) - table.reach for head in heads]
    assert drawn.tolist() == exact


def test_the_fast_path_agrees_with_the_plain_definition_on_a_real_keystream():
    words = SecureNoise(SeededEntropy("plain")).uint64(30_000)
    for std in (0.5, 6.25, 300.0):
        table = discrete._table(Fraction(std) ** 2)
        heads = words.view(np.uint32)
        untied = ~np.isin(heads, table.heads)
        drawn = table.draw(Keystream([*words.tolist(), *range(1000)]), 60_000)
        plain = np.searchsorted(table.heads, heads, side="right") - table.reach
        assert (drawn == plain)[untied].all()
        assert untied.mean() > 0.999


def test_control_a_sampler_that_ignores_the_bits_below_is_caught():
    """Draws all have the head of one bound: the true law splits them where the bits below say."""
    table = discrete._table(Fraction(6.25) ** 2)
    at = table.reach + 3
    head = int(table.heads[at])
    noise = SecureNoise(SeededEntropy("ties"))

    class Tied:
        def uint64(self, count):
            return np.full(count, pair(head, head), np.uint64) if count > 2 else noise.uint64(count)

    drawn = table.draw(Tied(), 4000)
    share = 1 - (table.bounds[at] & ((1 << 96) - 1)) / 2**96
    assert set(drawn.tolist()) == {at - table.reach, at + 1 - table.reach}
    spread = math.sqrt(4000 * share * (1 - share))
    assert abs((drawn == at + 1 - table.reach).sum() - 4000 * share) < 5 * spread
    careless = np.full(4000, at - table.reach)
    assert abs((careless == at + 1 - table.reach).sum() - 4000 * share) > 5 * spread
