"""Why a drug is recommended and what speaks against it, in edges of the knowledge graph.

A label is a drug or an ATC group; what is known of a member of the group is told of the group,
with the member named. Nothing here learns, and nothing leaves the hospital.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from client.knowledge.codes import ancestors, tagged
from client.knowledge.graph import Edge, KnowledgeGraph, Node

__all__ = [
    "Flag",
    "Reason",
    "Recommendation",
    "advice",
    "contraindications",
    "diseases_of",
    "interaction_rate",
    "interactions",
    "members_of",
    "reasons",
    "recommend",
    "told_flag",
    "told_reason",
]

_FOR = ("treats", "palliates", "indicated")
_AGAINST = ("contraindicated", "not_indicated")


@dataclass(frozen=True, slots=True, order=True)
class Reason:
    """Edges from a patient's code to a drug: `code` is coded for `disease`, `edge` speaks for it.

    `path` leads from the code to the label; its last edges say why the drug is in the label.
    """

    label: str
    code: str
    edge: Edge
    path: tuple[Edge, ...]


@dataclass(frozen=True, slots=True, order=True)
class Flag:
    """Something that speaks against a drug.

    `kind` is `contraindicated`, `not indicated` (curators found no use; no danger is stated) or
    `interacts`. `against` is the patient's code, or the other drug's label.
    """

    kind: str
    label: str
    against: str
    edge: Edge


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One drug of the list: its probability, what speaks for it and what against."""

    label: str
    probability: float
    reasons: tuple[Reason, ...]
    flags: tuple[Flag, ...]


@lru_cache(maxsize=4096)
def members_of(graph: KnowledgeGraph, label: str) -> Mapping[Node, tuple[Edge, ...]]:
    """The drugs that a label means, each with the edges that say so.

    A label is an ATC code or group (`C07A`, `atc:C07A`), a DrugBank id or `rxnorm:NUMBER`. An ATC
    group means itself, its drugs, and whatever is the same substance as one of them.
    """
    start = _label_node(label)
    if start is None:
        return MappingProxyType({})
    found: dict[Node, tuple[Edge, ...]] = {start: ()}
    if start.kind == "atc":
        for node in graph.nodes():
            if node.kind == "atc" and node.id.startswith(start.id):
                found.setdefault(node, ())
                for edge in graph.into_node(node, "is_a"):
                    found.setdefault(edge.head, (edge,))
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for edge in graph.from_node(node, "same_as"):
            other = edge.tail if edge.head == node else edge.head
            if other not in found:
                found[other] = (edge, *found[node])
                waiting.append(other)
    return MappingProxyType(found)


def _label_node(label: str) -> Node | None:
    system, colon, rest = label.partition(":")
    if colon:
        named = tagged(system, rest)
        return None if named is None else Node(system, named.partition(":")[2])
    group = tagged("atc", label)
    if group is not None:
        return Node("atc", group.partition(":")[2])
    return Node("drug", label) if label.startswith("DB") else None


@lru_cache(maxsize=4096)
def diseases_of(graph: KnowledgeGraph, code: str) -> Mapping[Node, tuple[Edge, ...]]:
    """What a tagged code (`icd9:428.0`) means: itself, its groups, and diseases coded as these.

    Diseases that are kinds of others bring those along.
    """
    found: dict[Node, tuple[Edge, ...]] = {}
    for name in ancestors(code):
        system, _, rest = name.partition(":")
        node = Node(system, rest)
        found[node] = ()
        for edge in graph.into_node(node, "coded_as"):
            found.setdefault(edge.head, (edge,))
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        for edge in graph.from_node(node, "is_a"):
            if edge.tail not in found:
                found[edge.tail] = (*found[node], edge)
                waiting.append(edge.tail)
    return MappingProxyType(found)


def reasons(
    graph: KnowledgeGraph, codes: Sequence[str], labels: Sequence[str]
) -> dict[str, tuple[Reason, ...]]:
    """For each label, the edges that speak for it given a patient's tagged codes, sorted."""
    return {
        label: tuple(
            sorted(
                Reason(label, code, edge, (*to_disease, edge, *to_drug))
                for code, edge, to_disease, to_drug in _between(graph, codes, label, _FOR)
            )
        )
        for label in labels
    }


def contraindications(
    graph: KnowledgeGraph, codes: Sequence[str], labels: Sequence[str]
) -> tuple[Flag, ...]:
    """What the graph says against drugs for a patient with these tagged codes, sorted.

    `not indicated` is told only where nothing speaks for the label and the same code: another
    member of the group may be the right drug.
    """
    found = []
    for label in labels:
        helped = {code for code, *_ in _between(graph, codes, label, _FOR)}
        for code, edge, _, _ in _between(graph, codes, label, _AGAINST):
            if edge.relation == "contraindicated":
                found.append(Flag("contraindicated", label, code, edge))
            elif code not in helped:
                found.append(Flag("not indicated", label, code, edge))
    return tuple(sorted(found))


