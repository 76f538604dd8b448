import csv
import json

import numpy as np
import pytest
import torch

from client.build import build_model
from client.export import export_model
from client.predict import predict
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from common.errors import Code, DataError, StorageError

CPU = torch.device("cpu")
WINDOWS = {
    "long_notes": "window",
    "window_stride": 6,
    "max_windows": 3,
    "stemming": "english",
    "stop_words": "english",
}


@pytest.fixture(scope="module")
def saved(tiny, study_of, notes, tmp_path_factory):
    """A folder whose reading is as unlike the default as can be, and our own probabilities."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    study = study_of(tiny("bert"), task=WINDOWS)
    backbone = load_backbone(str(tiny("bert")))
    stream = np.random.default_rng(0)
    state = {
        name: stream.normal(0, 1, value.shape).astype(np.float32)
        for name, value in build_model(study).initial.items()
    }
    export_model(folder, study, backbone, state)
    learner = DiagnosisLearner(study, notes, (), backbone, device=CPU)
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(state[name]))
        order = np.argsort([0, 2, 1, 3, 5, 4])
        probabilities = learner._logits(learner._train).softmax(dim=1).numpy()[order]
    return folder, probabilities


@pytest.fixture
def table(notes, tmp_path):
    path = tmp_path / "new.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([("text", "who"), *((n.text, n.patient) for n in notes)])
    return path


def test_csv_predictions_equal_the_trained_model(saved, table, tmp_path):
    folder, expected = saved
    out = tmp_path / "out.csv"
    assert predict(folder, table, out, patient="who", device="cpu") == 6
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = ["pneumonia", "asthma", "heart failure"]
    found = np.array([[float(row[f"p({name})"]) for name in names] for row in rows])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert [row["label"] for row in rows] == [names[i] for i in expected.argmax(axis=1)]
    assert [row["patient"] for row in rows] == ["p1", "p2", "p1", "p3", "p4", "p3"]
    assert [row["line"] for row in rows] == ["2", "3", "4", "5", "6", "7"]


def test_ndjson_predictions_carry_no_patient_unless_asked(saved, table, tmp_path):
    folder, expected = saved
    out = tmp_path / "out.ndjson"
    predict(folder, table, out, device="cpu")
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(entries) == 6
    assert "patient" not in entries[0]
    assert entries[0]["probabilities"]["asthma"] == pytest.approx(expected[0, 1], abs=2e-5)
    assert "fever" not in out.read_text(), "the notes are not repeated"


def test_mistakes_are_named_and_leave_no_output(saved, table, tmp_path):
    folder, _ = saved
    out = tmp_path / "out.csv"
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    cases = [
        ((tmp_path, table, out), {}, Code.MODEL_FOLDER),
        ((folder, tmp_path / "none.csv", out), {}, Code.DATA_UNREADABLE),
        ((folder, table, out), {"text": "txt"}, Code.DATA_COLUMNS),
        ((folder, table, tmp_path / "out.xlsx"), {}, Code.DATA_FORMAT),
        ((folder, table, taken), {}, Code.OUTPUT_EXISTS),
    ]
    for arguments, options, code in cases:
        with pytest.raises(DataError) as caught:
            predict(*arguments, device="cpu", **options)
        assert caught.value.code is code
    with pytest.raises(StorageError) as refused:
        predict(folder, table, tmp_path / "no" / "out.csv", device="cpu")
    assert refused.value.code is Code.MODEL_OUTPUT
    assert taken.read_text() == "mine"
    assert not out.exists()


def test_a_failure_midway_leaves_no_half_file(saved, table, tmp_path, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(StorageError):
        predict(folder, table, tmp_path / "out.csv", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def _full(_handle):
    raise OSError(28, "No space left on device")


def test_a_strangers_classifier_predicts_too(tiny, table, tmp_path):
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny("bert"), num_labels=2
    )
    model.save_pretrained(tmp_path / "m")
    load_backbone(str(tiny("bert"))).tokenizer.save_pretrained(tmp_path / "m")
    assert predict(tmp_path / "m", table, tmp_path / "out.csv", device="cpu") == 6
