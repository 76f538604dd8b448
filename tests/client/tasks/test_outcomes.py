"""Losses, measurements and answers by outcome, against plain textbook code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as textbook

from client.data.records import Record
from client.tasks.outcomes import answers, losses_of, measured, targets_of
from common.errors import Code, DataError
from common.metrics import (
    HazardScoring,
    HistogramScoring,
    LabelSetScoring,
    NumberScoring,
    words_from_counts,
)
from common.outcomes import Classes, Hazard, LabelSet, Number

CAP = 8.0
TWO, SET = Classes(("no", "yes")), LabelSet(("a", "b", "c", "d"))
NUMBER, HAZARD = Number(10.0, 30.0, "mg"), Hazard((1.0, 2.0, 4.0))
BINS = HistogramScoring(TWO.labels, CAP, 512)
CASES = {
    "classes": (TWO, BINS),
    "labels": (SET, LabelSetScoring(SET.labels, CAP)),
    "number": (NUMBER, NumberScoring(NUMBER)),
    "hazard": (HAZARD, HazardScoring(HAZARD, CAP)),
}


def record(at, **fields):
    return Record(f"p{at}", "", fields.pop("label", None), None, "f.csv", at + 1, **fields)


def cases(count, seed=0):
    """(records with every kind of answer, a stream)."""
    draw = np.random.default_rng(seed)
    made = [
        record(
            at,
            label=("no", "yes")[int(draw.random() < 0.3)],
            labels=tuple(label for label in SET.labels if draw.random() < 0.4),
            number=float(draw.uniform(0, 6)),
            event=bool(draw.random() < 0.6),
        )
        for at in range(count)
    ]
    return made, draw


def vectors(name, outputs, records, starts=None):
    outcome, scoring = CASES[name]
    starts = np.arange(len(records) + 1) if starts is None else starts
    targets = targets_of(outcome, records)
    return measured(outcome, scoring, torch.tensor(outputs), targets, starts, loss_cap=CAP)


def read(name, found):
    return CASES[name][1].read(words_from_counts(found.sum(axis=0)))


def test_a_histogram_gives_the_textbook_numbers_up_to_its_bins():
    records, draw = cases(600)
    truth = np.array([r.label == "yes" for r in records])
    odds = draw.normal(size=600) + 1.5 * truth - 1
    found = read("classes", vectors("classes", np.stack([np.zeros(600), odds], 1), records))
    chance = 1 / (1 + np.exp(-odds))
    assert found.scores["auroc"] == pytest.approx(textbook.roc_auc_score(truth, odds), abs=2e-3)
    exact = textbook.average_precision_score(truth, odds)
    assert found.scores["auprc"] == pytest.approx(exact, abs=1e-2)
    assert found.scores["accuracy"] == pytest.approx(((odds >= 0) == truth).mean())
    assert found.scores["sensitivity"] == pytest.approx((odds >= 0)[truth].mean())
    assert found.scores["specificity"] == pytest.approx((odds < 0)[~truth].mean())
    exact = textbook.brier_score_loss(truth, chance)
    assert found.scores["brier"] == pytest.approx(exact, abs=2e-3)
    assert found.scores["ece"] > 0
    losses = np.log1p(np.exp(np.where(truth, -odds, odds)))
    assert found.loss == pytest.approx(losses.mean(), rel=1e-4)


def test_another_threshold_trades_sensitivity_for_specificity():
    records, draw = cases(300)
    odds = draw.normal(size=300)
    found = vectors("classes", np.stack([np.zeros(300), odds], 1), records)
    low = HistogramScoring(TWO.labels, CAP, 512, 0.2).read(words_from_counts(found.sum(0))).scores
    half = BINS.read(words_from_counts(found.sum(0))).scores
    assert low["sensitivity"] > half["sensitivity"]
    assert low["specificity"] < half["specificity"]
    assert low["auroc"] == half["auroc"]


def test_label_sets_are_scored_by_patient_as_the_textbook_does():
    records, draw = cases(80)
    outputs = draw.normal(size=(80, 4))
    truth = targets_of(SET, records).numpy()
    kept = truth.sum(axis=1) > 0
    chosen = [r for r, keep in zip(records, kept, strict=True) if keep]
    found = read("labels", vectors("labels", outputs[kept], chosen)).scores
    told = outputs[kept] >= 0
    jaccard = textbook.jaccard_score(truth[kept], told, average="samples", zero_division=0)
    assert found["jaccard"] == pytest.approx(jaccard, abs=1e-4)
    f1 = textbook.f1_score(truth[kept], told, average="samples", zero_division=0)
    assert found["f1"] == pytest.approx(f1, abs=1e-4)
    each = [
        textbook.average_precision_score(one, row)
        for one, row in zip(truth[kept], outputs[kept], strict=True)
    ]
    assert found["prauc"] == pytest.approx(np.mean(each), abs=1e-4)


def test_a_number_is_measured_in_its_own_unit():
    draw = np.random.default_rng(1)
    truth, told = draw.uniform(10, 30, 50), draw.uniform(12, 28, 50)
    records = [record(at, number=float(value)) for at, value in enumerate(truth)]
    found = read("number", vectors("number", (told[:, None] - 10) / 20, records)).scores
    assert found["mse"] == pytest.approx(textbook.mean_squared_error(truth, told), rel=1e-3)
    assert found["mae"] == pytest.approx(textbook.mean_absolute_error(truth, told), rel=1e-3)
    assert found["r2"] == pytest.approx(textbook.r2_score(truth, told), abs=1e-2)


def slow_concordance(interval, event, risk):
    """Over all pairs: who has the event in an earlier interval should have the higher risk."""
    good = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            comparable = interval[i] < interval[j] or (interval[i] == interval[j] and not event[j])
            if i != j and event[i] and comparable:
                pairs += 1
                good += 1.0 if risk[i] > risk[j] else 0.5 * (risk[i] == risk[j])
    return good / pairs


def test_the_c_index_is_that_of_all_pairs_in_bins():
    records, draw = cases(90)
    outputs = draw.normal(size=(90, 4))
    found = read("hazard", vectors("hazard", outputs, records)).scores["c_index"]
    targets = targets_of(HAZARD, records).numpy()
    survival = np.cumprod(1 / (1 + np.exp(outputs)), axis=1)
    risk = np.floor((1 - survival.mean(axis=1)) * 64)
    exact = slow_concordance(targets[:, 0], targets[:, 1] > 0, risk)
    assert found == pytest.approx(exact, abs=1e-6)


def test_a_survival_loss_is_minus_the_log_of_the_chance_of_what_was_seen():
    records = [record(0, number=3.0, event=True), record(1, number=3.0, event=False)]
    logits = torch.tensor([[0.2, -0.4, 1.0, 0.0]] * 2, requires_grad=True)
    died, gone = losses_of(HAZARD, logits, targets_of(HAZARD, records))
    hazard = [1 / (1 + math.exp(-value)) for value in (0.2, -0.4, 1.0)]
    survived = (1 - hazard[0]) * (1 - hazard[1])
    assert died.item() == pytest.approx(-math.log(survived * hazard[2]), rel=1e-5)
    assert gone.item() == pytest.approx(-math.log(survived), rel=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_patient_however_many_records_stays_within_the_sensitivity(name):
    outcome, scoring = CASES[name]
    records, draw = cases(12, seed=3)
    for scale in (0.0, 1.0, 1e6):
        outputs = draw.normal(size=(12, outcome.outputs)) * scale
        whole = vectors(name, outputs, records, np.array([0, 12]))
        assert np.linalg.norm(whole.sum(axis=0)) <= scoring.sensitivity + 1e-9
    # The control: counted by record, the same patient would move far more.
    assert np.linalg.norm(vectors(name, outputs, records).sum(axis=0)) > scoring.sensitivity


@pytest.mark.parametrize("name", sorted(CASES))
def test_outputs_that_are_no_numbers_stay_within_it_too(name):
    outcome, scoring = CASES[name]
    records, _ = cases(2)
    whole = vectors(name, np.full((2, outcome.outputs), np.nan), records, np.array([0, 2]))
    assert np.isfinite(whole).all()
    assert np.linalg.norm(whole.sum(axis=0)) <= scoring.sensitivity + 1e-9


@pytest.mark.parametrize("name", sorted(CASES))
def test_nobody_measured_gives_no_number_and_no_score(name):
    scoring = CASES[name][1]
    words = np.zeros(scoring.length, np.int64)
    found = scoring.read(words)
    assert found.n == 0
    assert set(found.scores) == set(scoring.names)
    assert found.primary is None
    assert scoring.score(words) == 0
    with pytest.raises(ValueError, match="another study"):
        scoring.score(words[:-1])


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_score_that_a_gate_judges_rises_with_the_model(name):
    outcome, scoring = CASES[name]
    records, draw = cases(60, seed=5)
    targets = targets_of(outcome, records).numpy().astype(float)
    ideal = {
        "classes": np.stack([-targets, targets], 1) if name == "classes" else None,
        "labels": targets * 2 - 1,
        "number": targets[..., None],
        "hazard": 4.0 - 3.0 * targets[:, :1] * np.ones(4) if name == "hazard" else None,
    }[name]
    noise = draw.normal(size=(60, outcome.outputs)) * 3
    good, bad = (
        scoring.score(words_from_counts(vectors(name, outputs, records).sum(axis=0)))
        for outputs in (ideal, noise)
    )
    assert 1 >= good > bad >= 0


@pytest.mark.parametrize("name", sorted(CASES))
def test_intervals_hold_the_score_and_shrink_with_patients(name):
    outcome, scoring = CASES[name]
    widths = []
    for count in (60, 540):
        records, draw = cases(count, seed=7)
        targets = targets_of(outcome, records).numpy().astype(float).reshape(count, -1)
        outputs = draw.normal(size=(count, outcome.outputs)) + targets[:, :1]
        found = vectors(name, outputs, records)
        low, high = scoring.intervals(found)[scoring.names[0]]
        assert low <= scoring.read(words_from_counts(found.sum(axis=0))).primary <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 1.8
    with pytest.raises(ValueError, match="bootstrap"):
        scoring.intervals(np.zeros((0, scoring.length)))


def test_what_is_told_of_a_record():
    (told,) = answers(TWO, torch.tensor([[0.0, math.log(3.0)]]))
    assert told["label"] == "yes"
    assert told["probabilities"] == pytest.approx({"no": 0.25, "yes": 0.75})
    (told,) = answers(SET, torch.tensor([[2.0, -2.0, 0.5, -9.0]]))
    assert told["labels"] == ["a", "c"]
    assert [row["value"] for row in answers(NUMBER, torch.tensor([[0.25], [7.0]]))] == [15.0, 30.0]
    (told,) = answers(HAZARD, torch.zeros(1, 4))
    assert told["survival"] == pytest.approx({"1": 0.5, "2": 0.25, "4": 0.125, "later": 0.0625})
    assert told["risk"] == pytest.approx(1 - 0.9375 / 4)


@pytest.mark.parametrize(
    ("outcome", "fields", "code"),
    [
        (TWO, {"label": "maybe"}, Code.DATA_LABEL),
        (SET, {"labels": ("a", "z")}, Code.DATA_LABEL),
        (NUMBER, {}, Code.DATA_VALUE),
        (HAZARD, {"event": True}, Code.DATA_VALUE),
        (HAZARD, {"number": 1.0}, Code.DATA_VALUE),
    ],
)
def test_an_answer_that_is_missing_or_foreign_is_named_by_its_place(outcome, fields, code):
    with pytest.raises(DataError, match=r"f\.csv:1: ") as caught:
        targets_of(outcome, [record(0, **fields)])
    assert caught.value.code is code


def test_squared_label_sets_train_on_the_error_of_probabilities():
    targets = torch.tensor([[1.0, 0.0]])
    outcome = LabelSet(("a", "b"), squared=True)
    loss = losses_of(outcome, torch.zeros(1, 2), targets)
    assert loss.item() == pytest.approx(0.25)
