"""What a hospital promises holds against hostile studies, coordinators and models."""

import numpy as np
import pytest
import torch
from torch import nn

from client.daemon import SiteDaemon
from client.data.records import Record
from client.privacy.admission import admit
from client.privacy.engine import PerSampleEngine
from client.privacy.ledger import Charge, Ledger, RoundId
from client.privacy.noise import SecureNoise
from client.tasks import tabular
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from client.tasks.rows import rows_learner
from client.training import LocalTrainer, TrainingSettings
from common.accountant import DpEvent
from common.config import ConfigError, parse
from common.errors import Code, DataError, RefusedError
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy, WallClock

torch.set_num_threads(1)
CPU = torch.device("cpu")
STUDY = """\
format: wardround-study/1
name: promise
task: {{kind: diagnosis, labels: [a, b]}}
model: {{backbone: somewhere, tuning: head, precision: {precision}}}
privacy: {privacy}
sites: [{{id: a}}, {{id: b}}, {{id: c}}]
"""
PRIVATE = "{mode: local, epsilon: 3, delta: 1e-5, clip_norm: 1.0}"


def loud_ledger(tmp_path):
    return Ledger.open(
        tmp_path / "ledger.sqlite",
        epsilon_cap=20.0,
        delta=1e-5,
        clock=WallClock(),
        entropy=SeededEntropy("loud"),
    )


def test_a_study_cannot_cost_more_than_it_declares(tmp_path):
    ledger = loud_ledger(tmp_path)
    split = ledger.split(0.2).identity
    loud = [Charge("train", "train", (DpEvent(0.6, 0.1, 5),))]
    number = 0

    def go_on():
        nonlocal number
        while True:
            number += 1
            ledger.reserve_round(RoundId(b"s" * 32, "", number), loud, split, study_limit=1.0)

    with pytest.raises(RefusedError) as caught:
        go_on()
    assert caught.value.code is Code.BUDGET_STUDY
    assert ledger.spent().epsilon <= 1.0
    # Control: the cap of the population alone lets ten such rounds pass.
    for number in range(1, 11):
        ledger.reserve_round(RoundId(b"t" * 32, "", number), loud, split)
    assert ledger.spent().epsilon > 10
    ledger.close()


def test_another_studys_rows_do_not_count_against_a_studys_own_promise(tmp_path):
    ledger = loud_ledger(tmp_path)
    split = ledger.split(0.2).identity
    charge = [Charge("train", "train", (DpEvent(2.0, 0.1, 5),))]
    ledger.reserve_round(RoundId(b"s" * 32, "", 1), charge, split, study_limit=0.8)
    alone = ledger.spent().epsilon
    ledger.reserve_round(RoundId(b"t" * 32, "", 1), charge, split, study_limit=alone + 1e-6)
    assert ledger.spent().epsilon > alone
    ledger.close()


@pytest.mark.parametrize(
    ("precision", "privacy", "problem"),
    [
        ("bfloat16", PRIVATE, "model.precision: must not be bfloat16"),
        ("float32", PRIVATE.replace("1.0}", "1e-9}"), "privacy.clip_norm"),
    ],
)
def test_a_study_that_breaks_clipping_is_refused(precision, privacy, problem):
    with pytest.raises(ConfigError, match=problem):
        parse(STUDY.format(precision=precision, privacy=privacy), "study.yaml", Study)
    for fine in (PRIVATE, "{mode: none}"):
        chosen = "bfloat16" if "none" in fine else "auto"
        parse(STUDY.format(precision=chosen, privacy=fine), "study.yaml", Study)


def test_a_tiny_gradient_times_a_huge_activation_is_still_clipped():
    layer = nn.Linear(4, 2, bias=False)
    engine = PerSampleEngine(layer, {"weight": layer.weight}, 1e-3)
    inputs = torch.full((1, 4), 1e25)
    sums = engine.clipped_sum((layer(inputs) * 1e-25).sum(1), np.zeros(1, np.int64), 1)
    norm = float(sums.gradients["weight"].norm())
    engine.close()
    assert norm <= 1e-3 * 1.001
    # Control: squares in float32 see no norm at all.
    assert float(torch.full((2,), 1e-25).square().sum()) == 0.0


