"""Rules that make cases go with their task, or are refused key by key."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from common.config import load
from common.errors import ConfigError
from common.study import Study
from common.tasks.cases import CaseRules
from common.tasks.fit import misfits
from common.tasks.medication import MedicationTask
from common.tasks.multimodal import MultimodalTask
from common.tasks.prognosis import PrognosisTask

STUDY = Path(__file__).parents[3] / "configs" / "hospital-system.yaml"
AGE = {"name": "age", "of": "age", "low": 18.0, "high": 90.0}
HR = {"name": "hr", "items": ["heartrate"], "low": 20.0, "high": 220.0}
DEATH = {"kind": "mortality"}
DRUGS = {
    "kind": "codes",
    "source": "drugs",
    "rank": "any",
    "several": "all",
    "map": [
        {"label": "B01A", "system": "name", "codes": ["warfarin"]},
        {"label": "C07A", "system": "name", "codes": ["metoprolol"]},
    ],
}
COURSE = PrognosisTask.model_validate(
    {
        "kind": "prognosis",
        "labels": ["survived", "died"],
        "hours": 12,
        "features": [{"name": "hr", "low": 20.0, "high": 220.0}],
    }
)
MIXED = MultimodalTask.model_validate(
    {
        "kind": "multimodal",
        "labels": ["survived", "died"],
        "text": {"column": "note"},
        "numbers": {"features": [{"name": "age", "low": 18.0, "high": 90.0}]},
        "series": {
            "stay": "stay",
            "time": "hour",
            "hours": 12,
            "features": [{"name": "hr", "low": 20.0, "high": 220.0}],
        },
    }
)
GIVEN = MedicationTask.model_validate({"kind": "medication", "labels": ["B01A", "C07A"]})
HOURS = {"hours": 12, "quantities": [HR]}
CODES = {"diagnoses": ["icd9", "icd10"], "undated": "keep"}


def rules(**given):
    return CaseRules.model_validate({"label": DEATH, **given})


def keys(task, **given):
    return [key for key, _ in misfits(task, rules(**given))]


def test_rules_that_give_what_each_task_reads_are_taken():
    assert keys(COURSE, series=HOURS) == []
    assert keys(MIXED, series=HOURS, values=[AGE], notes={}) == []
    assert keys(GIVEN, label=DRUGS, codes=CODES) == []


@pytest.mark.parametrize(
    ("task", "given", "wrong"),
    [
        (COURSE, {}, ["series"]),
        (COURSE, {"series": {**HOURS, "hours": 8}}, ["series.hours"]),
        (COURSE, {"series": {"hours": 12, "quantities": [{**HR, "name": "x"}]}}, ["series.quantities"]),
        (COURSE, {"series": {"hours": 12, "quantities": [{**HR, "high": 99.0}]}},
         ["series.quantities.0"]),
        (COURSE, {"series": HOURS, "values": [AGE]}, ["values"]),
        (COURSE, {"series": HOURS, "notes": {}}, ["notes"]),
        (COURSE, {"series": HOURS, "codes": CODES}, ["codes"]),
        (COURSE, {"series": HOURS, "image": "first"}, ["image"]),
        (COURSE, {"series": HOURS, "label": {**DEATH, "died": "dead"}}, ["label", "label"]),
        (COURSE, {"series": HOURS, "label": DRUGS}, ["label.kind"]),
        (MIXED, {"series": HOURS, "values": [AGE]}, ["notes"]),
        (MIXED, {"values": [AGE], "notes": {}}, ["series"]),
        (MIXED, {"series": HOURS, "notes": {}}, ["values"]),
        (GIVEN, {"label": DRUGS}, ["codes"]),
        (GIVEN, {"codes": CODES}, ["label.kind"]),
        (GIVEN, {"label": {**DRUGS, "several": "first"}, "codes": CODES}, ["label.kind"]),
    ],
)  # fmt: skip
def test_what_does_not_suit_is_named(task, given, wrong):
    assert keys(task, **given) == wrong


def changed(tmp_path, change):
    document = copy.deepcopy(yaml.safe_load(STUDY.read_text()))
    change(document)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.pop("cases"), "cases: is missing"),
        (lambda d: d["cases"]["values"].pop(), "cases.values: must name the task's features"),
        (lambda d: d["cases"]["values"][0].update(high=120), "cases.values.0: must have the bounds"),
        (lambda d: d["cases"].update(notes={}), "cases.notes: has no effect"),
        (lambda d: d["simulation"]["data"].update(files=["x.csv"]), "name files, or a system"),
        (lambda d: d["simulation"]["data"].pop("system"), "name files, or a system"),
        (lambda d: d["simulation"]["split"].update(column="h"), "has no effect with a system"),
        (lambda d: d["simulation"]["data"]["system"].update(reader="orbis"), "reader"),
        (lambda d: d["task"].update(categories=[{"name": "unit", "values": ["a", "b"]}]),
         "cannot give task.categories"),
    ],
)  # fmt: skip
def test_a_study_is_refused_where_it_is_loaded(tmp_path, change, told):
    with pytest.raises(ConfigError) as caught:
        load(changed(tmp_path, change), Study)
    assert told in str(caught.value)


def test_the_rules_are_part_of_the_signed_terms(tmp_path):
    path = changed(tmp_path, lambda d: d["cases"]["window"].update(to_hours=12))
    assert load(path, Study).terms() != load(STUDY, Study).terms()
    assert load(changed(tmp_path, lambda d: None), Study).terms() == load(STUDY, Study).terms()
