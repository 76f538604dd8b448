"""The keystream's draws: their law, their freshness, their grid."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

import client.privacy.noise
from client.privacy.noise import GRID_BITS, SecureNoise, grid_of
from client.privacy.sampling import sample_patients
from common.world import SeededEntropy, SystemEntropy

torch.set_num_threads(1)


def seeded(name: str = "noise") -> SecureNoise:
    return SecureNoise(SeededEntropy(name))


def test_gaussian_draws_have_the_normal_law():
    draws = seeded().gaussian(300_001)
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert draws.std() == pytest.approx(1.0, abs=0.01)
    assert abs(stats.kurtosis(draws)) < 0.05
    # Neighbours and the two halves of a Box-Muller pair are unrelated.
    half = len(draws) // 2
    for lag in (1, half, half + 1):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 0.02
    # Control: the test notices a standard deviation that is 2 % off.
    assert stats.kstest(draws * 1.02, "norm").pvalue < 1e-3


def test_coins_fall_at_their_rate_and_certain_coins_always_fall():
    noise = seeded()
    for rate in (0.0256, 0.5, 0.97):
        mean = noise.bernoulli(400_000, rate).mean()
        assert abs(mean - rate) < 5 * math.sqrt(rate * (1 - rate) / 400_000)
    assert noise.bernoulli(1000, 1.0).all()
    assert not noise.bernoulli(1000, 0.0).any()
    with pytest.raises(ValueError, match="probability"):
        noise.bernoulli(1, 1.5)


def test_samples_are_ascending_independent_and_sometimes_empty():
    noise = seeded()
    sizes = [len(sample_patients(noise, 40, 0.05)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(2.0, abs=0.2)
    assert np.var(sizes) == pytest.approx(1.9, abs=0.35)  # binomial, not a fixed batch
    assert 0 in sizes
    one = sample_patients(noise, 1000, 0.3)
    assert (np.diff(one) > 0).all()


def test_a_permutation_is_uniform_over_orders():
    noise = seeded()
    counts = stats.chisquare(
        np.bincount([int(np.dot(noise.permutation(3), [9, 3, 1])) for _ in range(6000)])[
            [5, 7, 11, 15, 19, 21]
        ]
    )
    assert counts.pvalue > 1e-3


def test_two_objects_two_rounds_and_two_draws_never_repeat():
    noise = SecureNoise(SystemEntropy())
    draws = [noise.gaussian(1000)]
    draws.append(noise.gaussian(1000))
    noise.renew()
    draws.append(noise.gaussian(1000))
    draws.append(SecureNoise(SystemEntropy()).gaussian(1000))
    for left in range(4):
        for right in range(left):
            assert abs(np.corrcoef(draws[left], draws[right])[0, 1]) < 0.2


def test_seeded_torch_noise_cancels_between_rounds_and_a_bare_generator_always_starts_alike():
    """Controls: the two habits that make noise repeat, and a seed with only 32 bits."""
    torch.manual_seed(42)
    first = torch.randn(100)
    torch.manual_seed(42)
    assert torch.equal(first, torch.randn(100))
    bare = [torch.randn(100, generator=torch.Generator()) for _ in range(2)]
    assert torch.equal(*bare)
    wide = [
        torch.randn(100, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)
    ]
    assert torch.equal(*wide)
    # Ours takes 256 bits from the entropy port, and one changed bit changes everything.

    class Fixed:
        def __init__(self, key: bytes) -> None:
            self.key, self.asked = key, []

        def take(self, count: int) -> bytes:
            self.asked.append(count)
            return self.key

    low, high = Fixed(bytes(32)), Fixed(bytes(31) + b"\x01")
    ours = [SecureNoise(low).gaussian(1000), SecureNoise(high).gaussian(1000)]
    assert low.asked == [32]
    assert abs(np.corrcoef(*ours)[0, 1]) < 0.2


@pytest.mark.parametrize("std", [1e-4, 0.37, 1.0, 5000.0])
def test_noised_sums_lie_on_a_power_of_two_grid_and_keep_their_law(std):
    noise = seeded()
    secret = torch.linspace(-3 * std, 3 * std, 20_000)
    noised = noise.add_gaussian(secret.reshape(100, 200), std)
    assert noised.shape == (100, 200)
    assert noised.dtype == torch.float32
    grid = grid_of(std)
    assert math.log2(grid) == int(math.log2(grid))
    assert grid <= std * 2.0**-GRID_BITS
    steps = noised.double() / grid
    assert bool((steps == steps.round()).all())
    drawn = ((noised.reshape(-1).double() - secret.double()) / std).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    # Control: a plain float sum is not on the grid, its low bits tell about the summands.
    plain = secret.double() + torch.randn(20_000, dtype=torch.float64) * std
    assert not bool(((plain / grid) % 1 == 0).all())


def test_arrays_keep_their_type_and_shape():
    noised = seeded().add_gaussian(np.zeros((3, 4)), 2.0)
    assert noised.shape == (3, 4)
    assert noised.dtype == np.float64


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_noise_without_a_scale_is_not_added(std):
    with pytest.raises(ValueError, match="positive"):
        seeded().add_gaussian(np.zeros(3), std)


@pytest.mark.parametrize("count", [5, 100_001])
def test_noise_drawn_ahead_has_the_law_and_the_determinism_of_noise_drawn_now(count, monkeypatch):
    monkeypatch.setattr(client.privacy.noise, "_PIECE", 1 << 14)
    zeros = torch.zeros(count)

    def ahead(workers: int) -> torch.Tensor:
        monkeypatch.setattr(client.privacy.noise, "_WORKERS", workers)
        noise = seeded()
        noise.prefetch(count)
        return noise.add_gaussian(zeros, 1.0)

    first = ahead(1)
    assert torch.equal(first, ahead(4))  # the key alone decides, not how threads run
    if count > 1000:
        assert stats.kstest(first.numpy(), "norm").pvalue > 1e-3
        # No two pieces are alike, and none is what the stream itself goes on with.
        pieces = first[: 6 << 14].reshape(6, -1).numpy()
        assert np.abs(np.corrcoef(pieces) - np.eye(6)).max() < 0.05


def test_noise_drawn_ahead_is_added_once_and_only_to_what_it_was_drawn_for():
    noise = seeded()
    noise.prefetch(1000)
    other = noise.add_gaussian(torch.zeros(999), 1.0)  # not what was asked ahead
    first = noise.add_gaussian(torch.zeros(1000), 1.0)
    again = noise.add_gaussian(torch.zeros(1000), 1.0)
    assert all(0.8 < float(drawn.std()) < 1.2 for drawn in (other, first, again))
    for left, right in ((first, again), (first[:999], other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.2
    noise.prefetch(1000)
    noise.renew()
    assert noise._ahead is None  # what was drawn under the old key is gone
    same = [seeded(), seeded()]
    for one in same:
        one.prefetch(1000)
    assert torch.equal(*[one.add_gaussian(torch.zeros(1000), 1.0) for one in same])
    # Control: the comparison sees noise that is added twice.
    assert abs(np.corrcoef(first, first)[0, 1]) > 0.9


def test_a_large_sum_is_noised_in_pieces_as_small_as_a_cache():
    values = torch.full((1 << 20,), 3.0)
    tracemalloc.start()
    noised = seeded().add_gaussian(values, 2.0)
    _, peak = tracemalloc.get_traced_memory()  # numpy's; the result itself is torch's
    tracemalloc.stop()
    assert peak < 4 << 20  # the normals of all values would be 8 MB
    assert float(noised.std()) == pytest.approx(2.0, abs=0.02)
    assert float(noised.mean()) == pytest.approx(3.0, abs=0.02)
    assert torch.equal(values, torch.full((1 << 20,), 3.0))
