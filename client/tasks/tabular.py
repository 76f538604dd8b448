"""The task `tabular`: one label for each row of numbers, by a perceptron or logistic regression.

A value is scaled by its feature's public bounds and then normalised by mean and deviation over
all hospitals, which arrive with the model's state. Nothing of this site's own data enters the
normalisation: a statistic of one's own would make every row depend on every patient.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.records import Record, by_patient
from client.tasks.base import Index, metric_vector, owners_of, spread_evenly
from common.errors import Code, DataError
from common.metrics import metric_length
from common.statistics import StatisticsLayout, normalised, patient_words, scaled
from common.study import Feature, Study, TabularTask

__all__ = ["TabularLearner", "architecture", "bounds", "initial_tensors", "perceptron"]

MODEL_TYPE: Final = "wardround-tabular/1"
_INITIAL_STREAM: Final = 20_240_601  # any constant: the first weights are public

Values = NDArray[np.float64]


def bounds(features: Sequence[Feature]) -> tuple[Values, Values]:
    """The declared ranges, low (F,) and high (F,)."""
    return (
        np.array([feature.low for feature in features], np.float64),
        np.array([feature.high for feature in features], np.float64),
    )


def architecture(task: TabularTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    found: dict[str, Any] = {
        "format": MODEL_TYPE,
        "features": [feature.model_dump() for feature in task.features],
        "hidden": list(task.hidden),
        "labels": list(task.labels),
    }
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).digest(), text


def perceptron(features: int, hidden: Sequence[int], labels: int) -> nn.Sequential:
    """Linear layers with ReLU between them: (B, F) to (B, L)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = features
    for number, size in enumerate(hidden, start=1):
        layers[f"hidden{number}"] = nn.Linear(width, size)
        layers[f"relu{number}"] = nn.ReLU()
        width = size
    layers["output"] = nn.Linear(width, labels)
    return nn.Sequential(layers)


def initial_tensors(task: TabularTask) -> dict[str, NDArray[np.float32]]:
    """The first weights, by name.

    Hidden weights are uniform within sqrt(6 / fan-in) from a fixed public stream; biases and
    the output layer are zero, so the first predictions favour no label.

    Guarantee: the same bits on every machine. Source: He et al. 2015.
    """
    stream = np.random.Generator(np.random.PCG64(_INITIAL_STREAM))
    tensors: dict[str, NDArray[np.float32]] = {}
    width = len(task.features)
    for number, size in enumerate(task.hidden, start=1):
        bound = np.sqrt(6.0 / width)
        drawn = (2.0 * stream.random((size, width)) - 1.0) * bound
        tensors[f"hidden{number}.weight"] = drawn.astype(np.float32)
        tensors[f"hidden{number}.bias"] = np.zeros(size, np.float32)
        width = size
    tensors["output.weight"] = np.zeros((len(task.labels), width), np.float32)
    tensors["output.bias"] = np.zeros(len(task.labels), np.float32)
    return tensors


# Where between its bounds every feature lies: what a model is tried on at admission.
_PROBE = (("first", 0.1), ("second", 0.5), ("second", 0.8), ("third", 0.95))


class _Rows:
    """Rows sorted by patient; `patients[p] : patients[p + 1]` are one patient's."""

    def __init__(self, task: TabularTask, records: Sequence[Record], device: torch.device) -> None:
        groups = by_patient(records)
        order = [records[at] for group in groups.values() for at in group]
        sizes = [0, *(len(group) for group in groups.values())]
        self.patients: Index = np.cumsum(sizes, dtype=np.int64)
        self.labels = torch.tensor([_label(task, r) for r in order], dtype=torch.int64).to(device)
        values = np.array([record.values for record in order], np.float64)
        self.part = scaled(values.reshape(len(order), len(task.features)), *bounds(task.features))
        self.inputs = torch.zeros(self.part.shape, dtype=torch.float32, device=device)

    @property
    def patient_count(self) -> int:
        return len(self.patients) - 1


