"""Whole simulations that predict a number, a survival time, or scores: to the model's answers."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch

from client.predict import predict
from common.cli import main

torch.set_num_threads(1)

STUDY = """\
format: wardround-study/1
name: answers
task:
  kind: tabular
  {target}
  features: [{{name: age, low: 0, high: 100}}, {{name: crp, low: 0, high: 60}}]
  categories: [{{name: ward, values: [icu, er]}}]
training:
  {{rounds: 4, {training}, spare_rounds: 1}}
privacy: {privacy}
evaluation: {{every: {every}, held_out: 0.3{scores}}}
{acceptance}
simulation: {{data: {{files: [data.csv]}}, split: {{by: column, column: hospital}}, seed: 1}}
"""
PLAIN = "local_steps: 10, sampling_rate: 0.5, expected_batch: 40, {}"
SGD = PLAIN.format("optimizer: {name: sgd, learning_rate: 0.5}")
LOCAL = "{mode: local, epsilon: 8, delta: 1e-4, clip_norm: 1.0}"
JOINT = "{mode: joint, epsilon: 8, delta: 1e-4, clip_norm: 1.0}"
CASES = {
    "number": ("number: {column: cost, low: 0, high: 400, unit: EUR}", SGD, "{mode: none}"),
    "number-local": ("number: {column: cost, low: 0, high: 400}", SGD, LOCAL),
    "survival": ("survival: {time: stay, event: died, edges: [2, 5, 10, 20]}", SGD, "{mode: none}"),
    "survival-joint": (
        "survival: {time: stay, event: died, edges: [2, 5, 10, 20]}",
        "local_steps: 1, sampling_rate: 0.5, expected_batch: 40",
        JOINT,
    ),
    "proportional-local": (
        "survival: {time: stay, event: died, edges: [2, 5, 10, 20], proportional: true}",
        SGD,
        LOCAL,
    ),
    "proportional": (
        "survival: {time: stay, event: died, edges: [2, 5, 10, 20], proportional: true}",
        SGD,
        "{mode: none}",
    ),
    "scores": ("labels: [no, yes]\n  columns: {label: late}", SGD, "{mode: none}"),
}


def write_data(path):
    draw = np.random.default_rng(1)
    with path.open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["hospital", "patient", "age", "crp", "ward", "stay", "died", "cost", "late"])
        for at in range(360):
            age, crp = draw.uniform(20, 90), draw.uniform(0, 50)
            ward = draw.choice(["icu", "er", ""])
            pace = 0.05 * math.exp(0.03 * (age - 50) + (0.8 if ward == "icu" else 0))
            death, left = draw.exponential(1 / pace), draw.uniform(1, 40)
            cost = 100 + 2 * age + draw.normal(0, 10)
            stay, died = min(death, left), int(death <= left)
            late = "yes" if age + draw.normal(0, 15) > 60 else "no"
            row = [f"{age:.1f}", f"{crp:.1f}", ward, f"{stay:.3f}", died, f"{cost:.2f}", late]
            out.writerow(["abc"[at % 3] * 2, f"p{at}", *row])


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made = {}

    def play(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_data(folder / "data.csv")
            target, training, privacy = CASES[name]
            gated = name == "scores"
            text = STUDY.format(
                target=target,
                training=training,
                privacy=privacy,
                every=1 if gated else 4,
                scores=", score_bins: 64" if gated else "",
                acceptance="acceptance: {tolerance: 0.2}" if gated else "",
            )
            (folder / "study.yaml").write_text(text)
            out = folder / "run"
            assert main(["simulate", str(folder / "study.yaml"), "--out", str(out)]) == 0
            made[name] = out
        return made[name]

    return play


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("number", {"mse", "mae", "r2"}),
        ("number-local", {"mse", "mae", "r2"}),
        ("survival", {"c_index"}),
        ("survival-joint", {"c_index"}),
        ("proportional", {"c_index"}),
        ("proportional-local", {"c_index"}),
        ("scores", {"auroc", "auprc", "accuracy", "sensitivity", "specificity", "ece", "brier"}),
    ],
)
def test_every_outcome_is_measured_at_every_site_and_in_the_sum(played, name, scores):
    final = metrics(played(name))["final_metrics"]
    assert scores <= set(final)
    assert len(final["per_site"]) == 3
    for site in final["per_site"].values():
        assert scores <= set(site)
        assert site["n"] > 0
        assert site["interval_95"]
    card = (played(name) / "MODEL_CARD.md").read_text()
    tag = "tabular-classification" if name == "scores" else "tabular-regression"
    assert f"pipeline_tag: {tag}" in card


def test_without_privacy_the_models_learn(played):
    number = metrics(played("number"))["final_metrics"]
    assert number["r2"] > 0.5
    # The masked sums are exact: what was released is what the sites measure together.
    assert number["mse"] == pytest.approx(number["everywhere"]["mse"], rel=1e-3)
    assert metrics(played("survival"))["final_metrics"]["c_index"] > 0.6
    assert metrics(played("proportional"))["final_metrics"]["c_index"] > 0.6
    assert metrics(played("scores"))["final_metrics"]["auroc"] > 0.8


def test_under_privacy_budgets_hold_and_the_statement_names_what_is_released(played):
    for name in ("number-local", "survival-joint"):
        statement = json.loads((played(name) / "privacy.json").read_text())
        assert statement["epsilon_spent"] <= 8
        released = statement["evaluation"]["name"]
        assert ("sqrt(5)" in released) == (name == "number-local")
        assert ("sqrt(2)" in released) == (name == "survival-joint")


def test_the_models_answer_in_the_datas_own_unit(played, tmp_path):
    data = played("number").parent / "data.csv"
    predict(played("number") / "model", data, tmp_path / "n.csv")
    with (tmp_path / "n.csv").open() as told, data.open() as truth:
        pairs = [
            (float(a["value"]), float(b["cost"]))
            for a, b in zip(csv.DictReader(told), csv.DictReader(truth), strict=True)
        ]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 25
    predict(played("survival") / "model", data, tmp_path / "s.ndjson")
    for line in (tmp_path / "s.ndjson").read_text().splitlines():
        found = json.loads(line)
        chances = list(found["survival"].values())
        assert list(found["survival"]) == ["2", "5", "10", "20", "later"]
        assert chances == sorted(chances, reverse=True)
        assert 0 <= found["risk"] <= 1


def test_a_proportional_model_moves_every_intervals_odds_alike(played, tmp_path):
    """Of any two patients the difference in log odds is the same in every interval."""

    def spread(name):
        data, out = played(name).parent / "data.csv", tmp_path / f"{name}.ndjson"
        predict(played(name) / "model", data, out)
        told = [json.loads(line)["survival"] for line in out.read_text().splitlines()]
        chances = np.array([list(one.values()) for one in told])
        hazards = 1 - chances / np.column_stack([np.ones(len(chances)), chances[:, :-1]])
        odds = np.log(hazards / (1 - hazards))[:, :4]
        return float(np.ptp(odds - odds[:1], axis=1).max())

    assert spread("proportional") < 0.01
    assert spread("survival") > 0.3  # the control: weights of its own for each interval


@pytest.mark.parametrize(
    ("cell", "column"), [("", "stay"), ("2", "died"), ("yes", "died"), ("", "died")]
)
def test_an_outcome_that_cannot_be_used_is_named_by_line(tmp_path, capsys, cell, column):
    write_data(tmp_path / "data.csv")
    lines = (tmp_path / "data.csv").read_text().splitlines()
    fields = lines[4].split(",")
    fields[lines[0].split(",").index(column)] = cell
    lines[4] = ",".join(fields)
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    target, training, privacy = CASES["survival"]
    text = STUDY.format(
        target=target, training=training, privacy=privacy, every=4, scores="", acceptance=""
    )
    (tmp_path / "study.yaml").write_text(text)
    assert main(["simulate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")]) != 0
    said = capsys.readouterr().err
    assert "data.csv:5: column " + column in said
    assert not (tmp_path / "run" / "model").exists()
