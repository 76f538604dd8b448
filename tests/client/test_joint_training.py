"""A hospital's part of a joint round: whole numbers of the clipped sum, and its share of noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import client.training
from client.privacy.noise import SecureNoise
from client.training import LocalTrainer, TrainingSettings
from common.errors import Code, RefusedError
from common.joint import SLACK, joint_noise
from common.secagg.quantise import limit
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)
LABELS, CLIP, BATCH, PARTIES = 3, 0.2, 4.0, 5
OWNER = [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7]


class Rows:
    """A small learner: patient p has the rows whose owner is p."""

    def __init__(self, owner=OWNER, *, width: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.owner = np.asarray(owner, np.int64)
        self.data = torch.randn(len(self.owner), width, generator=generator)
        self.labels = torch.randint(0, LABELS, (len(self.owner),), generator=generator)
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(
            nn.Linear(width, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, LABELS)
        )

    def trainable(self):
        return dict(sorted(self.module.named_parameters()))

    def patient_count(self):
        return int(self.owner.max(initial=-1)) + 1

    def held_out_count(self):
        return 4

    def rows_of(self, patients):
        rows = [np.flatnonzero(self.owner == patient) for patient in patients]
        owner = [np.full(len(mine), place) for place, mine in enumerate(rows)]
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *rows]), np.concatenate([empty, *owner])

    def losses(self, rows):
        logits = self.module(self.data[rows])
        return functional.cross_entropy(logits, self.labels[rows], reduction="none")

    def measure(self):
        return np.zeros(LABELS * LABELS + 1)

    def state(self):
        return {n: p.detach().numpy().copy() for n, p in self.trainable().items()}

    def without(self, patient):
        """The same hospital without one patient, the others' records as they were."""
        other = Rows([])
        kept = self.owner != patient
        other.owner = self.owner[kept] - (self.owner[kept] > patient)
        other.data, other.labels = self.data[kept], self.labels[kept]
        other.module = self.module
        return other


def noise_of(learner, **changes):
    usual = {
        "parties": PARTIES,
        "honest": 3,
        "parameters": Layout.of(learner.state()).size,
        "clip_norm": CLIP,
        "expected_batch": BATCH,
        "noise_multiplier": 1.0,
    }
    return joint_noise(**(usual | changes))


def settings(joint, **changes) -> TrainingSettings:
    chosen = {
        "mode": "joint",
        "local_steps": 1,
        "expected_batch": BATCH,
        "micro_batch": 8,
        "learning_rate": 1.0,
        "optimizer": "sgd",
        "clip_norm": CLIP,
        "noise_multiplier": 1.0,
        "evaluation_noise": 1.0,
        "joint": joint,
    }
    return TrainingSettings(**(chosen | changes))


def trainer_of(learner, chosen, name="trainer", noise=SecureNoise) -> LocalTrainer:
    layout = Layout.of(learner.state())
    return LocalTrainer(learner, layout, chosen, noise(SeededEntropy(name)), device="cpu")


def trained(learner, joint, name="trainer", **changes):
    return trainer_of(learner, settings(joint, **changes), name).train(learner.state(), 1)


class Silence:
    """No noise, in the place of a share."""

    def __init__(self, noise, std) -> None:
        del noise, std

    def sample(self, count):
        return np.zeros(count, np.int64)

    def add_to(self, words):
        """Leaves the words as they are."""


@pytest.fixture
def silent(monkeypatch):
    """Shares are zero: what is left are the words before the noise."""
    monkeypatch.setattr(client.training, "DiscreteGaussian", Silence)


def clipped_sum(learner, clip):
    """By plain autograd, one patient at a time, flat in layout order."""
    total = np.zeros(Layout.of(learner.state()).size)
    for patient in range(learner.patient_count()):
        rows, _ = learner.rows_of(np.array([patient]))
        parameters = list(learner.trainable().values())
        grads = torch.autograd.grad(learner.losses(rows).mean(), parameters)
        flat = torch.cat([g.reshape(-1) for g in grads]).double().numpy()
        total += flat * min(1.0, clip / np.linalg.norm(flat))
    return total


