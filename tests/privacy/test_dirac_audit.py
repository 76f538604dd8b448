"""The calibration audit: the real training round on canaries, and the mistakes it must catch.

Canary i moves coordinate i alone, so after a round the coordinates of patients who took part
show the signal, and all others show the noise. Both are known in closed form: the mean
difference is lr C T q / B and the standard deviation lr sigma C sqrt(T) / B.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import client.training
from client.privacy.engine import PerSampleEngine
from client.privacy.noise import SecureNoise
from client.training import LocalTrainer, TrainingSettings
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)
CANARIES, STEPS, RATE, SIGMA, CLIP = 3000, 40, 0.2, 1.675, 0.5
BATCH = RATE * CANARIES / 2
LIMIT = 5.0
HONEST = TrainingSettings(
    mode="local",
    local_steps=STEPS,
    expected_batch=BATCH,
    micro_batch=150,
    learning_rate=1.0,
    optimizer="sgd",
    sampling_rate=RATE,
    clip_norm=CLIP,
    noise_multiplier=SIGMA,
)


class Canaries:
    """Every included patient has `records` equal records that push his own coordinate."""

    def __init__(self, included, records: int = 1) -> None:
        self.ids = np.flatnonzero(included)
        self.records = records
        self.module = nn.Embedding(CANARIES, 1)

    def trainable(self):
        return {"weight": self.module.weight}

    def patient_count(self):
        return len(self.ids)

    def held_out_count(self):
        return 0

    def rows_of(self, patients):
        owner = np.repeat(np.arange(len(patients)), self.records)
        return patients[owner], owner

    def losses(self, rows):
        tokens = torch.from_numpy(self.ids[rows])
        return -50.0 * self.module(tokens[:, None]).reshape(-1)

    def measure(self):
        raise NotImplementedError


class Reused(SecureNoise):
    """The same noise in every step, as from a seed in a configuration."""

    def gaussian(self, count):
        return np.random.default_rng(7).standard_normal(count)


def scores(settings=HONEST, *, noise=SecureNoise, records=1, name="audit"):
    """(z of the signal, z of the noise, signal over wanted, noise over wanted)."""
    included = np.random.default_rng(11).random(CANARIES) < 0.5
    learner = Canaries(included, records)
    state = {"weight": np.zeros((CANARIES, 1), np.float32)}
    trainer = LocalTrainer(
        learner, Layout.of(state), settings, noise(SeededEntropy(name)), device="cpu"
    )
    update = trainer.train(state, 1).astype(np.float64)
    inside, outside = update[included], update[~included]
    difference = inside.mean() - outside.mean()
    error = math.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
    wanted = CLIP * STEPS * RATE / BATCH
    spread = SIGMA * CLIP * math.sqrt(STEPS) / BATCH
    ratio = outside.std(ddof=1) / spread
    return (
        (difference - wanted) / error,
        (ratio - 1) * math.sqrt(2 * (len(outside) - 1)),
        difference / wanted,
        ratio,
    )


@pytest.mark.parametrize("name", ["audit", "another", "third"])
@pytest.mark.parametrize("records", [1, 3])
def test_the_real_round_shows_the_signal_and_the_noise_it_claims(name, records):
    signal, noise, signal_ratio, noise_ratio = scores(name=name, records=records)
    assert abs(signal) < LIMIT
    assert abs(noise) < LIMIT
    assert signal_ratio == pytest.approx(1.0, abs=0.2)
    assert noise_ratio == pytest.approx(1.0, abs=0.06)


def test_the_round_shows_the_same_with_gradients_from_opacus():
    signal, noise, signal_ratio, noise_ratio = scores(replace(HONEST, engine="opacus"), records=2)
    assert max(abs(signal), abs(noise)) < LIMIT
    assert signal_ratio == pytest.approx(1.0, abs=0.2)
    assert noise_ratio == pytest.approx(1.0, abs=0.06)


MISTAKES = {
    "half the noise": {"noise_multiplier": SIGMA / 2},
    "twice the sampling rate": {"sampling_rate": 2 * RATE},
    "full batch accounted as sampled": {"sampling_rate": 1.0},
    "ten times the clip norm": {"clip_norm": 10 * CLIP, "noise_multiplier": SIGMA / 10},
    "no clipping": {"clip_norm": 1e3, "noise_multiplier": SIGMA * CLIP / 1e3},
    "twice the steps": {"local_steps": 2 * STEPS},
    "half the divisor": {"expected_batch": BATCH / 2},
}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES.keys())
def test_the_audit_catches_a_wrong_setting(change):
    signal, noise, *_ = scores(replace(HONEST, **change))
    assert max(abs(signal), abs(noise)) > LIMIT


def test_the_audit_catches_reused_noise():
    _, noise, *_ = scores(noise=Reused)
    assert abs(noise) > LIMIT


def test_the_audit_catches_clipping_per_record_instead_of_per_patient(monkeypatch):
    class PerRecord(PerSampleEngine):
        def clipped_sum(self, losses, owner, patients):
            return super().clipped_sum(losses, np.arange(len(owner)), len(owner))

    monkeypatch.setattr(
        client.training, "choose_engine", lambda _, *given, **more: PerRecord(*given, **more)
    )
    signal, _, ratio, _ = scores(records=3)
    assert signal > LIMIT
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_the_audit_catches_a_plain_sum_in_the_place_of_the_clipped_one(monkeypatch):
    class Unclipped(PerSampleEngine):
        def clipped_sum(self, losses, owner, patients):
            self.clip_norm, kept = math.inf, self.clip_norm
            try:
                return super().clipped_sum(losses, owner, patients)
            finally:
                self.clip_norm = kept

    monkeypatch.setattr(
        client.training, "choose_engine", lambda _, *given, **more: Unclipped(*given, **more)
    )
    signal, *_ = scores()
    assert signal > LIMIT


def test_the_audit_catches_noise_that_forgets_empty_or_skipped_steps(monkeypatch):
    """Noise in every second step only, as a sampler that drops batches would give."""
    honest = SecureNoise.add_gaussian
    calls = 0

    def skipping(self, values, std):
        nonlocal calls
        calls += 1
        return honest(self, values, std if calls % 2 else std * 1e-9)

    monkeypatch.setattr(SecureNoise, "add_gaussian", skipping)
    _, noise, *_ = scores()
    assert noise < -LIMIT
