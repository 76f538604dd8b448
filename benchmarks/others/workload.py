"""The training that every simulator does: an MLP 32-64-2 at ten hospitals of 200 rows each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

SITES, ROWS, BATCH, LABELS = 10, 200, 20, 2
SHAPES = ((32, 64), (64, LABELS))
RATE = 0.05


class Mlp(nn.Sequential):
    """The model, with the same first weights in every process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(*SHAPES[0]), nn.ReLU(), nn.Linear(*SHAPES[1]))


@cache
def hospital(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and labels of a hospital, 0 to 9."""
    stream = np.random.default_rng(number)
    inputs = torch.from_numpy(stream.normal(size=(ROWS, SHAPES[0][0])).astype(np.float32))
    return inputs, torch.from_numpy(stream.integers(0, LABELS, ROWS))


def train(model: nn.Module, number: int) -> None:
    """One local epoch at a hospital, rows indexed by hand: the leanest loop a user would write."""
    inputs, targets = hospital(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = nn.CrossEntropyLoss()
    order = torch.randperm(ROWS)
    for start in range(0, ROWS, BATCH):
        at = order[start : start + BATCH]
        optimizer.zero_grad(set_to_none=True)
        loss(model(inputs[at]), targets[at]).backward()
        optimizer.step()


def loss_of(state: Mapping[str, Any]) -> float:
    """Mean loss of a model over all 2000 rows: the same on every platform if the work was."""
    model = Mlp()
    model.load_state_dict({n: torch.as_tensor(np.asarray(v)) for n, v in state.items()})
    told = [hospital(number) for number in range(SITES)]
    with torch.no_grad():
        logits = model(torch.cat([inputs for inputs, _ in told]))
        return float(nn.functional.cross_entropy(logits, torch.cat([t for _, t in told])))


def reference_loss(rounds: int) -> float:
    """`loss_of` the model after as many rounds of federated averaging in a plain loop."""
    model = Mlp()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(rounds):
        total = {n: torch.zeros_like(v) for n, v in state.items()}
        for number in range(SITES):
            model.load_state_dict(state)
            train(model, number)
            for n, p in model.named_parameters():
                total[n] += p.detach()
        state = {n: v / SITES for n, v in total.items()}
    return loss_of(state)
