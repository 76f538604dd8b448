"""Public sources become edges under their own licence; what they may not be is told."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path

import pytest

from client.knowledge.disease_codes import DISEASE_CODES
from client.knowledge.files import FREE_LICENCES, write_edges
from client.knowledge.graph import KnowledgeGraph, Node, check_edge
from client.knowledge.recipes import RECIPES, cook, disease_code_edges
from common.errors import Code, DataError

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[4] / "shared" / "data"))
FILES = {
    "pharmacotherapydb": "pharmacotherapydb_indications.tsv",
    "sider-indications": "sider4_indications.tsv.gz",
    "sider-effects": "sider4_meddra_all_se.tsv.gz",
    "drug-atc": "drug-atc.csv.gz",
    "ndc-rxnorm": "ndc2rxnorm_mapping.txt.gz",
}
PHARMA = "doid_id\tdrugbank_id\tdisease\tdrug\tcategory\n"


def cooked(name, folder, text, ending=".tsv"):
    path = folder / f"source{ending}"
    path.write_text(text, encoding="utf-8")
    counts = Counter()
    return [(str(e.head), e.relation, str(e.tail)) for e in cook(name, path, counts)], counts


def test_pharmacotherapydb_keeps_its_three_categories_apart(tmp_path):
    lines = "DOID:10763\tDB00264\thypertension\tMetoprolol\t"
    found, _ = cooked(
        "pharmacotherapydb",
        tmp_path,
        PHARMA + "".join(f"{lines}{kind}\n" for kind in ("DM", "SYM", "NOT")),
    )
    assert [relation for _, relation, _ in found] == ["treats", "palliates", "not_indicated"]


def test_sider_gives_substances_indications_and_side_effects(tmp_path):
    head = "drugbank_id\tpubchem_id\tumls_cui_from_meddra\tmeddra_type\n"
    rows = "DB00264\t4171\tC0020538\tPT\nDB00264\t4171\tC0020538\tLLT\n"
    found, counts = cooked("sider-indications", tmp_path, head + rows)
    assert found == [
        ("drug DB00264", "same_as", "pubchem 4171"),
        ("drug DB00264", "indicated", "concept C0020538"),
    ]
    assert counts == {"terms below MedDRA's preferred level": 1}
    effects = "CID100000085\tCID000010917\tC0000729\tPT\tC0000737\tAbdominal pain\n"
    found, _ = cooked("sider-effects", tmp_path, effects * 2)
    assert found == [("pubchem 10917", "causes", "concept C0000737")]


def test_the_maps_give_atc_groups_and_rxnorm_ids(tmp_path):
    found, counts = cooked("drug-atc", tmp_path, "CID000004171,C07AB02,none\n", ".csv")
    assert found == [("pubchem 4171", "is_a", "atc C07AB02")]
    assert counts == {"no ATC code": 1}
    pairs = "{'00338500341': u'1665046', '00064100133': u'', 'idx': 4203}"
    found, counts = cooked("ndc-rxnorm", tmp_path, pairs, ".txt")
    assert found == [("ndc 00338500341", "same_as", "rxnorm 1665046")]
    assert counts == {"pairs without an NDC or an RxCUI": 2}


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("pharmacotherapydb", PHARMA + "DOID:1\tDB00264\tx\ty\tMAYBE\n", Code.DATA_VALUE),
        ("pharmacotherapydb", PHARMA + "DOID:1\tX\tx\ty\tDM\n", Code.DATA_VALUE),
        ("pharmacotherapydb", PHARMA + "DOID:1\tDB00264\tDM\n", Code.DATA_RAGGED),
        ("pharmacotherapydb", "doid_id\tdrugbank_id\n", Code.DATA_COLUMNS),
        ("pharmacotherapydb", "", Code.DATA_EMPTY),
        ("sider-effects", "CID1\tCID2\n", Code.DATA_RAGGED),
        ("sider-effects", "a\tb\tc\tPT\tC0000737\tx\n", Code.DATA_VALUE),
        ("drug-atc", "4171,C07AB02\n", Code.DATA_VALUE),
        ("ndc-rxnorm", "__import__('os')", Code.DATA_VALUE),
        ("ndc-rxnorm", "{'00338500341': u'1', __import__('os'): 1}", Code.DATA_VALUE),
        ("nothing", "", Code.DATA_FORMAT),
    ],
)
def test_a_faulty_source_is_refused(tmp_path, name, text, code):
    with pytest.raises(DataError) as caught:
        cooked(name, tmp_path, text)
    assert caught.value.code is code


def test_a_truncated_map_is_refused(tmp_path):
    path = tmp_path / "map.txt.gz"
    path.write_bytes(gzip.compress(b"{'00338500341': u'1665046'}")[:-9])
    with pytest.raises(DataError) as caught:
        list(cook("ndc-rxnorm", path, Counter()))
    assert caught.value.code is Code.DATA_UNREADABLE


def test_a_recipe_is_handed_on_exactly_if_its_licence_is_free():
    for recipe in RECIPES.values():
        assert recipe.handed_on == (recipe.source.licence in FREE_LICENCES)
    assert not RECIPES["sider-indications"].handed_on


def test_no_source_of_others_lies_in_the_package():
    folder = Path(__file__).parents[3] / "client" / "knowledge"
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".py"}


def test_every_disease_is_coded_in_normal_form():
    edges = list(disease_code_edges())
    assert [check_edge(edge) for edge in edges] == [None] * len(edges)
    assert {edge.head.id for edge in edges} == set(DISEASE_CODES)
    graph = KnowledgeGraph(edges)
    assert not graph.counts

    def coded(doid):
        return {str(e.tail) for e in graph.from_node(Node("disease", doid), "coded_as")}

    assert {"icd9 401", "icd9 405", "icd10 I10", "icd10 I15"} <= coded("DOID:10763")
    assert "icd9 406" not in coded("DOID:10763")
    assert coded("DOID:9352").isdisjoint(coded("DOID:9744"))  # the two kinds of diabetes


@pytest.mark.skipif(not (DATA / "drug_kg").is_dir(), reason="the drug data is not here")
def test_the_published_files_are_read_whole(tmp_path):
    counts = Counter()
    edges = {n: list(cook(n, DATA / "drug_kg" / f, counts)) for n, f in FILES.items()}
    relations = Counter(edge.relation for edge in edges["pharmacotherapydb"])
    assert relations == {"treats": 755, "palliates": 390, "not_indicated": 243}
    assert len({e.tail for e in edges["pharmacotherapydb"]}) == 97
    assert {n: len(found) > 1000 for n, found in edges.items()} == dict.fromkeys(FILES, True)
    free = KnowledgeGraph([e for n, r in RECIPES.items() if r.handed_on for e in edges[n]])
    write_edges(tmp_path / "free.tsv", free.edges())
    with pytest.raises(DataError):
        write_edges(tmp_path / "closed.tsv", edges["sider-indications"])
    diseases = {e.tail.id for e in edges["pharmacotherapydb"]}
    assert set(DISEASE_CODES) <= diseases
