"""`diagnosis` with several labels a note: reading, losses, measurement, and the saved model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from client.data.intake import receive, table_columns
from client.predict import predict
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from common.cli import main
from common.errors import Code, DataError
from common.study import Study

torch.set_num_threads(1)
LABELS = ("pneumonia", "asthma", "heart failure")
SIGNS = {
    "pneumonia": ("fever", "sputum", "green"),
    "asthma": ("wheeze", "childhood", "since"),
    "heart failure": ("swollen", "legs", "heart"),
}
NONE = {"mode": "none"}
LOCAL = {"mode": "local", "epsilon": 8, "delta": 5e-4, "clip_norm": 1.0}
JOINT = {**LOCAL, "mode": "joint"}
ENCODER = {"buckets": 128, "width": 8, "kernels": [1], "channels": 16}


def write_notes(path, patients=60):
    draw = np.random.default_rng(3)
    with path.open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["patient", "hospital", "text", "label"])
        for hospital in ("east", "north", "south"):
            for at in range(patients):
                has = [label for label in LABELS if draw.random() < 0.4]
                words = [str(w) for label in has for w in draw.choice(SIGNS[label], 2)]
                words += [str(w) for w in draw.choice(["chest", "lung", "clear", "patient"], 3)]
                text = " ".join(map(str, draw.permutation(words)))
                out.writerow([f"{hospital}{at}", hospital, text, " ; ".join(has)])


def document(data, privacy, **sections):
    joint = privacy["mode"] == "joint"
    return {
        "format": "wardround-study/1",
        "name": "several",
        "task": {"kind": "diagnosis", "labels": list(LABELS), "several": True, "max_tokens": 12},
        "training": {
            "rounds": 3,
            "local_steps": 1 if joint else 20,
            "sampling_rate": 0.4,
            "expected_batch": 18,
            **({} if joint else {"optimizer": {"name": "adamw", "learning_rate": 0.02}}),
        },
        "privacy": privacy,
        "evaluation": {"every": 3},
        "simulation": {
            "data": {"files": [str(data)]},
            "split": {"by": "column", "column": "hospital"},
            "seed": 1,
        },
        **sections,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("several") / "notes.csv"
    write_notes(path)
    return path


@pytest.fixture(scope="module")
def played(data, tiny_bert, tmp_path_factory):
    made = {}

    def play(privacy, tuning):
        if (privacy["mode"], tuning) not in made:
            folder = tmp_path_factory.mktemp("run")
            told = document(data, privacy, model={"backbone": str(tiny_bert), "tuning": tuning})
            if tuning == "own":
                told.pop("model")
                told["task"]["encoder"] = ENCODER
            (folder / "study.yaml").write_text(json.dumps(told))
            out = folder / "out"
            assert main(["simulate", str(folder / "study.yaml"), "--out", str(out)]) == 0
            made[privacy["mode"], tuning] = out
        return made[privacy["mode"], tuning]

    return play


def tiny(data, bert, tuning="head"):
    model = {"backbone": str(bert), "tuning": tuning, "precision": "float32"}
    sites = [{"id": one} for one in "abc"]
    return Study.model_validate(document(data, NONE, model=model, sites=sites, simulation=None))


# ------------------------------------------------------------------ reading


def test_labels_are_parted_by_semicolons_and_may_be_none(data, tiny_bert):
    records = receive(tiny(data, tiny_bert).task, [data], site="hospital").records
    assert {len(record.labels) for record in records} == {0, 1, 2, 3}
    assert all(record.label is None and record.codes == () for record in records)


@pytest.mark.parametrize("cell", ["asthma;flu", "Asthma", "pneumonia,asthma"])
def test_a_label_that_is_not_in_the_study_is_refused(cell, tmp_path, tiny_bert):
    path = tmp_path / "notes.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["patient", "text", "label"], ["a", "clear", ""], ["b", "fever", cell]]
        )
    with pytest.raises(DataError) as caught:
        receive(tiny(path, tiny_bert).task, [path])
    assert caught.value.code is Code.DATA_LABEL
    assert "notes.csv:3" in caught.value.message
    assert "flu" not in caught.value.message.replace("notes", "")


def test_a_label_named_twice_counts_once(tmp_path, tiny_bert):
    path = tmp_path / "notes.csv"
    path.write_text("patient,text,label\na,fever,asthma; asthma ;\n")
    (record,) = receive(tiny(path, tiny_bert).task, [path]).records
    assert record.labels == ("asthma",)


def test_data_check_reads_the_column_that_may_be_empty(data, tiny_bert):
    columns = table_columns(tiny(data, tiny_bert).task)
    assert (columns.label, columns.codes) == (None, ("label",))


def test_data_check_counts_every_label(data, tmp_path, capsys):
    told = document(data, NONE)
    told["task"]["encoder"] = ENCODER
    (tmp_path / "study.yaml").write_text(json.dumps(told))
    assert main(["client", "data", "check", str(tmp_path / "study.yaml"), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["labels"]
    assert set(counts) == set(LABELS)
    assert all(int(count) > 50 for count in counts.values())


def test_a_model_of_notes_takes_no_further_file(played, data, tmp_path):
    with pytest.raises(DataError) as caught:
        predict(played(NONE, "head") / "model", data, tmp_path / "x.csv", beside=[data])
    assert caught.value.code is Code.DATA_FORMAT


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_the_loss_is_the_mean_cross_entropy_of_every_label(data, tiny_bert, tuning):
    study = tiny(data, tiny_bert, tuning)
    records = receive(study.task, [data], site="hospital").records[:6]
    learner = DiagnosisLearner(
        study, records, records, load_backbone(str(tiny_bert)), device=torch.device("cpu")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    rows, _ = learner.rows_of(np.arange(6))
    found = learner.losses(rows)
    with torch.no_grad():
        logits = learner._logits(learner._held_out)
    truth = torch.tensor([[float(label in r.labels) for label in LABELS] for r in records])
    plain = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    assert torch.allclose(found, plain, atol=1e-5)
    # Each held-out patient by itself: [1, average precision, Jaccard, F1, loss].
    vectors = learner.measure_patients()
    assert vectors.shape == (6, 5)
    assert np.allclose(vectors.sum(axis=0), learner.measure())
    assert np.allclose(vectors[:, 0], 1)


@pytest.mark.parametrize(
    ("privacy", "tuning"),
    [
        (NONE, "head"),
        (LOCAL, "head"),
        (JOINT, "lora"),
        (NONE, "own"),
        (LOCAL, "own"),
        (JOINT, "own"),
    ],
)
def test_whole_simulations_measure_sets_of_labels(played, privacy, tuning):
    told = json.loads((played(privacy, tuning) / "metrics.json").read_text())
    exact = told["final"]["everywhere"] if "final" in told else told["final_metrics"]["everywhere"]
    assert {"jaccard", "f1"} <= set(exact)


# ------------------------------------------------------------------ the saved model


@pytest.mark.parametrize("tuning", ["head", "own"])
def test_predictions_tell_every_label_by_itself(played, data, tmp_path, tuning):
    out = tmp_path / "answers.csv"
    predict(played(NONE, tuning) / "model", data, out)
    with out.open(newline="") as file:
        answers = list(csv.DictReader(file))
    with data.open(newline="") as file:
        truth = [set(filter(None, row["label"].split(" ; "))) for row in csv.DictReader(file)]
    assert len(answers) == len(truth)
    told = [set(filter(None, answer["labels"].split(";"))) for answer in answers]
    for answer, labels in zip(answers, told, strict=True):
        assert labels == {name for name in LABELS if float(answer[f"p({name})"]) >= 0.5}
    hits = sum((a ^ t) == set() for a, t in zip(told, truth, strict=True)) / len(truth)
    # Guessing the likeliest set of eight is right in about one of five.
    assert hits > (0.7 if tuning == "own" else 0.25)


def test_the_folder_says_so_to_whoever_loads_it(played, data):
    import transformers

    folder = played(NONE, "head") / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification"
    assert tuple(model.config.id2label.values()) == LABELS
    given = tokenizer("fever green sputum", return_tensors="pt", truncation=True, max_length=12)
    with torch.no_grad():
        found = model(**given, labels=torch.tensor([[1.0, 0.0, 0.0]]))
    assert found.loss == pytest.approx(
        functional.binary_cross_entropy_with_logits(
            found.logits, torch.tensor([[1.0, 0.0, 0.0]])
        ).item()
    )


def test_one_label_a_note_is_still_one_label(tiny_bert, data):
    """Control: without `several` the saved model is a classifier of one label."""
    from client.tasks.network import Plan, bare_model

    study = tiny(data, tiny_bert)
    terms = study.model_dump()
    terms["task"]["several"] = False
    model = bare_model(Plan.of(Study.model_validate(terms)), load_backbone(str(tiny_bert)))
    assert model.config.problem_type == "single_label_classification"
