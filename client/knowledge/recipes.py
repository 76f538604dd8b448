"""How the files of known public sources become edges of the graph, each under its own licence.

None of these files comes with the product. `handed_on` says which may be put into a file that a
consortium passes round (`client.knowledge.files.write_edges` refuses the others); what may not,
every hospital obtains for itself, and the graph's digest shows that all have the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from client.knowledge.codes import normal, public_set
from client.knowledge.disease_codes import DISEASE_CODES
from client.knowledge.files import enumerate_rows, lines_of
from client.knowledge.graph import Edge, Node, Source, is_node_id
from common.errors import Code, DataError

__all__ = ["RECIPES", "Recipe", "cook", "disease_code_edges"]

Reader = Callable[[Path, Source, Counter[str]], Iterator[Edge]]


@dataclass(frozen=True)
class Recipe:
    """One source: what it is called, under which licence it stands, and how it is read.

    Attributes:
        handed_on: whether its edges may be passed on to anybody.
    """

    name: str
    title: str
    source: Source
    handed_on: bool
    read: Reader


def cook(name: str, path: Path, counts: Counter[str]) -> Iterator[Edge]:
    """The edges of a source's own file.

    Args:
        name: of the recipe.
        path: the file as its publisher gives it.
        counts: what is left out is added here, by reason, in fixed words.

    Raises:
        DataError: names file and line, or there is no such recipe.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise DataError(
            Code.DATA_FORMAT,
            "There is no recipe of this name.",
            remedy=f"Name one of: {', '.join(RECIPES)}.",
        )
    yield from recipe.read(path, recipe.source, counts)


# ---------------------------------------------------------------------- PharmacotherapyDB

_CATEGORIES: Final = MappingProxyType({"DM": "treats", "SYM": "palliates", "NOT": "not_indicated"})


def _pharmacotherapy(path: Path, source: Source, counts: Counter[str]) -> Iterator[Edge]:
    del counts  # every line is an edge
    names = ("doid_id", "drugbank_id", "category")
    for line, cells in _table(path, names, ("disease", "drug")):
        disease, drug, kind, illness, substance = cells
        relation = _CATEGORIES.get(kind)
        if relation is None:
            raise _wrong(path, line, "a category other than DM, SYM and NOT")
        if not is_node_id("disease", disease) or not is_node_id("drug", drug):
            raise _wrong(path, line, "no DOID or DrugBank id")
        head, tail = Node("drug", drug, substance), Node("disease", disease, illness)
        yield Edge(head, relation, tail, (source,))


# ---------------------------------------------------------------------- SIDER


def _sider_indications(path: Path, source: Source, counts: Counter[str]) -> Iterator[Edge]:
    seen: set[tuple[str, str]] = set()
    names = ("drugbank_id", "pubchem_id", "umls_cui_from_meddra", "meddra_type")
    for line, cells in _table(path, names, ("drugbank_name", "meddra_name")):
        drug, compound, concept, term, substance, finding = cells
        if not is_node_id("drug", drug) or not is_node_id("pubchem", compound):
            raise _wrong(path, line, "no DrugBank or PubChem id")
        if (drug, compound) not in seen:
            seen.add((drug, compound))
            head = Node("drug", drug, substance)
            yield Edge(head, "same_as", Node("pubchem", compound), (source,))
        if term != "PT" or not is_node_id("concept", concept):
            counts["terms below MedDRA's preferred level"] += 1
        elif (drug, concept) not in seen:
            seen.add((drug, concept))
            head, tail = Node("drug", drug, substance), Node("concept", concept, finding)
            yield Edge(head, "indicated", tail, (source,))


_SIDER_COLUMNS: Final = 6


def _sider_effects(path: Path, source: Source, counts: Counter[str]) -> Iterator[Edge]:
    seen: set[tuple[str, str]] = set()
    for line, text in lines_of(path):
        cells = text.split("\t")
        if len(cells) != _SIDER_COLUMNS:
            raise _ragged(path, line, len(cells), _SIDER_COLUMNS)
        compound, term, concept = _compound(cells[1]), cells[3], cells[4]
        if compound is None:
            raise _wrong(path, line, "no STITCH id")
        if term != "PT" or not is_node_id("concept", concept):
            counts["terms below MedDRA's preferred level"] += 1
        elif (compound, concept) not in seen:
            seen.add((compound, concept))
            yield Edge(Node("pubchem", compound), "causes", Node("concept", concept), (source,))


# ---------------------------------------------------------------------- maps


def _drug_atc(path: Path, source: Source, counts: Counter[str]) -> Iterator[Edge]:
    for line, text in lines_of(path):
        head, *groups = text.split(",")
        compound = _compound(head)
        if compound is None or not groups:
            raise _wrong(path, line, "no STITCH id followed by ATC codes")
        for group in groups:
            if is_node_id("atc", group):
                yield Edge(Node("pubchem", compound), "is_a", Node("atc", group), (source,))
            else:
                counts["no ATC code"] += 1


_NDC_PAIR: Final = re.compile(
    r"'([^']{1,40})': (?:u?'([^']{0,40})'|[0-9]+)", re.ASCII
)  # some entries hold a number instead
_NDC_END: Final = re.compile(r"[{, ]*", re.ASCII)
_NDC_FILE: Final = 64 * 1024 * 1024


