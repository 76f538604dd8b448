"""The whole private path, measured: data set in, update or ledger out, one patient more or less."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld

from client.data.records import Record
from client.privacy.ledger import Charge, Ledger, RoundId
from client.privacy.noise import SecureNoise
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from client.training import LocalTrainer, TrainingSettings
from common.accountant import DpEvent
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy, WallClock

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLIP = 0.05
DELTA = 1e-5
WORDS = ("fever", "sputum", "cough", "wheeze", "legs", "heart", "chest", "no")


class _Silent(SecureNoise):
    """Everybody's coin falls on heads and the noise is zero: what is left is the clipped sum."""

    def bernoulli(self, count: int, probability: float) -> np.ndarray:
        del probability
        return np.ones(count, np.bool_)

    def add_gaussian(self, values, std):
        assert std > 0
        return values.clone() if isinstance(values, torch.Tensor) else values.copy()


def _study(backbone: Path, tuning: str) -> Study:
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "review",
            "task": {
                "kind": "diagnosis",
                "labels": ["a", "b", "c"],
                "max_tokens": 8,
                "long_notes": "window",
                "window_stride": 3,
                "max_windows": 3,
            },
            "model": {
                "backbone": str(backbone),
                "tuning": tuning,
                "freeze_embeddings": False,
                "precision": "float32",
                "lora": {"rank": 2},
            },
            "training": {
                "rounds": 1,
                "local_steps": 1,
                "sampling_rate": 1.0,
                "expected_batch": 1.0,
                "micro_batch": 5,
                "optimizer": {"name": "sgd", "learning_rate": 1.0},
            },
            "privacy": {
                "mode": "local",
                "epsilon": 8,
                "delta": DELTA,
                "clip_norm": CLIP,
                "noise_multiplier": 1.0,
            },
            "sites": [{"id": "north"}, {"id": "south"}, {"id": "west"}],
        }
    )


def _records() -> list[Record]:
    """Nine patients with one to five notes of three to thirty words."""
    stream = np.random.default_rng(3)
    found = []
    for patient in range(9):
        for note in range(int(stream.integers(1, 6))):
            text = " ".join(stream.choice(WORDS, int(stream.integers(3, 30))))
            label = "abc"[int(stream.integers(3))]
            found.append(Record(f"p{patient}", text, label, None, "notes.csv", note + 2))
    return found


def _update(study: Study, records: list[Record]) -> np.ndarray:
    """The update of the real trainer over `records`, from a state with a classifier in it."""
    assert study.model is not None
    backbone = load_backbone(study.model.backbone)
    learner = DiagnosisLearner(study, records, (), backbone, device=CPU)
    stream = np.random.default_rng(1)
    state = {
        name: stream.normal(0, 0.5, value.shape).astype(np.float32)
        if "classifier" in name
        else value.detach().numpy().copy()
        for name, value in learner.trainable().items()
    }
    settings = TrainingSettings.from_study(study, noise_multiplier=1.0, evaluation_noise=1.0)
    noise = _Silent(SeededEntropy("review"))
    return LocalTrainer(learner, Layout.of(state), settings, noise, "cpu").train(state, 1)


@pytest.mark.parametrize("tuning", ["head", "bitfit", "lora", "full"])
def test_one_patient_changes_the_trained_update_by_at_most_the_clip_norm(
    tiny_bert: Path, tuning: str
):
    """Through reading, windows, several notes, micro-batches and step; notes as control."""
    study, records = _study(tiny_bert, tuning), _records()
    alone = [dataclasses.replace(r, patient=f"{r.patient}-{r.line}") for r in records]
    whole, naive = _update(study, records), _update(study, alone)
    changes, control = [], []
    for patient in {r.patient for r in records}:
        kept = [i for i, r in enumerate(records) if r.patient != patient]
        changes.append(np.linalg.norm(whole - _update(study, [records[i] for i in kept])))
        control.append(np.linalg.norm(naive - _update(study, [alone[i] for i in kept])))
    # The update is a float32 difference of weights near 1: a part of 1e-6 of them is rounding.
    assert max(changes) <= CLIP * 1.001 + 2e-5
    assert min(changes) > 0.9 * CLIP
    assert max(control) > 1.5 * CLIP


def _independent(events: list[DpEvent]) -> float:
    accountant = pld.PLDAccountant(value_discretization_interval=2e-4)
    for event in events:
        plain = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, plain)
        accountant.compose(plain if event.sampling_rate == 1 else sampled, event.steps)
    return float(accountant.get_epsilon(DELTA))


def _charges(*, evaluate: bool) -> list[Charge]:
    charges = [Charge("train", "train", (DpEvent(1.3, 0.2, 4),))]
    if evaluate:
        charges.append(Charge("evaluate", "held_out", (DpEvent(9.0, 1.0, 1),)))
    return charges


def test_a_ledger_after_burns_crashes_and_voids_is_what_a_second_accountant_says(
    tmp_path: Path,
):
    """The events are counted here by hand; a void before training is the only one not there."""
    split = "ab" * 32

    def opened() -> Ledger:
        return Ledger.open(
            tmp_path / "ledger.sqlite",
            epsilon_cap=50.0,
            delta=DELTA,
            clock=WallClock(),
            entropy=SeededEntropy("review"),
        )

    def reserve(ledger: Ledger, number: int, *, evaluate: bool = False):
        return ledger.reserve_round(
            RoundId(bytes(32), "", number), _charges(evaluate=evaluate), split
        )

    first = opened()
    counted = Charge("statistics", "train", (DpEvent(4.0, 1.0, 1),))
    first.reserve_round(RoundId(bytes(32), "", 1), [counted], split)
    first.begin(reserve(first, 2))
    reserve(first, 3, evaluate=True)  # the process dies before a gradient: stays charged
    first.close()
    second = opened()
    second.begin(reserve(second, 3, evaluate=True))  # burned, tried again: charged again
    second.void(reserve(second, 4))
    second.release(reserve(second, 5, evaluate=True))
    train = [DpEvent(4.0, 1.0, 1), DpEvent(1.3, 0.2, 4 * 4)]
    held_out = [DpEvent(9.0, 1.0, 3)]
    spent = second.spent()
    second.close()
    assert spent.train == pytest.approx(_independent(train), rel=2e-3)
    assert spent.held_out == pytest.approx(_independent(held_out), rel=2e-3)
    assert spent.epsilon == max(spent.train, spent.held_out)
    forgotten = _independent([DpEvent(4.0, 1.0, 1), DpEvent(1.3, 0.2, 3 * 4)])
    assert spent.train > 1.05 * forgotten
