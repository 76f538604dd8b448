"""Where a hospital keeps the graphs that its studies name, and the graph of a study."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

from client.knowledge.files import load_graph
from client.knowledge.graph import KnowledgeGraph
from common.tasks.medication import GraphChoice

__all__ = ["FOLDER_VARIABLE", "graph_of"]

FOLDER_VARIABLE: Final = "WARDROUND_KNOWLEDGE"


def graph_of(choice: GraphChoice) -> KnowledgeGraph:
    """The study's graph, from the folder that WARDROUND_KNOWLEDGE names, or the current one.

    Raises:
        DataError: a file is missing or wrong, or together they are not the graph of the study.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE, "."))
    paths = tuple(folder / name for name in choice.files)
    return _loaded(paths, choice.digest)


@lru_cache(maxsize=2)
def _loaded(paths: tuple[Path, ...], digest: str) -> KnowledgeGraph:
    return load_graph(paths, digest=digest)
