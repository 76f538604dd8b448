"""Privacy accounting: from what was done to (epsilon, delta), and from epsilon to sigma.

The truth is the privacy-loss distribution (PLD) of add-or-remove-one-patient neighbours, by
`dp_accounting`; Renyi accounting is kept as a ceiling that the PLD may never pass. Histories of
plain Gaussians alone have a closed form and never touch the library.

Everything is deterministic: events are merged and sorted before they are composed, so two
sites with the same history print the same number, and a history is computed once per process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DISCRETIZATION = 1e-3
"""Width of a PLD bucket. Rounding is pessimistic: a wider bucket can only raise epsilon."""

_SIGMA_DECIMALS = 4
_SIGMA_FLOOR = 0.05
_SIGMA_CEILING = 1e6
_EPSILON_CEILING = 1e4
_Merged = tuple[tuple[float, float, int], ...]


@dataclass(frozen=True, slots=True, order=True)
class DpEvent:
    """Some equal Gaussian mechanisms on Poisson samples of the patients.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity.
        sampling_rate: probability that a patient takes part in one step; 1.0 means all do.
        steps: how many times it was done.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError("noise_multiplier must be positive and finite")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError("sampling_rate must lie in (0, 1]")
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def epsilon(events: Sequence[DpEvent], delta: float) -> float:
    """The epsilon of doing all of `events` to the same patients.

    Guarantee: an upper bound (buckets round up), the same for every order of `events`;
    repeated histories cost a dictionary look-up.
    Source: Koskela et al. 2020 and Doroshenko et al. 2022 (PLD); Balle and Wang 2018, theorem 8,
    where every event is a plain Gaussian.
    """
    _check_delta(delta)
    return _epsilon(_merge(events), delta)


def epsilon_rdp(events: Sequence[DpEvent], delta: float) -> float:
    """The same by Renyi accounting: looser, and independent enough to be a ceiling.

    Source: Mironov 2017; Mironov, Talwar and Zhang 2019.
    """
    _check_delta(delta)
    merged = _merge(events)
    if not merged:
        return 0.0
    import dp_accounting

    # Whole orders only: the series for fractional ones does not converge at large sampling rates.
    accountant = dp_accounting.rdp.RdpAccountant(
        orders=[*range(2, 64), 80, 96, 128, 192, 256, 512, 1024],
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    for sigma, rate, steps in merged:
        event = dp_accounting.GaussianDpEvent(sigma)
        if rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def solve_noise_multiplier(
    target: float, delta: float, *, sampling_rate: float, steps: int
) -> float:
    """The smallest noise multiplier, to four decimals and rounded up, that stays within `target`.

    Guarantee: `epsilon` of the answer is at most `target`; a smaller multiple of 0.0001 within
    the solver's precision would not be.

    Raises:
        ValueError: where no noise multiplier up to a million is enough, or the target is not
            a positive number.
    """
    _check_delta(delta)
    return solve_sigma(target, lambda sigma: epsilon([DpEvent(sigma, sampling_rate, steps)], delta))


def solve_sigma(target: float, spent: Callable[[float], float]) -> float:
    """The smallest noise multiplier, to four decimals, whose `spent` is at most `target`.

    Args:
        target: epsilon.
        spent: epsilon by noise multiplier, falling; it may count other releases besides.

    Guarantee and Raises: as `solve_noise_multiplier`.
    """
    if not (math.isfinite(target) and target > 0):
        raise ValueError("the target epsilon must be positive and finite")
    high = 1.0
    while spent(high) > target:
        high *= 2
        if high > _SIGMA_CEILING:
            raise ValueError("no noise multiplier below a million reaches this epsilon")
    low = high / 2
    while low > _SIGMA_FLOOR and spent(low) <= target:
        low, high = low / 2, low
    unit = 10.0**-_SIGMA_DECIMALS
    while high - low > unit / 4:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    ticks = math.ceil(high / unit)
    while spent(round(ticks * unit, _SIGMA_DECIMALS)) > target:
        ticks += 1
    return round(ticks * unit, _SIGMA_DECIMALS)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError("delta must lie in (0, 1)")


def _merge(events: Iterable[DpEvent]) -> _Merged:
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_rate)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(sorted((sigma, rate, count) for (sigma, rate), count in steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(merged: _Merged, delta: float) -> float:
    # Plain Gaussians compose exactly into one: 1/sigma^2 adds up (Dong, Roth and Su 2022).
    precision = math.fsum(count / sigma**2 for sigma, rate, count in merged if rate == 1)
    sampled = [entry for entry in merged if entry[1] < 1]
    if not sampled:
        return _gaussian_epsilon(math.sqrt(precision), delta) if precision else 0.0
    total = None
    for sigma, rate, count in sampled:
        composed = _sampled_pld(sigma, rate).self_compose(count)
        total = composed if total is None else total.compose(composed)
    assert total is not None  # noqa: S101 - `sampled` is not empty
    if precision:
        total = total.compose(_plain_pld(1 / math.sqrt(precision)))
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


def _relation() -> Any:
    import dp_accounting

    return dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


@lru_cache(maxsize=64)
def _sampled_pld(sigma: float, rate: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=DISCRETIZATION,
        sampling_prob=rate,
        neighboring_relation=_relation(),
    )


@lru_cache(maxsize=4)
def _plain_pld(sigma: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=DISCRETIZATION, neighboring_relation=_relation()
    )


def _gaussian_epsilon(mean: float, delta: float) -> float:
    """Epsilon of N(0, 1) against N(mean, 1), by bisection on Balle and Wang's delta(epsilon)."""
    if _gaussian_delta(mean, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _gaussian_delta(mean, high) > delta:
        low, high = high, high * 2
        if high > _EPSILON_CEILING:
            return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _gaussian_delta(mean, middle) > delta else (low, middle)
    return high


def _gaussian_delta(mean: float, bound: float) -> float:
    upper = math.erfc((bound / mean - mean / 2) / math.sqrt(2)) / 2
    tail = math.erfc((bound / mean + mean / 2) / math.sqrt(2)) / 2
    # Where the tail underflows we subtract nothing: delta, and so epsilon, comes out larger.
    return upper if tail == 0 else upper - math.exp(bound + math.log(tail))
