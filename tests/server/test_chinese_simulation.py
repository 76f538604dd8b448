"""Chinese by characters, as configs/diagnosis-chinese.yaml shows it: from the study to answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from client.predict import predict
from common.cli import main
from common.errors import Code, DataError

CONFIGS = Path(__file__).parents[2] / "configs"
NOTES = CONFIGS / "data" / "synthetic-chinese.csv"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("chinese") / "run"
    assert main(["simulate", str(CONFIGS / "diagnosis-chinese.yaml"), "--out", str(out)]) == 0
    return out


def test_joint_noise_leaves_a_model_that_reads_chinese(run, tmp_path):
    out = tmp_path / "answers.csv"
    count = predict(run / "model", NOTES, out, patient="patient")
    with out.open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    with NOTES.open(newline="", encoding="utf-8") as file:
        truth = list(csv.DictReader(file))
    assert count == len(truth) == 240
    right = sum(a["label"] == t["label"] for a, t in zip(answers, truth, strict=True))
    assert right / count > 0.6  # the noise is real: 0.87 to 0.98 in eight runs, a third by chance
    assert [a["patient"] for a in answers] == [t["patient"] for t in truth]


def test_the_folder_says_what_it_is(run):
    card = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "text convolutions over gb2312-level-1" in card
    assert "library_name: wardround" in card
    facts = json.loads((run / "model" / "task.json").read_text(encoding="utf-8"))
    assert facts["task"]["encoder"]["vocabulary"] == "gb2312-level-1"
    assert facts["mean"] == []
    rounds = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["rounds"]
    assert {entry["kind"] for entry in rounds} == {"train", "evaluate"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("patient,text\np1,  \n", Code.DATA_VALUE),
        ("patient,note\np1,咳嗽\n", Code.DATA_COLUMNS),
        ("patient,text\np1,咳嗽,x\n", Code.DATA_RAGGED),
    ],
)
def test_bad_rows_are_refused(run, tmp_path, content, code):
    path = tmp_path / "notes.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        predict(run / "model", path, tmp_path / "answers.csv")
    assert caught.value.code is code


def test_another_encoding_is_refused_and_not_guessed(run, tmp_path):
    path = tmp_path / "notes.csv"
    path.write_bytes("patient,text\np1,咳嗽三天\n".encode("gb18030"))
    with pytest.raises(DataError) as caught:
        predict(run / "model", path, tmp_path / "answers.csv")
    assert caught.value.code is Code.DATA_ENCODING


def test_an_encoder_of_its_own_explains_itself_by_pieces_of_the_note(run, tmp_path):
    page = tmp_path / "why.html"
    arguments = [str(run / "model"), str(NOTES), "--out", str(page), "--limit", "2"]
    assert main(["explain", *arguments]) == 0
    text = page.read_text(encoding="utf-8")
    assert "note: " in text
    assert "they add up" in text
