"""Invented visits of four invented hospitals, and a small knowledge graph, for the example study.

No real patient. Drugs follow from what a patient has, from what goes together, and from what must
not be given: who has asthma gets no beta blocker, who takes an anticoagulant no ibuprofen.
Hospitals code in ICD-9 or in ICD-10 and differ in habits. The same seed gives the same bytes. The
graph states a few things that every textbook has; it is an example and no source to prescribe by.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from client.knowledge.files import write_edges
from client.knowledge.graph import Edge, Node, Source

__all__ = ["COLUMNS", "DRUGS", "edges", "visits", "write_visits"]

COLUMNS: Final = ("patient", "hospital", "codes", "drugs")
DRUGS: Final = ("A10B", "B01A", "C03C", "C07A", "C09A", "J01C", "M01A", "N02B", "R03A")
# Hospitals, the ICD that they code in, and how often they give what they could.
_HOSPITALS: Final = (("north", 9, 0.9), ("east", 10, 0.9), ("south", 10, 0.8), ("west", 9, 0.85))
_PATIENTS: Final = 60
_SECOND: Final = 5  # every so many patients one comes again
_AGAIN: Final = 0.9  # what a patient has at the second visit still

# An illness: how common, its Disease Ontology id, codes of ICD-9 and ICD-10, drugs for it.
_ILLS: Final = {
    "hypertension": (0.45, "DOID:10763", ("401.9", "I10"), ("C09A", "C07A")),
    "diabetes": (0.3, "DOID:9352", ("250.00", "E11.9"), ("A10B",)),
    "heart failure": (0.25, "DOID:6000", ("428.0", "I50.9"), ("C03C", "C09A", "C07A")),
    "fibrillation": (0.2, "DOID:0060224", ("427.31", "I48.91"), ("B01A", "C07A")),
    "asthma": (0.2, "DOID:2841", ("493.90", "J45.909"), ("R03A",)),
    "pneumonia": (0.25, "DOID:552", ("486", "J18.9"), ("J01C",)),
    "arthrosis": (0.3, "DOID:8398", ("715.90", "M19.90"), ("M01A", "N02B")),
    "kidney disease": (0.15, "DOID:784", ("585.9", "N18.9"), ("C03C",)),
}
_NEVER: Final = {"C07A": ("asthma",), "M01A": ("kidney disease", "heart failure")}
_APART: Final = (("B01A", "M01A"),)
_INSTEAD: Final = {"C07A": "C03C", "M01A": "N02B"}

# The graph: which substance stands for a group, and what it does for an illness.
_MEMBERS: Final = {
    "A10B": ("A10BA02", "metformin"),
    "B01A": ("B01AA03", "warfarin"),
    "C03C": ("C03CA01", "furosemide"),
    "C07A": ("C07AA05", "propranolol"),
    "C09A": ("C09AA05", "ramipril"),
    "J01C": ("J01CA04", "amoxicillin"),
    "M01A": ("M01AE01", "ibuprofen"),
    "N02B": ("N02BE01", "paracetamol"),
    "R03A": ("R03AC02", "salbutamol"),
}
_PALLIATES: Final = frozenset({"M01A", "N02B", "R03A"})

Visit = tuple[str, str, str, str]


def visits(seed: int = 0) -> list[Visit]:
    """(patient, hospital, codes, drugs) of every visit."""
    found: list[Visit] = []
    for number, (hospital, version, gives) in enumerate(_HOSPITALS):
        stream = np.random.Generator(np.random.PCG64([seed, number]))
        for at in range(_PATIENTS):
            ills = [ill for ill, told in _ILLS.items() if stream.random() < told[0]]
            for visit in range(2 if at % _SECOND == 0 else 1):
                if visit:
                    ills = [ill for ill in ills if stream.random() < _AGAIN]
                ills = ills or ["arthrosis"]
                codes = [_ILLS[ill][2][version == 10] for ill in ills]  # noqa: PLR2004 - ICD-10
                drugs = _given(ills, gives, stream)
                patient = f"{hospital}-{at + 1:02d}"
                found.append((patient, hospital, " ".join(codes), " ".join(drugs)))
    return found


def _given(ills: list[str], gives: float, stream: np.random.Generator) -> list[str]:
    given: set[str] = set()
    for ill in ills:
        for drug in _ILLS[ill][3]:
            if stream.random() < gives:
                wrong = set(ills) & set(_NEVER.get(drug, ()))
                given.add(_INSTEAD[drug] if wrong else drug)
    for first, second in _APART:
        if {first, second} <= given:
            given = (given - {second}) | {_INSTEAD[second]}
    return sorted(given)


def edges() -> Iterator[Edge]:
    """What the graph states, sorted by nothing in particular."""
    source = (Source("example for Wardround", "CC0-1.0"),)

    def drug(group: str) -> Node:
        return Node("atc", *_MEMBERS[group])

    for ill, (_, disease, (old, new), drugs) in _ILLS.items():
        node = Node("disease", disease, ill)
        for system, code in (("icd9", old), ("icd10", new)):
            category = Node(system, code.partition(".")[0])
            yield Edge(node, "coded_as", category, source)
        for group in drugs:
            relation = "palliates" if group in _PALLIATES else "treats"
            yield Edge(drug(group), relation, node, source)
        for group, never in _NEVER.items():
            if ill in never:
                yield Edge(drug(group), "contraindicated", node, source)
    for first, second in _APART:
        yield Edge(drug(first), "interacts", drug(second), source)


def write_visits(folder: Path, seed: int = 0) -> None:
    """Write synthetic-visits.csv and synthetic-knowledge.tsv; neither may be there."""
    with (folder / "synthetic-visits.csv").open("x", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(visits(seed))
    write_edges(folder / "synthetic-knowledge.tsv", sorted(edges()))
