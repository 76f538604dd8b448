"""A whole study of numbers, with masks, noise, ledgers and accidents, as configs/ shows it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.predict import predict
from client.privacy.ledger import Ledger
from client.site import HospitalWorker, SiteSetup
from common.accountant import DpEvent
from common.bundle import Bundle
from common.cli import main
from common.errors import Code, DataError, RefusedError
from common.world import ManualClock, SeededEntropy, WallClock

CONFIGS = Path(__file__).parents[2] / "configs"
STUDY = CONFIGS / "tabular.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tabular") / "run"
    assert main(["simulate", str(STUDY), "--out", str(out)]) == 0
    return out


def rows(run, site):
    ledger = Ledger.open_existing(
        run / "state" / "sites" / site / "ledger.sqlite", clock=WallClock()
    )
    try:
        return ledger.history(), ledger.spent()
    finally:
        ledger.close()


def test_counting_comes_first_then_training_then_one_evaluation(run):
    rounds = json.loads((run / "metrics.json").read_text())["rounds"]
    assert [r["kind"] for r in rounds] == ["statistics", *["train"] * 4, "evaluate"]
    assert rounds[0]["dropouts"] == ["east"]
    assert rounds[1]["dropouts"] == ["west"]


def test_every_hospital_is_charged_for_the_statistics_once_and_keeps_its_cap(run):
    bundle = Bundle.load(run / "state" / "bundle")
    for site in ("north", "east", "south", "west"):
        history, spent = rows(run, site)
        charged = [r.body for r in history if r.kind == "charge" and r.body["work"] == "statistics"]
        assert [(c["part"], c["round"]) for c in charged] == [("train", 1)]
        assert charged[0]["events"] == [[bundle.statistics_noise, 1.0, 1]]
        assert spent.epsilon <= spent.cap == 10
        assert spent.train > 2


def test_the_statement_names_the_mechanism(run):
    statement = json.loads((run / "privacy.json").read_text())
    noise = Bundle.load(run / "state" / "bundle").statistics_noise
    assert statement["normalisation"]["noise_multiplier"] == noise
    assert "tabular-classification" in (run / "MODEL_CARD.md").read_text()


def test_the_model_folder_predicts_without_the_study(run, tmp_path):
    out = tmp_path / "answers.csv"
    count = predict(run / "model", CONFIGS / "data" / "synthetic-labs.csv", out, patient="patient")
    with out.open(newline="") as file:
        answers = list(csv.DictReader(file))
    with (CONFIGS / "data" / "synthetic-labs.csv").open(newline="") as file:
        truth = list(csv.DictReader(file))
    assert count == len(answers) == len(truth)
    right = sum(a["label"] == t["label"] for a, t in zip(answers, truth, strict=True))
    assert right / count > 0.65
    assert [a["patient"] for a in answers] == [t["patient"] for t in truth]
    assert all(abs(float(a["p(none)"]) + float(a["p(sepsis)"]) - 1) < 1e-5 for a in answers)


def test_the_predictions_are_the_networks_own(run):
    """The exported model against the one that trained, missing values included."""
    from client.data.intake import table_columns
    from client.data.tables import read_table
    from client.saved import SavedRows
    from client.tasks.kinds import code_of
    from client.tasks.rows import rows_learner
    from common.tensors import load_tensors

    study = Bundle.load(run / "state" / "bundle").study
    records = read_table(
        CONFIGS / "data" / "synthetic-labs.csv", table_columns(study.task), labels=study.labels
    )
    saved = SavedRows(run / "model", "cpu")
    code = code_of(study.task)
    learner = rows_learner(code, study, records, (), device=torch.device("cpu"))
    learner.set_statistics(saved.mean, saved.deviation)
    for name, value in load_tensors(run / "model" / "model.safetensors").items():
        learner.trainable()[name].data.copy_(torch.from_numpy(value))
    at, _ = learner.rows_of(np.arange(learner.patient_count()))
    probabilities = (
        learner.module(*learner._train.at(torch.from_numpy(at))).softmax(dim=1).detach().numpy()
    )
    order = sorted(
        range(len(records)),
        key=lambda i: list(dict.fromkeys(r.patient for r in records)).index(records[i].patient),
    )
    found = saved.outputs([records[i] for i in order]).softmax(dim=1).numpy()
    assert np.allclose(found, probabilities, atol=1e-5)


def test_the_exported_statistics_are_far_from_the_identity(run):
    facts = json.loads((run / "model" / "task.json").read_text())
    names = [feature["name"] for feature in facts["task"]["features"]]
    assert names == ["age", "systolic", "crp", "heart_rate"]
    assert len(facts["mean"]) == len(facts["deviation"]) == len(names)
    assert all(0 < mean < 1 for mean in facts["mean"])
    assert all(0 < deviation <= 0.5 for deviation in facts["deviation"])
    assert facts["task"]["labels"] == ["none", "sepsis"]


def test_a_damaged_model_folder_is_refused(run, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("task.json", "model.safetensors"):
        (folder / name).write_bytes((run / "model" / name).read_bytes())
    facts = json.loads((folder / "task.json").read_text())
    facts["task"]["hidden"] = [9]
    (folder / "task.json").write_text(json.dumps(facts))
    with pytest.raises(DataError) as caught:
        predict(folder, CONFIGS / "data" / "synthetic-labs.csv", tmp_path / "x.csv")
    assert caught.value.code is Code.MODEL_STATE


def _ledger(path, cap):
    entropy = SeededEntropy(path.name)
    return Ledger.open(path, epsilon_cap=cap, delta=1e-4, clock=ManualClock(), entropy=entropy)


def test_a_hospital_whose_budget_is_spent_does_not_count(run, tmp_path):
    from client.privacy.ledger import Charge, RoundId
    from client.round.effects import Work
    from server.simulate import _permissive

    bundle = Bundle.load(run / "state" / "bundle")
    ledger = _ledger(tmp_path / "l.sqlite", 2.5)
    split = ledger.split(0.2).identity
    ledger.reserve_round(
        RoundId(bytes(32), "", 1), [Charge("train", "train", (DpEvent(1.6, 1.0, 1),))], split
    )
    asked = []

    class Untouched:
        def statistics(self):
            asked.append("statistics")
            return np.zeros(12, np.int64)

    setup = SiteSetup(
        site="north",
        folder=tmp_path,
        audit=tmp_path,
        bundle=bundle,
        roster={},
        keys_digest="",
        ceilings=_permissive(bundle.study, bundle.digest),
        kill_switch=tmp_path / "STOP",
        trainer=Untouched,
        split_id=split,
        entropy=SeededEntropy("n"),
    )
    worker = HospitalWorker(setup, ledger)
    request = Work(1, 0, {}, trains=False, measures=False, counts=True)
    with pytest.raises(RefusedError) as caught:
        worker.work(request)
    assert caught.value.code is Code.BUDGET_EXCEEDED
    assert asked == []
    ledger.close()
    # Control: with room under the cap the same request is served, and charged first.
    roomy = _ledger(tmp_path / "r.sqlite", 10)
    worker = HospitalWorker(setup, roomy)
    assert worker.work(request).statistics is not None
    assert asked == ["statistics"]
    assert [r.body["work"] for r in roomy.history() if r.kind == "charge"] == ["statistics"]
    roomy.close()


def test_the_audit_logs_tell_of_the_statistics_round(run):
    events = [json.loads(line) for line in (run / "audit" / "north.jsonl").read_text().splitlines()]
    assert any(
        e.get("kind") == "statistics" for e in (event.get("fields", event) for event in events)
    )


def test_without_privacy_the_counted_statistics_are_the_pooled_ones(tmp_path):
    """Mode none, no noise: what four hospitals agree on is numpy's mean over all of them."""
    from client.federation import Federation
    from common.config import load
    from common.statistics import scaled
    from common.study import Study

    torch.set_num_threads(1)
    text = STUDY.read_text()
    start, end = text.index("privacy:"), text.index("evaluation:")
    text = text[:start] + "privacy: {mode: none}\n" + text[end:]
    text = (
        text[: text.index("  # Round 1 counts")]
        .replace("data/", f"{CONFIGS}/data/")
        .replace("rounds: 4", "rounds: 1")
        .replace("every: 4", "every: 1")
    )
    path = tmp_path / "plain.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    assert main(["simulate", str(path), "--out", str(out)]) == 0
    facts = json.loads((out / "model" / "task.json").read_text())
    study = load(path, Study)
    federation = Federation(study, path)
    features = facts["task"]["features"]
    low, high = (np.array([f[k] for f in features]) for k in ("low", "high"))
    sums = np.zeros((3, 4))
    for site in federation.sites:
        own = federation.divide(site, None).train
        for patient in {r.patient for r in own}:
            part = scaled(np.array([r.values for r in own if r.patient == patient]), low, high)
            there = ~np.isnan(part)
            known = np.where(there, part, 0)
            sums += np.stack([known, known**2, there]).mean(axis=1)
    mean = sums[0] / sums[2]
    deviation = np.sqrt(sums[1] / sums[2] - mean**2)
    assert np.allclose(facts["mean"], mean, atol=1e-5)
    assert np.allclose(facts["deviation"], deviation, atol=1e-4)
