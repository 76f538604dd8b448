"""The diseases and drugs of a knowledge graph that a note names, and what the graph knows of them.

A name is found where its words stand in the note one after another, whatever their case; of two
names at one place the longer one counts. Nothing is guessed: no synonyms but those that the graph
states as names of their own nodes, no endings, and a denial ("no asthma") names the disease, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.knowledge.graph import KnowledgeGraph, Node
from client.knowledge.shelf import graph_of
from client.knowledge.spread import node_rows
from common.tasks.graph import GraphChoice

__all__ = ["Mentions", "mentions_of"]

# A run of letters and digits is a word; each Chinese character is one.
_WORD: Final = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_SHORTEST: Final = 3
_WIDE: Final = "\u3400"

Words = tuple[str, ...]


class Mentions:
    """Finds a graph's nodes in notes.

    Args:
        graph: its nodes with names are looked for; names of fewer than three letters are not.
        width: numbers that stand for a node.
        steps: edges over which knowledge spreads to its neighbours.

    Guarantee: the same numbers for the same text on every machine, from the graph alone.
    """

    def __init__(self, graph: KnowledgeGraph, *, width: int, steps: int) -> None:
        self._width = width
        self._places: dict[Words, list[int]] = {}
        named = [node for node in graph.nodes() if node.name]
        for at, node in enumerate(named):
            words = _words(node.name)
            if len("".join(words)) >= _SHORTEST or any(word >= _WIDE for word in words):
                self._places.setdefault(words, []).append(at)
        self._longest = max(map(len, self._places), default=0)
        self._nodes = named
        tags = [f"{node.kind}:{node.id}" for node in named]
        self._rows = node_rows(graph, tags, width=width, steps=steps)

    def nodes(self, text: str) -> tuple[Node, ...]:
        """What the note names, each node once, in the order of the graph."""
        return tuple(self._nodes[at] for at in self._found(text))

    def rows(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean of the rows of what each note names; zeros where it names nothing.

        Shapes: returns (len(texts), width) float32, each row of length 1 at most.
        """
        found = np.zeros((len(texts), self._width), np.float32)
        for row, text in enumerate(texts):
            places = self._found(text)
            if places:
                found[row] = self._rows[places].mean(axis=0)
        return found

    def _found(self, text: str) -> list[int]:
        return sorted({at for place in self._spans(_words(text)) for at in place})

    def _spans(self, words: Words) -> Iterator[list[int]]:
        """The nodes at each place where a name stands, longest names first."""
        at = 0
        while at < len(words):
            for size in range(min(self._longest, len(words) - at), 0, -1):
                place = self._places.get(words[at : at + size])
                if place is not None:
                    yield place
                    at += size
                    break
            else:
                at += 1


def _words(text: str) -> Words:
    return tuple(_WORD.findall(text.casefold()))


@lru_cache(maxsize=4)
def _made(choice: GraphChoice) -> Mentions:
    return Mentions(graph_of(choice), width=choice.width, steps=choice.steps)


def mentions_of(choice: GraphChoice) -> Mentions:
    """The finder over a graph that was read before.

    Raises:
        DataError: nobody read it (client/knowledge/shelf.py).
    """
    return _made(choice)
