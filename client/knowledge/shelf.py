"""The knowledge graphs that this process has read, by digest, and where they are read from.

A study names its graph by digest; the files of a hospital lie in a folder of its own. Whoever opens
a study, a model or a review reads the graph first (`read_knowledge`); the network then asks for it
by digest alone, so no setting of a folder is carried through training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from client.knowledge.files import load_graph, write_edges
from client.knowledge.graph import KnowledgeGraph
from common.errors import Code, DataError
from common.study import Task
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.graph import GraphChoice
from common.tasks.medication import MedicationTask

__all__ = [
    "KNOWLEDGE_FILE",
    "graph_choice",
    "graph_of",
    "read_knowledge",
    "read_saved_knowledge",
    "save_knowledge",
]

KNOWLEDGE_FILE: Final = "knowledge.tsv"
"""A model's graph beside its weights, where its licences allow that."""

_SHELF: Final[dict[str, KnowledgeGraph]] = {}


def graph_choice(task: Task) -> GraphChoice | None:
    """The graph that a task names, if it names one."""
    return task.graph if isinstance(task, MedicationTask | DiagnosisTask) else None


def read_knowledge(task: Task, folder: Path | None) -> None:
    """Read the task's graph, if it names one, from the files that it names, in `folder`.

    Args:
        task: the study's.
        folder: the study's own in a simulation, `knowledge` of site.yaml at a hospital; None:
            there is none.

    Raises:
        DataError: there is no such folder or file, a file is wrong, or together they are not
            the graph of the study.
    """
    choice = graph_choice(task)
    if choice is None or choice.digest in _SHELF:
        return
    if folder is None:
        raise DataError(
            Code.GRAPH_ABSENT, "The study names a knowledge graph, and no folder of graphs is set."
        )
    paths = [folder / name for name in choice.files]
    for path in paths:
        if not path.is_file():
            raise DataError(Code.GRAPH_ABSENT, f"{path}: there is no such file.")
    _SHELF[choice.digest] = load_graph(paths, digest=choice.digest)


def read_saved_knowledge(task: Task, model: Path, folder: Path | None) -> None:
    """Read the graph of a saved model: from `folder`, as a study's, or from beside the weights.

    Raises DataError, as `read_knowledge`.
    """
    choice = graph_choice(task)
    own = model / KNOWLEDGE_FILE
    if choice is None or choice.digest in _SHELF:
        return
    if folder is not None:
        read_knowledge(task, folder)
    elif own.is_file():
        _SHELF[choice.digest] = load_graph([own], digest=choice.digest)
    else:
        raise DataError(
            Code.GRAPH_ABSENT,
            f"{model}: this model reads a knowledge graph, whose licences keep it from lying here.",
            remedy="Name the folder of the study's edge files: --knowledge FOLDER.",
        )


def save_knowledge(task: Task, model: Path) -> None:
    """Write the graph beside a saved model, if there is one and all of it may be handed on."""
    choice = graph_choice(task)
    if choice is None:
        return
    try:
        write_edges(model / KNOWLEDGE_FILE, graph_of(choice).edges())
    except DataError as error:
        if error.code is not Code.GRAPH_LICENCE:
            raise


def graph_of(choice: GraphChoice) -> KnowledgeGraph:
    """The graph of this digest, which was read before.

    Raises:
        DataError: nobody read it.
    """
    found = _SHELF.get(choice.digest)
    if found is None:
        raise DataError(
            Code.GRAPH_ABSENT, f"The knowledge graph {choice.digest[:16]}... has not been read."
        )
    return found
