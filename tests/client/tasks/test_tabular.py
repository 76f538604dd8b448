"""The task tabular: rows, losses, statistics, and a normalisation that is nobody's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.data.records import Record
from client.privacy.admission import admit
from client.privacy.engine import PerSampleEngine
from client.privacy.noise import SecureNoise
from client.tasks import tabular
from client.tasks.base import Learner, Normalising
from client.tasks.rows import initial_tensors, rows_learner
from client.tasks.tabular import architecture
from client.training import LocalTrainer, TrainingSettings
from common.errors import Code, DataError
from common.statistics import DEVIATION, MEAN, STATISTIC_SCALE, StatisticsLayout, normalised
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)
CPU = torch.device("cpu")


def study(hidden=(6,), mode="none"):
    private = {"mode": "local", "epsilon": 5.0, "delta": 1e-5, "clip_norm": 1.0}
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "labs",
            "task": {
                "kind": "tabular",
                "labels": ("no", "yes"),
                "features": (
                    {"name": "age", "low": 0.0, "high": 100.0},
                    {"name": "crp", "low": 0.0, "high": 50.0},
                ),
                "hidden": hidden,
            },
            "privacy": private if mode == "local" else {"mode": "none"},
            "sites": ({"id": "a"}, {"id": "b"}, {"id": "c"}),
        }
    )


def records(count, seed=0, *, shift=0.0, each=3):
    stream = np.random.default_rng(seed)
    made = []
    for patient in range(count):
        sick = stream.random() < 0.5
        for _ in range(stream.integers(1, each + 1)):
            age, crp = stream.normal(50 + 15 * sick + shift, 10), stream.normal(10 + 8 * sick, 5)
            values = [math.nan if stream.random() < 0.1 else float(v) for v in (age, crp)]
            made.append(
                Record(
                    f"p{seed}-{patient}",
                    "",
                    "yes" if sick else "no",
                    None,
                    "f.csv",
                    len(made) + 2,
                    tuple(values),
                )
            )
    return made


def learner(train, held=(), **options):
    return rows_learner(tabular, study(**options), train, held, device=CPU)


def settings(**changes):
    chosen = {
        "mode": "local",
        "local_steps": 2,
        "expected_batch": 8.0,
        "micro_batch": 16,
        "learning_rate": 0.5,
        "optimizer": "sgd",
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "evaluation_noise": 1.0,
        "statistics_noise": 1.5,
        "evaluation_sensitivity": math.sqrt(2),
    }
    return TrainingSettings(**(chosen | changes))


PLAIN = {
    "mode": "none",
    "clip_norm": None,
    "noise_multiplier": None,
    "evaluation_noise": None,
    "statistics_noise": None,
}


def trainer(model, seed="0", **changes):
    layout = Layout.of(initial_tensors(tabular, study().task))
    return LocalTrainer(model, layout, settings(**changes), SecureNoise(SeededEntropy(seed)), "cpu")


def test_it_is_a_learner_that_normalises():
    made: Learner = learner(records(5))
    assert isinstance(made, Normalising)
    assert list(made.trainable()) == sorted(initial_tensors(tabular, study().task))
    assert made.patient_count() == 5


def test_the_first_weights_are_the_bundles_and_favour_no_label():
    made = learner(records(5))
    for name, value in initial_tensors(tabular, study().task).items():
        assert np.array_equal(made.trainable()[name].detach().numpy(), value)
    losses = made.losses(np.arange(3)).detach().numpy()
    assert losses == pytest.approx(math.log(2))


def test_without_hidden_layers_it_is_logistic_regression():
    assert set(initial_tensors(tabular, study(hidden=()).task)) == {"output.weight", "output.bias"}
    assert architecture(study(hidden=()).tabular)[0] != architecture(study().tabular)[0]


def test_the_model_passes_admission():
    admit(learner(records(6)))


def test_a_patients_rows_stay_together():
    train = records(6, each=4)
    made = learner(train)
    rows, owner = made.rows_of(np.array([4, 1]))
    names = [r.patient for r in sorted(train, key=lambda r: int(r.patient.split("-")[1]))]
    assert [names[row] for row in rows] == [f"p0-{[4, 1][o]}" for o in owner]


def test_a_label_outside_the_study_is_named_by_its_place_alone():
    bad = [*records(3), Record("x", "", "perhaps", None, "f.csv", 99, (1.0, 2.0))]
    with pytest.raises(DataError, match=r"f\.csv:99: has a label") as caught:
        learner(bad)
    assert caught.value.code is Code.DATA_LABEL


def test_measurement_weighs_patients_not_rows():
    held = records(7, seed=3, each=4)
    vector = learner(records(4), held).measure()
    assert vector[:-1].sum() == pytest.approx(7)
    assert 0 <= vector[-1] <= 7
    one = learner(records(4), [r for r in held if r.patient == "p3-0"]).measure()
    assert np.linalg.norm(one) <= math.sqrt(2)
    assert learner(records(4)).measure().tolist() == [0] * 5


def test_the_statistics_of_all_sites_are_those_of_the_pooled_patients():
    """Bit for bit: whole numbers are summed, so it does not matter who holds whom."""
    sites = [records(20, seed) for seed in range(4)]
    pooled = learner([r for site in sites for r in site]).statistic_words()
    parts = [learner(site).statistic_words() for site in sites]
    assert np.array_equal(sum(parts), pooled)
    assert np.array_equal(sum(reversed(parts)), pooled)


@given(st.integers(0, 10_000), st.integers(0, 11))
@hypothesis_settings(deadline=None, max_examples=40)
def test_leaving_a_patient_out_moves_the_statistics_by_their_sensitivity_at_most(seed, out):
    """Through the whole learner: several records each, values missing and out of bounds."""
    everybody = records(12, seed, shift=40.0, each=5)
    rest = [r for r in everybody if r.patient != f"p{seed}-{out}"]
    change = learner(everybody).statistic_words() - learner(rest).statistic_words()
    assert np.linalg.norm(change) <= StatisticsLayout(2).sensitivity * STATISTIC_SCALE


def test_a_patient_at_the_bounds_moves_the_statistics_by_their_whole_sensitivity():
    others = records(6, 1)
    extreme = Record("p", "", "no", None, "f", 1, (-1e9, 1e9))
    change = learner([*others, extreme]).statistic_words() - learner(others).statistic_words()
    whole = StatisticsLayout(2).sensitivity * STATISTIC_SCALE
    assert np.linalg.norm(change) == pytest.approx(whole, rel=1e-4)


def test_the_state_sets_the_normalisation_and_missing_is_zero():
    made = learner([Record("p", "", "no", None, "f", 1, (25.0, math.nan))])
    made.set_statistics(np.array([0.5, 0.9], np.float32), np.array([0.25, 0.01], np.float32))
    assert made._train.inputs[0].tolist() == [[-1.0, 0.0]]


def test_training_and_measuring_use_the_states_statistics():
    made = learner(records(20), records(8, seed=9))
    state = dict(initial_tensors(tabular, study().task))
    plain = trainer(made, **PLAIN)
    near = {
        **state,
        MEAN: np.array([0.5, 0.2], np.float32),
        DEVIATION: np.array([0.1, 0.1], np.float32),
    }
    plain.measure(near, 1)
    expected = normalised(made._held_out.encoded.values, near[MEAN], near[DEVIATION])
    assert np.array_equal(made._held_out.inputs[0].numpy(), expected)
    update = plain.train({**near, MEAN: np.zeros(2, np.float32)}, 1)
    assert np.isfinite(update).all()
    assert np.array_equal(
        made._train.inputs[0].numpy(),
        normalised(made._train.encoded.values, np.zeros(2, np.float32), near[DEVIATION]),
    )


def test_statistics_are_noised_under_dp_and_exact_without():
    """The noise has the stated size; its control, mode none, has none."""
    made = learner(records(30))
    exact = made.statistic_words()
    assert np.array_equal(trainer(made, **PLAIN).statistics(), exact)
    private = trainer(made)
    draws = np.array([private.statistics() - exact for _ in range(400)], np.float64)
    std = 1.5 * StatisticsLayout(2).sensitivity * STATISTIC_SCALE
    assert abs(draws.std() / std - 1) < 0.06
    assert abs(draws.mean()) < 0.1 * std
    assert len(np.unique(draws)) > 2000


def test_noise_that_rounding_would_show_is_refused():
    with pytest.raises(ValueError, match="rounded safely"):
        settings(statistics_noise=0.001)
    with pytest.raises(ValueError, match="needs statistics noise"):
        trainer(learner(records(3)), statistics_noise=None).statistics()


def test_statistics_of_a_task_without_numbers_are_a_bug():
    class Notes:
        module = learner(records(3)).module
        trainable = staticmethod(lambda: dict(sorted(Notes.module.named_parameters())))

    with pytest.raises(TypeError):
        trainer(Notes()).statistics()


def clipped(made, patients):
    engine = PerSampleEngine(made.module, made.trainable(), 1.0)
    try:
        rows, owner = made.rows_of(patients)
        sums = engine.clipped_sum(made.losses(rows), owner, len(patients)).gradients
        return torch.cat([value.reshape(-1) for value in sums.values()]).double().numpy()
    finally:
        engine.close()


def leave_one_out(normalise):
    """How far one patient moves the clipped sum when records are read as `normalise` says."""
    train = [
        Record(f"p{at}", "", "yes" if at % 2 else "no", None, "f", at, (48.0 + 4 * (at % 2), 10.0))
        for at in range(40)
    ]
    outlier = Record("outlier", "", "yes", None, "f", 1, (100.0, 50.0))
    sums = []
    for population in ([*train, outlier], train):
        made = learner(population, hidden=())
        normalise(made)
        sums.append(clipped(made, np.arange(made.patient_count())))
    return np.linalg.norm(sums[0] - sums[1])


def test_leaving_a_patient_out_moves_the_clipped_sum_by_the_clip_norm_at_most():
    """Through the whole reader: the statistics come from outside, so no other row changes."""
    mean, deviation = np.array([0.5, 0.2], np.float32), np.array([0.03, 0.02], np.float32)
    assert leave_one_out(lambda made: made.set_statistics(mean, deviation)) <= 1.0 + 1e-5


def test_control_normalising_by_ones_own_records_breaks_the_sensitivity():
    """The usual preprocessing: every other row moves a little, and the sum moves by more than C."""

    def local(made):
        part = made._train.encoded.values
        deviation = np.nanstd(part, axis=0).clip(0.01).astype(np.float32)
        made.set_statistics(np.nanmean(part, axis=0).astype(np.float32), deviation)

    assert leave_one_out(local) > 2.0
