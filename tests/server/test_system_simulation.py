"""Records straight out of a hospital's system, as configs/hospital-system.yaml shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from client.config import SiteConfig
from client.data.intake import System, receive_cases
from client.data.synthetic_system import write_system
from client.local import LocalFiles, local_files
from common.cli import main
from common.config import load
from common.errors import Code, DataError
from common.study import Study

torch.set_num_threads(1)
CONFIGS = Path(__file__).parents[2] / "configs"
STUDY = CONFIGS / "hospital-system.yaml"
FOLDER = CONFIGS / "data" / "synthetic-eicu"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "eicu_demo"


def study_in(folder, **changed):
    shutil.copytree(FOLDER, folder / "data" / FOLDER.name)
    document = yaml.safe_load(STUDY.read_text()) | changed
    (folder / "study.yaml").write_text(json.dumps(document))
    return folder / "study.yaml"


@pytest.mark.parametrize("mode", ["none", "local"])
def test_a_system_is_simulated_hospital_by_hospital(mode, tmp_path, capsys):
    changed = {}
    if mode == "local":
        changed = {
            "privacy": {"mode": "local", "epsilon": 8, "delta": 0.0001, "clip_norm": 1.0},
            "training": {"rounds": 2, "local_steps": 2, "expected_batch": 12, "sampling_rate": 0.3},
            "evaluation": {"every": 2, "held_out": 0.3, "score_bins": 16},
        }
    out = tmp_path / "run"
    assert main(["simulate", str(study_in(tmp_path / "s", **changed)), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "encounters that do not say whether the patient died" in said.err + said.out
    told = json.loads((out / "metrics.json").read_text())
    assert told["rounds_completed"] == (2 if mode == "local" else 6)
    assert set(told["epsilon"]) == {"101", "102", "103", "104", "105"}
    groups = told["final_metrics"]["subgroups"]
    assert {"sex:female", "sex:male", "age:65-79"} <= set(groups)
    whole = told["final_metrics"]["everywhere"]["n"]
    assert groups["sex:female"]["n"] + groups["sex:male"]["n"] == whole
    assert "AUROC by sex: from " in said.out
    card = (out / "MODEL_CARD.md").read_text()
    assert "| sex:female |" in card
    if mode == "none":
        assert told["final_metrics"]["everywhere"]["auroc"] > 0.65


def test_a_run_is_not_resumed_over_another_system(tmp_path, capsys):
    study = study_in(tmp_path / "s")
    out = tmp_path / "run"
    assert main(["simulate", str(study), "--out", str(out)]) == 0
    for name in ("summary.json", "conclusion.json"):
        (out / "state" / name).unlink(missing_ok=True)
    with (study.parent / "data" / FOLDER.name / "lab.csv").open("a") as file:
        file.write("99999,1000,5,lactate,2.0,mmol/L\n")
    assert main(["resume", str(out)]) != 0
    assert Code.INPUTS_CHANGED.label in capsys.readouterr().err


def test_nothing_after_the_window_is_seen():
    """The last creatinine of every stay tells the outcome, an hour too late."""
    study = load(STUDY, Study)
    found = receive_cases(study, System("eicu", FOLDER))
    seen = {record.values[2] for record in found.records}
    assert 9.0 not in seen
    assert found.tally["measurements after the observation window or the label"] == len(
        found.records
    )
    later = study.cases.model_copy(
        update={"window": study.cases.window.model_copy(update={"to_hours": 25.0})}
    )
    wide = receive_cases(study.model_copy(update={"cases": later}), System("eicu", FOLDER))
    assert {9.0} <= {record.values[2] for record in wide.records}, "control: an hour later"


def site_of(tmp_path, **data):
    document = yaml.safe_load((CONFIGS / "site.yaml").read_text())
    document["data"] = data
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_hospital_reads_its_system_and_tells_its_trainer(tmp_path):
    path = site_of(tmp_path, system={"reader": "eicu", "folder": str(FOLDER)})
    files = local_files(load(path, SiteConfig), path)
    assert LocalFiles.load(files.dump()) == files
    study = load(STUDY, Study)
    assert files.read(study) == receive_cases(study, System("eicu", FOLDER)).records


def test_the_data_check_counts_what_is_left_out(tmp_path, capsys):
    path = site_of(tmp_path, system={"reader": "eicu", "folder": str(FOLDER)})
    arguments = ["client", "data", "check", str(STUDY), "--config", str(path), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"]["encounters that do not say whether the patient died"] == "17"
    assert found["usable"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "name files, or a system"),
        ({"files": ["a.csv"], "system": {"reader": "eicu", "folder": "x"}}, "not both"),
        ({"system": {"reader": "eicu", "folder": "x"}, "columns": {"text": "t"}}, "no effect"),
        ({"system": {"reader": "eicu", "folder": "/nowhere"}}, "no such folder"),
    ],
)
def test_a_site_that_says_it_wrongly_is_told(data, told, tmp_path, capsys):
    assert main(["check", str(site_of(tmp_path, **data))]) != 0
    assert told in capsys.readouterr().err


def refused(study, system):
    with pytest.raises(DataError) as caught:
        receive_cases(study, system)
    return caught.value.code


def test_a_study_without_rules_is_no_use_to_a_system():
    tables = load(CONFIGS / "tabular.yaml", Study)
    assert refused(tables, System("eicu", FOLDER)) is Code.NO_CASES


def test_a_system_without_a_case_says_so(tmp_path):
    study = load(STUDY, Study)
    assert refused(study, System("eicu", tmp_path / "none")) is Code.DATA_UNREADABLE
    assert refused(study, System("mimic", FOLDER)) in {Code.DATA_COLUMNS, Code.DATA_UNREADABLE}
    nobody = study.cases.model_copy(
        update={"qualify": study.cases.qualify.model_copy(update={"min_age": 140.0})}
    )
    none = study.model_copy(update={"cases": nobody})
    assert refused(none, System("eicu", FOLDER)) is Code.CASES_EMPTY


def test_the_example_is_what_its_generator_writes(tmp_path):
    write_system(tmp_path / "made")
    for name in ("patient.csv", "lab.csv"):
        assert (tmp_path / "made" / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the eICU demo is not here")
def test_notes_of_the_real_demo_become_cases():
    document = yaml.safe_load((CONFIGS / "diagnosis-chinese.yaml").read_text())
    document["task"] = {
        "kind": "diagnosis",
        "labels": ["survived", "died"],
        "max_tokens": 64,
        "encoder": {"vocabulary": "words", "buckets": 256, "width": 8, "channels": 8},
    }
    document["privacy"] = {"mode": "none"}
    document["cases"] = {
        "window": {"to_hours": 24},
        "label": {"kind": "mortality"},
        "notes": {"deidentify": True},
    }
    found = receive_cases(Study.model_validate(document), System("eicu", SHARED))
    assert len(found.records) > 500
    assert {record.label for record in found.records} == {"survived", "died"}
    assert all(record.text.strip() for record in found.records)


@pytest.mark.parametrize(
    ("system", "told"),
    [
        ({"reader": "eicu"}, "name a folder, or a database"),
        ({"reader": "omop", "folder": "x", "database": "y"}, "not both"),
        ({"reader": "eicu", "database": "y"}, "only omop is"),
        ({"reader": "omop", "folder": "x", "schema": "cdm"}, "no effect without a database"),
    ],
)
def test_a_system_that_is_named_wrongly_is_told(system, told, tmp_path, capsys):
    assert main(["check", str(site_of(tmp_path, system=system))]) != 0
    assert told in capsys.readouterr().err
