"""Normalisation statistics: exact, independent of every order, and bounded by patient."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.statistics import (
    DEVIATION,
    DEVIATION_FLOOR,
    MEAN,
    STATISTIC_SCALE,
    StatisticsLayout,
    normalised,
    patient_words,
    scaled,
)

FEATURES = 3
LAYOUT = StatisticsLayout(FEATURES)
LOW, HIGH = np.array([0.0, -5.0, 100.0]), np.array([1.0, 5.0, 300.0])
CELLS = st.one_of(st.just(math.nan), st.floats(-1e6, 1e6))
PATIENT = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, FEATURES), elements=CELLS))
POPULATION = st.lists(PATIENT, min_size=1, max_size=8)


def words(patients):
    return sum(
        (patient_words(scaled(p, LOW, HIGH)) for p in patients), np.zeros(LAYOUT.words, np.int64)
    )


def draw(patients, seed, missing=0.1):
    stream = np.random.default_rng(seed)
    found = []
    for _ in range(patients):
        values = stream.normal(
            [0.4, 1.0, 180.0], [0.2, 2.0, 40.0], (stream.integers(1, 4), FEATURES)
        )
        found.append(np.where(stream.random(values.shape) < missing, np.nan, values))
    return found


def test_without_noise_they_are_the_pooled_mean_and_deviation():
    """Against numpy over all sites' patients; each word is rounded once by patient."""
    patients = [p[:1] for p in draw(400, 1, missing=0)]
    state = LAYOUT.resolve(words(patients[:150]) + words(patients[150:]), 2)
    pooled = scaled(np.concatenate(patients), LOW, HIGH)
    assert np.allclose(state[MEAN], pooled.mean(axis=0), atol=2 / STATISTIC_SCALE)
    assert np.allclose(state[DEVIATION], pooled.std(axis=0), atol=1e-4)


def test_the_sums_are_exactly_the_rounded_patients():
    patients = draw(50, 2)
    expected = np.zeros(LAYOUT.words, dtype=object)
    for patient in patients:
        for feature in range(FEATURES):
            column = scaled(patient, LOW, HIGH)[:, feature]
            known = column[~np.isnan(column)]
            centred = np.sort(known - 0.5)
            moments = (centred.sum(), np.sort(centred**2).sum(), len(known) / 4)
            for block, moment in enumerate(moments):
                expected[block * FEATURES + feature] += round(
                    moment / len(column) * STATISTIC_SCALE
                )
    assert np.array_equal(words(patients), expected.astype(np.int64))


def test_missing_values_contribute_nothing():
    patient = np.array([[np.nan, 1.0, np.nan], [np.nan, np.nan, 200.0]])
    found = patient_words(scaled(patient, LOW, HIGH)).reshape(3, FEATURES) / STATISTIC_SCALE
    assert (4 * found[2]).tolist() == [0, 0.5, 0.5]
    assert found[0].tolist() == pytest.approx([0, 0.05, 0], abs=1e-4)
    assert found[1].tolist() == pytest.approx([0, 0.005, 0], abs=1e-4)