def _label(task: TabularTask, record: Record) -> int:
    try:
        return task.labels.index(record.label or "")
    except ValueError:
        message = f"{record.where}: has a label that is not in the study."
        raise DataError(Code.DATA_LABEL, message) from None


class TabularLearner:
    """A site's rows and network (`client.tasks.base.Learner` and `Normalising`).

    Args:
        study: a study of kind tabular.
        train: records with values to learn from, in the order of the study's features.
        held_out: records to measure on; no patient of `train`.
        device: where the network runs.

    Raises:
        DataError: a label is not in the study.
    """

    module: nn.Module

    def __init__(
        self,
        study: Study,
        train: Sequence[Record],
        held_out: Sequence[Record],
        *,
        device: torch.device,
    ) -> None:
        task = study.tabular
        self._study = study
        self._loss_cap = study.evaluation.loss_cap
        self._layout = StatisticsLayout(len(task.features))
        self._train = _Rows(task, train, device)
        self._held_out = _Rows(task, held_out, device)
        self._labels = len(task.labels)
        self._device = device
        self.module = perceptron(len(task.features), task.hidden, len(task.labels)).to(device)
        with torch.no_grad():
            for name, value in initial_tensors(task).items():
                self.module.get_parameter(name).copy_(torch.from_numpy(value))
        start = self._layout.initial()
        self.set_statistics(*start.values())

    def probe(self) -> TabularLearner:
        """The same network over fixed rows within the study's public bounds (see `Probing`)."""
        return probe_of(self._study, self._device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, sorted by name."""
        return dict(sorted(self.module.named_parameters()))

    def patient_count(self) -> int:
        """Patients to learn from."""
        return self._train.patient_count

    def held_out_count(self) -> int:
        """Patients to measure on."""
        return self._held_out.patient_count

    def rows_of(self, patients: Index) -> tuple[Index, Index]:
        """The rows of `patients` and whose each is (see `Learner`)."""
        return owners_of(self._train.patients, patients)

    def losses(self, rows: Index) -> torch.Tensor:
        """Cross-entropy of each row. Shapes: rows (r,) int64; returns (r,) float32."""
        at = torch.from_numpy(rows).to(self._device)
        logits = self.module(self._train.inputs[at]).float()
        return nn.functional.cross_entropy(logits, self._train.labels[at], reduction="none")

    def measure(self) -> NDArray[np.float64]:
        """The metric vector over held-out patients (see `Learner`). Shapes: (L*L + 1,)."""
        rows = self._held_out
        if rows.patient_count == 0:
            return np.zeros(metric_length(self._labels))
        with torch.no_grad():
            logits = self.module(rows.inputs).float()
        return metric_vector(logits, rows.labels, spread_evenly(rows.patients), self._loss_cap)

    def statistic_words(self) -> NDArray[np.int64]:
        """The statistic words over training patients (see `Normalising`). Shapes: (3F,)."""
        total = np.zeros(self._layout.words, np.int64)
        rows = self._train
        for first, last in zip(rows.patients[:-1], rows.patients[1:], strict=True):
            total += patient_words(rows.part[first:last])
        return total

    def set_statistics(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        """Normalise every row by these (see `Normalising`). Shapes: (F,) float32 each."""
        for rows in (self._train, self._held_out):
            values = torch.from_numpy(normalised(rows.part, mean, deviation))
            rows.inputs = values.to(self._device)


def probe_of(study: Study, device: torch.device) -> TabularLearner:
    """The study's network over fixed public rows: what is tried before anybody's records are."""
    task = study.tabular
    low, high = bounds(task.features)
    records = [
        Record(
            patient,
            "",
            task.labels[at % len(task.labels)],
            None,
            "probe",
            at + 1,
            tuple(float(value) for value in low + part * (high - low)),
        )
        for at, (patient, part) in enumerate(_PROBE)
    ]
    return TabularLearner(study, records, (), device=device)