# ------------------------------------------------------------------ the words


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
@pytest.mark.parametrize("engine", ["auto", "opacus", "bookkeeping"])
def test_words_are_the_clipped_sum_over_the_public_batch_on_the_grid(silent, micro_batch, engine):
    learner = Rows()
    joint = noise_of(learner)
    words = trained(learner, joint, micro_batch=micro_batch, engine=engine)
    assert words.dtype == np.int32
    exact = -clipped_sum(learner, CLIP) * 2.0**joint.exponent / BATCH
    assert np.abs(exact).max() > 1e6, "the grid is fine"
    assert np.linalg.norm(words - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("exponent", [4, 8, 12])
def test_words_are_rounded_to_the_nearest_not_cut_off(silent, exponent):
    learner = Rows()
    joint = replace(noise_of(learner), exponent=exponent)
    words = trained(learner, joint)
    exact = -clipped_sum(learner, CLIP) * 2.0**exponent / BATCH
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-2
    assert clear.mean() > 0.9
    assert np.array_equal(words[clear], np.rint(exact[clear]))
    assert not np.array_equal(words, np.trunc(exact)), "the control"


def test_the_share_is_added_to_the_words_and_nothing_else_changes(monkeypatch):
    learner = Rows()
    joint = noise_of(learner)
    drawn = []
    real = client.training.DiscreteGaussian

    class Kept(real):
        def _draw(self, count):
            drawn.append(super()._draw(count))
            return drawn[-1]

    monkeypatch.setattr(client.training, "DiscreteGaussian", Kept)
    noised = trained(learner, joint)
    monkeypatch.setattr(client.training, "DiscreteGaussian", Silence)
    plain = trained(learner, joint)
    assert np.array_equal(noised, plain + np.concatenate(drawn))
    assert np.abs(np.concatenate(drawn)).max() > 0


@pytest.mark.parametrize("rate", [1.0, 1e-15])
def test_nobody_in_the_step_sends_a_share_alone(rate):
    learner = Rows([] if rate == 1 else OWNER, width=600)
    joint = noise_of(learner)
    words = trained(learner, joint, sampling_rate=rate)
    assert words.std() == pytest.approx(joint.share_std, rel=0.06)
    assert abs(words.mean()) < 5 * joint.share_std / math.sqrt(words.size)


def test_the_share_is_the_same_with_few_and_with_many_patients():
    """A public number: nothing of it is derived from how many patients there are."""
    spreads = []
    for owner in ([0], np.arange(40)):
        learner = Rows(owner, width=600)
        joint = noise_of(learner, noise_multiplier=200.0)
        spreads.append(trained(learner, joint).std())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.06)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_patient_who_is_not_finite_adds_nothing_and_changes_nobody(silent, broken):
    learner = Rows()
    joint = noise_of(learner)
    learner.data[OWNER.index(3)] = broken
    found = trained(learner, joint, micro_batch=1)
    assert np.array_equal(found, trained(learner.without(3), joint, micro_batch=1))
    together = trained(learner, joint)
    assert np.linalg.norm(together - found) <= 1e-5 * np.linalg.norm(found)
    assert np.abs(found).max() > 0


def test_weights_that_are_not_finite_send_a_share_alone(silent):
    """What a poisoned model does to everybody's gradients is no gap in the noise."""
    learner = Rows()
    trainer = trainer_of(learner, settings(noise_of(learner)))
    trainer.train(learner.state(), 1)
    poisoned = {name: np.full_like(value, np.nan) for name, value in learner.state().items()}
    assert not trainer.train(poisoned, 2).any()


# ------------------------------------------------------------------ bounds


def test_no_word_is_larger_than_the_ring_allows_a_party(monkeypatch):
    learner = Rows()
    joint = noise_of(learner, expected_batch=0.05)
    most = joint.signal_bound + joint.share_bound
    assert PARTIES * most < 2**31

    class Largest(Silence):
        def sample(self, count):
            return np.where(np.arange(count) % 2, joint.share_bound, -joint.share_bound)

        def add_to(self, words):
            words += self.sample(words.size).astype(np.int32)

    monkeypatch.setattr(client.training, "DiscreteGaussian", Largest)
    small = replace(joint, signal_bound=1000)
    words = trained(learner, small, expected_batch=0.05).astype(np.int64)
    signal = words - Largest(None, None).sample(words.size)
    assert np.abs(signal).max() == 1000, "cut"
    assert np.abs(words).max() == 1000 + joint.share_bound
    assert most <= limit(32, PARTIES)


