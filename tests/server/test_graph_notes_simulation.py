"""`diagnosis` beside a knowledge graph: notes that name drugs which no training note names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.knowledge import shelf
from client.knowledge.files import write_edges
from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from common.cli import main

torch.set_num_threads(1)
SITES = ("east", "north", "south", "west")
ILLS = {"heart": "DOID:6000", "lung": "DOID:552"}
# Invented names: twenty drugs for each.
DRUGS = {
    ill: tuple(f"{first}{second}{last}" for first in ("ba", "de", "lo", "mu") for second in seconds)
    for ill, last, seconds in (
        ("heart", "pril", ("ri", "na", "co", "vel", "zu")),
        ("lung", "mycin", ("ta", "fe", "so", "gil", "pu")),
    )
}
SEEN = 14  # the first of each stand in training notes, the others in test notes alone
SAYS = (Source("a textbook", "CC0-1.0"),)


def edges():
    for part, (ill, doid) in enumerate(ILLS.items()):
        for at, drug in enumerate(DRUGS[ill]):
            node = Node("drug", f"DB{100 * part + at:05d}", drug)
            yield Edge(node, "treats", Node("disease", doid), SAYS)


def write(folder: Path) -> None:
    write_edges(folder / "kg.tsv", edges())
    draw = np.random.default_rng(2)
    for name, count, drugs in (("train", 40, slice(SEEN)), ("test", 20, slice(SEEN, None))):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["hospital", "patient", "text", "label"])
            for site in SITES:
                for number in range(count):
                    ill = tuple(ILLS)[number % 2]
                    drug = draw.choice(DRUGS[ill][drugs])
                    text = f"Admitted in the night, {drug} continued, slept well."
                    out.writerow([site, f"{site}-{name}-{number}", text, ill])


def study(folder: Path, *, graph: bool, **sections) -> Path:
    task = {
        "kind": "diagnosis",
        "labels": list(ILLS),
        "max_tokens": 16,
        "encoder": {"vocabulary": "words", "buckets": 1024, "width": 8, "channels": 8},
    }
    if graph:
        digest = KnowledgeGraph(edges()).digest
        task["graph"] = {"files": ["kg.tsv"], "digest": digest, "width": 32, "steps": 3}
    document = {
        "format": "wardround-study/1",
        "name": "notes-and-graph",
        "task": task,
        "training": {
            "rounds": 6,
            "local_steps": 10,
            "expected_batch": 40,
            "optimizer": {"name": "adamw", "learning_rate": 0.005},
        },
        "privacy": {"mode": "none"},
        "evaluation": {"every": 6},
        "simulation": {
            "data": {"files": ["train.csv"], "test_files": ["test.csv"]},
            "split": {"by": "column", "column": "hospital"},
        },
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(document | sections))
    return path


def play(folder: Path, **changes) -> Path:
    write(folder)
    out = folder / "run"
    assert main(["simulate", str(study(folder, **changes)), "--out", str(out)]) == 0
    return out


def score(run: Path) -> float:
    return json.loads((run / "metrics.json").read_text())["final_metrics"]["accuracy"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return play(tmp_path_factory.mktemp("graph"), graph=True)


def test_what_the_graph_knows_of_a_drug_serves_where_no_note_has_named_it(run, tmp_path):
    assert score(run) >= 0.95
    # Control: words alone say nothing of words that nobody has seen.
    assert score(play(tmp_path, graph=False)) <= 0.9


def test_under_joint_privacy_too(tmp_path):
    out = play(
        tmp_path,
        graph=True,
        training={"rounds": 40, "local_steps": 1, "sampling_rate": 1.0, "expected_batch": 32},
        aggregation={"optimizer": {"name": "fedavgm", "learning_rate": 2.0, "momentum": 0.5}},
        privacy={"mode": "joint", "epsilon": 8, "delta": 1e-4, "clip_norm": 0.5},
        evaluation={"every": 40},
    )
    exact = json.loads((out / "metrics.json").read_text())["final_metrics"]["everywhere"]
    assert exact["accuracy"] >= 0.8


def test_a_saved_model_brings_its_graph_and_says_what_a_note_names(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_SHELF", {})
    notes = tmp_path / "notes.csv"
    notes.write_text("patient,text\na,Muzupril and Mupumycin given\nb,nothing given\n")
    out = tmp_path / "answers.csv"
    words = ["predict", str(run / "model"), str(notes), "--out", str(out)]
    assert main(words) == 0
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {*rows[0]["named"].split("; ")} == {"muzupril", "mupumycin"}
    assert rows[1]["named"] == ""


def test_its_answers_are_explained_by_the_words_that_the_graph_knows(run, tmp_path):
    note = tmp_path / "note.csv"
    note.write_text("patient,text\na,Slept well and muzupril continued\n")
    page = tmp_path / "page.html"
    assert main(["explain", str(run / "model"), str(note), "--out", str(page), "--json"]) == 0


REFUSED = {
    "pretrained": (
        {"encoder": None},
        {"model": {"backbone": "bert-base"}},
        "graph: needs an encoder",
    ),
    "missing": ({}, {}, "WR-2064"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_needs_is_asked_for(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shelf, "_SHELF", {})
    terms, sections, told = REFUSED[name]
    write(tmp_path)
    path = study(tmp_path, graph=True, **sections)
    document = json.loads(path.read_text())
    document["task"] |= terms
    path.write_text(json.dumps(document))
    (tmp_path / "kg.tsv").unlink()
    assert main(["plan", str(path)]) in {2, 3}
    assert told in " ".join(capsys.readouterr().err.split())
