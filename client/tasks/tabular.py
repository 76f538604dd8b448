"""The task `tabular`: a row of numbers and categories, by a perceptron or (logistic) regression.

A value is scaled by its feature's public bounds and then normalised by mean and deviation over
all hospitals, which arrive with the model's state. Nothing of this site's own data enters the
normalisation: a statistic of one's own would make every row depend on every patient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.records import Record
from client.tasks.rows import Encoded, described, first_values
from common.fields import Feature
from common.outcomes import Classes, Hazard
from common.statistics import scaled
from common.tasks.tabular import RowTerms, TabularTask

__all__ = ["architecture", "bounds", "encode", "invented", "network", "probes"]

# Where between its bounds every feature lies: what a model is tried on at admission.
_PROBE = (("first", 0.1), ("second", 0.5), ("second", 0.8), ("third", 0.95))


def architecture(task: TabularTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    facts: dict[str, Any] = {
        "features": [feature.model_dump() for feature in task.features],
        "categories": [found.model_dump(mode="json") for found in task.categories],
        "hidden": list(task.hidden),
        "outputs": task.outcome.outputs,
        "labels": list(task.labels),
    }
    if _proportional(task):
        facts["proportional"] = True
    return described(task.kind, facts)


class Perceptron(nn.Module):
    """Linear layers with ReLU between them. Shapes: (B, F), (B, K) to (B, outputs)."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = inputs
        for number, size in enumerate(hidden, start=1):
            layers[f"hidden{number}"] = nn.Linear(width, size)
            layers[f"relu{number}"] = nn.ReLU()
            width = size
        layers["output"] = nn.Linear(width, outputs)
        self._names = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, values: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        """The outputs of rows."""
        found = torch.cat([values, categories], dim=1)
        for name in self._names:
            found = self.get_submodule(name)(found)
        return found


class Proportional(Perceptron):
    """A perceptron that is told the interval beside its last layer: one score, T baselines.

    One linear layer reads (last layer, interval as zeros and a one) for each interval, so that
    the row's part of every logit is the same. Shapes: (B, F), (B, K) to (B, T).
    """

    def __init__(self, inputs: int, hidden: Sequence[int], intervals: int) -> None:
        super().__init__(inputs, hidden, 1)
        last = hidden[-1] if hidden else inputs
        self.output = nn.Linear(last + intervals, 1)
        self._intervals = intervals

    def forward(self, values: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        """The logit of each interval, for rows."""
        found = torch.cat([values, categories], dim=1)
        for name in self._names[:-1]:
            found = self.get_submodule(name)(found)
        count = self._intervals
        each = found[:, None].expand(-1, count, -1)
        places = torch.eye(count, dtype=found.dtype, device=found.device)
        both = torch.cat([each, places.expand(len(found), -1, -1)], dim=2)
        told: torch.Tensor = self.output(both)
        return told.squeeze(2)


def _proportional(task: TabularTask) -> bool:
    return task.survival is not None and task.survival.proportional


def network(task: TabularTask) -> nn.Module:
    """The perceptron at its first values: an output layer of zeros favours no answer."""
    kind = Proportional if _proportional(task) else Perceptron
    made = first_values(kind(task.inputs, task.hidden, task.outcome.outputs))
    with torch.no_grad():
        made.get_parameter("output.weight").zero_()
    return made


def bounds(features: Sequence[Feature]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The declared ranges, low (F,) and high (F,)."""
    return (
        np.array([feature.low for feature in features], np.float64),
        np.array([feature.high for feature in features], np.float64),
    )


def encode(task: RowTerms, records: Sequence[Record]) -> Encoded:
    """Values (N, F) as parts of their ranges, and categories (N, K) as zeros and ones."""
    values = np.array([record.values for record in records], np.float64)
    part = scaled(values.reshape(len(records), len(task.features)), *bounds(task.features))
    columns = []
    for at, category in enumerate(task.categories):
        told = [record.codes[at] for record in records]
        columns += [[float(value == one) for value in told] for one in category.values]
    found = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), len(records))
    return Encoded(part, (found.T.contiguous(),))


def probes(task: RowTerms) -> tuple[Record, ...]:
    """Fixed rows within the study's public bounds."""
    low, high = bounds(task.features)
    return tuple(
        invented(
            task.outcome,
            patient,
            at,
            values=tuple(float(value) for value in low + part * (high - low)),
            codes=tuple(one.values[at % len(one.values)] for one in task.categories),
        )
        for at, (patient, part) in enumerate(_PROBE)
    )


def invented(
    outcome: Any,
    patient: str,
    at: int,
    *,
    values: tuple[float, ...] = (),
    codes: tuple[str, ...] = (),
) -> Record:
    """An invented record with some answer of this outcome; number `at` of several."""
    label = outcome.labels[at % len(outcome.labels)] if isinstance(outcome, Classes) else None
    number = float(at)
    if isinstance(outcome, Hazard):
        number = outcome.edges[at % len(outcome.edges)] / 2
    return Record(
        patient,
        "",
        label,
        None,
        "probe",
        at + 1,
        values,
        labels=outcome.labels[at % 2 : at % 2 + 1],
        number=number,
        event=at % 2 == 0,
        codes=codes,
    )