def _between(
    graph: KnowledgeGraph, codes: Sequence[str], label: str, relations: tuple[str, ...]
) -> Iterator[tuple[str, Edge, tuple[Edge, ...], tuple[Edge, ...]]]:
    members = members_of(graph, label)
    for code in codes:
        ills = diseases_of(graph, code)
        for member, to_drug in members.items():
            for edge in graph.from_node(member, *relations):
                if edge.tail in ills:
                    yield code, edge, ills[edge.tail], to_drug


def interactions(graph: KnowledgeGraph, labels: Sequence[str]) -> tuple[Flag, ...]:
    """Pairs of labels with members that interact, each pair and edge once, sorted."""
    members = {label: members_of(graph, label) for label in dict.fromkeys(labels)}
    found = []
    for at, (label, own) in enumerate(members.items()):
        others = list(members.items())[at + 1 :]
        for member in own:
            for edge in graph.from_node(member, "interacts"):
                partner = edge.tail if edge.head == member else edge.head
                for other, theirs in others:
                    if partner in theirs:
                        found.append(Flag("interacts", label, other, edge))
    return tuple(sorted(set(found)))


def interaction_rate(graph: KnowledgeGraph, visits: Sequence[Sequence[str]]) -> float | None:
    """The part of all pairs of drugs given together that interact (SafeDrug's DDI rate).

    None where the graph knows no interaction at all: nothing known is not the same as none.

    Source: Shang et al. 2019; Yang et al. 2021.
    """
    if not graph.edges("interacts"):
        return None
    labels = sorted({label for visit in visits for label in visit})
    pairs = {frozenset((flag.label, flag.against)) for flag in interactions(graph, labels)}
    hit = together = 0
    for visit in visits:
        given = sorted(set(visit))
        for at, first in enumerate(given):
            for second in given[at + 1 :]:
                together += 1
                hit += frozenset((first, second)) in pairs
    return hit / together if together else 0.0


def recommend(
    graph: KnowledgeGraph,
    codes: Sequence[str],
    probabilities: Mapping[str, float],
    *,
    threshold: float = 0.5,
) -> tuple[Recommendation, ...]:
    """The drugs at or above a probability, likeliest first, each with its reasons and flags.

    Interactions are flagged at both drugs, and only among those recommended.
    """
    chosen = sorted(
        (label for label, p in probabilities.items() if p >= threshold),
        key=lambda label: (-probabilities[label], label),
    )
    why = reasons(graph, codes, chosen)
    flags = (*contraindications(graph, codes, chosen), *interactions(graph, chosen))
    return tuple(
        Recommendation(
            label,
            probabilities[label],
            why[label],
            tuple(
                flag
                for flag in flags
                if flag.label == label or (flag.kind == "interacts" and flag.against == label)
            ),
        )
        for label in chosen
    )


def advice(
    graph: KnowledgeGraph, codes: Sequence[str], probabilities: Mapping[str, float]
) -> dict[str, list[str]]:
    """`reasons` and `flags` of the drugs that are recommended, in words, likeliest drug first."""
    found = recommend(graph, codes, probabilities)
    return {
        "reasons": [told_reason(reason) for drug in found for reason in drug.reasons],
        "flags": list(dict.fromkeys(told_flag(flag) for drug in found for flag in drug.flags)),
    }


def told_reason(reason: Reason) -> str:
    """`C07A for icd9:401.9: disease DOID:1 is coded as icd9 401, drug DB1 treats ... (source)`."""
    steps = ", ".join(_told_edge(edge) for edge in reason.path)
    return f"{reason.label} for {reason.code}: {steps} ({_told_sources(reason.edge)})"


def told_flag(flag: Flag) -> str:
    """`C07A is contraindicated with icd9:493.9: drug DB1 ... (source)`."""
    words = "interacts" if flag.kind == "interacts" else f"is {flag.kind}"
    edge = f"{_told_edge(flag.edge)} ({_told_sources(flag.edge)})"
    return f"{flag.label} {words} with {flag.against}: {edge}"


_WORDS = MappingProxyType(
    {
        "coded_as": "is coded as",
        "same_as": "is the same as",
        "is_a": "is a kind of",
        "interacts": "interacts with",
        "not_indicated": "is not indicated for",
        "contraindicated": "is contraindicated for",
        "indicated": "is indicated for",
    }
)


def _told_edge(edge: Edge) -> str:
    return f"{edge.head} {_WORDS.get(edge.relation, edge.relation)} {edge.tail}"


def _told_sources(edge: Edge) -> str:
    return ", ".join(source.provenance for source in edge.sources)
