"""LocalTrainer: what a round computes, what it leaves behind, and what it charges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from client.privacy.noise import SecureNoise
from client.training import LocalTrainer, TrainingSettings
from common.errors import Code, DataError, RefusedError
from common.metrics import METRIC_SCALE
from common.strategy import CORRECTION
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)
LABELS = 3


class Rows:
    """A small learner: patient p has the rows whose owner is p."""

    def __init__(self, owner, *, width: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.owner = np.asarray(owner, np.int64)
        self.data = torch.randn(len(self.owner), width, generator=generator)
        self.labels = torch.randint(0, LABELS, (len(self.owner),), generator=generator)
        torch.manual_seed(seed)
        self.module: nn.Module = nn.Sequential(
            nn.Linear(width, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, LABELS)
        )
        self.calls: list[np.ndarray] = []

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(sorted(self.module.named_parameters()))

    def patient_count(self) -> int:
        return int(self.owner.max(initial=-1)) + 1

    def held_out_count(self) -> int:
        return 4

    def rows_of(self, patients):
        rows = [np.flatnonzero(self.owner == patient) for patient in patients]
        owner = [np.full(len(mine), place) for place, mine in enumerate(rows)]
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *rows]), np.concatenate([empty, *owner])

    def losses(self, rows):
        self.calls.append(np.asarray(rows))
        return functional.cross_entropy(
            self.module(self.data[rows]), self.labels[rows], reduction="none"
        )

    def measure(self):
        assert not self.module.training
        assert not torch.is_grad_enabled()
        return np.arange(LABELS * LABELS + 1) / 8

    def state(self):
        return {n: p.detach().numpy().copy() for n, p in self.trainable().items()}


def settings(**changes) -> TrainingSettings:
    chosen = {
        "mode": "local",
        "local_steps": 1,
        "expected_batch": 4.0,
        "micro_batch": 8,
        "learning_rate": 1.0,
        "optimizer": "sgd",
        "sampling_rate": 1.0,
        "clip_norm": 0.2,
        "noise_multiplier": 1e-5,
        "evaluation_noise": 1.0,
    }
    return TrainingSettings(**(chosen | changes))


def plain(**changes) -> TrainingSettings:
    private = dict.fromkeys(("clip_norm", "noise_multiplier", "evaluation_noise"))
    return settings(**({"mode": "none"} | private | changes))


def trainer_of(learner, chosen, name="trainer") -> LocalTrainer:
    return LocalTrainer(
        learner,
        Layout.of(learner.state()),
        chosen,
        SecureNoise(SeededEntropy(name)),
        device="cpu",
    )


def clipped_sum(learner, clip):
    """By plain autograd, one patient at a time, flat in layout order."""
    total = 0.0
    for patient in range(learner.patient_count()):
        rows, _ = learner.rows_of(np.array([patient]))
        parameters = list(learner.trainable().values())
        grads = torch.autograd.grad(learner.losses(rows).mean(), parameters)
        flat = torch.cat([g.reshape(-1) for g in grads]).double()
        total = total + flat * min(1.0, clip / float(flat.norm()))
    return total.numpy()


OWNER = [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7]


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_a_private_step_is_the_clipped_sum_over_the_public_batch(micro_batch):
    learner = Rows(OWNER)
    expected = -clipped_sum(learner, 0.2) / 4.0
    trainer = trainer_of(learner, settings(micro_batch=micro_batch))
    update = trainer.train(learner.state(), 1)
    assert update.dtype == np.float32
    assert np.linalg.norm(update - expected) <= 1e-4 * np.linalg.norm(expected)
    for rows in learner.calls[-3:]:  # a patient's rows are never parted
        for patient in set(learner.owner[rows]):
            assert set(np.flatnonzero(learner.owner == patient)) <= set(rows)


def test_an_empty_sample_is_noise_alone_and_asks_the_model_nothing():
    learner = Rows(OWNER, width=4000)
    trainer = trainer_of(learner, settings(noise_multiplier=1.5))
    trainer.train(learner.state(), 1)  # admission happens here, once
    learner.calls.clear()
    lonely = trainer_of(learner, settings(noise_multiplier=1.5, sampling_rate=1e-15))
    lonely._admitted = True
    update = lonely.train(learner.state(), 1)
    assert learner.calls == []
    assert update.std() == pytest.approx(1.5 * 0.2 / 4.0, rel=0.02)


def test_a_site_without_patients_sends_noise():
    learner = Rows([], width=4000)
    update = trainer_of(learner, settings(noise_multiplier=1.0)).train(learner.state(), 1)
    assert update.std() == pytest.approx(0.2 / 4.0, rel=0.02)


def test_the_noise_scale_does_not_tell_how_many_patients_there_are():
    """Control: dividing by a batch derived from n shows 320 against 321 at a glance."""
    scales = []
    for patients in (320, 321):
        learner = Rows(np.arange(patients), width=3000)
        trainer = trainer_of(learner, settings(noise_multiplier=50.0, sampling_rate=0.1))
        scales.append(trainer.train(learner.state(), 1).std())
    assert scales[0] == pytest.approx(scales[1], rel=0.02)
    naive = [int(patients / math.ceil(patients / 32)) for patients in (320, 321)]
    assert naive == [32, 29]


def test_two_rounds_with_the_same_number_have_unrelated_noise():
    learner = Rows([], width=2000)
    trainer = trainer_of(learner, settings(noise_multiplier=1.0))
    first, second = (trainer.train(learner.state(), 7) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_a_non_finite_record_ruins_a_plain_round_but_not_a_private_one():
    learner = Rows(OWNER)
    learner.data[11] = math.nan
    without = Rows(OWNER[:-1])
    without.data[:] = learner.data[:-1]
    without.labels[:] = learner.labels[:-1]
    found = trainer_of(learner, settings()).train(learner.state(), 1)
    wanted = trainer_of(without, settings()).train(without.state(), 1)
    assert np.abs(found - wanted).max() < 1e-5
    with pytest.raises(DataError, check=lambda error: error.code is Code.UPDATE_NOT_FINITE):
        trainer_of(learner, plain(expected_batch=8.0)).train(learner.state(), 1)


def test_after_a_round_the_object_holds_nothing_of_it():
    learner = Rows(OWNER)
    trainer = trainer_of(learner, settings(noise_multiplier=1.0))
    state = learner.state()
    keystream = trainer._noise._keystream
    update = trainer.train(state, 1)
    assert np.abs(update).max() > 0
    for name, parameter in learner.trainable().items():
        assert parameter.grad is None
        assert np.array_equal(parameter.detach().numpy(), state[name])
    assert trainer._noise._keystream is not keystream
    assert not any(layer._forward_hooks for layer in learner.module.modules())
    held = [
        value for value in vars(trainer).values() if isinstance(value, np.ndarray | torch.Tensor)
    ]
    assert held == []


def test_a_round_that_failed_leaves_nothing_for_the_next():
    """Control: a gradient kept across the failure would show in the exact comparison."""
    learner = Rows(OWNER)
    trainer = trainer_of(learner, settings(micro_batch=3))
    state = learner.state()
    wanted = trainer.train(state, 1)
    honest, budget = learner.losses, 2

    def breaking(rows):
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise MemoryError
        return honest(rows)

    learner.losses = breaking
    with pytest.raises(MemoryError):
        trainer.train(state, 1)
    learner.losses = honest
    found = trainer.train(state, 1)
    assert np.abs(found - wanted).max() < 1e-5
    assert np.array_equal(learner.trainable()["0.weight"].detach().numpy(), state["0.weight"])


def test_a_gradient_that_the_learner_leaves_behind_never_gets_out():
    """The naive step (`loss.backward()` and step) would send it unclipped."""
    learner = Rows(OWNER)
    honest = learner.losses
    wanted = trainer_of(learner, settings()).train(learner.state(), 1)

    def leaking(rows):
        honest(rows).sum().backward()
        return honest(rows)

    learner.losses = leaking
    found = trainer_of(learner, settings()).train(learner.state(), 1)
    assert (
        float(
            learner.module[0].weight.grad.norm() if learner.module[0].weight.grad is not None else 0
        )
        == 0
    )
    assert np.abs(found - wanted).max() < 1e-5


def test_noise_covers_the_whole_embedding_table():
    """Control: noise on the touched rows alone tells exactly which words the notes had."""

    class Words(Rows):
        def __init__(self):
            super().__init__(np.arange(6))
            self.words = torch.randint(0, 200, (6, 4))
            self.module = nn.Embedding(200, 8)

        def losses(self, rows):
            return self.module(self.words[rows]).sum((1, 2))

    learner = Words()
    update = trainer_of(learner, settings(noise_multiplier=2.0)).train(learner.state(), 1)
    table = update.reshape(200, 8)
    touched = np.zeros(200, bool)
    touched[learner.words.numpy().ravel()] = True
    assert (np.abs(table).sum(1) > 0).all()
    sizes = np.linalg.norm(table, axis=1)
    assert abs(np.median(sizes[touched]) - np.median(sizes[~touched])) < sizes.std()
    sparse = np.where(touched[:, None], table, 0.0)
    assert ((np.abs(sparse).sum(1) > 0) == touched).all()


def test_the_proximal_pull_comes_after_the_noise():
    learner = Rows(OWNER)
    chosen = {"local_steps": 2, "learning_rate": 0.5}
    free = trainer_of(learner, settings(**chosen)).train(learner.state(), 1)
    held = trainer_of(learner, settings(**chosen, proximal=1.0)).train(learner.state(), 1)
    assert np.linalg.norm(held) < np.linalg.norm(free)
    # One step starts where the pull is zero.
    one = {"local_steps": 1}
    free = trainer_of(learner, settings(**one)).train(learner.state(), 1)
    held = trainer_of(learner, settings(**one, proximal=1.0)).train(learner.state(), 1)
    assert np.abs(free - held).max() < 1e-6


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_privacy_a_round_is_a_plain_torch_loop(optimizer):
    learner = Rows(np.arange(10))
    chosen = plain(
        local_steps=5, expected_batch=4.0, learning_rate=0.1, optimizer=optimizer, weight_decay=0.01
    )
    state = learner.state()
    update = trainer_of(learner, chosen, "loop").train(state, 1)
    batches = list(learner.calls)
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4]
    assert sorted(np.concatenate(batches[:3])) == list(range(10))
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    loop = make(list(learner.trainable().values()), lr=0.1, weight_decay=0.01)
    for rows in batches:
        loop.zero_grad()
        learner.losses(rows).mean().backward()
        loop.step()
    after = learner.state()
    expected = np.concatenate([(after[n] - state[n]).ravel() for n in sorted(state)])
    assert np.abs(update - expected).max() < 1e-6


def test_without_privacy_micro_batches_change_nothing():
    learner = Rows(OWNER)
    results = [
        trainer_of(learner, plain(micro_batch=size, expected_batch=8.0), "same").train(
            learner.state(), 1
        )
        for size in (1, 3, 100)
    ]
    assert max(np.abs(result - results[0]).max() for result in results) < 1e-6
    assert np.abs(trainer_of(Rows([]), plain()).train(learner.state(), 1)).max() == 0


def test_metrics_are_exact_without_privacy_and_noised_with_it():
    learner = Rows(OWNER)
    exact = trainer_of(learner, plain()).measure(learner.state(), 1)
    assert exact.dtype == np.int64
    assert np.array_equal(exact, np.arange(10) * METRIC_SCALE // 8)
    trainer = trainer_of(learner, settings(evaluation_noise=2.0))
    drawn = np.stack([trainer.measure(learner.state(), 1) - exact for _ in range(400)])
    assert drawn.std() == pytest.approx(2.0 * math.sqrt(2) * METRIC_SCALE, rel=0.05)
    assert abs(drawn.mean()) < 5 * drawn.std() / math.sqrt(drawn.size)
    assert len({tuple(row) for row in drawn}) == 400


def test_metrics_are_not_measured_without_the_noise_they_need():
    learner = Rows(OWNER)
    with pytest.raises(ValueError, match="evaluation noise"):
        trainer_of(learner, settings(evaluation_noise=None)).measure(learner.state(), 1)
    with pytest.raises(ValueError, match="too small"):
        settings(evaluation_noise=1e-3)


def test_a_model_is_admitted_before_the_first_private_step():
    learner = Rows(np.arange(8))
    learner.module = nn.Sequential(nn.Linear(5, LABELS), nn.BatchNorm1d(LABELS, affine=False))
    with pytest.raises(RefusedError, check=lambda error: error.code is Code.MODEL_BATCH_NORM):
        trainer_of(learner, settings()).train(learner.state(), 1)


def test_a_model_that_is_not_the_studys_is_refused():
    learner = Rows(OWNER)
    other = Layout.of({name: value.T for name, value in learner.state().items()})
    with pytest.raises(DataError, check=lambda error: error.code is Code.TRAINABLES_DIFFER):
        LocalTrainer(learner, other, settings(), SecureNoise(SeededEntropy("x")), device="cpu")


def test_private_settings_need_a_clip_norm_and_noise():
    for missing in ("clip_norm", "noise_multiplier"):
        with pytest.raises(ValueError, match="needs"):
            settings(**{missing: None})


def test_bfloat16_rounds_have_wider_noise_and_finite_updates():
    learner = Rows([], width=4000)
    chosen = settings(precision="bfloat16", noise_multiplier=1.0)
    update = trainer_of(learner, chosen).train(learner.state(), 1)
    assert update.std() == pytest.approx(1.01 * 0.2 / 4.0, rel=0.02)
    learner = Rows(OWNER)
    rough = trainer_of(learner, settings(precision="bfloat16")).train(learner.state(), 1)
    exact = -clipped_sum(learner, 0.2) / 4.0
    assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


# ------------------------------------------------------------------ control variates


@pytest.mark.parametrize("mode", ["none", "local"])
def test_a_correction_moves_every_step_by_itself(mode):
    """With one step on all patients its effect is minus the learning rate times the correction."""
    found = []
    for scale in (0.0, 0.25):
        learner = Rows([0, 1, 2, 3])
        state = learner.state()
        layout = Layout.of(state)
        moved = {CORRECTION + n: np.full_like(v, scale) for n, v in state.items()}
        chosen = settings(mode=mode, expected_batch=4.0, noise_multiplier=1e-9, learning_rate=0.5)
        noise = SecureNoise(SeededEntropy("correction"))
        trainer = LocalTrainer(learner, layout, chosen, noise, "cpu")
        found.append(trainer.train({**state, **(moved if scale else {})}, 1))
        assert np.array_equal(layout.flatten(learner.state()), layout.flatten(state))
    assert found[1] - found[0] == pytest.approx(np.full_like(found[0], -0.125), abs=1e-5)
