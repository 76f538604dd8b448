"""What a note names of a knowledge graph, and the numbers that follow from it."""

from __future__ import annotations

import numpy as np
import pytest

from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from client.knowledge.mentions import Mentions

SAYS = (Source("a table", "CC0-1.0"),)
HYPERTENSION = Node("disease", "DOID:10763", "hypertension")
FAILURE = Node("disease", "DOID:6000", "Heart failure")
PULMONARY = Node("disease", "DOID:6432", "pulmonary hypertension")
COUGH = Node("disease", "DOID:552", "肺炎")
GOUT = Node("disease", "DOID:13189", "gout")
IT = Node("disease", "DOID:1", "IT")
RAMIPRIL = Node("drug", "DB00178", "ramipril")
LISINOPRIL = Node("drug", "DB00722", "lisinopril")
ALLOPURINOL = Node("drug", "DB00437", "allopurinol")
NAMELESS = Node("drug", "DB99999")

PAIRS = (
    (RAMIPRIL, HYPERTENSION),
    (LISINOPRIL, HYPERTENSION),
    (LISINOPRIL, FAILURE),
    (ALLOPURINOL, GOUT),
    (NAMELESS, PULMONARY),
    (NAMELESS, COUGH),
    (NAMELESS, IT),
)


@pytest.fixture(scope="module")
def mentions():
    graph = KnowledgeGraph(Edge(drug, "treats", ill, SAYS) for drug, ill in PAIRS)
    return Mentions(graph, width=64, steps=3)


FOUND = {
    "nothing": ("The patient feels well.", ()),
    "empty": ("", ()),
    "one": ("Known hypertension.", (HYPERTENSION,)),
    "any case": ("HYPERTENSION, on Ramipril 5 mg", (HYPERTENSION, RAMIPRIL)),
    "two words, over a line": ("heart\n failure", (FAILURE,)),
    "with a hyphen": ("heart-failure", (FAILURE,)),
    "the longer name alone": ("pulmonary hypertension", (PULMONARY,)),
    "both where both stand": ("pulmonary hypertension; hypertension", (HYPERTENSION, PULMONARY)),
    "once, however often": ("gout gout GOUT", (GOUT,)),
    "not within a word": ("hypertensions, goutish, xgout", ()),
    "not apart": ("heart of failure", ()),
    "too short a name": ("it is what it is", ()),
    "Chinese within a sentence": ("患者肺炎三天", (COUGH,)),
    "a denial counts, too": ("no gout", (GOUT,)),
}


@pytest.mark.parametrize("name", FOUND)
def test_names_are_found_where_they_stand(name, mentions):
    text, nodes = FOUND[name]
    assert set(mentions.nodes(text)) == set(nodes)


def test_the_row_of_a_note_is_the_mean_of_its_nodes(mentions):
    rows = mentions.rows(["gout", "ramipril", "gout and ramipril", "nothing at all"])
    assert rows.dtype == np.float32
    assert rows.shape == (4, 64)
    assert rows[2] == pytest.approx((rows[0] + rows[1]) / 2, abs=1e-6)
    assert not rows[3].any()
    assert np.linalg.norm(rows, axis=1).max() <= 1 + 1e-6


def test_neighbours_lie_together(mentions):
    """Two drugs for one disease, and that disease, against a drug for another."""
    one, other, ill, far = mentions.rows(["ramipril", "lisinopril", "hypertension", "allopurinol"])
    assert one @ ill > 0.7
    assert one @ other > 0.5
    assert abs(one @ far) < 0.3


def test_a_graph_without_names_finds_nothing():
    graph = KnowledgeGraph([Edge(NAMELESS, "treats", Node("disease", "DOID:552"), SAYS)])
    made = Mentions(graph, width=8, steps=2)
    assert made.nodes("DOID:552 and DB99999") == ()
    assert not made.rows(["DOID:552"]).any()