def _ndc_map(path: Path, source: Source, counts: Counter[str]) -> Iterator[Edge]:
    """One line: a mapping as Python writes it, which is matched here and never run."""
    text = _whole(path)
    at = 0
    for found in _NDC_PAIR.finditer(text):
        if _NDC_END.fullmatch(text, at, found.start()) is None:
            raise _wrong(path, 1, "something else than pairs of NDC and RxCUI")
        at = found.end()
        ndc, rxnorm = normal("ndc", found[1]), normal("rxnorm", found[2] or "")
        if ndc is None or rxnorm is None:
            counts["pairs without an NDC or an RxCUI"] += 1
        else:
            yield Edge(Node("ndc", ndc), "same_as", Node("rxnorm", rxnorm), (source,))
    if not at or text[at:].strip() != "}":
        raise _wrong(path, 1, "something else than pairs of NDC and RxCUI")


def _whole(path: Path) -> str:
    import gzip
    import zlib

    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            content = file.read(_NDC_FILE + 1)
    except (OSError, EOFError, zlib.error):
        raise DataError(Code.DATA_UNREADABLE, f"{path}: cannot be read to its end.") from None
    if len(content) > _NDC_FILE:
        raise DataError(Code.DATA_TOO_LONG, f"{path}: is larger than 64 MiB.")
    try:
        return bytes(content).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(Code.DATA_ENCODING, f"{path}: is not UTF-8.") from None


# ---------------------------------------------------------------------- our own table


def disease_code_edges() -> Iterator[Edge]:
    """Which ICD codes stand for the diseases of PharmacotherapyDB (disease_codes.py)."""
    source = Source("wardround disease codes", "CC0-1.0")
    for disease, written in DISEASE_CODES.items():
        for system, text in zip(("icd9", "icd10"), written, strict=True):
            for code in _spelled(system, text):
                yield Edge(Node("disease", disease), "coded_as", Node(system, code), (source,))


def _spelled(system: str, text: str) -> Iterator[str]:
    """The codes of a list like `491.2 492 C81-C85`."""
    known = [name.partition(":")[2] for name in public_set(f"{system}:categories") or ()]
    for part in text.split():
        first, dash, last = part.partition("-")
        if dash:
            yield from (head for head in known if first <= head <= last and _same(first, head))
        else:
            yield first


def _same(first: str, head: str) -> bool:
    """Whether both stand in the same kind of chapter: 401 to 405 holds no E403."""
    return len(first) == len(head) and first[0].isdigit() == head[0].isdigit()


# ---------------------------------------------------------------------- helpers

_STITCH: Final = re.compile(r"CID[01]?0*([1-9][0-9]{0,9})", re.ASCII)


def _compound(text: str) -> str | None:
    """The PubChem number of a STITCH id (CID0… keeps stereochemistry, CID1… does not)."""
    found = _STITCH.fullmatch(text)
    return None if found is None else found[1]


def _table(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, list[str]]]:
    """The wanted cells of every line; empty where an optional column is not there."""
    rows = enumerate_rows(path)
    _, header = next(rows, (0, None))
    if header is None:
        raise DataError(Code.DATA_EMPTY, f"{path}: is empty.")
    for name in names:
        if name not in header:
            raise DataError(Code.DATA_COLUMNS, f"{path}: has no column {name}.")
    order = [header.index(name) if name in header else None for name in (*names, *optional)]
    for line, cells in rows:
        yield line, ["" if at is None else cells[at].strip() for at in order]


def _wrong(path: Path, line: int, what: str) -> DataError:
    return DataError(
        Code.DATA_VALUE,
        f"{path}:{line}: holds {what}.",
        remedy="Obtain the file again from its publisher; it is read as published.",
    )


def _ragged(path: Path, line: int, found: int, wanted: int) -> DataError:
    return DataError(Code.DATA_RAGGED, f"{path}:{line}: has {found} fields, not {wanted}.")


RECIPES: Final = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                "pharmacotherapydb",
                "PharmacotherapyDB 1.0, indications.tsv: what drugs do for 97 diseases",
                Source("PharmacotherapyDB 1.0", "CC0-1.0"),
                handed_on=True,
                read=_pharmacotherapy,
            ),
            Recipe(
                "sider-indications",
                "SIDER 4.1 as TSV with DrugBank ids: what labels say that drugs are for",
                Source("SIDER 4.1", "CC-BY-NC-SA-4.0"),
                handed_on=False,
                read=_sider_indications,
            ),
            Recipe(
                "sider-effects",
                "SIDER 4.1, meddra_all_se.tsv: side effects that labels name",
                Source("SIDER 4.1", "CC-BY-NC-SA-4.0"),
                handed_on=False,
                read=_sider_effects,
            ),
            Recipe(
                "drug-atc",
                "GAMENet, drug-atc.csv: ATC codes of compounds",
                Source("GAMENet drug-atc", "MIT"),
                handed_on=True,
                read=_drug_atc,
            ),
            Recipe(
                "ndc-rxnorm",
                "GAMENet, ndc2rxnorm_mapping.txt: RxNorm ids of packages",
                Source("GAMENet ndc2rxnorm", "MIT"),
                handed_on=True,
                read=_ndc_map,
            ),
        )
    }
)
