"""A graph is what its edges state: checked, without circles, and known by one digest."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.knowledge.files import COLUMNS, load_graph, read_edges, write_edges
from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from common.errors import Code, DataError

FREE = Source("a table", "CC0-1.0")
HEADER = "\t".join(COLUMNS)
GOOD = "drug\tDB00264\ttreats\tdisease\tDOID:10763\ta table\tCC0-1.0"


def edge(head, relation, tail, *sources):
    parts = [Node(*text.split(" ")) for text in (head, tail)]
    return Edge(parts[0], relation, parts[1], sources or (FREE,))


TREATS = edge("drug DB00264", "treats", "disease DOID:10763")
CODED = edge("disease DOID:10763", "coded_as", "icd9 401")
PAIR = edge("drug DB00001", "interacts", "drug DB00264")


def written(folder, *lines, name="edges.tsv", header=HEADER):
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def fault(path, **more):
    with pytest.raises(DataError) as caught:
        load_graph([path], **more)
    return caught.value


# ---------------------------------------------------------------------- names


def test_names_are_read_written_and_part_of_the_digest_but_of_no_identity(tmp_path):
    header = "\t".join((*COLUMNS, "head_name", "tail_name"))
    path = written(tmp_path, f"{GOOD}\tmetoprolol\thypertension", header=header)
    named = load_graph([path])
    (found,) = named.edges()
    assert (found.head.name, str(found.tail)) == ("metoprolol", "disease DOID:10763 (hypertension)")
    assert found == TREATS
    assert found.head in KnowledgeGraph([TREATS])
    assert named.digest != KnowledgeGraph([TREATS]).digest
    write_edges(tmp_path / "again.tsv", named.edges())
    assert load_graph([tmp_path / "again.tsv"], digest=named.digest).digest == named.digest


def test_the_same_name_is_taken_whatever_the_order(tmp_path):
    header = "\t".join((*COLUMNS, "head_name"))
    lines = [f"{GOOD}\tLopressor", f"{GOOD}\tBeloc".replace("a table", "another")]
    one = load_graph([written(tmp_path, *lines, header=header)])
    other = load_graph([written(tmp_path, *lines[::-1], header=header, name="b.tsv")])
    assert one.digest == other.digest
    assert one.edges()[0].head.name == other.edges()[0].head.name == "Beloc"
    assert one.counts["nodes that sources name differently"] == 1


@pytest.mark.parametrize("name", ["a\x07b", "x" * 201])
def test_a_name_that_nobody_can_read_is_refused(name, tmp_path):
    header = "\t".join((*COLUMNS, "head_name"))
    error = fault(written(tmp_path, f"{GOOD}\t{name}", header=header))
    assert (error.code, "has a name" in error.message) == (Code.DATA_VALUE, True)


# ---------------------------------------------------------------------- planted faults


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (GOOD.replace("drug\t", "gene\t"), Code.DATA_VALUE, "kind that is not known"),
        (GOOD.replace("treats", "cures"), Code.DATA_VALUE, "relation that is not known"),
        (GOOD.replace("DB00264", "DB264"), Code.DATA_VALUE, "no drug id"),
        (GOOD.replace("disease\tDOID:10763", "icd9\t4010"), Code.DATA_VALUE, "normal form"),
        (GOOD.replace("treats", "interacts"), Code.DATA_VALUE, "leads from drug to disease"),
        (GOOD.replace("treats", "is_a"), Code.DATA_VALUE, "leads from drug to disease"),
        (GOOD.replace("CC0-1.0", ""), Code.DATA_VALUE, "has no licence"),
        (GOOD.replace("a table", " "), Code.DATA_VALUE, "where it comes from"),
        (GOOD.replace("a table", "a\x07table"), Code.DATA_VALUE, "where it comes from"),
        (GOOD + "\tmore", Code.DATA_RAGGED, "8 fields, the header 7"),
        (GOOD.rpartition("\t")[0], Code.DATA_RAGGED, "6 fields, the header 7"),
        (GOOD + "x" * 70_000, Code.DATA_TOO_LONG, "longer than"),
    ],
)
def test_a_faulty_line_is_named_with_its_fault(tmp_path, line, code, words):
    found = fault(written(tmp_path, GOOD, line))
    assert found.code is code
    assert ":3:" in found.message
    assert words in found.message


def test_the_same_line_without_its_fault_is_read(tmp_path):
    assert len(load_graph([written(tmp_path, GOOD)])) == 1


def test_a_file_that_is_missing_is_named(tmp_path):
    assert fault(tmp_path / "none.tsv").code is Code.DATA_UNREADABLE


def test_a_file_of_another_kind_is_refused(tmp_path):
    assert fault(written(tmp_path, GOOD, name="edges.xlsx")).code is Code.DATA_FORMAT


def test_a_file_that_is_not_utf8_is_refused_at_its_line(tmp_path):
    path = tmp_path / "edges.tsv"
    path.write_bytes(f"{HEADER}\n{GOOD}\n".encode() + b"drug\xff\n")
    found = fault(path)
    assert found.code is Code.DATA_ENCODING


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "edges.tsv.gz"
    whole = gzip.compress("\n".join([HEADER, *[GOOD] * 500]).encode())
    path.write_bytes(whole)
    assert len(load_graph([path])) == 1
    path.write_bytes(whole[: len(whole) // 2])
    assert fault(path).code is Code.DATA_UNREADABLE


def test_a_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "edges.parquet"
    path.write_bytes(b"PAR1 and no more")
    assert fault(path).code is Code.DATA_UNREADABLE


def test_a_parquet_cell_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "edges.parquet"
    cells = dict(zip(COLUMNS, ([text] for text in GOOD.split("\t")), strict=True))
    pq.write_table(pa.table({**cells, "licence": [None]}), path)
    assert fault(path).code is Code.DATA_VALUE


def test_a_missing_column_is_named(tmp_path):
    found = fault(written(tmp_path, GOOD, header=HEADER.replace("licence", "license")))
    assert found.code is Code.DATA_COLUMNS
    assert "licence" in found.message


def test_a_column_named_twice_is_refused(tmp_path):
    path = written(tmp_path, GOOD + "\tx", header=HEADER + "\tlicence")
    assert fault(path).code is Code.DATA_COLUMNS


@pytest.mark.parametrize("text", ["", HEADER + "\n"])
def test_a_file_without_edges_is_refused(tmp_path, text):
    path = tmp_path / "edges.tsv"
    path.write_text(text, encoding="utf-8")
    assert fault(path).code is Code.DATA_EMPTY


def test_is_a_edges_in_a_circle_are_refused():
    chain = [
        edge("disease DOID:1", "is_a", "disease DOID:2"),
        edge("disease DOID:2", "is_a", "disease DOID:3"),
    ]
    assert len(KnowledgeGraph(chain)) == 2
    with pytest.raises(DataError) as caught:
        KnowledgeGraph([*chain, edge("disease DOID:3", "is_a", "disease DOID:1")])
    assert caught.value.code is Code.GRAPH_CIRCLE
    assert "3 edges" in caught.value.message


def test_a_circle_of_other_relations_is_no_fault():
    assert len(KnowledgeGraph([edge("drug DB00001", "same_as", "rxnorm 1"), PAIR])) == 2


def test_another_graph_than_the_pinned_one_is_refused(tmp_path):
    path = written(tmp_path, GOOD)
    digest = load_graph([path]).digest
    assert load_graph([path], digest=digest).digest == digest
    assert fault(path, digest="0" * 64).code is Code.GRAPH_DIFFERS


def test_edges_to_themselves_are_left_out_and_counted():
    graph = KnowledgeGraph([TREATS, edge("drug DB00264", "interacts", "drug DB00264")])
    assert len(graph) == 1
    assert graph.counts == {"edges from a node to itself, left out": 1}


def test_a_repeated_edge_counts_once():
    graph = KnowledgeGraph([TREATS, TREATS, CODED])
    assert len(graph) == 2
    assert graph.counts == {"edges repeated by the same source, left out": 1}


def test_the_same_edge_from_two_sources_is_one_edge_with_both():
    other = Source("a book", "CC-BY-4.0")
    graph = KnowledgeGraph([TREATS, edge("drug DB00264", "treats", "disease DOID:10763", other)])
    (found,) = graph.edges()
    assert found.sources == (other, FREE)
    assert graph.licences() == {"CC-BY-4.0": 1, "CC0-1.0": 1}
    assert graph.counts == {"edges that several sources state": 1}


def test_sources_that_disagree_are_both_kept_and_counted():
    graph = KnowledgeGraph([TREATS, edge("drug DB00264", "contraindicated", "disease DOID:10763")])
    assert len(graph) == 2
    assert graph.counts == {"drugs that sources disagree about for a disease": 1}


def test_edges_without_direction_are_the_same_from_either_end():
    turned = edge("drug DB00264", "interacts", "drug DB00001")
    assert KnowledgeGraph([PAIR]).digest == KnowledgeGraph([turned]).digest
    graph = KnowledgeGraph([turned])
    for name in ("DB00264", "DB00001"):
        assert len(list(graph.from_node(Node("drug", name), "interacts"))) == 1
    assert not list(graph.from_node(Node("drug", "DB99999")))


def test_an_edge_made_in_code_is_checked_too():
    with pytest.raises(DataError) as caught:
        KnowledgeGraph([edge("gene X", "treats", "disease DOID:1")])
    assert caught.value.code is Code.DATA_VALUE


# ---------------------------------------------------------------------- digest and files


@given(st.permutations([TREATS, CODED, PAIR, TREATS]))
def test_the_digest_does_not_depend_on_order_or_repetition(edges):
    assert KnowledgeGraph(edges).digest == KnowledgeGraph([TREATS, CODED, PAIR]).digest


@pytest.mark.parametrize(
    "other",
    [
        edge("drug DB00265", "treats", "disease DOID:10763"),
        edge("drug DB00264", "palliates", "disease DOID:10763"),
        edge("drug DB00264", "treats", "disease DOID:1"),
        edge("drug DB00264", "treats", "disease DOID:10763", Source("a book", "CC0-1.0")),
        edge("drug DB00264", "treats", "disease DOID:10763", Source("a table", "MIT")),
    ],
)
def test_the_digest_tells_every_part_of_a_statement(other):
    assert KnowledgeGraph([other]).digest != KnowledgeGraph([TREATS]).digest


def test_the_digest_is_this_one():
    assert KnowledgeGraph([TREATS]).digest == (
        "0555f4bd30ab795295ac2b2b135cbb802415021b2589f6229ae993cc603c8a53"
    )


def test_tsv_gzip_and_parquet_state_the_same(tmp_path):
    plain = written(tmp_path, GOOD)
    packed = tmp_path / "edges.tsv.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf# a note\n" + plain.read_bytes()))
    columns = dict(zip(COLUMNS, ([text] for text in GOOD.split("\t")), strict=True))
    table = tmp_path / "edges.parquet"
    pq.write_table(pa.table(columns), table)
    found = {load_graph([path]).digest for path in (plain, packed, table)}
    assert found == {KnowledgeGraph([TREATS]).digest}


def test_provenance_and_licence_may_be_given_for_a_whole_file(tmp_path):
    path = written(tmp_path, "\t".join(GOOD.split("\t")[:5]), header="\t".join(COLUMNS[:5]))
    assert list(read_edges(path, source=FREE)) == [TREATS]
    assert fault(path).code is Code.DATA_COLUMNS


def test_what_is_written_is_read_again_and_nothing_is_overwritten(tmp_path):
    path = tmp_path / "out.tsv"
    write_edges(path, [TREATS, CODED])
    assert load_graph([path]).digest == KnowledgeGraph([TREATS, CODED]).digest
    with pytest.raises(DataError) as caught:
        write_edges(path, [TREATS])
    assert caught.value.code is Code.OUTPUT_EXISTS


def test_an_edge_that_may_not_be_handed_on_is_not_written(tmp_path):
    path = tmp_path / "out.tsv"
    closed = edge("drug DB00264", "treats", "disease DOID:1", Source("x", "CC-BY-NC-SA-4.0"))
    with pytest.raises(DataError) as caught:
        write_edges(path, [TREATS, closed])
    assert caught.value.code is Code.GRAPH_LICENCE
    assert not path.exists()
