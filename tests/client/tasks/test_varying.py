"""Training inputs that are varied: the same in every pass of a step, nobody's by anybody else."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.privacy.admission import admit
from client.privacy.noise import SecureNoise
from client.tasks import imaging
from client.tasks.rows import drawn, initial_tensors, probe_of, rows_learner
from client.training import LocalTrainer, TrainingSettings
from common.errors import Code, RefusedError
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)
CPU = torch.device("cpu")
VARIED = {"shift": 0.2, "rotate": 20.0}


def study(augmentation=VARIED, privacy=None):
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "films",
            "task": {
                "kind": "imaging",
                "labels": ("a", "b"),
                "size": 16,
                "network": {"kind": "resnet", "widths": (8,), "groups": 4},
                "augmentation": augmentation,
            },
            "training": {"local_steps": 3, "expected_batch": 2.0, "micro_batch": 2},
            "privacy": privacy or {"mode": "none"},
            "sites": tuple({"id": name} for name in ("east", "north", "south")),
        }
    )


def records():
    return imaging.probes(study().task)


def learner(code=imaging, terms=None, rows=None):
    rows = records() if rows is None else rows
    made = rows_learner(code, terms or study(), rows, rows[:1], device=CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def everyone(made):
    return made.rows_of(np.arange(made.patient_count()))[0]


def test_a_variation_is_the_same_in_every_call_and_in_every_batch_of_a_step():
    made = learner()
    rows = everyone(made)
    made.vary(5)
    first = made.losses(rows)
    assert torch.equal(first, made.losses(rows))
    alone = torch.cat([made.losses(rows[at : at + 1]) for at in range(len(rows))])
    assert torch.allclose(first, alone, atol=1e-5)
    made.vary(6)
    assert not torch.allclose(first, made.losses(rows), atol=1e-4)


def test_without_a_key_or_without_terms_images_are_as_they_are():
    made, plain = learner(), learner(terms=study({}))
    rows = everyone(made)
    expected = plain.losses(rows)
    assert torch.equal(made.losses(rows), expected)
    made.vary(5)
    assert not torch.allclose(made.losses(rows), expected, atol=1e-4)
    made.vary(None)
    assert torch.equal(made.losses(rows), expected)
    assert made.varies
    assert not plain.varies
    plain.vary(5)
    assert torch.equal(plain.losses(rows), expected)


def test_measurement_sees_images_as_they_are():
    made = learner()
    before = made.measure()
    made.vary(5)
    assert np.array_equal(before, made.measure())


def test_nobodys_variation_depends_on_who_else_is_there():
    """Control: the same numbers by position would."""
    whole, fewer = learner(), learner(rows=records()[1:])
    for made in (whole, fewer):
        made.vary(5)
    rows, _ = whole.rows_of(np.array([1, 2]))
    others, _ = fewer.rows_of(np.array([0, 1]))
    assert torch.allclose(whole.losses(rows), fewer.losses(others), atol=1e-6)
    assert rows.tolist() != others.tolist()
    places = np.arange(4, dtype=np.uint64)
    assert not np.array_equal(drawn(5, places[1:], 8), drawn(5, places[:3], 8))


def test_images_of_one_patient_are_varied_differently():
    twice = [replace(records()[0], line=line) for line in (1, 2)]
    made = learner(rows=twice)
    made.vary(5)
    first, second = made.losses(everyone(made)).tolist()
    assert abs(first - second) > 1e-4


def test_the_numbers_are_those_of_splitmix64():
    found = drawn(0, np.zeros(1, np.uint64), 2)
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert found.tolist() == [[(word >> 40) / 2**24 for word in words]]
    many = drawn(7, np.arange(4000, dtype=np.uint64), 8)
    assert many.min() >= 0
    assert many.max() < 1
    assert np.allclose(many.mean(axis=0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(many.T) - np.eye(8)).max() < 0.08


class Spy:
    """Notes every key that a learner is given."""

    def __init__(self, made, monkeypatch):
        self.keys = []
        inner = made.vary
        monkeypatch.setattr(made, "vary", lambda key: (self.keys.append(key), inner(key))[1])


@pytest.mark.parametrize("mode", ["none", "local"])
def test_every_step_has_a_key_of_its_own_and_none_is_left(monkeypatch, mode):
    private = {"mode": "local", "epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}
    terms = study(privacy=None if mode == "none" else private)
    made = learner(terms=terms)
    spy = Spy(made, monkeypatch)
    initial = initial_tensors(imaging, terms.task)
    settings = TrainingSettings.from_study(
        terms, noise_multiplier=1.0, evaluation_noise=None, statistics_noise=None
    )
    noise = SecureNoise(SeededEntropy("keys"))
    trainer = LocalTrainer(made, Layout.of(initial), settings, noise, "cpu")
    trainer.train(initial, 1)
    *keys, last = spy.keys
    assert len(set(keys)) == len(keys) == 3
    assert last is None


def test_a_study_that_varies_nothing_draws_no_keys(monkeypatch):
    terms = study({})
    made = learner(terms=terms)
    spy = Spy(made, monkeypatch)
    initial = initial_tensors(imaging, terms.task)
    settings = TrainingSettings.from_study(terms, noise_multiplier=None, evaluation_noise=None)
    noise = SecureNoise(SeededEntropy("keys"))
    LocalTrainer(made, Layout.of(initial), settings, noise, "cpu").train(initial, 1)
    assert set(spy.keys) <= {None}


# ---------------------------------------------------------------------- admission


def code_with(augment):
    made = types.SimpleNamespace()
    for name in ("architecture", "network", "encode", "probes", "draws"):
        setattr(made, name, getattr(imaging, name))
    made.augment = augment
    return made


def mixing(task, inputs, numbers):
    images = inputs[0].float() / 255
    return (images - 0.9 * images.mean(0),)


def fresh(task, inputs, numbers):
    return imaging.augment(task, inputs, torch.rand(numbers.shape))


def test_a_varied_model_is_admitted():
    assert admit(probe_of(imaging, study(), CPU)).startswith("bookkeeping")


@pytest.mark.parametrize("augment", [mixing, fresh])
def test_a_variation_that_mixes_patients_or_changes_between_passes_is_refused(augment):
    torch.manual_seed(0)
    told = {Code.GRADIENT_INEXACT, Code.SENSITIVITY_EXCEEDED}
    with pytest.raises(RefusedError, check=lambda error: error.code in told):
        admit(probe_of(code_with(augment), study(), CPU))
