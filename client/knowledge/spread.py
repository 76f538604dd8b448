"""Numbers that stand for the nodes of a knowledge graph: public, fixed, nothing is learned.

Every node starts with a row of signs of its own, drawn from its name; the rows are then averaged
along the edges, with the symmetric normalisation of graph convolutions. Nodes that reach the same
neighbours end up alike, however far apart their names are.
Source: Kipf and Welling 2017 (normalised adjacency); Wu et al. 2019 (no weights between steps);
Chen et al. 2019 (random starting rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from client.knowledge.codes import ancestors
from client.knowledge.graph import KnowledgeGraph

__all__ = ["SPREADING", "node_rows"]

SPREADING = ("treats", "palliates", "indicated", "coded_as", "same_as", "is_a")
"""Relations along which knowledge spreads: what belongs together. Warnings do not."""


def node_rows(
    graph: KnowledgeGraph, wanted: Sequence[str], *, width: int, steps: int
) -> NDArray[np.float32]:
    """The rows of tagged codes (`icd9:428.0`, `atc:C07A`); zeros where the graph does not reach.

    Codes hang below the groups that they roll up to, ATC groups above the codes that begin alike.

    Shapes: returns (len(wanted), width) float32, each row of length 1 or 0.

    Guarantee: the same bits on every machine, from the graph's statements alone; their order
        does not matter.
    """
    links = {
        tuple(sorted((f"{e.head.kind}:{e.head.id}", f"{e.tail.kind}:{e.tail.id}")))
        for e in graph.edges(*SPREADING)
    }
    known = {name for link in links for name in link}
    for name in sorted(known | set(wanted)):
        steps_up = ancestors(name)
        links |= {tuple(sorted(pair)) for pair in pairwise(steps_up)}
    names = sorted({name for link in links for name in link})
    place = {name: at for at, name in enumerate(names)}
    pairs = np.array([(place[a], place[b]) for a, b in sorted(links)], np.int64).reshape(-1, 2)
    start = np.stack([_signs(name, width) for name in names]) if names else np.zeros((0, width))
    spread = _spread(start, pairs, steps)
    reached = _reached(len(names), pairs, [place[name] for name in sorted(known)])
    found = np.zeros((len(wanted), width), np.float32)
    for row, name in enumerate(wanted):
        at = place.get(name)
        if at is not None and reached[at]:
            found[row] = spread[at] / max(float(np.sqrt((spread[at] ** 2).sum())), 1e-12)
    return found


def _signs(name: str, width: int) -> NDArray[np.float64]:
    key = int.from_bytes(hashlib.sha256(b"wardround/1/node " + name.encode()).digest()[:8])
    drawn = np.random.Generator(np.random.PCG64(key)).integers(0, 2, width).astype(np.float64)
    return 2.0 * drawn - 1.0


def _spread(
    start: NDArray[np.float64], pairs: NDArray[np.int64], steps: int
) -> NDArray[np.float64]:
    """The rows after `steps` averagings along edges and with themselves."""
    degree = np.ones(len(start), np.float64)
    np.add.at(degree, pairs.ravel(), 1.0)
    weight = 1.0 / np.sqrt(degree[pairs[:, 0]] * degree[pairs[:, 1]])
    rows = start
    for _ in range(steps):
        after = rows / degree[:, None]
        np.add.at(after, pairs[:, 0], rows[pairs[:, 1]] * weight[:, None])
        np.add.at(after, pairs[:, 1], rows[pairs[:, 0]] * weight[:, None])
        rows = after
    return rows


def _reached(count: int, pairs: NDArray[np.int64], first: Sequence[int]) -> NDArray[np.bool_]:
    """Which nodes hang together with a node of the graph's own edges."""
    found = np.zeros(count, bool)
    found[list(first)] = True
    while True:
        joined = found[pairs].any(axis=1)
        if found[pairs[joined]].all():
            return found
        found[pairs[joined].ravel()] = True
