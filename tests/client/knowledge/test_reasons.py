"""Reasons are edges of the graph between a patient's codes and a drug; warnings likewise."""

from __future__ import annotations

import pytest

from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from client.knowledge.reasons import (
    contraindications,
    diseases_of,
    interaction_rate,
    interactions,
    members_of,
    reasons,
    recommend,
)
from client.knowledge.spread import node_rows

FREE = Source("a table", "CC0-1.0")


def edge(head, relation, tail):
    return Edge(Node(*head.split(" ")), relation, Node(*tail.split(" ")), (FREE,))


EDGES = (
    edge("disease DOID:10763", "coded_as", "icd9 401"),
    edge("disease DOID:10763", "coded_as", "icd10 I10"),
    edge("disease DOID:10763", "is_a", "disease DOID:114"),
    edge("disease DOID:2841", "coded_as", "icd9 493"),
    edge("drug DB00264", "treats", "disease DOID:10763"),
    edge("drug DB00264", "contraindicated", "disease DOID:2841"),
    edge("drug DB00264", "same_as", "pubchem 4171"),
    edge("pubchem 4171", "is_a", "atc C07AB02"),
    edge("drug DB00393", "not_indicated", "disease DOID:10763"),
    edge("drug DB00393", "is_a", "atc C08CA06"),
    edge("drug DB00264", "interacts", "drug DB00393"),
    edge("drug DB00316", "palliates", "disease DOID:114"),
    edge("drug DB00316", "is_a", "atc N02BE01"),
)
GRAPH = KnowledgeGraph(EDGES)


def test_an_atc_group_means_its_drugs_by_whatever_name():
    assert {str(node) for node in members_of(GRAPH, "C07A")} == {
        "atc C07A",
        "atc C07AB02",
        "pubchem 4171",
        "drug DB00264",
    }
    assert set(members_of(GRAPH, "atc:C07A")) == set(members_of(GRAPH, "C07A"))
    assert (
        Node("atc", "C07AB02") in members_of(GRAPH, "DB00264")
        or len(members_of(GRAPH, "DB00264")) == 2
    )
    assert members_of(GRAPH, "no drug") == {}


def test_a_code_means_its_groups_and_the_diseases_coded_so():
    found = {str(node) for node in diseases_of(GRAPH, "icd9:401.9")}
    assert {"icd9 401.9", "icd9 401", "disease DOID:10763", "disease DOID:114"} <= found
    assert "disease DOID:2841" not in found


def test_reasons_name_the_code_and_the_edges_that_lead_to_the_drug():
    found = reasons(GRAPH, ["icd9:401.9", "icd9:493.90"], ["C07A", "N02B", "A02B"])
    (reason,) = found["C07A"]
    assert reason.code == "icd9:401.9"
    assert reason.edge == EDGES[4]
    assert {e.relation for e in reason.path} == {"coded_as", "treats", "same_as", "is_a"}
    (over,) = found["N02B"]  # through the disease that hypertension is a kind of
    assert over.edge.relation == "palliates"
    assert found["A02B"] == ()


def test_no_code_gives_no_reason_and_no_warning():
    assert reasons(GRAPH, [], ["C07A"]) == {"C07A": ()}
    assert contraindications(GRAPH, [], ["C07A"]) == ()


def test_what_must_not_be_given_is_flagged_with_the_code_that_says_so():
    (flag,) = contraindications(GRAPH, ["icd9:493.90", "icd10:I10"], ["C07A"])
    assert (flag.kind, flag.label, flag.against) == ("contraindicated", "C07A", "icd9:493.90")


def test_no_known_use_is_not_called_a_contraindication():
    (flag,) = contraindications(GRAPH, ["icd10:I10"], ["C08C"])
    assert flag.kind == "not indicated"


def test_no_known_use_of_one_member_is_not_told_where_another_helps():
    both = KnowledgeGraph(
        [
            *EDGES,
            edge("drug DB00381", "treats", "disease DOID:10763"),
            edge("drug DB00381", "is_a", "atc C08CA01"),
        ]
    )
    assert contraindications(both, ["icd10:I10"], ["C08C"]) == ()


def test_interacting_drugs_are_flagged_once_in_either_order():
    assert len(interactions(GRAPH, ["C07A", "C08C", "N02B"])) == 1
    assert len(interactions(GRAPH, ["C08C", "C07A", "C08C"])) == 1
    assert interactions(GRAPH, ["C07A", "N02B"]) == ()


def test_the_interaction_rate_is_the_part_of_pairs_that_interact():
    visits = [["C07A", "C08C", "N02B"], ["C07A"], []]
    assert interaction_rate(GRAPH, visits) == pytest.approx(1 / 3)
    assert interaction_rate(GRAPH, [["C07A"]]) == 0.0


def test_without_any_known_interaction_there_is_no_rate():
    quiet = KnowledgeGraph([e for e in EDGES if e.relation != "interacts"])
    assert interaction_rate(quiet, [["C07A", "C08C"]]) is None


def test_the_list_goes_from_likely_to_unlikely_with_reasons_and_flags():
    chances = {"C07A": 0.6, "C08C": 0.9, "N02B": 0.4, "A02B": 0.6}
    found = recommend(GRAPH, ["icd9:401.9"], chances)
    assert [r.label for r in found] == ["C08C", "A02B", "C07A"]
    assert {flag.kind for flag in found[0].flags} == {"not indicated", "interacts"}
    assert found[1].reasons == found[1].flags == ()
    assert len(found[2].reasons) == 1
    assert [flag.kind for flag in found[2].flags] == ["interacts"]


# ---------------------------------------------------------------------- rows of nodes

NAMES = ("icd9:401.9", "icd10:I10", "icd9:493", "atc:C07A", "icd9:820", "word")


def test_what_the_graph_joins_ends_up_alike():
    rows = node_rows(GRAPH, NAMES, width=256, steps=4)
    assert rows[0] @ rows[1] > 0.3  # two codes of one disease
    assert abs(rows[0] @ rows[2]) < 0.2  # chance alone is 1/16


def test_what_the_graph_does_not_reach_has_no_row():
    rows = node_rows(GRAPH, NAMES, width=64, steps=3)
    lengths = (rows**2).sum(axis=1)
    assert lengths[:4] == pytest.approx(1.0, abs=1e-6)
    assert lengths[4:].tolist() == [0.0, 0.0]


def test_rows_do_not_depend_on_the_order_of_edges():
    turned = KnowledgeGraph(reversed(EDGES))
    first, second = (node_rows(g, NAMES, width=8, steps=2) for g in (GRAPH, turned))
    assert first.tobytes() == second.tobytes()


def test_warnings_do_not_bring_drugs_nearer():
    without = KnowledgeGraph([e for e in EDGES if e.relation != "contraindicated"])
    first, second = (node_rows(g, NAMES, width=8, steps=2) for g in (GRAPH, without))
    assert first.tobytes() == second.tobytes()
    other = KnowledgeGraph([e for e in EDGES if e.relation != "treats"])
    assert node_rows(other, NAMES, width=8, steps=2).tobytes() != first.tobytes()
