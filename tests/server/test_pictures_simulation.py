"""Images out of a hospital's PACS, joined to the stays of its system; and a model asked about both."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from client.data.intake import NO_IMAGE, System, receive_cases
from client.data.pictured import NO_DATE, NO_STAY
from common.cli import main
from common.config import load
from common.errors import Code, DataError
from common.study import Study

torch.set_num_threads(1)
SITES, PATIENTS = ("1", "2", "3", "4"), 16
SIZE = 16
TASK = {
    "kind": "imaging",
    "labels": ["survived", "died"],
    "size": SIZE,
    "network": {"kind": "resnet", "widths": [8], "blocks": 1, "groups": 4},
}


def image(path: Path, patient: str, day: str | None, bright: bool) -> None:
    """A film: who dies has a bright middle, everybody else a bright bar at the top."""
    draw = np.random.default_rng(len(path.name) + int(patient))
    pixels = draw.integers(0, 800, (SIZE, SIZE)).astype(np.uint16)
    pixels[(slice(4, 12), slice(4, 12)) if bright else (slice(0, 3), slice(None))] += 2500
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    made.PatientID, made.StudyInstanceUID = patient, generate_uid()
    if day is not None:
        made.StudyDate, made.StudyTime = day, "120000"
    made.BurnedInAnnotation = "NO"
    made.Rows, made.Columns, made.SamplesPerPixel = SIZE, SIZE, 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)


def dead(patient: int) -> bool:
    return patient // 4 % 2 == 0  # at every hospital half of them


def write_system(folder: Path) -> None:
    """OMOP tables of four hospitals, and a PACS with what belongs to a stay and what does not."""
    (folder / "omop").mkdir(parents=True)
    people = range(1, len(SITES) * PATIENTS + 1)
    tables = {
        "person": [
            ("person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth"),
            *((p, 8532, 1950, 1, 1) for p in people),
        ],
        "visit_occurrence": [
            (
                "visit_occurrence_id",
                "person_id",
                "visit_start_date",
                "visit_start_datetime",
                "visit_end_date",
                "visit_end_datetime",
                "care_site_id",
            ),
            *(
                (100 + p, p, "2020-01-01", "2020-01-01 10:00:00", "2020-01-05", "", SITES[p % 4])
                for p in people
            ),
        ],
        "death": [("person_id", "death_date"), *((p, "2020-01-05") for p in people if dead(p))],
        "concept": [("concept_id", "concept_name", "vocabulary_id", "concept_code")],
    }
    for name, rows in tables.items():
        with (folder / "omop" / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    for p in people:
        if p == 3:
            continue  # nobody made a film of this one
        image(folder / "pacs" / f"{p:03d}" / "a.dcm", str(p), "20200102", dead(p))
        # Another one from before the stay, that says the opposite.
        image(folder / "pacs" / f"{p:03d}" / "old.dcm", str(p), "20191201", not dead(p))
    image(folder / "pacs" / "nobody.dcm", "999", "20200102", bright=True)
    image(folder / "pacs" / "undated.dcm", "5", None, bright=True)


def study(folder: Path, name: str = "study.yaml", **cases) -> Path:
    document = {
        "format": "wardround-study/1",
        "name": "films",
        "task": TASK,
        "cases": {
            "window": {"zero": "start", "to_hours": 48},
            "label": {"kind": "mortality", "survived": "survived", "died": "died"},
            "image": "last",
            **cases,
        },
        "training": {
            "rounds": 20,
            "local_steps": 6,
            "expected_batch": 16,
            "optimizer": {"name": "adamw", "learning_rate": 0.01},
        },
        "privacy": {"mode": "none"},
        "evaluation": {"every": 20, "held_out": 0.3},
        "simulation": {
            "data": {"system": {"reader": "omop", "folder": "omop", "images": "pacs"}},
            "split": {"by": "column"},
        },
    }
    path = folder / name
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("films")
    write_system(made)
    study(made)
    return made


@pytest.fixture(scope="module")
def run(folder):
    assert main(["simulate", str(folder / "study.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def received(folder: Path, **cases):
    made = load(study(folder, "other.yaml", **cases), Study)
    system = System("omop", folder / "omop", images=folder / "pacs")
    return receive_cases(made, system)


def test_each_stay_has_the_image_that_was_taken_in_it(folder):
    found = received(folder)
    assert len(found.records) == len(SITES) * PATIENTS - 1
    bright = {r.patient: bool(r.image[8, 8] > 128) for r in found.records}
    assert all(bright[str(p)] == dead(p) for p in range(1, 65) if p != 3)
    counts = Counter(found.tally)
    assert counts[NO_IMAGE] == 1
    assert counts[NO_DATE] == 1
    assert counts[NO_STAY] == len(SITES) * PATIENTS - 1 + 1


def test_control_the_image_of_another_day_says_something_else(folder, monkeypatch):
    """Were stays not looked at, the older film would be the first one."""
    monkeypatch.setattr("client.data.pictured._within", lambda _stay, _image: True)
    monkeypatch.setattr("client.data.cases.CaseMaker._visible", lambda *_: True)
    found = received(folder, image="first")
    wrong = [r.patient for r in found.records if bool(r.image[8, 8] > 128) != dead(int(r.patient))]
    assert len(wrong) >= len(SITES) * PATIENTS - 2


def test_nothing_after_the_window_is_seen(folder):
    found = received(folder, window={"zero": "start", "to_hours": 72})
    assert len(found.records) == 63
    with pytest.raises(DataError) as refused:
        received(folder, window={"zero": "start", "to_hours": 24})
    assert refused.value.code is Code.CASES_EMPTY


def test_hospitals_learn_from_their_films_together(run):
    told = json.loads((run / "metrics.json").read_text())["final_metrics"]
    assert told["everywhere"]["accuracy"] >= 0.9


SITE = {
    "format": "wardround-site/1",
    "site": "one",
    "state": "state",
    "budget": {"epsilon": 8.0, "delta": 1e-5},
    "ceilings": {"epsilon": 8.0, "rounds": 100, "approved_studies": []},
}


def site_file(folder: Path, name: str = "site.yaml", **data) -> Path:
    known = {"system": {"reader": "omop", "folder": "omop", "images": "pacs"}} | data
    path = folder / name
    path.write_text(json.dumps(SITE | {"data": {k: v for k, v in known.items() if v is not None}}))
    return path


def test_a_model_is_asked_about_the_stays_of_a_system(run, folder, tmp_path, capsys):
    (folder / "omop" / "death.csv").rename(folder / "death.csv")
    (folder / "omop" / "death.csv").write_text("person_id,death_date\n")  # nobody has died yet
    try:
        out = tmp_path / "answers.csv"
        words = ["predict", str(run / "model"), str(site_file(folder)), "--out", str(out)]
        assert main(words) == 0
    finally:
        (folder / "death.csv").replace(folder / "omop" / "death.csv")
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 63
    assert {"stay", "patient", "label", "p(died)"} <= set(rows[0])
    assert all(int(row["stay"]) == 100 + int(row["patient"]) for row in rows)
    right = sum((row["label"] == "died") == dead(int(row["patient"])) for row in rows)
    assert right >= 0.9 * len(rows)
    capsys.readouterr()


REFUSED = {
    "no folder of images": ({"image": "last"}, "no folder of images is named"),
    "no image wanted": ({"image": "none"}, "cases.image: is none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_told(name, folder, tmp_path, capsys):
    cases, told = REFUSED[name]
    path = study(folder, "without.yaml", **cases)
    document = json.loads(path.read_text())
    del document["simulation"]["data"]["system"]["images"]
    path.write_text(json.dumps(document))
    assert main(["simulate", str(path), "--out", str(tmp_path / "run")]) in {2, 3}
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_site_with_tables_alone_or_a_model_without_rules_is_told(run, folder, tmp_path, capsys):
    words = ["predict", str(run / "model"), "", "--out", str(tmp_path / "a.csv")]
    words[2] = str(site_file(folder, "tables.yaml", system=None, files=["a.csv"]))
    assert main(words) == 3
    assert "names no system" in capsys.readouterr().err
    rules = run / "model" / "cases.json"
    kept = rules.read_bytes()
    words[2] = str(site_file(folder))
    assert main([*words, "--with", "hours.csv"]) == 3
    assert "come out of the system" in capsys.readouterr().err
    for content, told in ((None, "read tables"), (b"{}", "not the rules of a study")):
        rules.unlink()
        if content is not None:
            rules.write_bytes(content)
        assert main(words) == 3
        assert told in capsys.readouterr().err
        rules.write_bytes(kept)


def test_a_system_with_images_travels_to_the_trainer(folder):
    system = System("omop", folder / "omop", images=folder / "pacs")
    assert System.load(system.dump()) == system
    plain = replace(system, images=None)
    assert System.load(plain.dump()) == plain
    assert {path.suffix for path in system.inputs()} == {".csv", ".dcm"}
