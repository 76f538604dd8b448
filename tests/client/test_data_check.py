import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.cli import main

STUDY = {
    "format": "wardround-study/1",
    "name": "labs",
    "task": {
        "kind": "tabular",
        "labels": ["none", "sepsis"],
        "features": [{"name": "crp", "low": 0, "high": 60}],
    },
    "privacy": {"mode": "none"},
    "sites": [{"id": name} for name in ("east", "north", "south")],
}
SITE = {
    "format": "wardround-site/1",
    "site": "east",
    "data": {"files": ["labs.csv"], "columns": {"patient": "who"}},
    "state": "state",
    "budget": {"epsilon": 8, "delta": 1e-5},
    "ceilings": {"epsilon": 3, "rounds": 10, "approved_studies": "any"},
}


def labs(path, patient="patient", count=40, crp=lambda i: i % 50):
    rows = [(f"p{i}", ("none", "sepsis")[i % 2], crp(i)) for i in range(count)]
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([(patient, "label", "crp"), *rows])
    return path


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def check(capsys, *words):
    status = main(["client", "data", "check", *map(str, words), "--json"])
    out = capsys.readouterr().out.strip().splitlines()
    return status, json.loads(out[-1])


def test_named_files_are_checked(study, tmp_path, capsys):
    status, told = check(capsys, study, labs(tmp_path / "labs.csv"))
    assert status == 0
    assert told["usable"] is True
    assert told["study"] == "labs"
    assert told["labels"] == {"none": "20", "sepsis": "20"}
    assert told["fixes"] == []


def test_a_hospitals_own_files_and_names_come_from_its_configuration(study, tmp_path, capsys):
    labs(tmp_path / "labs.csv", "who")
    config = tmp_path / "site.yaml"
    config.write_text(yaml.safe_dump(SITE))
    status, told = check(capsys, study, "--config", config)
    assert (status, told["patients"]) == (0, "40")


def test_the_configuration_of_this_folder_is_found(study, tmp_path, capsys, monkeypatch):
    labs(tmp_path / "labs.csv", "who")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    monkeypatch.chdir(tmp_path)
    assert check(capsys, study)[1]["patients"] == "40"


def test_a_simulations_files_are_checked_with_their_sites(tmp_path, capsys):
    with (tmp_path / "labs.csv").open("w", newline="") as handle:
        rows = [(f"p{i}", "none", i, "abc"[i % 3]) for i in range(33)]
        csv.writer(handle).writerows([("patient", "label", "crp", "hospital"), *rows])
    simulation = {
        "data": {"files": ["labs.csv"]},
        "split": {"by": "column", "column": "hospital"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "sites": [], "simulation": simulation}))
    status, told = check(capsys, path)
    assert (status, told["sites"], told["records"]) == (0, 3, "33")


def test_own_column_names_can_be_given(study, tmp_path, capsys):
    file = labs(tmp_path / "labs.csv", "who")
    status, told = check(capsys, study, file)
    assert status == 1
    assert any("column patient is not there" in fix["message"] for fix in told["fixes"])
    assert check(capsys, study, file, "--patient", "who")[0] == 0


def test_a_person_reads_counts_and_a_list_of_what_to_do(study, tmp_path, capsys):
    file = labs(tmp_path / "labs.csv", crp=lambda i: i % 50 if i % 4 else 310)
    assert main(["client", "data", "check", str(study), str(file)]) == 0
    out = capsys.readouterr().out
    assert "25 % of crp lie above the bound 60: another unit? They would fit divided by 10" in out
    assert "310" not in out
    assert out.rstrip().splitlines()[-1] == f"next: wardround check {study}"


def test_without_any_source_the_fault_says_what_to_type(study, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["client", "data", "check", str(study)]) == 2
    assert "--config site.yaml" in capsys.readouterr().err


def test_nothing_that_trains_is_loaded_for_it(study, tmp_path):
    file = labs(tmp_path / "labs.csv")
    code = (
        "import sys; from common.cli import main; "
        f"main(['client', 'data', 'check', {str(study)!r}, {str(file)!r}, '--json']); "
        "found = {'torch', 'transformers', 'opacus', 'pyarrow', 'rich'} & set(sys.modules); "
        "sys.exit(' '.join(sorted(found)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


PROGNOSIS = Path(__file__).parents[2] / "configs" / "prognosis.yaml"


def test_courses_by_the_hour_are_checked_as_training_reads_them(capsys):
    status, told = check(capsys, PROGNOSIS)
    assert status == 0
    assert told["usable"] is True
    assert {column["name"] for column in told["columns"]} >= {"heart_rate"}
    assert set(told["labels"]) == {"better", "worse"}
    assert (told["records"], told["patients"]) == ("180", "160")


def test_a_course_that_training_would_refuse_is_named(tmp_path, capsys):
    hours = tmp_path / "hours.csv"
    hours.write_text("stay,hour,heart_rate\ns1,noon,88\n")
    status, told = check(capsys, PROGNOSIS, hours)
    assert status != 0
    assert told["usable"] is False
    assert any(fix["kind"] == "fault" for fix in told["fixes"])
