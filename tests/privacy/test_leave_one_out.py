"""One patient less in the FILE moves the clipped sum by at most C: reader, split, learner, step.

The engine's own tests leave a patient out of a batch. Here he is left out of the data, so whatever
a reader, a tokenizer or a normalisation would take from the data as a whole shows as well. Every
patient's coin is fixed by his name; the sum is caught just before its noise.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import client.tasks.diagnosis as task
import client.training
from client.build import build_model
from client.data.records import by_patient
from client.federation import Federation
from client.privacy.ledger import HeldOutSplit
from client.privacy.noise import SecureNoise
from client.tasks.rows import NormalisedRowsLearner
from client.tasks.text import Encoded, Encoder
from client.training import LocalTrainer, TrainingSettings
from common.config import load
from common.statistics import DEVIATION, MEAN, StatisticsLayout
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy

torch.set_num_threads(1)

CLIP = 0.05  # below every gradient, so that who takes part counts in full
ROUNDING = 1e-5
SPLIT = HeldOutSplit(bytes([14]) * 32, 0.2)  # none of those left out is held out
HOSPITAL = "east"
MANY = "east-p3"  # has twenty notes
ODD = "east-p4"  # has a word, and a value, that nobody else has
OTHERS = ("east-p0", "east-p5", "east-p9")
LEFT_OUT = (MANY, ODD, *OTHERS)


def coin(patient: str) -> bool:
    """Whether a patient takes part in the step: his own coin, whatever the others are."""
    return patient in LEFT_OUT or hashlib.sha256(patient.encode()).digest()[0] < 192


class Caught(SecureNoise):
    """Adds no noise, and keeps what it was given."""

    def add_gaussian(self, values, std):
        self.sum = values.double().numpy().copy()
        return values


@dataclass(frozen=True)
class Hospital:
    """A study over a file, and the step of one of its hospitals."""

    study: Path
    file: Path
    rows: list[dict[str, str]]

    def write(self, *, without: str | None) -> None:
        with self.file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(row for row in self.rows if row["patient"] != without)

    def clipped_sum(self, monkeypatch, *, without: str | None = None) -> np.ndarray:
        """The sum of one private step over everybody whose coin is up, before its noise."""
        self.write(without=without)
        study = load(self.study, Study)
        federation = Federation(study, self.study, device="cpu")
        records = federation.divide(HOSPITAL, SPLIT).train
        sample = [i for i, name in enumerate(by_patient(records)) if coin(name)]
        monkeypatch.setattr(
            client.training, "sample_patients", lambda *_: np.array(sample, np.int64)
        )
        learner = federation.learner(HOSPITAL)
        assert learner.patient_count() == len(by_patient(records))
        settings = TrainingSettings.from_study(
            federation.study, noise_multiplier=1.0, evaluation_noise=1.0, statistics_noise=1.0
        )
        # Admission has tests of its own; the controls would fail it.
        monkeypatch.setattr("client.privacy.admission.admit", lambda *_, **__: None)
        initial = build_model(federation.study).initial
        draw = np.random.default_rng(3)
        state = {n: v + draw.normal(0, 0.1, v.shape).astype("f4") for n, v in initial.items()}
        if isinstance(learner, NormalisedRowsLearner):
            state[MEAN] = np.full(4, 0.4, np.float32)
            state[DEVIATION] = np.full(4, 0.2, np.float32)
        noise = Caught(SeededEntropy("step"))
        trainer = LocalTrainer(learner, Layout.of(initial), settings, noise, "cpu")
        trainer._admitted = True
        trainer.train(state, 1)
        return noise.sum

    def change(self, monkeypatch, patient: str) -> float:
        """How far leaving a patient out of the file moves the sum, in clip norms."""
        whole = self.clipped_sum(monkeypatch)
        return float(np.linalg.norm(whole - self.clipped_sum(monkeypatch, without=patient))) / CLIP


@pytest.fixture
def texts(tmp_path, tiny_bert, write_study, write_notes) -> Callable[..., Hospital]:
    """A hospital of notes; `changes` are laid over the study."""

    def make(**changes) -> Hospital:
        rows = write_notes(tmp_path / "notes.csv", patients=16)
        rows += [
            {"patient": MANY, "hospital": HOSPITAL, "text": f"swollen legs {'old ' * at}", "label": "asthma"}
            for at in range(20)
        ]  # fmt: skip
        for row in rows:
            if row["patient"] == ODD:
                row["text"] += " aaaaa"
        private = {
            "training": {"local_steps": 1, "micro_batch": 1000},
            "privacy": {"clip_norm": CLIP},
        }
        study = write_study(tmp_path, tiny_bert, {**private, **changes}, notes=False)
        return Hospital(study, tmp_path / "notes.csv", rows)

    return make


@pytest.fixture
def numbers(tmp_path) -> Hospital:
    """A hospital of numbers, the study of configs/ with another clip norm."""
    text = (Path(__file__).parents[2] / "configs" / "tabular.yaml").read_text()
    for old, new in (
        ("data/synthetic-labs.csv", "labs.csv"),
        ("clip_norm: 1.0", f"clip_norm: {CLIP}"),
        ("local_steps: 5", "local_steps: 1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "study.yaml").write_text(text)
    draw = np.random.default_rng(1)
    rows = []
    for site in ("east", "north", "south", "west"):
        for number in range(20):
            patient = f"{site}-p{number}"
            for _ in range(20 if patient == MANY else 1 + number % 2):
                values = {
                    "age": draw.integers(20, 60), "systolic": draw.integers(100, 140),
                    "crp": draw.integers(1, 9), "heart_rate": draw.integers(60, 90),
                }  # fmt: skip
                if patient == ODD:
                    values = {"age": 100, "systolic": 240, "crp": 60, "heart_rate": 200}
                label = "sepsis" if number % 3 == 0 else "none"
                told = {name: str(value) for name, value in values.items()}
                rows.append({"patient": patient, "hospital": site, **told, "label": label})
    return Hospital(tmp_path / "study.yaml", tmp_path / "labs.csv", rows)


READINGS = {
    "features of truncated notes": {},
    "features of windows": {"task": {"max_tokens": 8, "long_notes": "window", "window_stride": 4}},
    "without stop words and endings": {"task": {"stop_words": "english", "stemming": "english"}},
    "the whole network, by windows": {
        "task": {"max_tokens": 8, "long_notes": "window", "window_stride": 4},
        "model": {"tuning": "full"},
    },
    "adapters": {"model": {"tuning": "lora", "lora": {"rank": 2}}},
}


@pytest.mark.parametrize("name", READINGS)
def test_leaving_a_patient_out_of_a_file_of_notes_moves_the_sum_by_at_most_the_clip_norm(
    name, texts, monkeypatch
):
    hospital = texts(**READINGS[name])
    for patient in LEFT_OUT:
        assert 0.5 < hospital.change(monkeypatch, patient) <= 1 + ROUNDING, patient


def test_leaving_a_patient_out_of_a_file_of_numbers_moves_the_sum_by_at_most_the_clip_norm(
    numbers, monkeypatch
):
    for patient in LEFT_OUT:
        assert 0.5 < numbers.change(monkeypatch, patient) <= 1 + ROUNDING, patient


def test_a_patient_whose_coin_is_down_or_who_is_held_out_moves_nothing(texts, monkeypatch):
    hospital = texts()
    names = [f"{HOSPITAL}-p{number}" for number in range(16)]
    down = [name for name in names if not coin(name) and not SPLIT.holds_out(name)]
    held_out = [name for name in names if SPLIT.holds_out(name)]
    for patient in (down[0], held_out[0]):
        assert hospital.change(monkeypatch, patient) == 0


def test_those_left_out_are_in_training_and_one_has_many_notes(texts):
    rows = texts().rows
    assert [row["patient"] for row in rows].count(MANY) > 20
    assert not any(SPLIT.holds_out(patient) for patient in LEFT_OUT)


# ------------------------------------------------- controls: what is fitted on the data as a whole
class Fitted(Encoder):
    """A vocabulary made from the notes at hand: one word less renumbers all after it."""

    def __call__(self, texts) -> Encoded:
        words = sorted({word for text in texts for word in text.split()})
        number = {word: 4 + at % 20 for at, word in enumerate(words)}
        rows = tuple((2, *(number[w] for w in text.split()[:9]), 3) for text in texts)
        return Encoded(rows, np.arange(len(rows) + 1, dtype=np.int64))


def test_control_a_vocabulary_fitted_on_the_notes_breaks_the_bound(texts, monkeypatch):
    hospital = texts()
    monkeypatch.setattr(task, "Encoder", Fitted)
    assert hospital.change(monkeypatch, ODD) > 1.5


def test_control_features_centred_over_the_hospital_break_the_bound(texts, monkeypatch):
    hospital = texts()
    plain = task.DiagnosisLearner._features

    def centred(self, rows):
        values = plain(self, rows)
        return (values - values.mean(0)) / values.std(0) if len(values) > 1 else values

    monkeypatch.setattr(task.DiagnosisLearner, "_features", centred)
    assert max(hospital.change(monkeypatch, patient) for patient in LEFT_OUT) > 1.5


def test_control_numbers_normalised_by_the_hospitals_own_statistics_break_the_bound(
    numbers, monkeypatch
):
    plain = NormalisedRowsLearner.set_statistics

    def own(self, mean, deviation):
        found = StatisticsLayout(len(mean)).resolve(self.statistic_words(), 1)
        plain(self, found[MEAN], found[DEVIATION])

    monkeypatch.setattr(NormalisedRowsLearner, "set_statistics", own)
    assert max(numbers.change(monkeypatch, patient) for patient in LEFT_OUT) > 1.5


def test_control_clipping_a_note_instead_of_a_patient_breaks_the_bound(texts, monkeypatch):
    hospital = texts()
    honest = client.training.PerSampleEngine.clipped_sum

    def by_row(self, losses, owner, patients):
        return honest(self, losses, np.arange(len(owner), dtype=np.int64), len(owner))

    monkeypatch.setattr(client.training.PerSampleEngine, "clipped_sum", by_row)
    assert hospital.change(monkeypatch, MANY) > 5