def test_no_note_shares_a_batch_under_privacy(tiny_bert, monkeypatch):
    sizes = []
    forward = DiagnosisLearner._forward

    def counted(self, module, rows):
        sizes.append(len(rows))
        return forward(self, module, rows)

    monkeypatch.setattr(DiagnosisLearner, "_forward", counted)
    texts = ["fever cough", "no fever", "chest pain and cough", "heart", "cough " * 9]
    notes = [Record(f"p{i}", t, "ab"[i % 2], None, "f", i) for i, t in enumerate(texts * 3)]
    for mode, alone in (("local", True), ("none", False)):
        sizes.clear()
        privacy = PRIVATE if mode == "local" else "{mode: none}"
        text = STUDY.format(precision="float32", privacy=privacy)
        text = text.replace("backbone: somewhere", f"backbone: {tiny_bert}")
        study = parse(text, "study.yaml", Study)
        made = DiagnosisLearner(
            study, notes[:9], notes[9:], load_backbone(str(tiny_bert)), device=CPU
        )
        made.measure()
        assert (max(sizes) == 1) is alone


def test_what_others_give_does_not_depend_on_a_held_out_patient(tiny_bert):
    text = STUDY.format(precision="auto", privacy=PRIVATE)
    study = parse(text.replace("somewhere", str(tiny_bert)), "study.yaml", Study)
    words = ("fever", "cough", "chest", "heart", "no")
    stream = np.random.default_rng(1)
    notes = [
        Record(f"p{i}", " ".join(stream.choice(words, 1 + i % 11)), "ab"[i % 2], None, "f", i)
        for i in range(24)
    ]
    backbone = load_backbone(str(tiny_bert))
    features = DiagnosisLearner(study, notes, (), backbone, device=CPU)._train.features
    for out in (0, 7, 23):
        rest = [note for i, note in enumerate(notes) if i != out]
        without = DiagnosisLearner(study, rest, (), backbone, device=CPU)._train.features
        kept = [i for i in range(24) if i != out]
        assert torch.equal(features[kept], without)


def numbers(positive):
    study = Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "hostile",
            "task": {
                "kind": "tabular",
                "labels": ("no", "yes"),
                "hidden": (4,),
                "features": (
                    {"name": "u", "low": 0.0, "high": 1.0},
                    {"name": "hiv", "low": 0.0, "high": 1.0},
                ),
            },
            "privacy": {"mode": "local", "epsilon": 5.0, "delta": 1e-5, "clip_norm": 1.0},
            "sites": [{"id": s} for s in ("a", "b", "c")],
        }
    )
    rows = [
        Record(f"p{i}", "", "no", None, "f", i, (0.1 * i, float(positive and i == 0)))
        for i in (0, 0, 1, 2, 3, 4, 5)
    ]
    made = rows_learner(tabular, study, rows, (), device=CPU)
    made.set_statistics(np.zeros(2, np.float32), np.ones(2, np.float32))
    with torch.no_grad():
        made.module.get_parameter("hidden1.weight")[:, 1] = 1e21
        made.module.get_parameter("hidden1.bias").fill_(0.1)
    return made


def outcome(made):
    settings = TrainingSettings(
        mode="local",
        local_steps=1,
        expected_batch=4.0,
        micro_batch=8,
        learning_rate=0.1,
        optimizer="sgd",
        sampling_rate=0.5,
        clip_norm=1.0,
        noise_multiplier=1.0,
    )
    state = {name: p.detach().numpy().copy() for name, p in made.trainable().items()}
    trainer = LocalTrainer(made, Layout.of(state), settings, SecureNoise(SeededEntropy("o")), "cpu")
    try:
        trainer.train(state, 1)
    except (RefusedError, DataError) as error:
        return error.code
    return None


def admitted(made):
    try:
        admit(made)
    except RefusedError as error:
        return error.code
    return None


def test_admission_of_a_hostile_model_tells_nothing_about_a_patient():
    # Control: tried on the hospital's own patients, the answer is the patient's attribute.
    assert admitted(numbers(positive=True)) != admitted(numbers(positive=False))
    assert outcome(numbers(positive=True)) == outcome(numbers(positive=False))


def test_a_data_fault_leaves_the_hospital_without_its_reason(monkeypatch):
    from world import World

    world = World(4, rounds=1)
    victim = world.parties["site-02"]
    world.start()

    def work(_request):
        raise DataError(Code.DATA_LABEL, "file.csv:3: has a label that is not in the study.")

    monkeypatch.setattr(victim.worker, "work", work)
    world.run()
    refused = [event for event in world.events if event.startswith("coordinator peer.refused")]
    assert any(Code.DATA_DECLINED.label in event for event in refused)
    assert not any(Code.DATA_LABEL.label in event for event in refused)
    own = [event for event in world.events if event.startswith("site-02 ")]
    assert any(Code.DATA_LABEL.label in event for event in own)
    assert isinstance(victim.daemon, SiteDaemon)
    assert all("site-02" not in result.survivors for result in world.rounds)
