"""Studies of kind tabular: what they may say, what they resolve to, and what they plan."""

from __future__ import annotations

import numpy as np
import pytest

from common.accountant import DpEvent, epsilon
from common.bundle import Bundle, resolve
from common.config import ConfigFileError, parse
from common.errors import Code, ConfigError
from common.plan import plan, render
from common.statistics import DEVIATION, MEAN
from common.study import Study

BASE = """\
format: wardround-study/1
name: labs
task:
  kind: tabular
  labels: [no, yes]
  features:
    - {name: age, low: 0, high: 120}
    - {name: crp, low: 0.5, high: 300}
privacy: {mode: local, epsilon: 6, delta: 1e-5, clip_norm: 1}
training: {rounds: 3, local_steps: 4, sampling_rate: 0.2, spare_rounds: 2}
sites: [{id: a}, {id: b}, {id: c}]
"""
INITIAL = {"output.bias": np.zeros(2, np.float32), "output.weight": np.zeros((2, 2), np.float32)}
KEYS = {site: bytes([number]) * 32 for number, site in enumerate("abc")}


def study(text=BASE):
    return parse(text, "labs.yaml", Study)


def bundle(text=BASE):
    return resolve(study(text), INITIAL, bytes(32), "{}")


def test_a_tabular_study_says_what_it_needs_and_no_model():
    made = study()
    assert made.model is None
    assert made.tabular.hidden == ()
    assert made.feature_count == 2
    assert made.architecture == ("2-2 perceptron", "full")
    with pytest.raises(TypeError):
        _ = made.diagnosis
    with pytest.raises(TypeError):
        _ = made.network


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: tabular",
            "kind: tabula",
            "4:9: task.kind: must be 'diagnosis', 'tabular', 'imaging', 'prognosis', 'medication', "
            "'multimodal' or 'custom' (got 'tabula')",
        ),
        ("  kind: tabular\n", "", "3:1: task.kind: is missing"),
        (
            "low: 0.5, high: 300",
            "low: 5, high: 5",
            "8:33: task.features.1.high: must be more than low (5)",
        ),
        ("low: 0.5", "low: .inf", "8:24: task.features.1.low: must be a finite number (got inf)"),
        ("name: crp", "name: age", "8:14: task.features.1.name: is listed twice"),
        ("name: crp", "name: label", "8:14: task.features.1.name: is also another column"),
        ("low: 0.5", "lo: 0.5", "8:19: task.features.1.lo: unknown key (did you mean low?)"),
        ("  labels: [no, yes]\n", "", "3:1: task.labels: is missing (or number, or survival)"),
        (
            "  labels",
            "  max_tokens: 64\n  labels",
            "5:3: task.max_tokens: unknown key (known here: labels, number, survival, "
            "columns, features, categories, kind, hidden)",
        ),
        (
            "privacy: {",
            "model: {backbone: hub/x}\nprivacy: {",
            "9:8: model: has no effect with task.kind: tabular, which says what learns; remove it",
        ),
        (
            "clip_norm: 1",
            "clip_norm: 1, statistics_epsilon: 6",
            "9:83: privacy.statistics_epsilon: must leave something of epsilon for training (got 6.0 of 6.0)",
        ),
    ],
)
def test_a_mistake_is_named_at_its_line_without_the_kind_in_its_path(old, new, expected):
    with pytest.raises(ConfigFileError) as caught:
        study(BASE.replace(old, new))
    lines = [str(problem).removeprefix("labs.yaml:") for problem in caught.value.problems]
    assert expected in lines


def test_a_diagnosis_study_needs_a_model_and_no_statistics():
    text = (
        BASE[: BASE.index("task:")]
        + "task: {kind: diagnosis, labels: [a, b]}\n"
        + BASE[BASE.index("privacy:") :]
    )
    with pytest.raises(ConfigFileError, match="model: is missing"):
        study(text)
    text += "model: {backbone: hub/x}\n"
    assert study(text).diagnosis.max_tokens == 128
    with pytest.raises(
        ConfigFileError, match=r"statistics_epsilon: has no effect with task.kind: diagnosis"
    ):
        study(text.replace("clip_norm: 1", "clip_norm: 1, statistics_epsilon: 1"))


def test_the_bounds_are_part_of_what_is_signed():
    other = BASE.replace("high: 300", "high: 301")
    assert study().terms() != study(other).terms()
    assert bundle().digest != bundle(other).digest


