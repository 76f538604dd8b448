"""Which numbers and categories of a row raise or lower the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.explain.attribution import Mask, Target, deletion, integrated_gradients, still
from client.explain.facts import Found
from client.tasks.outcomes import answers

__all__ = ["NumbersExplanation", "explain_numbers"]

_AT_ONCE: Final = 64
BLANK: Final = "the federation's mean of every number, and no category told"


@dataclass(frozen=True)
class NumbersExplanation:
    """One row's features: name, value as it is read, and attribution, in the model's order.

    `notes` are further lines for the reader.
    """

    names: tuple[str, ...]
    shown: tuple[str, ...]
    values: NDArray[np.float64]
    found: Found
    notes: tuple[str, ...] = ()


def explain_numbers(
    network: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    *,
    owner: NDArray[np.int64],
    names: Sequence[str],
    shown: Sequence[str],
) -> NumbersExplanation:
    """Integrated gradients of one row from the federation's mean.

    Args:
        network: of the row's inputs.
        inputs: (1, F) normalised numbers, then further columns (1, K); 0 is the blank everywhere.
        target: what is explained.
        owner: the feature that each column, over all inputs in order, belongs to.
        names: the features' names.
        shown: their values for people to read.

    Guarantee: a missing value counts as the mean and gets exactly 0.
    """
    widths = np.cumsum([tensor.shape[1] for tensor in inputs])[:-1]

    def outputs(rows: Tensor) -> Tensor:
        parts = torch.tensor_split(rows, widths.tolist(), dim=1)
        found: Tensor = network(*parts)
        return found

    row = torch.cat(list(inputs), dim=1)
    column = torch.from_numpy(owner).to(row.device)

    def chances(kept: Mask) -> NDArray[np.float64]:
        mask = torch.from_numpy(kept).to(row.device)[:, column]
        with torch.no_grad():
            return target.chances(outputs(row * mask))

    with still(network):
        attributed = integrated_gradients(
            lambda rows: target.score(outputs(rows)),
            (row,),
            (torch.zeros_like(row),),
            at_once=_AT_ONCE,
        )
        values = np.zeros(len(names))
        np.add.at(values, owner, attributed.values[0])
        with torch.no_grad():
            answer = answers(target.outcome, outputs(row))[0]
        curve = deletion(chances, values)
    found = Found(answer, target.name, target.unit, BLANK, attributed.balance, curve)
    return NumbersExplanation(tuple(names), tuple(shown), values, found)
