"""Whole studies of drugs, as configs/medication.yaml shows them: to reasons and flags."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from client.data.intake import UNLISTED_DRUGS, receive
from client.data.synthetic_visits import DRUGS, edges, visits, write_visits
from client.knowledge import shelf
from client.knowledge.graph import KnowledgeGraph
from common.cli import main
from common.config import load
from common.errors import Code, DataError
from common.study import Study

torch.set_num_threads(1)
CONFIGS = Path(__file__).parents[2] / "configs"
STUDY = CONFIGS / "medication.yaml"
TABLE = CONFIGS / "data" / "synthetic-visits.csv"
GRAPH = CONFIGS / "data" / "synthetic-knowledge.tsv"
PRIVATE = {"epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}
MODES = {
    "none": {},
    "local": {
        "privacy": {"mode": "local", **PRIVATE},
        "training": {
            "rounds": 2,
            "local_steps": 2,
            "sampling_rate": 0.5,
            "expected_batch": 20,
            "optimizer": {"name": "sgd", "learning_rate": 0.2},
        },
        "evaluation": {"every": 2, "held_out": 0.3},
    },
    "joint": {
        "privacy": {"mode": "joint", **PRIVATE},
        "training": {
            "rounds": 3,
            "local_steps": 1,
            "sampling_rate": 0.5,
            "expected_batch": 20,
        },
        "aggregation": {"optimizer": {"name": "fedavgm", "learning_rate": 0.2}},
        "evaluation": {"every": 3, "held_out": 0.3},
    },
}


@pytest.fixture(autouse=True)
def _empty_shelf(monkeypatch):
    """Every test reads its graph itself."""
    monkeypatch.setattr(shelf, "_SHELF", {})


def study_in(folder: Path, **changed: object) -> Path:
    (folder / "data").mkdir(parents=True)
    for file in (TABLE, GRAPH):
        shutil.copy(file, folder / "data" / file.name)
    document = yaml.safe_load(STUDY.read_text()) | changed
    (folder / "study.yaml").write_text(json.dumps(document))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made = {}

    def play(mode):
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            study = study_in(folder / "study", **MODES[mode])
            out = folder / "run"
            assert main(["simulate", str(study), "--out", str(out)]) == 0
            made[mode] = out
        return made[mode]

    return play


@pytest.mark.parametrize("mode", list(MODES))
def test_every_round_completes_and_sets_of_drugs_are_measured(played, mode):
    told = json.loads((played(mode) / "metrics.json").read_text())
    assert {r["code"] for r in told["rounds"]} == {None}
    assert {"prauc", "jaccard", "f1"} <= set(told["final_metrics"]["everywhere"])
    statement = json.loads((played(mode) / "privacy.json").read_text())
    assert ("mechanism" in statement) == (mode != "none")


def test_the_model_learns_and_tells_why(played, tmp_path):
    out = tmp_path / "drugs.csv"
    run = played("none")
    assert main(["predict", str(run / "model"), str(TABLE), "--out", str(out)]) == 0
    with out.open(newline="") as file:
        answers = list(csv.DictReader(file))
    with TABLE.open(newline="") as file:
        truth = list(csv.DictReader(file))
    overlap = [
        len(told & given) / len(told | given)
        for told, given in (
            (set(a["labels"].split(";")), set(t["drugs"].split()))
            for a, t in zip(answers, truth, strict=True)
        )
        if told | given
    ]
    assert sum(overlap) / len(overlap) > 0.6
    known = [a for a, t in zip(answers, truth, strict=True) if "J45.909" in t["codes"].split()]
    assert known
    assert all("R03A for icd10:J45.909" in a["reasons"] for a in known if "R03A" in a["labels"])
    assert all("salbutamol" in a["reasons"] for a in known if "R03A" in a["labels"])
    card = (run / "MODEL_CARD.md").read_text()
    assert "over a knowledge graph" in card
    assert "library_name: wardround" in card


def test_what_speaks_against_a_drug_is_said(played, tmp_path):
    """Codes that no hospital sees together: the model may fall for it, the graph does not."""
    table, out = tmp_path / "one.csv", tmp_path / "one.ndjson"
    table.write_text("codes,drugs\nM19.90 I48.91 N18.9 I10 J45.909,\n")
    assert main(["predict", str(played("none") / "model"), str(table), "--out", str(out)]) == 0
    (found,) = map(json.loads, out.read_text().splitlines())
    graph = KnowledgeGraph(edges())
    from client.knowledge.reasons import advice

    codes = [f"icd10:{code}" for code in ("M19.90", "I48.91", "N18.9", "I10", "J45.909")]
    told = advice(graph, codes, dict.fromkeys(DRUGS, 0.9))["flags"]
    assert any(flag.startswith("C07A is contraindicated with icd10:J45.909") for flag in told)
    assert any(flag.startswith("M01A is contraindicated with icd10:N18.9") for flag in told)
    assert any(flag.startswith("B01A interacts with M01A") for flag in told)
    kept = {flag for flag in told if set(found["labels"]) >= _drugs_of(flag)}
    assert set(found["flags"]) == kept
    assert not advice(graph, codes, dict.fromkeys(DRUGS, 0.1))["flags"], "control: none is given"


def _drugs_of(flag: str) -> set[str]:
    return {word for word in flag.partition(":")[0].split() if word in DRUGS}


def test_a_recommendation_is_explained_by_codes_and_edges(played, tmp_path):
    page = tmp_path / "why.html"
    arguments = [str(played("none") / "model"), str(TABLE), "--out", str(page), "--limit", "3"]
    assert main(["explain", *arguments, "--label", "C07A"]) == 0
    text = page.read_text()
    assert "code: 250.00" in text
    assert "For: C07A for icd9:427.31" in text
    assert "they add up" in text
    assert "Shapley values" in text


def test_a_simulation_without_its_graph_ends_before_it_trains(tmp_path, capsys):
    study = study_in(tmp_path / "study")
    (study.parent / "data" / GRAPH.name).unlink()
    assert main(["check", str(study)]) != 0
    assert "no such file" in capsys.readouterr().err
    assert main(["simulate", str(study), "--out", str(tmp_path / "run")]) != 0
    assert Code.GRAPH_ABSENT.label in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_an_edge_more_is_another_graph(tmp_path, capsys):
    study = study_in(tmp_path / "study")
    with (study.parent / "data" / GRAPH.name).open("a") as file:
        file.write("atc\tN02BE01\tinteracts\tatc\tA10BA02\tsomebody\tCC0-1.0\t\t\n")
    assert main(["simulate", str(study), "--out", str(tmp_path / "run")]) != 0
    assert Code.GRAPH_DIFFERS.label in capsys.readouterr().err


def test_the_example_is_what_its_generator_writes(tmp_path):
    write_visits(tmp_path)
    for file in (TABLE, GRAPH):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    digest = yaml.safe_load(STUDY.read_text())["task"]["graph"]["digest"]
    assert KnowledgeGraph(edges()).digest == digest
    assert len({patient for patient, *_ in visits()}) == 240


def test_what_the_study_does_not_know_is_counted(tmp_path):
    task = load(STUDY, Study).task
    table = tmp_path / "v.csv"
    table.write_text("patient,codes,drugs\na,I10 V45.01 junk!,C09A Z99Z\nb,Z00.0,\n")
    found = receive(task, [table])
    assert [r.labels for r in found.records] == [("C09A",), ()]
    assert found.tally == {UNLISTED_DRUGS: 1, "codes in no form of their system": 2}
    table.write_text("patient,codes,drugs\na,I10,Z99Z\n")
    with pytest.raises(DataError) as caught:
        receive(task, [table])
    assert caught.value.code is Code.DATA_LABEL


def test_the_data_check_reads_visits(tmp_path, capsys):
    assert main(["client", "data", "check", str(STUDY), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], found["patients"], found["usable"]) == ("288", "240", True)
    table = tmp_path / "v.csv"
    table.write_text("patient,codes\na,I10\n")
    assert main(["client", "data", "check", str(STUDY), str(table)]) != 0
    assert "no column drugs" in capsys.readouterr().out
