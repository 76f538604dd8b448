"""Whole studies of notes, images, numbers and series, as configs/multimodal.yaml shows them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from client.data.intake import receive, receive_inputs, table_columns
from client.predict import predict
from common.cli import main
from common.config import load
from common.errors import Code, DataError
from common.study import Study

CONFIGS = Path(__file__).parents[2] / "configs"
STUDY = CONFIGS / "multimodal.yaml"
DATA = CONFIGS / "data" / "multimodal"
torch.set_num_threads(1)

PLAIN = {
    "training": {
        "rounds": 4,
        "local_steps": 15,
        "sampling_rate": 0.3,
        "expected_batch": 28,
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
    },
    "aggregation": {},
    "privacy": {"mode": "none"},
}
LOCAL = {
    "training": {"rounds": 2, "local_steps": 4, "sampling_rate": 0.3, "expected_batch": 28},
    "aggregation": {},
    "privacy": {"mode": "local", "epsilon": 8, "delta": 1e-4, "clip_norm": 1.0},
}
JOINT = {"training": {"rounds": 3, "local_steps": 1, "sampling_rate": 0.5, "expected_batch": 48}}
MODES = {"none": PLAIN, "local": LOCAL, "joint": JOINT}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made = {}

    def play(mode):
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            changed = MODES[mode]
            document = load(STUDY, Study).model_dump(mode="json") | changed
            document["evaluation"] = {"every": changed["training"]["rounds"]}
            files = [str(DATA / name) for name in ("cases.csv", "hours.csv")]
            document["simulation"]["data"] = {"files": files}
            (folder / "study.yaml").write_text(json.dumps(document))
            out = folder / "run"
            assert main(["simulate", str(folder / "study.yaml"), "--out", str(out)]) == 0
            made[mode] = out
        return made[mode]

    return play


@pytest.mark.parametrize("mode", list(MODES))
def test_statistics_come_first_and_every_round_completes(played, mode):
    rounds = json.loads((played(mode) / "metrics.json").read_text())["rounds"]
    count = MODES[mode]["training"]["rounds"]
    assert [r["kind"] for r in rounds] == ["statistics", *["train"] * count, "evaluate"]
    statement = json.loads((played(mode) / "privacy.json").read_text())
    assert ("mechanism" in statement) == (mode != "none")


def test_the_fused_model_predicts_the_table(played, tmp_path):
    out = tmp_path / "answers.csv"
    count = predict(played("none") / "model", DATA / "cases.csv", out, patient="patient")
    with out.open(newline="") as file:
        answers = list(csv.DictReader(file))
    with (DATA / "cases.csv").open(newline="") as file:
        truth = list(csv.DictReader(file))
    assert count == len(answers) == len(truth) == 480
    right = sum(a["label"] == t["label"] for a, t in zip(answers, truth, strict=True))
    assert right / count > 0.75
    facts = json.loads((played("none") / "model" / "task.json").read_text())
    assert len(facts["mean"]) == 4
    card = (played("none") / "MODEL_CARD.md").read_text()
    assert "gated fusion of text, image, numbers, series" in card
    assert "library_name: wardround" in card
    assert "transformers" not in card.partition("---\n")[2].partition("---")[0]


def test_the_hours_change_the_answer(played):
    """Series are joined by stay also where nothing is to be learned."""
    from client.saved import SavedRows

    model = SavedRows(played("none") / "model", "cpu")
    sepsis = model.task.labels.index("sepsis")
    files = [DATA / "cases.csv", DATA / "hours.csv"]
    poor = receive_inputs(model.task, files[:1], patient="patient")
    whole = receive_inputs(model.task, files, patient="patient")
    assert not any(record.series is not None for record in poor)
    with_hours = [at for at, record in enumerate(whole) if record.series is not None]
    assert 0 < len(with_hours) < len(whole)
    told = [model.outputs(records).softmax(1)[:, sepsis].tolist() for records in (poor, whole)]
    changed = {at for at in range(len(whole)) if abs(told[0][at] - told[1][at]) > 1e-6}
    assert changed <= set(with_hours)
    assert len(changed) > 0.9 * len(with_hours)  # some were certain before


def test_the_verb_takes_the_hours_beside_the_table(played, tmp_path):
    model, cases = played("none") / "model", DATA / "cases.csv"
    rows = []
    for name, more in (("poor.csv", []), ("whole.csv", ["--with", str(DATA / "hours.csv")])):
        out = tmp_path / name
        assert main(["predict", str(model), str(cases), "--out", str(out), *more]) == 0
        rows.append(out.read_text().splitlines())
    assert len(rows[0]) == len(rows[1]) == 481
    assert rows[0] != rows[1]


# ------------------------------------------------------------------ rows that cannot be used


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(DATA, tmp_path / "data")
    return tmp_path / "data"


def edited(folder, name, old, new):
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def read(folder):
    task = load(STUDY, Study).task
    return receive(task, [folder / "cases.csv", folder / "hours.csv"], site="hospital")


def test_empty_cells_are_missing_inputs_and_every_row_is_taken(copied):
    records = read(copied).records
    assert len(records) == 480
    assert {bool(r.text) for r in records} == {True, False}
    assert {r.image is None for r in records} == {True, False}
    assert {r.series is None for r in records} == {True, False}
    assert all(len(r.codes) == 1 for r in records)


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "told"),
    [
        ("cases.csv", "images/c1.png", "../images/c1.png", Code.IMAGE_PATH, "cases.csv:"),
        ("cases.csv", "images/c1.png", "images/none.png", Code.DATA_UNREADABLE, "cases.csv:"),
        ("cases.csv", "images/c1.png", "images/c1.gif", Code.IMAGE_KIND, "cases.csv:"),
        ("cases.csv", ",sepsis\n", ",Sepsis\n", Code.DATA_LABEL, "did you mean sepsis?"),
        ("cases.csv", ",sepsis\n", ",\n", Code.DATA_VALUE, "label is empty"),
        ("cases.csv", ",sepsis\n", ",sepsis,x\n", Code.DATA_RAGGED, "10 fields"),
        ("cases.csv", ",xray,", ",picture,", Code.DATA_COLUMNS, "no column xray"),
        ("cases.csv", ",crp,", ",CRP,", Code.DATA_COLUMNS, "did you mean CRP?"),
        ("hours.csv", ",systolic", ",bp", Code.DATA_COLUMNS, "no column systolic"),
        ("hours.csv", "\ne1000,0,", "\ne1000,noon,", Code.DATA_VALUE, "hours.csv:2: column hour"),
        ("hours.csv", "hour,", "minute,", Code.DATA_COLUMNS, "hours.csv"),
    ],
)
def test_bad_rows_are_told_by_file_and_line(copied, name, old, new, code, told):
    edited(copied, name, old, new)
    with pytest.raises(DataError) as caught:
        read(copied)
    assert caught.value.code is code
    assert told in caught.value.message


def test_a_number_that_is_none_is_refused(copied):
    rows = (copied / "cases.csv").read_text().splitlines()
    cells = rows[1].split(",")
    cells[rows[0].split(",").index("crp")] = "high"
    (copied / "cases.csv").write_text("\n".join([rows[0], ",".join(cells), *rows[2:], ""]))
    with pytest.raises(DataError) as caught:
        read(copied)
    assert caught.value.code is Code.DATA_VALUE


def test_two_rows_may_not_share_a_stay(copied):
    """One patient's hours must not be another's too."""
    edited(copied, "cases.csv", ",e1000,", ",e1001,")
    text = (copied / "cases.csv").read_text()
    assert text.count(",e1001,") in {1, 2}
    if text.count(",e1001,") == 1:
        edited(copied, "cases.csv", ",n1022,", ",e1001,")
    with pytest.raises(DataError) as caught:
        read(copied)
    assert caught.value.code is Code.DATA_VALUE
    assert "stay of another row" in caught.value.message


def test_hours_of_nobody_are_counted(copied):
    with (copied / "hours.csv").open("a") as file:
        file.write("stranger,0,80,120\n")
    tally = read(copied).tally
    assert list(tally.values()) == [1]


def test_hours_alone_are_no_cases(copied):
    with pytest.raises(DataError) as caught:
        receive(load(STUDY, Study).task, [copied / "hours.csv"])
    assert caught.value.code is Code.DATA_EMPTY


def test_data_check_counts_what_is_missing(capsys, copied):
    assert main(["client", "data", "check", str(STUDY), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["records"], told["patients"]) == ("480", "480")
    assert [column["name"] for column in told["columns"]] == [
        *("crp", "lactate"),
        *("heart_rate", "systolic"),
    ]
    edited(copied, "cases.csv", "images/c1.png", "images/none.png")
    files = [str(copied / name) for name in ("cases.csv", "hours.csv")]
    assert main(["client", "data", "check", str(STUDY), *files, "--json"]) == 1
    assert "cases.csv:" in capsys.readouterr().out


def test_data_check_knows_the_columns():
    columns = table_columns(load(STUDY, Study).task, site="hospital")
    assert columns.codes == ("note", "xray", "stay", "sex")
    assert columns.numbers == ("crp", "lactate")
    assert columns.label == "label"


def test_the_fused_model_explains_itself_part_by_part(played, tmp_path):
    page = tmp_path / "why.html"
    files = [str(DATA / "cases.csv"), "--with", str(DATA / "hours.csv")]
    model = str(played("none") / "model")
    assert main(["explain", model, *files, "--out", str(page), "--limit", "3"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Shapley values" in text
    assert "they add up" in text
    assert "do NOT add up" not in text
    for part in ("note: ", "crp: ", "sex: ", "image: ", "heart_rate: "):
        assert part in text, part


def test_subgroups_of_a_table_are_told_where_they_are_asked_for(tmp_path):
    document = load(STUDY, Study).model_dump(mode="json") | PLAIN
    document["training"] = {**PLAIN["training"], "rounds": 1}
    document["evaluation"] = {"every": 1}
    files = [str(DATA / name) for name in ("cases.csv", "hours.csv")]
    document["simulation"]["data"] = {"files": files, "groups": ["sex", "patient"]}
    (tmp_path / "study.yaml").write_text(json.dumps(document))
    out = tmp_path / "run"
    assert main(["simulate", str(tmp_path / "study.yaml"), "--out", str(out), "--no-alone"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())["final_metrics"]
    groups = metrics["subgroups"]
    assert {"sex:f", "sex:m"} <= set(groups), "every other column has too many values to be one"
    assert all(name.startswith("sex:") for name in groups)
    assert sum(one["n"] for one in groups.values()) <= metrics["everywhere"]["n"]
