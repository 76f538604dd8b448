"""The diagnosis task under the privacy engine's own admission check."""

import dataclasses

import numpy as np
import pytest
import torch

from client.privacy.admission import admit
from client.tasks import diagnosis as task
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from common.errors import WardroundError

FAMILIES = ("bert", "sentence-bert", "roberta", "electra", "distilbert", "modernbert")
TUNINGS = ("head", "bitfit", "lora", "full")
CASES = [(f, t) for f in FAMILIES for t in TUNINGS if (f, t) != ("modernbert", "bitfit")]
MODULES = {"distilbert": ("q_lin", "v_lin"), "modernbert": ("Wqkv",)}
WINDOWS = {"long_notes": "window", "window_stride": 6, "max_windows": 3}


def _learner(tiny, study_of, notes, family, tuning, **options):
    lora = {"rank": 2, "modules": MODULES.get(family, ("query", "value"))}
    model = {"lora": lora, "freeze_embeddings": options.pop("freeze", True)}
    study = study_of(tiny(family), tuning, task=options, model=model)
    learner = DiagnosisLearner(
        study, notes, (), load_backbone(str(tiny(family))), device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return learner


@pytest.mark.parametrize(("family", "tuning"), CASES)
def test_every_family_and_tuning_is_admitted(family, tuning, tiny, study_of, notes):
    learner = _learner(tiny, study_of, notes, family, tuning)
    admit(learner)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_windows_of_a_note_are_clipped_as_one_patient(tuning, tiny, study_of, notes):
    learner = _learner(tiny, study_of, notes, "bert", tuning, **WINDOWS)
    _, owner = learner.rows_of(np.arange(4, dtype=np.int64))
    assert tuning == "head" or np.bincount(owner).max() >= 3
    admit(learner)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_embedding_tables_learn_under_admission_too(family, tiny, study_of, notes):
    learner = _learner(tiny, study_of, notes, family, "full", freeze=False)
    assert any("position_embeddings" in name for name in learner.trainable())
    admit(learner)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_control_broadcast_positions_are_refused(family, tiny, study_of, notes):
    learner = _learner(tiny, study_of, notes, family, "full", freeze=False)

    def stock(ids, mask):
        return {"input_ids": ids, "attention_mask": mask}

    learner._network = dataclasses.replace(learner._network, inputs=stock)
    with pytest.raises(WardroundError):
        admit(learner)


def test_control_a_batch_mean_in_the_loss_is_refused(tiny, study_of, notes, monkeypatch):
    learner = _learner(tiny, study_of, notes, "bert", "head")
    plain = task.DiagnosisLearner.losses

    def coupled(self, rows):
        losses = plain(self, rows)
        return losses.mean().expand(len(rows))

    monkeypatch.setattr(task.DiagnosisLearner, "losses", coupled)
    with pytest.raises(WardroundError):
        admit(learner)
