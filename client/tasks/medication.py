"""The task `medication`: the drugs of a visit, by self-attention over its codes and a graph.

Two ways lead to the answer and are added. The direct one gives every code a weight for every drug
(a logistic regression); the other lets codes look at each other first, in few dimensions, so that
rare drugs learn from what they share with common ones. Where the study names a knowledge graph,
codes and drugs also bring public rows of it: a drug's likelihood then depends on how near it is to
the patient's codes. No dropout: admission compares gradients, and few codes are no place for it.
Source: Vaswani et al. 2017 (attention); Shang et al. 2019 (codes and a drug graph).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from client.data.records import Record
from client.knowledge.codes import CHAPTERS, tagged
from client.knowledge.shelf import graph_of
from client.knowledge.spread import node_rows
from client.knowledge.visits import seen, vocabulary
from client.tasks.rows import Encoded, described, first_values
from common.tasks.medication import MedicationTask

__all__ = [
    "Attention",
    "Medication",
    "architecture",
    "encode",
    "network",
    "probes",
]

_EMPTY: Final = 0
_VISIT: Final = 1  # stands first in every visit, also where no code is known
_SPECIAL: Final = 2
_HIDDEN: Final = -1e9  # attention to a place that is empty, before the softmax

_PROBE: Final = (
    ("first", (0, 1)),
    ("second", (1, 2, 3)),
    ("second", ()),
    ("third", (4,)),
)


def architecture(task: MedicationTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    facts = task.model_dump(exclude={"kind", "columns", "max_visits", "objective", "graph"})
    if task.graph is not None:
        facts["graph"] = task.graph.model_dump(exclude={"files"})
    return described("medication", facts)


# ---------------------------------------------------------------------- network


class Attention(nn.Module):
    """A block of self-attention with the norms before: (B, T, D) to (B, T, D).

    Empty places are looked at by nobody. Built of Linear and LayerNorm, each used once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.joined = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, codes: Tensor, present: Tensor) -> Tensor:
        """Shapes: codes (B, T, D), present (B, T) bool."""
        count, places, width = codes.shape
        normal = self.norm(codes)

        def parted(values: Tensor) -> Tensor:
            return values.view(count, places, self.heads, -1).transpose(1, 2)

        query, key, value = (parted(f(normal)) for f in (self.query, self.key, self.value))
        score = query @ key.transpose(2, 3) / math.sqrt(width / self.heads)
        look = score.masked_fill(~present[:, None, None], _HIDDEN).softmax(dim=3)
        mixed = (look @ value).transpose(1, 2).reshape(count, places, width)
        codes = codes + self.joined(mixed)
        return codes + cast("Tensor", self.narrow(torch.relu(self.wide(self.second_norm(codes)))))


class Medication(nn.Module):
    """Codes to drugs: (B, T) int64, 0 where empty and 1 first, to (B, L).

    Args:
        codes: how many the vocabulary has, the two special ones included.
        code_rows: (codes, G) the graph's numbers for codes, or None without a graph.
        drug_rows: (L, G) the same for drugs.
    """

    def __init__(
        self,
        task: MedicationTask,
        codes: int,
        code_rows: Tensor | None,
        drug_rows: Tensor | None,
    ) -> None:
        super().__init__()
        drugs, width = len(task.labels), task.width
        self.direct = nn.Embedding(codes, drugs, padding_idx=_EMPTY)
        self.embedding = nn.Embedding(codes, width, padding_idx=_EMPTY)
        self.blocks = nn.ModuleList([Attention(width, task.heads) for _ in range(task.layers)])
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, drugs)
        self.graph_in = self.graph_out = None
        self.register_buffer("code_rows", code_rows, persistent=False)
        self.register_buffer("drug_rows", drug_rows, persistent=False)
        if code_rows is not None:
            self.graph_in = nn.Linear(code_rows.shape[1], width, bias=False)
            self.graph_out = nn.Linear(width, code_rows.shape[1], bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        """The logit of every drug. A visit's depend on its own codes alone."""
        present = codes != _EMPTY
        weight = present.float().unsqueeze(2)
        rows = self.embedding(codes)
        if self.graph_in is not None:
            rows = rows + self.graph_in(cast("Tensor", self.code_rows)[codes])
        for block in self.blocks:
            rows = block(rows, present)
        whole = self.norm((rows * weight).sum(1) / weight.sum(1).sqrt())
        found = self.output(whole) + (self.direct(codes) * weight).sum(1)
        if self.graph_out is not None:
            found = found + self.graph_out(whole) @ cast("Tensor", self.drug_rows).T
        return cast("Tensor", found)


def network(task: MedicationTask) -> nn.Module:
    """The network with its first values; the first predictions favour no drug.

    Guarantee: the same bits on every machine.

    Raises:
        DataError: the study's graph has not been read (client/knowledge/shelf.py).
    """
    known = vocabulary(task)
    code_rows = drug_rows = None
    if task.graph is not None:
        names = (*known, *(tagged("atc", label) or label for label in task.labels))
        rows = node_rows(
            graph_of(task.graph), names, width=task.graph.width, steps=task.graph.steps
        )
        none = np.zeros((_SPECIAL, rows.shape[1]), np.float32)
        code_rows = torch.from_numpy(np.concatenate([none, rows[: len(known)]]))
        drug_rows = torch.from_numpy(rows[len(known) :].copy())
    module = Medication(task, _SPECIAL + len(known), code_rows, drug_rows)
    first_values(module)
    with torch.no_grad():
        module.embedding.weight.mul_(_EMBEDDING_SCALE)
        module.embedding.weight[_EMPTY].zero_()
        module.direct.weight.zero_()
        module.output.weight.zero_()
        if module.graph_out is not None:
            module.graph_out.weight.zero_()
    return module


_EMBEDDING_SCALE: Final = 5.0  # from 0.02 to 0.1


# ---------------------------------------------------------------------- records


def encode(task: MedicationTask, records: Sequence[Record]) -> Encoded:
    """The records' codes with the groups above them, finest first, as places in the vocabulary.

    Every row has the same length whatever the records hold, so that no patient's codes change
    another's arithmetic.

    Shapes: one tensor (N, max_codes + 1) int64.
    """
    place = {code: at + _SPECIAL for at, code in enumerate(vocabulary(task))}
    found = torch.zeros((len(records), task.max_codes + 1), dtype=torch.int64)
    for row, record in enumerate(records):
        known = [_VISIT, *seen(task, record, place, Counter())[: task.max_codes]]
        found[row, : len(known)] = torch.tensor(known)
    return Encoded(values=None, tensors=(found,))


def probes(task: MedicationTask) -> tuple[Record, ...]:
    """Four invented visits of three patients, one of them without any code."""
    known = vocabulary(task)
    return tuple(
        Record(
            patient,
            "",
            None,
            None,
            "probe",
            at + 1,
            labels=tuple(task.labels[at % len(task.labels) :: 2]),
            codes=tuple(_written(known[(n * 7 + at) % len(known)]) for n in codes),
        )
        for at, (patient, codes) in enumerate(_PROBE)
    )


def _written(code: str) -> str:
    """A code of the vocabulary as a record would hold it; a chapter by its first category."""
    system, _, rest = code.partition(":")
    if not rest.startswith("chapter-"):
        return code
    return f"{system}:{CHAPTERS[system][int(rest.removeprefix('chapter-')) - 1][0]}"