def test_the_terms_carry_the_statistics_from_the_start():
    terms = bundle().terms(KEYS)
    assert (terms.statistic_words, terms.first_turn) == (6, 0)
    assert terms.initial[MEAN].tolist() == [0, 0]
    assert terms.initial[DEVIATION].tolist() == [1, 1]
    assert terms.rounds == 3 + 1 + 2 + 1
    assert {spec.name for spec in terms.layout.specs} == set(INITIAL)


def test_an_adaptive_optimiser_moves_weights_and_leaves_statistics_alone():
    terms = bundle(BASE + "aggregation: {optimizer: {name: fedadam}}\n").terms(KEYS)
    state = terms.count(terms.initial, np.array([-100, 0, 50, 90, 100, 100]) * 65536, 3)
    total = np.full(terms.layout.size, 1000, np.int64)
    moved, _ = terms.apply(state, terms.exponents, total, ("a", "b", "c"))
    assert set(moved) == set(terms.initial)
    assert not any("statistics" in name and name.startswith("optimizer/") for name in moved)
    assert np.array_equal(moved[MEAN], np.array([0.25, 0.5], np.float32))
    assert np.array_equal(moved[DEVIATION], state[DEVIATION])
    assert (moved["output.bias"] != 0).all()


def test_a_bundle_survives_its_folder(tmp_path):
    """Also where the patient column is null, which is not the default."""
    made = bundle(BASE.replace("  features", "  columns: {patient: null}\n  features"))
    made.save(tmp_path)
    read = Bundle.load(tmp_path)
    assert read.digest == made.digest
    assert read.study.tabular.columns.patient is None
    assert read.statistics_noise == made.statistics_noise
    assert read.terms(KEYS).initial.keys() == made.terms(KEYS).initial.keys()


def test_statistics_and_training_together_stay_within_epsilon_wherever_rounds_burn():
    found = plan(study(), 6)
    sigma, counted = found.training.noise_multiplier, found.statistics.noise_multiplier
    spent = [
        epsilon([DpEvent(sigma, 0.2, 4 * (5 - burned)), DpEvent(counted, 1.0, 1 + burned)], 1e-5)
        for burned in range(3)
    ]
    assert max(spent) == found.training.epsilon
    assert 5.9 < found.training.epsilon <= 6.0
    assert 0.59 < found.statistics.epsilon <= 0.6
    assert found.training.curve[-1][1] < found.training.epsilon


def test_control_a_sigma_solved_for_training_alone_passes_epsilon():
    alone = plan(
        study(
            BASE[: BASE.index("task:")]
            + "task: {kind: diagnosis, labels: [a, b]}\nmodel: {backbone: hub/x}\n"
            + BASE[BASE.index("privacy:") :]
        ),
        6,
    )
    counted = plan(study(), 6).statistics.noise_multiplier
    events = [DpEvent(alone.training.noise_multiplier, 0.2, 20), DpEvent(counted, 1.0, 1)]
    assert epsilon(events, 1e-5) > 6.0


def test_many_spare_rounds_are_bounded_from_above():
    text = BASE.replace("spare_rounds: 2", "spare_rounds: 12")
    found = plan(study(text), 6)
    sigma, counted = found.training.noise_multiplier, found.statistics.noise_multiplier
    for burned in (0, 5, 12):
        events = [DpEvent(sigma, 0.2, 4 * (15 - burned)), DpEvent(counted, 1.0, 1 + burned)]
        assert epsilon(events, 1e-5) <= found.training.epsilon <= 6.0


def test_a_larger_share_means_less_noise_on_statistics_and_more_on_training():
    small, large = (
        plan(study(), 6),
        plan(study(BASE.replace("clip_norm: 1", "clip_norm: 1, statistics_epsilon: 3")), 6),
    )
    assert large.statistics.noise_multiplier < small.statistics.noise_multiplier
    assert large.training.noise_multiplier > small.training.noise_multiplier
    assert large.training.epsilon <= 6.0


def test_a_share_that_retries_cannot_pay_for_is_no_plan():
    with pytest.raises(ConfigError) as caught:
        plan(study(BASE.replace("clip_norm: 1", "clip_norm: 1, statistics_epsilon: 5.99")), 6)
    assert caught.value.code is Code.PLAN_IMPOSSIBLE


def test_the_plan_says_what_the_statistics_cost():
    shown = render(plan(study(), 6))
    assert "mean and deviation of 2 features, before training" in shown
    assert "epsilon, statistics" in shown
    exact = plan(
        study(BASE.replace("mode: local, epsilon: 6, delta: 1e-5, clip_norm: 1", "mode: none")), 6
    )
    assert exact.statistics.noise_multiplier is None
    assert "epsilon, statistics" not in render(exact)
