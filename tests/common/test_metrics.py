"""Metric words: exact without noise, sensible with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics import (
    METRIC_SCALE,
    ClassScoring,
    Metrics,
    words_from_counts,
)

LABELS = ("a", "b", "c")
# rows true, columns predicted: 10 patients
CONFUSION = np.array([[3, 1, 0], [0, 2, 2], [1, 0, 1]], float)


def scoring(labels=LABELS, cap=8.0):
    return ClassScoring(tuple(labels), cap)


def words_of(confusion, loss=4.0):
    return words_from_counts(np.append(confusion.ravel(), loss))


def test_the_words_are_the_confusion_matrix_and_the_loss_in_fixed_point():
    assert scoring("abcde").length == 26
    words = words_of(CONFUSION)
    assert words.dtype == np.int64
    assert words[:3].tolist() == [3 * 65536, 65536, 0]
    assert words[-1] == 4 * METRIC_SCALE
    assert words_from_counts(np.array([0.5 / METRIC_SCALE, 1.0]))[0] == 0


def test_exact_words_give_the_textbook_numbers():
    metrics = scoring().read(words_of(CONFUSION))
    assert metrics.n == 10.0
    assert metrics.primary == 0.6
    assert metrics.loss == pytest.approx(3.2)
    a, b, c = metrics.classes
    assert (a.precision, a.recall, a.f1, a.support) == (0.75, 0.75, 0.75, 4.0)
    assert (b.precision, b.recall, b.support) == (2 / 3, 0.5, 4.0)
    assert b.f1 == pytest.approx(4 / 7)
    assert (c.precision, c.recall, c.f1) == (1 / 3, 0.5, 0.4)
    assert metrics.scores["macro_f1"] == pytest.approx((0.75 + 4 / 7 + 0.4) / 3)
    assert metrics.confusion == ((3.0, 1.0, 0.0), (0.0, 2.0, 2.0), (1.0, 0.0, 1.0))


def test_a_class_that_nobody_has_does_not_count_in_macro_f1():
    confusion = np.array([[4, 0, 0], [2, 2, 0], [0, 0, 0]], float)
    metrics = scoring(cap=1.0).read(words_of(confusion))
    assert metrics.scores["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert metrics.classes[2].f1 == 0.0


def test_no_patient_means_no_number():
    metrics = scoring().read(np.zeros(10, np.int64))
    assert (metrics.n, metrics.loss) == (0.0, None)
    assert metrics.scores == {"accuracy": None, "macro_f1": None}
    assert Metrics.from_json(metrics.to_json()) == metrics
    json.dumps(metrics.to_json(), allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), min_size=10, max_size=10))
def test_any_noise_gives_numbers_inside_their_ranges(words):
    metrics = scoring().read(np.array(words, np.int64))
    assert metrics.n >= 0
    assert metrics.primary is None or 0 <= metrics.primary <= 1
    macro = metrics.scores["macro_f1"]
    assert macro is None or 0 <= macro <= 1
    assert metrics.loss is None or 0 <= metrics.loss <= 8.0
    for row in metrics.classes:
        assert 0 <= row.precision <= 1
        assert 0 <= row.recall <= 1
        assert 0 <= row.f1 <= 1
        assert row.support >= 0
    assert min(min(row) for row in metrics.confusion) >= 0
    json.dumps(metrics.to_json(), allow_nan=False)


def test_clipping_sums_is_less_biased_than_clipping_cells():
    """Why counts are clipped after summing: with 10 x 10 cells, clipped cells drown the truth."""
    rng = np.random.default_rng(5)
    confusion = np.diag(np.full(10, 20.0))
    ours, cells = [], []
    for _ in range(200):
        noised = confusion + rng.normal(0, 5, (10, 10))
        words = words_from_counts(np.append(noised.ravel(), 0.0))
        ours.append(scoring("abcdefghij", 1.0).read(words).primary)
        clipped = noised.clip(min=0)
        cells.append(np.trace(clipped) / clipped.sum())
    assert abs(np.mean(ours) - 1.0) < 0.15
    assert abs(np.mean(cells) - 1.0) > 0.4, "the control: clipping cells is far off"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=9, max_size=9).filter(lambda cells: sum(cells) > 0),
    st.floats(0, 1),
)
def test_one_patient_moves_the_vector_by_at_most_the_stated_sensitivity(cells, loss):
    patient = np.append(np.array(cells) / sum(cells), loss)
    assert np.linalg.norm(patient) <= scoring().sensitivity + 1e-12


def test_the_stated_sensitivity_is_reached():
    assert np.linalg.norm([0.0, 1.0, 0.0, 1.0]) == pytest.approx(scoring().sensitivity)


@pytest.mark.parametrize("wrong", [[1.0, np.nan], [1.0, np.inf], [1e18, 0.0]])
def test_counts_that_are_no_metric_vector_are_refused(wrong):
    with pytest.raises(ValueError, match="metric"):
        words_from_counts(np.array(wrong))


def test_words_of_another_number_of_labels_are_refused():
    with pytest.raises(ValueError, match="another study"):
        scoring("ab").read(np.zeros(10, np.int64))


# ---------------------------------------------------------------------------- bootstrap


def intervals(confusion):
    labels = [f"l{i}" for i in range(len(confusion))]
    return scoring(labels).intervals(np.append(np.ravel(confusion), 0.0)[None])


def slow_bootstrap(confusion, n_boot, seed):
    """Resample the patients themselves, one by one."""
    rng = np.random.default_rng(seed)
    pairs = [
        (i, j)
        for i in range(len(confusion))
        for j in range(len(confusion))
        for _ in range(int(confusion[i][j]))
    ]
    pairs = np.array(pairs)
    accuracy, macro = [], []
    for _ in range(n_boot):
        true, found = pairs[rng.integers(0, len(pairs), len(pairs))].T
        accuracy.append((true == found).mean())
        scores = []
        for label in range(len(confusion)):
            both = (true == label).sum() + (found == label).sum()
            if both:
                scores.append(2 * ((true == label) & (found == label)).sum() / both)
        macro.append(np.mean(scores))
    return np.percentile(accuracy, (2.5, 97.5)), np.percentile(macro, (2.5, 97.5))


def test_the_interval_is_the_one_of_resampled_patients():
    confusion = CONFUSION * 12
    ours = intervals(confusion)
    accuracy, macro = slow_bootstrap(confusion, 2000, 2)
    assert ours["accuracy"] == pytest.approx(accuracy, abs=0.02)
    assert ours["macro_f1"] == pytest.approx(macro, abs=0.02)
    assert ours["accuracy"][0] < 0.6 < ours["accuracy"][1]


def test_the_interval_is_fixed_by_its_seed_and_shrinks_with_patients():
    assert intervals(CONFUSION) == intervals(CONFUSION)
    small = intervals(CONFUSION)["accuracy"]
    large = intervals(CONFUSION * 100)["accuracy"]
    assert (large[1] - large[0]) * 5 < small[1] - small[0]


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.array([[2.0, -1.0], [0.0, 1.0]])])
def test_a_bootstrap_of_noised_or_empty_counts_is_refused(wrong):
    with pytest.raises(ValueError, match="bootstrap"):
        intervals(wrong)