def test_the_signal_is_cut_before_the_noise_and_not_with_it(monkeypatch):
    """Control: cutting the noised word would let no share through where the signal is large."""
    learner = Rows()
    joint = replace(noise_of(learner), signal_bound=1)
    words = trained(learner, joint)
    assert np.abs(words).max() > joint.share_std
    monkeypatch.setattr(client.training, "DiscreteGaussian", Silence)
    assert np.abs(trained(learner, joint)).max() == 1


GRIDS = {"as fine as fits": None, "two steps to C / B": 1, "sixteen": 4}


def on_grid(learner, steps):
    """The study's noise, or that of a grid on which C / B is 2**steps steps long."""
    joint = noise_of(learner)
    if steps is None:
        return joint
    exponent = steps - math.floor(math.log2(CLIP / BATCH))
    root = math.sqrt(Layout.of(learner.state()).size)
    moved = math.ldexp(SLACK * CLIP / BATCH, exponent)
    return replace(joint, exponent=exponent, sensitivity=moved + root)


@pytest.mark.parametrize("steps", GRIDS.values(), ids=GRIDS.keys())
def test_leaving_any_patient_out_moves_the_words_by_at_most_the_sensitivity(silent, steps):
    learner = Rows()
    joint = on_grid(learner, steps)
    whole = trained(learner, joint).astype(np.int64)
    moves = []
    for patient in range(learner.patient_count()):
        rest = trained(learner.without(patient), joint).astype(np.int64)
        moves.append(np.linalg.norm(whole - rest))
    assert max(moves) <= joint.sensitivity
    if steps is None:
        assert max(moves) > 0.99 * joint.sensitivity, "every one of them is clipped"


def test_control_without_clipping_a_patient_moves_them_further(silent, monkeypatch):
    learner = Rows()
    learner.data *= 30
    joint = noise_of(learner)
    real = client.training.choose_engine
    monkeypatch.setattr(
        client.training,
        "choose_engine",
        lambda kind, module, trainable, clip, **more: real(
            kind, module, trainable, 1e3 * clip, **more
        ),
    )
    whole = trained(learner, joint).astype(np.int64)
    rest = trained(learner.without(3), joint).astype(np.int64)
    assert np.linalg.norm(whole - rest) > 2 * joint.sensitivity


def test_control_clipping_by_record_moves_them_further(silent, monkeypatch):
    """All records of a patient are the same, so that their gradients add up."""
    learner = Rows([0, 1, 1, 1])
    learner.data[2:] = learner.data[1]
    learner.labels[2:] = learner.labels[1]
    joint = noise_of(learner)
    honest = trained(learner, joint).astype(np.int64)
    alone = trained(learner.without(1), joint).astype(np.int64)
    assert np.linalg.norm(honest - alone) <= joint.sensitivity
    real = client.training.choose_engine

    def by_record(*words, **more):
        engine = real(*words, **more)
        whole = engine.clipped_sum
        engine.clipped_sum = lambda losses, owner, _: whole(
            losses, np.arange(len(owner)), len(owner)
        )
        return engine

    monkeypatch.setattr(client.training, "choose_engine", by_record)
    naive = trained(learner, joint).astype(np.int64)
    assert np.linalg.norm(naive - alone) > 2.9 * joint.sensitivity


def test_sums_of_less_than_float32_are_not_given_to_joint_noise(monkeypatch):
    """The slack of the sensitivity is that of float32; an engine that needs more is a mistake."""
    learner = Rows()
    trainer = trainer_of(learner, settings(noise_of(learner)))
    monkeypatch.setattr(trainer, "_reduced", True)
    with pytest.raises(AssertionError, match="float32"):
        trainer.train(learner.state(), 1)


# ------------------------------------------------------------------ before and after


def test_after_a_joint_round_the_object_holds_nothing_of_it():
    learner = Rows()
    trainer = trainer_of(learner, settings(noise_of(learner)))
    state = learner.state()
    keystream = trainer._noise._keystream
    trainer.train(state, 1)
    for name, parameter in learner.trainable().items():
        assert parameter.grad is None
        assert np.array_equal(parameter.detach().numpy(), state[name])
    assert trainer._noise._keystream is not keystream
    assert not any(layer._forward_hooks for layer in learner.module.modules())
    held = [v for v in vars(trainer).values() if isinstance(v, np.ndarray | torch.Tensor)]
    assert held == []


