"""The calibration audit of joint privacy, through real trainers, machines, masks and sums.

Canary i moves coordinate i alone, and lies at one hospital or at none. In the released sum the
coordinates of patients who were there show the signal, all others show the noise of everybody's
shares. Both are known in closed form, from the study alone: of a sum over all hospitals the
mean difference after T rounds is C T q / B, and k honest shares leave a standard deviation of
sigma C' sqrt(T k / h) / B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import world
from torch import nn
from world import TracerWorker, World

import client.training
from client.privacy.discrete import DiscreteGaussian
from client.privacy.noise import SecureNoise
from client.round.effects import Worked
from client.training import LocalTrainer, TrainingSettings
from common.bundle import Bundle
from common.joint import SLACK
from common.study import Study
from common.world import SeededEntropy

torch.set_num_threads(1)
PARTIES, QUORUM, COLLUDERS = 6, 5, 1
HONEST = QUORUM - COLLUDERS
CANARIES, ROUNDS, RATE, SIGMA, CLIP = 3000, 2, 0.4, 1.0, 0.5
BATCH = RATE * CANARIES / 2 / PARTIES
LIMIT = 5.0
NAMES = tuple(f"site-{number:02d}" for number in range(1, PARTIES + 1))
STUDY = Study.model_validate(
    {
        "format": "wardround-study/1",
        "name": "audit",
        "task": {"kind": "diagnosis", "labels": ("a", "b")},
        "model": {"backbone": "package:x/y"},
        "training": {
            "rounds": ROUNDS,
            "local_steps": 1,
            "sampling_rate": RATE,
            "expected_batch": BATCH,
            "micro_batch": 100,
        },
        "privacy": {
            "mode": "joint",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip_norm": CLIP,
            "noise_multiplier": SIGMA,
        },
        "evaluation": {"every": ROUNDS},
        "sites": tuple({"id": name} for name in NAMES),
        "quorum": {"colluders": COLLUDERS, "survivors": QUORUM},
    }
)


class Canaries:
    """Every patient of this hospital has `records` equal records that push his own coordinate."""

    def __init__(self, ids, records: int) -> None:
        self.ids, self.records = ids, records
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


class Mute(SecureNoise):
    """The randomness of a hospital that adds no noise: it conspires, or its software is broken."""


class Reused(SecureNoise):
    """The same keystream in every round, as from a seed in a configuration."""

    def __init__(self, entropy) -> None:
        self._fixed = entropy.take(32)
        super().__init__(entropy)

    def renew(self):
        entropy, self._entropy = self._entropy, self
        super().renew()
        self._entropy = entropy

    def take(self, count):
        return self._fixed[:count]


@dataclass(frozen=True)
class Seen:
    """What the audit says: z scores, and what was found over what was wanted."""

    signal: float
    noise: float
    signal_ratio: float
    noise_ratio: float

    @property
    def caught(self):
        return max(abs(self.signal), abs(self.noise)) > LIMIT


@pytest.fixture
def audit(monkeypatch):
    """Plays the study; `mute` hospitals add no noise, `absent` ones are not there at all."""

    def mutable(noise, std):
        drawn = DiscreteGaussian(noise, std)
        return Silence() if isinstance(noise, Mute) else drawn

    if client.training.DiscreteGaussian is DiscreteGaussian:
        monkeypatch.setattr(client.training, "DiscreteGaussian", mutable)

    def play(*, mute=0, absent=0, honest=None, noise=SecureNoise, records=1, name="audit"):
        there = NAMES[: PARTIES - absent]
        chain, homes = played(monkeypatch, there, mute, noise, records, name)
        wanted = len(there) - mute if honest is None else honest
        return scores(len(there) * chain.state["weight"], homes, wanted)

    return play


class Silence:
    """No noise, in the place of a share."""

    def sample(self, count):
        return np.zeros(count, np.int64)

    def add_to(self, words):
        """Leaves the words as they are."""


def played(monkeypatch, there, mute, noise, records, name):
    """(the chain after the last round, the hospital of every canary or -1)."""
    blank = {"weight": np.zeros((CANARIES, 1), np.float32)}
    bundle = Bundle(STUDY, blank, bytes(32), "{}", SIGMA, 1.0)
    settings = TrainingSettings.from_study(
        STUDY, noise_multiplier=SIGMA, evaluation_noise=1.0, joint=bundle.joint_noise()
    )
    homes = np.random.default_rng(11).integers(-PARTIES, PARTIES, CANARIES)
    homes[homes >= len(there)] = -1
    trainers = {
        site: LocalTrainer(
            Canaries(np.flatnonzero(homes == index), records),
            bundle.layout,
            settings,
            (Mute if index >= len(there) - mute else noise)(SeededEntropy(f"{name}-{site}")),
            device="cpu",
        )
        for index, site in enumerate(there)
    }

    class Hospital(TracerWorker):
        def work(self, request):
            done = super().work(replace(request, trains=False, measures=False))
            assert request.trains
            update = trainers[self.site].train(request.state, request.round)
            assert update.dtype == np.int32
            return Worked(update, None, done.ledger)

    monkeypatch.setattr(world, "TracerWorker", Hospital)
    monkeypatch.setattr(
        world, "make_terms", lambda _, keys, **__: bundle.terms({s: keys[s].public for s in NAMES})
    )
    run = World(PARTIES, seed=name)
    run.start(absent=NAMES[len(there) :])
    run.run(until=lambda: len(run.rounds) == ROUNDS)
    assert [result.survivors for result in run.rounds] == [there] * ROUNDS
    return run.chains[-1], homes


def scores(total, homes, honest) -> Seen:
    """How the released sum looks against what the study promises with so many honest shares."""
    total = total.astype(np.float64).reshape(-1)
    inside, outside = total[homes >= 0], total[homes < 0]
    difference = inside.mean() - outside.mean()
    error = math.sqrt(inside.var() / len(inside) + outside.var() / len(outside))
    wanted = CLIP * ROUNDS * RATE / BATCH
    spread = SIGMA * SLACK * CLIP * math.sqrt(ROUNDS * honest / HONEST) / BATCH
    ratio = outside.std(ddof=1) / spread
    return Seen(
        (difference - wanted) / error,
        (ratio - 1) * math.sqrt(2 * (len(outside) - 1)),
        difference / wanted,
        ratio,
    )


# What holds: (hospitals that are not there, hospitals that add no noise).
KEPT = {
    "all honest": (0, 0),
    "all there, as many silent as may conspire": (0, COLLUDERS),
    "a bare quorum of honest ones": (PARTIES - QUORUM, 0),
    "a bare quorum, as many silent as may conspire": (PARTIES - QUORUM, COLLUDERS),
}


@pytest.mark.parametrize("name", ["audit", "another"])
@pytest.mark.parametrize(("absent", "mute"), KEPT.values(), ids=KEPT.keys())
def test_the_released_sum_shows_the_signal_and_every_share_of_the_noise(audit, absent, mute, name):
    seen = audit(absent=absent, mute=mute, name=name)
    assert abs(seen.signal) < LIMIT
    assert abs(seen.noise) < LIMIT
    assert seen.signal_ratio == pytest.approx(1.0, abs=0.4)
    assert seen.noise_ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("absent", "mute"), KEPT.values(), ids=KEPT.keys())
def test_the_noise_is_never_below_the_one_that_is_charged(audit, absent, mute):
    seen = audit(absent=absent, mute=mute, honest=HONEST)
    assert seen.noise > -LIMIT
    assert seen.noise_ratio > 0.9


def test_a_patients_records_count_as_one_patient(audit):
    seen = audit(records=3)
    assert not seen.caught


WORST = {"absent": PARTIES - QUORUM, "mute": COLLUDERS}


def test_the_audit_catches_one_silent_hospital_more_than_may_conspire(audit):
    seen = audit(absent=PARTIES - QUORUM, mute=COLLUDERS + 1, honest=HONEST)
    assert seen.noise < -LIMIT
    assert seen.noise_ratio == pytest.approx(math.sqrt((HONEST - 1) / HONEST), rel=0.05)


def planted_share(monkeypatch, factor):
    real = client.training.DiscreteGaussian
    changed = lambda noise, std: real(noise, std * factor)  # noqa: E731 - one planted mistake
    monkeypatch.setattr(client.training, "DiscreteGaussian", changed)


def test_the_audit_catches_half_the_noise(audit, monkeypatch):
    planted_share(monkeypatch, 0.5)
    seen = audit(**WORST)
    assert seen.noise < -LIMIT
    assert seen.noise_ratio == pytest.approx(0.5, rel=0.1)


def test_the_audit_catches_shares_sized_for_all_hospitals_and_not_for_the_honest(
    audit, monkeypatch
):
    """Alone it looks right where everybody is honest and there; the promise is about the rest."""
    monkeypatch.setattr(Study, "honest", lambda _self, count: count)
    seen = audit(**WORST)
    assert seen.noise < -LIMIT
    assert seen.noise_ratio == pytest.approx(math.sqrt(HONEST / PARTIES), rel=0.05)
    naive = audit(honest=HONEST)
    assert abs(naive.noise) < LIMIT


def test_the_audit_catches_shares_sized_for_the_quorum_with_its_colluders(audit, monkeypatch):
    monkeypatch.setattr(Study, "honest", lambda _self, _count: QUORUM)
    assert audit(**WORST).noise < -LIMIT


def test_the_audit_catches_twice_the_sampling_rate(audit, monkeypatch):
    real = client.training.sample_patients
    monkeypatch.setattr(
        client.training, "sample_patients", lambda noise, count, rate: real(noise, count, 2 * rate)
    )
    seen = audit(**WORST)
    assert seen.signal > LIMIT
    assert abs(seen.noise) < LIMIT


def test_the_audit_catches_a_sum_that_is_hardly_clipped(audit, monkeypatch):
    real = client.training.choose_engine
    monkeypatch.setattr(
        client.training,
        "choose_engine",
        lambda kind, module, trainable, clip, **more: real(
            kind, module, trainable, 10 * clip, **more
        ),
    )
    seen = audit(**WORST)
    assert seen.signal > LIMIT
    assert seen.signal_ratio == pytest.approx(10, rel=0.2)


def test_the_audit_catches_clipping_by_record(audit, monkeypatch):
    real = client.training.choose_engine

    def by_record(*words, **more):
        engine = real(*words, **more)
        whole = engine.clipped_sum
        engine.clipped_sum = lambda losses, owner, _: whole(
            losses, np.arange(len(owner)), len(owner)
        )
        return engine

    monkeypatch.setattr(client.training, "choose_engine", by_record)
    seen = audit(records=3, **WORST)
    assert seen.signal > LIMIT
    assert seen.signal_ratio == pytest.approx(3, rel=0.2)


def test_the_audit_catches_noise_that_is_used_again_in_the_next_round(audit):
    seen = audit(noise=Reused)
    assert seen.noise > LIMIT
    assert seen.noise_ratio == pytest.approx(math.sqrt(2), rel=0.1)


def planted_grid(monkeypatch, change):
    real = TrainingSettings.from_study

    def changed(study, *, joint, **more):
        return replace(real(study, joint=joint, **more), joint=change(joint))

    monkeypatch.setattr(TrainingSettings, "from_study", staticmethod(changed))


@pytest.mark.parametrize("off", [-1, 1])
def test_the_audit_catches_noise_for_another_grid_than_the_signals(audit, monkeypatch, off):
    planted_grid(
        monkeypatch, lambda joint: replace(joint, share_std=math.ldexp(joint.share_std, off))
    )
    seen = audit(**WORST)
    assert seen.caught
    assert seen.noise_ratio == pytest.approx(2.0**off, rel=0.1)


def test_the_audit_catches_a_trainer_on_another_grid_than_the_sum(audit, monkeypatch):
    """All of it is half as large: noise and signal fit each other, and the step is wrong."""

    def coarser(joint):
        return replace(joint, exponent=joint.exponent - 1, share_std=joint.share_std / 2)

    planted_grid(monkeypatch, coarser)
    seen = audit(**WORST)
    assert seen.signal < -LIMIT
    assert seen.noise < -LIMIT


def test_the_rounding_to_the_grid_is_no_part_of_what_is_measured():
    blank = {"weight": np.zeros((CANARIES, 1), np.float32)}
    noise = Bundle(STUDY, blank, bytes(32), "{}", SIGMA, 1.0).joint_noise()
    assert noise is not None
    assert noise.honest == HONEST
    assert noise.rounding < 1e-3