@given(POPULATION, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_no_order_of_sites_patients_or_records_changes_a_bit(patients, shuffle):
    whole = LAYOUT.resolve(words(patients), 3)
    mixed = [p[::-1] for p in patients]
    shuffle.shuffle(mixed)
    parts = [mixed[at::3] for at in range(3)]
    again = LAYOUT.resolve(words(parts[2]) + words(parts[0]) + words(parts[1]), 3)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


@given(POPULATION, st.integers(0, 7))
@settings(deadline=None)
def test_one_patient_moves_the_words_by_at_most_the_stated_sensitivity(patients, out):
    out %= len(patients)
    rest = patients[:out] + patients[out + 1 :]
    change = words(patients) - words(rest)
    assert np.linalg.norm(change.astype(np.float64)) <= LAYOUT.sensitivity * STATISTIC_SCALE
    assert LAYOUT.sensitivity == math.sqrt(3 * FEATURES / 8)


def test_the_stated_sensitivity_is_reached():
    """A bound that nothing reaches would be noise wasted."""
    corner = np.full((1, FEATURES), 1e9)
    change = np.linalg.norm(patient_words(scaled(corner, LOW, HIGH)))
    assert change == pytest.approx(LAYOUT.sensitivity * STATISTIC_SCALE)


def test_control_counting_records_instead_of_patients_passes_the_sensitivity():
    """A patient with ten records, each counted as a patient of its own."""
    patient = np.full((10, FEATURES), 1e6)
    naive = sum(patient_words(scaled(row[None], LOW, HIGH)) for row in patient)
    assert np.linalg.norm(naive) > 9 * LAYOUT.sensitivity * STATISTIC_SCALE
    assert (
        np.linalg.norm(patient_words(scaled(patient, LOW, HIGH)))
        <= LAYOUT.sensitivity * STATISTIC_SCALE
    )


def test_control_values_that_are_not_cut_pass_the_sensitivity():
    wild = np.array([[7.0, 0.0, 150.0]])
    part = (wild - LOW) / (HIGH - LOW) - 0.5
    moments = np.stack([part, part**2, np.full_like(part, 0.25)])
    assert np.linalg.norm(moments) > LAYOUT.sensitivity


@given(
    arrays(np.int64, LAYOUT.words, elements=st.integers(-(2**50), 2**50)),
    st.sampled_from([0.0, 0.5, 30.0]),
)
@settings(deadline=None)
def test_whatever_the_noise_does_the_statistics_are_usable(total, noise):
    state = StatisticsLayout(FEATURES, noise).resolve(total, 4)
    assert state[MEAN].dtype == state[DEVIATION].dtype == np.float32
    assert ((state[MEAN] >= 0) & (state[MEAN] <= 1)).all()
    assert ((state[DEVIATION] >= DEVIATION_FLOOR) & (state[DEVIATION] <= 0.5)).all()
    extremes = normalised(
        np.array([[0.0] * FEATURES, [1.0] * FEATURES]), state[MEAN], state[DEVIATION]
    )
    assert np.abs(extremes).max() <= 1 / DEVIATION_FLOOR


def test_a_feature_nobody_has_is_left_in_the_middle():
    state = LAYOUT.resolve(np.zeros(LAYOUT.words, np.int64), 1)
    assert state[MEAN].tolist() == state[DEVIATION].tolist() == [0.5] * FEATURES


def test_the_arithmetic_is_that_of_single_rounded_doubles():
    """The bits that every party must find, by python's own arithmetic, one feature at a time."""
    patients = draw(60, 5)
    total = words(patients)
    state = StatisticsLayout(FEATURES, 0.25).resolve(total, 3)
    error = 0.25 * LAYOUT.sensitivity * math.sqrt(3)
    for at in range(FEATURES):
        first, second, present = (int(word) / STATISTIC_SCALE for word in total[at::FEATURES])
        count = present / 0.25
        centre = first / count
        variance = max(second / count - centre * centre, error / count, DEVIATION_FLOOR**2)
        assert state[MEAN][at] == np.float32(centre + 0.5)
        assert state[DEVIATION][at] == np.float32(min(math.sqrt(variance), 0.5))


def test_a_feature_that_drowns_in_noise_is_not_blown_up():
    """Hundreds of patients, hardly any variance: what is left is noise, and is taken for noise."""
    stream, sigma = np.random.default_rng(3), 4.0
    layout = StatisticsLayout(FEATURES, sigma)
    values = np.tile([0.5, 0.0, 200.0], (300, 1)) + stream.normal(0, 1e-3, (300, FEATURES))
    exact = words([row[None] for row in values])
    largest = []
    for _ in range(50):
        noise = stream.normal(0, sigma * layout.sensitivity * STATISTIC_SCALE, layout.words)
        total = exact + np.rint(noise).astype(np.int64)
        told = normalised(scaled(values, LOW, HIGH), *layout.resolve(total, 1).values())
        blind = normalised(scaled(values, LOW, HIGH), *LAYOUT.resolve(total, 1).values())
        largest.append((np.abs(told).max(), np.abs(blind).max()))
    assert max(told for told, _ in largest) < 1
    assert max(blind for _, blind in largest) > 2, "control: without knowing the noise it blows up"


def test_scaling_cuts_at_the_declared_bounds_and_keeps_missing_missing():
    part = scaled(np.array([[-1.0, 0.0, np.nan], [2.0, 99.0, 200.0]]), LOW, HIGH)
    assert part[0, :2].tolist() == [0, 0.5]
    assert np.isnan(part[0, 2])
    assert part[1].tolist() == [1, 1, 0.5]
    wide = np.array([-1e308]), np.array([1e308])
    assert scaled(np.array([[0.0]]), *wide).tolist() == [[0.5]]


def test_a_missing_value_is_normalised_to_zero():
    part = np.array([[0.25, np.nan]])
    mean, deviation = np.array([0.5, 0.9], np.float32), np.array([0.25, 0.1], np.float32)
    assert normalised(part, mean, deviation).tolist() == [[-1.0, 0.0]]


def test_a_sum_of_another_length_is_refused():
    with pytest.raises(ValueError, match="length"):
        LAYOUT.resolve(np.zeros(8, np.int64), 1)
    with pytest.raises(ValueError, match="at least one feature"):
        StatisticsLayout(0)
