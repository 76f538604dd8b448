"""What hospitals hold: the study's bound on one patient's notes, and what is said about it."""

from __future__ import annotations

import csv
import json

import pytest

from client.data.intake import table_columns
from client.holdings import read_holdings
from client.local import LocalFiles
from common.config import load
from common.study import Study

STUDY = """
format: wardround-study/1
name: notes
task: {{kind: diagnosis, labels: [flu, cold]{most}}}
model: {{backbone: tiny}}
privacy: {{mode: none}}
simulation:
  data: {{files: [notes.csv]{tests}}}
  split: {{by: column, column: hospital}}
"""
HOSPITALS = ("north", "east", "west")
LONGEST = ("east-p3", 150)


@pytest.fixture
def config(tmp_path):
    """Three hospitals, twelve patients each with one note, and one of them with 150."""

    def make(most: str = "", tests: bool = False):
        with (tmp_path / "notes.csv").open("w", newline="") as handle:
            table = csv.writer(handle)
            table.writerow(["patient", "text", "label", "hospital"])
            for site in HOSPITALS:
                for number in range(12):
                    patient = f"{site}-p{number}"
                    notes = LONGEST[1] if patient == LONGEST[0] else 1
                    for note in range(notes):
                        table.writerow([patient, f"note {note}", ["flu", "cold"][number % 2], site])
        with (tmp_path / "test.csv").open("w", newline="") as handle:
            table = csv.writer(handle)
            table.writerow(["patient", "text", "label", "hospital"])
            for site in HOSPITALS:
                table.writerows([[f"{site}-t", f"note {n}", "flu", site] for n in range(70)])
        path = tmp_path / "study.yaml"
        told = ", test_files: [test.csv]" if tests else ""
        path.write_text(STUDY.format(most=most, tests=told))
        return path

    return make


def test_a_simulated_hospital_reads_a_patients_first_notes_and_says_how_many_it_left(config):
    path = config()
    study = load(path, Study)
    assert study.diagnosis.max_notes == 64
    held = read_holdings(study, path)
    own = [r for r in held.records["east"] if r.patient == LONGEST[0]]
    assert [r.text for r in own] == [f"note {n}" for n in range(64)]
    assert held.warnings == (
        "site east: 86 record(s) of 1 patient(s) are beyond what the study takes of one and not read.",
    )
    assert held.manifest["records_not_read"] == 86
    assert LONGEST[0] not in json.dumps(held.manifest) + "".join(held.warnings)


def test_test_files_are_bound_alike(config):
    path = config(tests=True)
    held = read_holdings(load(path, Study), path)
    assert all(len(rows) == 64 for rows in held.tests.values())
    assert held.manifest["records_not_read"] == 86 + 3 * 6
    assert len(held.warnings) == 1 + 3


def test_a_study_may_read_more_and_then_nothing_is_said(config):
    path = config(most=", max_notes: 150")
    held = read_holdings(load(path, Study), path)
    assert sum(r.patient == LONGEST[0] for r in held.records["east"]) == 150
    assert held.warnings == ()
    assert held.manifest["records_not_read"] == 0


def test_a_hospitals_own_files_are_bound_by_the_same_rule(config, tmp_path):
    path = config(most=", max_notes: 5")
    study = load(path, Study)
    records = LocalFiles((tmp_path / "notes.csv",)).read(study)
    assert [r.text for r in records if r.patient == LONGEST[0]] == [f"note {n}" for n in range(5)]
    assert table_columns(study.task).most == 5
