"""Whole simulations of courses: classes and quantities, with and without privacy, to answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from client.predict import predict
from common.cli import main
from common.errors import Code, DataError

torch.set_num_threads(1)
CONFIGS = Path(__file__).parents[2] / "configs"
DATA = CONFIGS / "data"
HOURS, STAYS = DATA / "synthetic-hours.csv", DATA / "synthetic-stays.csv"
NUMBER = {"column": "creatinine_later", "low": 0.0, "high": 10.0}
CASES = [(kind, mode) for kind in ("class", "number") for mode in ("none", "local", "joint")]


def study(kind, mode):
    """The example, as another outcome and under another promise."""
    document = yaml.safe_load((CONFIGS / "prognosis.yaml").read_text())
    document["simulation"]["data"]["files"] = [str(HOURS), str(STAYS)]
    if kind == "number":
        del document["task"]["labels"]
        document["task"] |= {"number": NUMBER, "last": "creatinine"}
    if mode == "none":
        document["privacy"] = {"mode": "none"}
        del document["simulation"]["faults"]
        document["training"] |= {"rounds": 6, "local_steps": 10}
        document["evaluation"]["every"] = 6
    else:
        document["privacy"] |= {"mode": mode, "delta": 1e-4}  # which YAML 1.1 takes for text
    if mode == "joint":
        document["training"]["local_steps"] = 1
        del document["training"]["optimizer"]
        document["aggregation"] = {"optimizer": {"name": "fedavgm", "learning_rate": 0.5}}
    return document


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made = {}

    def play(kind, mode):
        if (kind, mode) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{mode}")
            (folder / "study.yaml").write_text(json.dumps(study(kind, mode)))
            assert main(["simulate", str(folder / "study.yaml"), "--out", str(folder / "run")]) == 0
            made[kind, mode] = folder / "run"
        return made[kind, mode]

    return play


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The hours with what is known of the stay in its first row: one file, as `predict` reads."""
    path = tmp_path_factory.mktemp("joined") / "hours.csv"
    with STAYS.open(newline="") as file:
        ages = {row["stay"]: row["age"] for row in csv.DictReader(file)}
    with HOURS.open(newline="") as file, path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["stay", "time", "heart_rate", "creatinine", "age"])
        for row in csv.DictReader(file):
            writer.writerow([*row.values(), ages.pop(row["stay"], "")])
    return path


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_outcome_is_measured_under_every_promise(played, kind, mode):
    run = played(kind, mode)
    told = json.loads((run / "metrics.json").read_text())
    wanted = {"accuracy", "macro_f1"} if kind == "class" else {"mse", "mae", "r2"}
    assert told["rounds"][0]["kind"] == "statistics"
    assert wanted <= set(told["final_metrics"])
    assert len(told["final_metrics"]["per_site"]) == 4
    statement = json.loads((run / "privacy.json").read_text())
    if mode != "none":
        assert 2 < statement["epsilon_spent"] <= 10
    card = (run / "MODEL_CARD.md").read_text()
    assert "pipeline_tag: time-series-forecasting" in card
    assert "LSTM of 8 over 3 measurements" in card


def test_without_privacy_it_learns_where_courses_lead(played):
    found = json.loads((played("class", "none") / "metrics.json").read_text())["final_metrics"]
    assert found["everywhere"]["accuracy"] > 0.75
    found = json.loads((played("number", "none") / "metrics.json").read_text())["final_metrics"]
    assert found["everywhere"]["r2"] > 0.5


def test_a_model_folder_tells_of_new_stays_in_the_datas_own_unit(played, joined, tmp_path):
    with STAYS.open(newline="") as file:
        truth = {row["stay"]: row for row in csv.DictReader(file)}
    for kind, mode in CASES:
        out = tmp_path / f"{kind}-{mode}.csv"
        count = predict(played(kind, mode) / "model", joined, out, patient="stay")
        with out.open(newline="") as file:
            answers = list(csv.DictReader(file))
        assert count == len(answers) == len(truth)
        assert {answer["patient"] for answer in answers} == set(truth)
        if mode == "none" and kind == "class":
            right = sum(a["label"] == truth[a["patient"]]["label"] for a in answers)
            assert right / count > 0.75
        if kind == "number":
            wrong = [
                abs(float(a["value"]) - float(truth[a["patient"]]["creatinine_later"]))
                for a in answers
            ]
            assert sum(wrong) / count < 1.5


