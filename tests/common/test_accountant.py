"""Epsilon against two other accountants and the closed form, and sigma against epsilon."""

from __future__ import annotations

import math
import warnings

import pytest

from common.accountant import (
    DpEvent,
    epsilon,
    epsilon_rdp,
    solve_noise_multiplier,
)

DELTA = 1e-5
SETTINGS = [  # sampling rate, noise multiplier, steps
    (0.0256, 1.0, 500),
    (0.0256, 0.7, 500),
    (0.0512, 2.0, 2000),
    (0.1024, 1.0, 100),
    (0.0256, 1.2, 1170),
    (0.2, 1.675, 40),
    (0.1, 1.1, 200),
    (0.01, 0.8, 100),
    (0.3, 3.0, 300),
    (0.5, 5.0, 50),
]


@pytest.mark.parametrize(("rate", "sigma", "steps"), SETTINGS)
def test_epsilon_agrees_with_prv_and_stays_below_renyi(rate, sigma, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        prv = PRVAccountant()
        prv.history = [(sigma, rate, steps)]
        other = prv.get_epsilon(DELTA)
    ours = epsilon([DpEvent(sigma, rate, steps)], DELTA)
    assert abs(ours - other) <= max(0.01 * other, 0.02)
    assert ours <= epsilon_rdp([DpEvent(sigma, rate, steps)], DELTA)


def test_a_wrong_sampling_rate_would_be_noticed():
    """Control for the comparison above: a cohort four times smaller than planned."""
    planned = epsilon([DpEvent(1.0, 0.0256, 500)], DELTA)
    really = epsilon([DpEvent(1.0, 0.1024, 500)], DELTA)
    assert planned == pytest.approx(3.617, abs=0.005)
    assert really == pytest.approx(17.0, abs=0.1)


def test_plain_gaussians_have_the_textbook_epsilon():
    def delta_of(bound: float, sigma: float) -> float:
        def normal(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        half = 1 / (2 * sigma)
        return normal(half - bound * sigma) - math.exp(bound) * normal(-half - bound * sigma)

    for sigma in (0.5, 1.0, 4.0, 30.0):
        found = epsilon([DpEvent(sigma, 1.0, 1)], DELTA)
        assert delta_of(found, sigma) == pytest.approx(DELTA, rel=1e-6)
    assert epsilon([DpEvent(1.0, 1.0, 1)], DELTA) == pytest.approx(4.377, abs=1e-3)


def test_plain_gaussians_add_up_in_precision():
    parts = [DpEvent(10.0, 1.0, 3), DpEvent(20.0, 1.0, 4)]
    whole = DpEvent(1 / math.sqrt(3 / 100 + 4 / 400), 1.0, 1)
    assert epsilon(parts, DELTA) == pytest.approx(epsilon([whole], DELTA), rel=1e-9)


def test_a_mixture_costs_more_than_its_parts_and_less_than_their_sum():
    sampled, plain = DpEvent(1.1, 0.0256, 500), DpEvent(30.0, 1.0, 50)
    apart = [epsilon([sampled], DELTA), epsilon([plain], DELTA)]
    together = epsilon([sampled, plain], DELTA)
    assert max(apart) < together < sum(apart)
    assert together <= epsilon_rdp([sampled, plain], DELTA)


def test_the_plain_path_and_the_library_agree():
    """A sampling rate a hair below one goes through the PLD and must meet the closed form."""
    closed = epsilon([DpEvent(8.0, 1.0, 20)], DELTA)
    composed = epsilon([DpEvent(8.0, 1.0 - 1e-12, 20)], DELTA)
    assert composed == pytest.approx(closed, abs=0.01)
    assert composed >= closed


def test_the_order_and_the_grouping_of_events_do_not_matter():
    events = [DpEvent(1.0, 0.1, 3), DpEvent(2.0, 1.0, 1), DpEvent(1.5, 0.1, 2)]
    split = [DpEvent(1.0, 0.1, 1), *reversed(events[1:]), DpEvent(1.0, 0.1, 2)]
    assert epsilon(events, DELTA) == epsilon(split, DELTA)


def test_nothing_costs_nothing_and_more_never_costs_less():
    assert epsilon([], DELTA) == 0.0
    assert epsilon_rdp([], DELTA) == 0.0
    curve = [
        epsilon([DpEvent(1.2, 0.1, 5 * done), DpEvent(20.0, 1.0, done)], DELTA)
        for done in range(1, 9)
    ]
    assert len(set(curve)) == 8
    assert curve == sorted(curve)


def test_forgetting_earlier_rounds_shows_a_fraction_of_the_truth():
    """Control: an accountant that is made anew each round (0.95) against the history (3.62)."""
    once = epsilon([DpEvent(1.0, 0.0256, 10)], DELTA)
    assert once == pytest.approx(0.95, abs=0.01)
    assert epsilon([DpEvent(1.0, 0.0256, 10 * 50)], DELTA) > 3.6


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(3.0, 0.0256, 500), (8.0, 0.0256, 500), (1.0, 0.2, 40), (0.5, 1.0, 20), (3.0, 1.0, 1)],
)
def test_the_solved_noise_stays_within_the_target_and_wastes_nothing(target, rate, steps):
    sigma = solve_noise_multiplier(target, DELTA, sampling_rate=rate, steps=steps)
    assert sigma == round(sigma, 4)
    assert epsilon([DpEvent(sigma, rate, steps)], DELTA) <= target
    assert epsilon([DpEvent(round(sigma - 2e-4, 4), rate, steps)], DELTA) > target


def test_solved_noise_is_the_published_one():
    assert solve_noise_multiplier(3.0, DELTA, sampling_rate=0.0256, steps=500) == pytest.approx(
        1.1, abs=0.001
    )


@pytest.mark.parametrize(
    "event", [(0.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, 0)]
)
def test_an_impossible_event_cannot_be_made(event):
    with pytest.raises(ValueError, match="must"):
        DpEvent(*event)


def test_impossible_questions_are_not_answered():
    with pytest.raises(ValueError, match="delta"):
        epsilon([DpEvent(1.0, 0.1, 1)], 0.0)
    with pytest.raises(ValueError, match="positive"):
        solve_noise_multiplier(0.0, DELTA, sampling_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="million"):
        solve_noise_multiplier(1e-9, 1e-12, sampling_rate=1.0, steps=10**6)
