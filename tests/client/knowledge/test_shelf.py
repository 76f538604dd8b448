"""A graph is found where the hospital keeps it, is the study's or refused, and leaves as it may."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.knowledge import shelf
from client.knowledge.files import write_edges
from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from common.errors import Code, DataError
from common.tasks.medication import MedicationTask

FREE, OWN = Source("a table", "CC0-1.0"), Source("a list", "CC-BY-NC-SA-4.0")


@pytest.fixture(autouse=True)
def _empty_shelf(monkeypatch):
    monkeypatch.setattr(shelf, "_SHELF", {})


def edges(source=FREE):
    return [Edge(Node("atc", "C07AB02"), "treats", Node("disease", "DOID:10763"), (source,))]


def task(source=FREE, files=("kg.tsv",)):
    graph = {"files": list(files), "digest": KnowledgeGraph(edges(source)).digest}
    return MedicationTask.model_validate(
        {"kind": "medication", "labels": ["C07A", "N02B"], "graph": graph}
    )


@pytest.fixture
def folder(tmp_path):
    write_edges(tmp_path / "kg.tsv", edges())
    return tmp_path


def refused(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    return caught.value


def test_a_graph_that_was_read_is_known_by_its_digest(folder):
    shelf.read_knowledge(task(), folder)
    assert len(shelf.graph_of(task().graph)) == 1
    assert shelf.graph_of(task(files=["elsewhere.tsv"]).graph) is shelf.graph_of(task().graph)


@pytest.mark.parametrize("where", [None, Path("/nowhere")])
def test_without_its_files_a_study_is_refused(where):
    assert refused(shelf.read_knowledge, task(), where).code is Code.GRAPH_ABSENT
    assert refused(shelf.graph_of, task().graph).code is Code.GRAPH_ABSENT


def test_another_graph_is_refused_and_not_kept(folder):
    assert refused(shelf.read_knowledge, task(OWN), folder).code is Code.GRAPH_DIFFERS
    assert refused(shelf.graph_of, task(OWN).graph).code is Code.GRAPH_ABSENT


def test_a_task_without_a_graph_needs_no_folder():
    plain = MedicationTask.model_validate({"kind": "medication", "labels": ["C07A", "N02B"]})
    shelf.read_knowledge(plain, None)
    shelf.read_saved_knowledge(plain, Path("/nowhere"), None)


@pytest.mark.parametrize("name", ["/etc/kg.tsv", "../kg.tsv", "a/../../kg.tsv", "~/kg.tsv"])
def test_a_study_names_no_file_outside_the_folder(name):
    with pytest.raises(ValueError, match="must lie inside the folder"):
        task(files=[name])


def test_a_model_brings_its_graph_along_where_all_of_it_is_free(folder, tmp_path, monkeypatch):
    shelf.read_knowledge(task(), folder)
    model = tmp_path / "model"
    model.mkdir()
    shelf.save_knowledge(task(), model)
    monkeypatch.setattr(shelf, "_SHELF", {})
    shelf.read_saved_knowledge(task(), model, None)
    assert len(shelf.graph_of(task().graph)) == 1


def test_a_model_whose_graph_is_not_free_asks_for_it(tmp_path, monkeypatch):
    head = "head_type\thead_id\trelation\ttail_type\ttail_id\tprovenance\tlicence\n"
    line = "atc\tC07AB02\ttreats\tdisease\tDOID:10763\ta list\tCC-BY-NC-SA-4.0\n"
    (tmp_path / "kg.tsv").write_text(head + line)
    shelf.read_knowledge(task(OWN), tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    shelf.save_knowledge(task(OWN), model)
    assert not list(model.iterdir())
    monkeypatch.setattr(shelf, "_SHELF", {})
    error = refused(shelf.read_saved_knowledge, task(OWN), model, None)
    assert error.code is Code.GRAPH_ABSENT
    assert "--knowledge" in error.remedy
    shelf.read_saved_knowledge(task(OWN), model, tmp_path)
    assert len(shelf.graph_of(task(OWN).graph)) == 1