def test_the_answers_are_those_of_the_network_that_trained(played, joined, tmp_path):
    import numpy as np

    from client.data.intake import receive_inputs
    from client.tasks import prognosis
    from client.tasks.rows import inputs_of, loaded
    from common.tasks.prognosis import PrognosisTask
    from common.tensors import load_tensors

    folder = played("number", "none") / "model"
    facts = json.loads((folder / "task.json").read_text())
    task = PrognosisTask.model_validate_json(json.dumps(facts["task"]))
    records = receive_inputs(task, [joined])
    statistics = (np.array(facts[name], np.float32) for name in ("mean", "deviation"))
    network = loaded(prognosis, task, load_tensors(folder / "model.safetensors"))
    found = network(*inputs_of(prognosis.encode(task, records), *statistics))[:, 0].clamp(0, 1) * 10
    predict(folder, joined, tmp_path / "n.ndjson")
    told = [json.loads(line)["value"] for line in (tmp_path / "n.ndjson").read_text().splitlines()]
    assert told == pytest.approx(found.tolist(), abs=1e-4)


def test_a_file_without_a_measurement_of_the_model_is_refused(played, tmp_path):
    with pytest.raises(DataError) as caught:
        predict(played("class", "none") / "model", HOURS, tmp_path / "x.csv")
    assert caught.value.code is Code.DATA_COLUMNS
    assert "age" in str(caught.value)


FAULTS = {
    "a stay twice": (STAYS, lambda rows: [*rows, rows[1]], "stays.csv:182"),
    "a unit in the cell": (HOURS, lambda rows: spoiled(rows, 3, "88 bpm"), "heart_rate"),
    "another label": (STAYS, lambda rows: [*rows[:-1], [*rows[-1][:4], "wors", "1"]], "label"),
    "two patients": (
        STAYS,
        lambda rows: [*rows, ["new", "", "west", "3", "worse", "1"]],
        "patient",
    ),
}


def spoiled(rows, at, cell):
    return [*rows[:at], [*rows[at][:2], cell, rows[at][3]], *rows[at + 1 :]]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_used_ends_a_simulation_before_it_begins(tmp_path, capsys, fault):
    source, change, told = FAULTS[fault]
    document = study("class", "none")
    with source.open(newline="") as file:
        rows = change(list(csv.reader(file)))
    with (tmp_path / source.name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    files = [str(tmp_path / p.name) if p == source else str(p) for p in (HOURS, STAYS)]
    document["simulation"]["data"]["files"] = files
    (tmp_path / "study.yaml").write_text(json.dumps(document))
    assert main(["simulate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")]) != 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_hours_outside_the_window_are_told_and_not_learned_from(tmp_path, capsys):
    document = study("class", "none")
    text = HOURS.read_text() + "st001,-1,90,1\nst001,8,90,1\nst999,0,90,1\n"
    (tmp_path / "hours.csv").write_text(text)
    document["simulation"]["data"]["files"][0] = str(tmp_path / "hours.csv")
    (tmp_path / "study.yaml").write_text(json.dumps(document))
    out = tmp_path / "run"
    assert main(["simulate", str(tmp_path / "study.yaml"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    for reason in ("before the stay", "after the hours", "not in the table of stays"):
        assert "left out: 1 rows " in said.err + said.out
        assert reason in said.err + said.out


def test_subgroups_of_courses_are_told(tmp_path):
    document = study("class", "none")
    document["training"] |= {"rounds": 1, "local_steps": 1}
    document["evaluation"]["every"] = 1
    document["simulation"]["data"]["groups"] = ["ward"]
    with STAYS.open(newline="") as stream:
        rows = list(csv.reader(stream))
    with (tmp_path / "stays.csv").open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow([*rows[0], "ward"])
        out.writerows([*row, "AB"[at % 2]] for at, row in enumerate(rows[1:]))
    document["simulation"]["data"]["files"] = [str(HOURS), "stays.csv"]
    (tmp_path / "study.yaml").write_text(json.dumps(document))
    assert main(["simulate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["final_metrics"]
    assert set(told["subgroups"]) == {"ward:A", "ward:B"}
    assert sum(one["n"] for one in told["subgroups"].values()) == told["everywhere"]["n"]
