"""Edge files: a knowledge graph as TSV or Parquet, one statement a line, source and licence too."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TextIO

from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source, check_edge
from common.errors import Code, DataError

__all__ = [
    "COLUMNS",
    "FREE_LICENCES",
    "NAMES",
    "lines_of",
    "load_graph",
    "read_edges",
    "write_edges",
]

COLUMNS: Final = (
    "head_type",
    "head_id",
    "relation",
    "tail_type",
    "tail_id",
    "provenance",
    "licence",
)
NAMES: Final = ("head_name", "tail_name")
"""Columns that may be there besides: what people call the two ends."""
FREE_LICENCES: Final = frozenset({"CC0-1.0", "MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-3.0"})
"""Licences under which a file may be handed on to anybody."""

_MAX_LINE: Final = 64 * 1024  # characters
_MOST_EDGES: Final = 5_000_000


def load_graph(paths: Sequence[Path], *, digest: str | None = None) -> KnowledgeGraph:
    """The graph of several edge files together; with `digest`, only if it is the pinned one.

    Raises:
        DataError: names file and line of what cannot be used; is_a edges lead in a circle; the
            digest is another.
    """
    graph = KnowledgeGraph(edge for path in paths for edge in read_edges(path))
    if digest is not None:
        graph.require_digest(digest)
    return graph


def read_edges(path: Path, *, source: Source | None = None) -> Iterator[Edge]:
    """The edges of one .tsv, .tsv.gz or .parquet file.

    Args:
        path: the file; its columns are `COLUMNS` and perhaps `NAMES`, in any order.
        source: for files whose columns `provenance` and `licence` are absent: of every edge.

    Raises:
        DataError: names file and line, never skipping one.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = _parquet(path)
    elif name.endswith((".tsv", ".tsv.gz")):
        rows = enumerate_rows(path)
    else:
        raise DataError(
            Code.DATA_FORMAT,
            f"{path}: is not a file of edges.",
            remedy="Give .tsv, .tsv.gz or .parquet.",
        )
    _, header = next(rows, (0, None))
    if header is None:
        raise DataError(Code.DATA_EMPTY, f"{path}: is empty.")
    order = _order(path, header, source)
    names = [header.index(name) if name in header else None for name in NAMES]
    count = 0
    for count, (line, cells) in enumerate(rows, start=1):
        if count > _MOST_EDGES:
            raise DataError(Code.DATA_FORMAT, f"{path}: has more than {_MOST_EDGES} edges.")
        called = ["" if at is None else cells[at].strip() for at in names]
        yield _edge(f"{path}:{line}", [cells[at] for at in order], called, source)
    if not count:
        raise DataError(Code.DATA_EMPTY, f"{path}: has no edge below its header.")


def write_edges(
    path: Path, edges: Iterable[Edge], *, licences: frozenset[str] = FREE_LICENCES
) -> None:
    """Write edges as TSV, for the hospitals of a study.

    Args:
        path: a .tsv file, which must not exist.
        edges: what to write, sorted by the caller if order matters to anybody.
        licences: those under which the file may be handed on.

    Raises:
        DataError: an edge stands under another licence (nothing is written), or the file is there.
    """
    edges = list(edges)
    named = any(node.name for edge in edges for node in (edge.head, edge.tail))
    lines = ["\t".join((*COLUMNS, *(NAMES if named else ())))]
    for edge in edges:
        names = (edge.head.name, edge.tail.name) if named else ()
        for source in edge.sources:
            if source.licence not in licences:
                raise DataError(
                    Code.GRAPH_LICENCE,
                    f"An edge of {source.provenance} stands under {source.licence}.",
                )
            ends = (edge.head.kind, edge.head.id, edge.relation, edge.tail.kind, edge.tail.id)
            lines.append("\t".join((*ends, source.provenance, source.licence, *names)))
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise DataError(Code.OUTPUT_EXISTS, f"{path} is already there.") from None


def _order(path: Path, header: Sequence[str], source: Source | None) -> list[int]:
    wanted = COLUMNS if source is None else COLUMNS[:5]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataError(
            Code.DATA_COLUMNS,
            f"{path}: has no column {missing[0]}.",
            remedy=f"The first line names the columns, parted by tabs: {', '.join(COLUMNS)}.",
        )
    if len(set(header)) != len(header):
        raise DataError(Code.DATA_COLUMNS, f"{path}: names a column twice.")
    return [header.index(name) for name in wanted]


def _edge(where: str, cells: Sequence[str], names: Sequence[str], source: Source | None) -> Edge:
    told = Source(cells[5].strip(), cells[6].strip()) if source is None else source
    head, tail = Node(cells[0], cells[1], names[0]), Node(cells[3], cells[4], names[1])
    edge = Edge(head, cells[2], tail, (told,))
    wrong = check_edge(edge)
    if wrong is not None:
        raise DataError(
            Code.DATA_VALUE,
            f"{where}: the edge {wrong}.",
            remedy="Correct or remove the line named; docs/KNOWLEDGE.md lists kinds and relations.",
        )
    return edge


def enumerate_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line of a TSV file, checked to be as many as the header has."""
    width = 0
    for number, line in lines_of(path):
        if not line or line.startswith("#"):
            continue
        cells = line.split("\t")
        width = width or len(cells)
        if len(cells) != width:
            raise DataError(
                Code.DATA_RAGGED,
                f"{path}:{number}: has {len(cells)} fields, the header {width}.",
            )
        yield number, cells


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, also .gz, each of bounded length, without their ends.

    Raises DataError: unreadable, truncated, not UTF-8, or a line is too long.
    """
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise DataError(
                        Code.DATA_TOO_LONG,
                        f"{path}:{number}: is longer than {_MAX_LINE} characters.",
                    )
                yield number, line.rstrip("\r\n").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise DataError(Code.DATA_ENCODING, f"{path}:{number + 1}: is not UTF-8.") from None
    except (OSError, EOFError, zlib.error):
        raise DataError(Code.DATA_UNREADABLE, f"{path}: cannot be read to its end.") from None


def _opened(path: Path) -> TextIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open("r", encoding="utf-8", newline="\n")


def _parquet(path: Path) -> Iterator[tuple[int, list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            yield 0, names
            line = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    line += 1
                    if not all(isinstance(cell, str) for cell in row):
                        raise DataError(
                            Code.DATA_VALUE, f"{path}:{line}: has a cell that is not text."
                        )
                    yield line, list(row)
    except (OSError, pa.ArrowException):
        raise DataError(Code.DATA_UNREADABLE, f"{path}: is no readable Parquet file.") from None
