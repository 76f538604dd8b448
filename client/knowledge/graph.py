"""A typed graph of medical knowledge: codes, diseases and drugs, and what is known between them.

Every edge has its sources, and they have their licences.

The graph is public and the same at every hospital; nothing of a patient ever enters it. Its
digest depends on the edges alone, not on their order or on the files they came in.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from client.knowledge.codes import normal
from common.errors import Code, DataError

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "NODE_KINDS",
    "RELATIONS",
    "Edge",
    "KnowledgeGraph",
    "Node",
    "Source",
    "check_edge",
    "is_node_id",
]

_FORMAT: Final = "wardround-graph/1"
_LONGEST_NAME: Final = 200

_PATTERNS: Final = MappingProxyType(
    {
        "disease": re.compile(r"DOID:[0-9]{1,7}", re.ASCII),
        "drug": re.compile(r"DB[0-9]{5}", re.ASCII),  # DrugBank
        "pubchem": re.compile(r"[1-9][0-9]{0,9}", re.ASCII),
        "concept": re.compile(r"C[0-9]{7}", re.ASCII),  # UMLS: findings and side effects
    }
)
_CODED: Final = ("icd9", "icd10", "atc", "rxnorm", "ndc")
NODE_KINDS: Final = (*_PATTERNS, *_CODED)
"""What a node can be. Ids are DOID, DrugBank, PubChem and UMLS ids, or codes in normal form."""

_ILLNESS: Final = frozenset({"disease", "icd9", "icd10", "concept"})
_MEDICINE: Final = frozenset({"drug", "atc", "rxnorm", "pubchem"})

RELATIONS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = MappingProxyType(
    {
        "treats": (_MEDICINE, _ILLNESS),
        "palliates": (_MEDICINE, _ILLNESS),
        "indicated": (_MEDICINE, _ILLNESS),
        "not_indicated": (_MEDICINE, _ILLNESS),
        "contraindicated": (_MEDICINE, _ILLNESS),
        "causes": (_MEDICINE, frozenset({"concept"})),
        "interacts": (_MEDICINE, _MEDICINE),
        "coded_as": (frozenset({"disease", "concept"}), frozenset({"icd9", "icd10"})),
        "same_as": (_MEDICINE | {"ndc"}, _MEDICINE | {"ndc"}),
        "is_a": (frozenset(NODE_KINDS), frozenset(NODE_KINDS)),
    }
)
"""Each relation, and which kinds of nodes it may lead from and to.

treats: changes the course of a disease. palliates: eases a symptom of it. indicated: a source
says so without telling which. not_indicated: curators found that it is neither (this is not a
warning). contraindicated: must not be given. interacts and same_as have no direction.
"""
_SYMMETRIC: Final = frozenset({"interacts", "same_as"})
_IS_A: Final = frozenset({("drug", "atc"), ("rxnorm", "atc"), ("pubchem", "atc")})


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One thing of the graph, by kind and id; `name` is for people to read."""

    kind: str
    id: str
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.id}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """Who says so, and under which licence (an SPDX identifier where there is one)."""

    provenance: str
    licence: str


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """Something known between two nodes, with everybody who says so, sorted."""

    head: Node
    relation: str
    tail: Node
    sources: tuple[Source, ...]


def is_node_id(kind: str, name: str) -> bool:
    """Whether `name` is an id of `kind` in its one normal form."""
    if kind in _PATTERNS:
        return _PATTERNS[kind].fullmatch(name) is not None
    return kind in _CODED and normal(kind, name) == name


def check_edge(edge: Edge) -> str | None:
    """What is wrong with an edge, in one phrase that fits after "the edge", or None."""
    for node in (edge.head, edge.tail):
        if node.kind not in NODE_KINDS:
            return f"has a node of a kind that is not known here ({', '.join(NODE_KINDS)})"
        if not is_node_id(node.kind, node.id):
            return f"has an id that is no {node.kind} id in normal form"
        if node.name and not (_told(node.name) and len(node.name) <= _LONGEST_NAME):
            return f"has a name that is not {_LONGEST_NAME} printable characters or fewer"
    if edge.relation not in RELATIONS:
        return f"has a relation that is not known here ({', '.join(RELATIONS)})"
    heads, tails = RELATIONS[edge.relation]
    kinds = (edge.head.kind, edge.tail.kind)
    fits = kinds[0] in heads and kinds[1] in tails
    if edge.relation == "is_a":
        fits = kinds[0] == kinds[1] or kinds in _IS_A
    if not fits:
        return f"leads from {kinds[0]} to {kinds[1]}, which {edge.relation} cannot"
    if not all(_told(source.provenance) for source in edge.sources) or not edge.sources:
        return "does not say where it comes from"
    if not all(_told(source.licence) for source in edge.sources):
        return "has no licence"
    return None


def _told(text: str) -> bool:
    return bool(text.strip()) and text.isprintable()