def test_the_next_round_starts_from_the_state_that_it_is_given(silent):
    learner = Rows()
    joint = noise_of(learner)
    trainer = trainer_of(learner, settings(joint))
    first = learner.state()
    moved = {name: value + np.float32(0.1) for name, value in first.items()}
    before = trainer.train(first, 1)
    other = trainer.train(moved, 2)
    assert not np.array_equal(before, other)
    assert np.array_equal(trainer.train(first, 3), before)


class Reused(SecureNoise):
    """The same keystream in every round."""

    def renew(self):
        if not hasattr(self, "_key"):
            self._key = self._entropy.take(32)
        entropy, self._entropy = self._entropy, self
        super().renew()
        self._entropy = entropy

    def take(self, count):
        return self._key[:count]


@pytest.mark.parametrize(("noise", "related"), [(SecureNoise, False), (Reused, True)])
def test_two_rounds_from_the_same_state_have_unrelated_noise(noise, related):
    learner = Rows([], width=600)
    trainer = trainer_of(learner, settings(noise_of(learner)), noise=noise)
    first, second = (trainer.train(learner.state(), 7).astype(float) for _ in range(2))
    correlation = np.corrcoef(first, second)[0, 1]
    assert bool(abs(correlation) > 0.99) is related
    assert related or abs(correlation) < 5 / math.sqrt(first.size)


def test_a_joint_round_that_failed_leaves_nothing_for_the_next(silent):
    learner = Rows()
    trainer = trainer_of(learner, settings(noise_of(learner), micro_batch=3))
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
    assert np.array_equal(trainer.train(state, 1), wanted)


def test_a_model_is_admitted_before_the_first_joint_step():
    learner = Rows(np.arange(8))
    learner.module = nn.Sequential(nn.Linear(5, LABELS), nn.BatchNorm1d(LABELS, affine=False))
    with pytest.raises(RefusedError) as caught:
        trained(learner, noise_of(learner))
    assert caught.value.code is Code.MODEL_BATCH_NORM


# ------------------------------------------------------------------ settings


def study():
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "demo",
            "task": {"kind": "diagnosis", "labels": ("a", "b", "c")},
            "model": {"backbone": "package:x/y"},
            "training": {
                "rounds": 4,
                "local_steps": 1,
                "sampling_rate": 1.0,
                "expected_batch": 4.0,
            },
            "aggregation": {"optimizer": {"name": "fedadam", "learning_rate": 0.1}},
            "privacy": {"mode": "joint", "epsilon": 8.0, "delta": 1e-5, "clip_norm": CLIP},
            "sites": tuple({"id": f"site-{i}"} for i in range(PARTIES)),
        }
    )


def test_a_hospital_on_its_own_goes_in_the_direction_that_it_gives_to_the_sum(silent, monkeypatch):
    learner = Rows()
    joint = noise_of(learner)
    monkeypatch.setattr(SecureNoise, "add_gaussian", lambda _self, values, _std: values)
    given = {"noise_multiplier": 1.0, "evaluation_noise": 1.0}
    shared = TrainingSettings.from_study(study(), joint=joint, **given)
    alone = TrainingSettings.from_study(study(), **given)
    assert (shared.mode, alone.mode) == ("joint", "local")
    words = trainer_of(learner, shared).train(learner.state(), 1)
    update = trainer_of(learner, alone).train(learner.state(), 1)
    assert update.dtype == np.float32
    assert np.abs(words / 2.0**joint.exponent - update).max() < 1e-6
    assert np.abs(update).max() > 1e-3


def test_a_hospital_on_its_own_adds_noise_for_one():
    """Not a share of it: nobody else's comes to it."""
    learner = Rows([], width=600)
    alone = TrainingSettings.from_study(study(), noise_multiplier=1.0, evaluation_noise=1.0)
    update = trainer_of(learner, alone).train(learner.state(), 1)
    assert update.std() == pytest.approx(SLACK * CLIP / BATCH, rel=0.06)


@pytest.mark.parametrize("change", [{"joint": None}, {"clip_norm": None}, {"local_steps": 2}])
def test_joint_settings_need_shares_a_clip_norm_and_a_single_step(change):
    joint = noise_of(Rows())
    settings(joint)
    with pytest.raises(ValueError, match="mode joint needs"):
        settings(**({"joint": joint} | change))