class KnowledgeGraph:
    """Edges, looked up by node (a networkx.MultiDiGraph whose edge keys are relations).

    Args:
        edges: in any order; each is checked. The same edge from several sources becomes one.

    Attributes:
        counts: what was left out or put together, by reason, in fixed words.

    Raises:
        DataError: an edge is wrong in itself, or `is_a` edges lead in a circle.
    """

    def __init__(self, edges: Iterable[Edge]) -> None:
        import networkx as nx

        self.counts: Counter[str] = Counter()
        merged: dict[tuple[Node, str, Node], set[Source]] = {}
        names: dict[Node, set[str]] = {}
        for edge in edges:
            self._take(edge, merged)
            for node in (edge.head, edge.tail):
                if node.name:
                    names.setdefault(node, set()).add(node.name)
        named = {node: replace(node, name=min(found)) for node, found in names.items()}
        several = sum(len(found) > 1 for found in names.values())
        if several:
            self.counts["nodes that sources name differently"] += several
        self._graph: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
        for (one, relation, other), sources in sorted(merged.items()):
            head, tail = named.get(one, one), named.get(other, other)
            known = Edge(head, relation, tail, tuple(sorted(sources)))
            self._graph.add_edge(head, tail, key=relation, edge=known)
            if len(sources) > 1:
                self.counts["edges that several sources state"] += 1
        self._nodes = tuple(sorted(self._graph))
        self._refuse_circles()
        self._count_disputes()

    def _take(self, edge: Edge, merged: dict[tuple[Node, str, Node], set[Source]]) -> None:
        wrong = check_edge(edge)
        if wrong is not None:
            raise DataError(Code.DATA_VALUE, f"An edge of the knowledge graph {wrong}.")
        head, tail = edge.head, edge.tail
        if head == tail:
            self.counts["edges from a node to itself, left out"] += 1
            return
        if edge.relation in _SYMMETRIC and tail < head:
            head, tail = tail, head
        known = merged.setdefault((head, edge.relation, tail), set())
        if known.issuperset(edge.sources):
            self.counts["edges repeated by the same source, left out"] += 1
        known.update(edge.sources)

    def _refuse_circles(self) -> None:
        import networkx as nx

        tree = nx.DiGraph(
            (head, tail) for head, tail, key in self._graph.edges(keys=True) if key == "is_a"
        )
        try:
            circle = nx.find_cycle(tree)
        except nx.NetworkXNoCycle:
            return
        raise DataError(
            Code.GRAPH_CIRCLE,
            f"is_a leads in a circle of {len(circle)} edges through {circle[0][0]}.",
        )

    def _count_disputes(self) -> None:
        good = {"treats", "palliates", "indicated"}
        for head, tail in {(u, v) for u, v, _ in self._graph.edges(keys=True)}:
            found = set(self._graph[head][tail])
            if found & good and found & {"not_indicated", "contraindicated"}:
                self.counts["drugs that sources disagree about for a disease"] += 1

    def __len__(self) -> int:
        """How many edges there are."""
        return int(self._graph.number_of_edges())

    def __contains__(self, node: Node) -> bool:
        """Whether any edge touches `node`."""
        return node in self._graph

    def nodes(self) -> tuple[Node, ...]:
        """Every node, sorted."""
        return self._nodes

    def edges(self, *relations: str) -> tuple[Edge, ...]:
        """Every edge, or those of some relations, sorted."""
        found = (
            data["edge"]
            for _, _, key, data in self._graph.edges(keys=True, data=True)
            if not relations or key in relations
        )
        return tuple(sorted(found))

    def from_node(self, node: Node, *relations: str) -> Iterator[Edge]:
        """Edges that leave `node`, sorted; those without direction from either end."""
        return iter(sorted(self._touching(node, relations, leaving=True)))

    def into_node(self, node: Node, *relations: str) -> Iterator[Edge]:
        """Edges that reach `node`, sorted; those without direction from either end."""
        return iter(sorted(self._touching(node, relations, leaving=False)))

    def _touching(self, node: Node, relations: tuple[str, ...], *, leaving: bool) -> list[Edge]:
        if node not in self._graph:
            return []
        ways = (self._graph.out_edges, self._graph.in_edges)
        along, against = ways if leaving else ways[::-1]
        wanted = relations or tuple(RELATIONS)
        found = [d["edge"] for _, _, key, d in along(node, keys=True, data=True) if key in wanted]
        both = _SYMMETRIC.intersection(wanted)
        found += [d["edge"] for _, _, key, d in against(node, keys=True, data=True) if key in both]
        return found

    def licences(self) -> dict[str, int]:
        """How many statements stand under each licence, by licence."""
        found = Counter(s.licence for edge in self.edges() for s in edge.sources)
        return dict(sorted(found.items()))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical form: every statement with its source, sorted; then names.

        Guarantee: two graphs have the same digest exactly if they state the same from the same
        sources, whatever the order, the files and the repetitions.
        """
        whole = hashlib.sha256(f"{_FORMAT}\n".encode())
        for edge in self.edges():
            for source in edge.sources:
                whole.update("\t".join(_fields(edge, source)).encode() + b"\n")
        for node in self._nodes:
            if node.name:
                whole.update(f"name\t{node.kind}\t{node.id}\t{node.name}\n".encode())
        return whole.hexdigest()

    def require_digest(self, pinned: str) -> None:
        """Refuse to go on with another graph than the study's. Raises DataError."""
        found = self.digest
        if found != pinned:
            raise DataError(
                Code.GRAPH_DIFFERS,
                f"The knowledge graph here has digest {found}, the study names {pinned}.",
            )


def _fields(edge: Edge, source: Source) -> tuple[str, ...]:
    """The columns of one statement, as files and the digest have them."""
    return (
        edge.head.kind,
        edge.head.id,
        edge.relation,
        edge.tail.kind,
        edge.tail.id,
        source.provenance,
        source.licence,
    )
