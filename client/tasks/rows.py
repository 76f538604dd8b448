"""A learner over rows of tensors: everything a task needs but its network and its encoding.

A task of this kind is a module with four functions (`RowsTask`); grouping by patient, loss,
measurement, normalisation, admission, prediction and export follow from the study's outcome.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.records import Record, by_patient
from client.tasks.base import Index, owners_of
from client.tasks.outcomes import losses_of, measured, targets_of
from common.metrics import scoring_of
from common.statistics import StatisticsLayout, normalised, patient_words
from common.study import Study, Task

__all__ = [
    "Encoded",
    "RowsLearner",
    "RowsTask",
    "VaryingTask",
    "described",
    "drawn",
    "first_values",
    "initial_tensors",
    "inputs_of",
    "loaded",
    "probe_of",
    "rows_learner",
]

_BATCH: Final = 256
# Inputs are varied at admission too: a variation that mixes patients is found there.
_PROBE_KEY: Final = 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Encoded:
    """Records as a network's inputs.

    Shapes:
        values: (N, F) or (N, T, F) numbers as parts of their public ranges, NaN where missing; they
            are normalised by the statistics of all hospitals, missing ones become 0, and go first.
            None: the task has no numeric features.
        tensors: further inputs, N rows each.
    """

    values: Values | None
    tensors: tuple[torch.Tensor, ...] = ()


class RowsTask(Protocol):
    """What a task's module offers; `task` is its section of the study."""

    def architecture(self, task: Any) -> tuple[bytes, str]:
        """(digest, description) of the network: what stands for a backbone in the study bundle."""
        ...

    def network(self, task: Any) -> nn.Module:
        """The network at its first values, the same bits on every machine.

        Its outputs are (rows, outcome.outputs); a row's depend on that row alone.
        """
        ...

    def encode(self, task: Any, records: Sequence[Record]) -> Encoded:
        """The records as inputs, each by itself. Raises DataError naming file and line."""
        ...

    def probes(self, task: Any) -> tuple[Record, ...]:
        """Invented records of three patients or more, on which a network is tried at admission."""
        ...


@runtime_checkable
class VaryingTask(Protocol):
    """What a task's module offers besides, where training inputs may be varied at random."""

    def draws(self, task: Any) -> int:
        """Numbers that the variation of one row takes; 0: the study varies nothing."""
        ...

    def augment(
        self, task: Any, inputs: tuple[torch.Tensor, ...], numbers: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The same inputs, row i varied by numbers[i] in [0, 1) and by nothing else."""
        ...


def drawn(key: int, rows: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) for each row, a function of `key` and the row's own name.

    Shapes: rows (r,) names; returns (r, count).
    Source: SplitMix64 (Steele, Lea and Flood 2014).
    """
    place = np.arange(1, count + 1, dtype=np.uint64)
    start = _mixed(rows ^ np.full(1, key, np.uint64))
    words = _mixed(start[:, None] + place * _GOLDEN)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _row_names(groups: Mapping[str, Sequence[int]]) -> NDArray[np.uint64]:
    """64 bits for each row, of its patient and its place among the patient's rows."""
    found = [
        hashlib.sha256(f"{place} {patient}".encode()).digest()[:8]
        for patient, rows in groups.items()
        for place in range(len(rows))
    ]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def described(kind: str, facts: Mapping[str, Any]) -> tuple[bytes, str]:
    """(digest, canonical JSON) of what makes a network."""
    text = json.dumps({"format": f"wardround-{kind}/1", **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).digest(), text


def first_values(module: nn.Module) -> nn.Module:
    """Set a network's parameters to public first values; returns it.

    Matrices and kernels are uniform within sqrt(6 / fan-in), embeddings normal, from a stream
    keyed by the parameter's name; scales are one, biases zero. A task may set others after.

    Guarantee: the same bits on every machine. Source: He et al. 2015.
    """
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        key = int.from_bytes(hashlib.sha256(b"wardround/1/first " + name.encode()).digest()[:8])
        stream = np.random.Generator(np.random.PCG64(key))
        shape = tuple(parameter.shape)
        if isinstance(owner, nn.Embedding):
            drawn = stream.standard_normal(shape) * 0.02
        elif parameter.ndim > 1:
            bound = np.sqrt(6.0 / np.prod(shape[1:]))
            drawn = (2.0 * stream.random(shape) - 1.0) * bound
        else:
            scale = isinstance(owner, nn.LayerNorm | nn.GroupNorm) and name.endswith("weight")
            drawn = np.full(shape, 1.0 if scale else 0.0)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return module


def initial_tensors(code: RowsTask, task: Task) -> dict[str, NDArray[np.float32]]:
    """The first weights, by name."""
    named = sorted(code.network(task).named_parameters())
    return {name: parameter.detach().numpy().copy() for name, parameter in named}


def loaded(code: RowsTask, task: Task, weights: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """The network with these weights. Raises ValueError where they do not fit."""
    module = code.network(task).eval()
    parameters = dict(module.named_parameters())
    if {n: tuple(p.shape) for n, p in parameters.items()} != {
        n: tuple(v.shape) for n, v in weights.items()
    }:
        raise ValueError("the weights are another network's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
    return module.requires_grad_(False)  # noqa: FBT003


def inputs_of(
    encoded: Encoded, mean: NDArray[np.float32], deviation: NDArray[np.float32]
) -> tuple[torch.Tensor, ...]:
    """All inputs of the network, values normalised. Shapes: mean and deviation (F,)."""
    if encoded.values is None:
        return encoded.tensors
    flat = encoded.values.reshape(-1, encoded.values.shape[-1])
    values = normalised(flat, mean, deviation).reshape(encoded.values.shape)
    return (torch.from_numpy(values), *encoded.tensors)


class _Rows:
    """Rows sorted by patient; `patients[p] : patients[p + 1]` are one patient's."""

    def __init__(
        self, code: RowsTask, study: Study, records: Sequence[Record], device: torch.device
    ) -> None:
        groups = by_patient(records)
        order = [records[at] for group in groups.values() for at in group]
        sizes = [0, *(len(group) for group in groups.values())]
        self.patients: Index = np.cumsum(sizes, dtype=np.int64)
        self.groups = groups
        self.encoded = code.encode(study.task, order)
        self.targets = targets_of(study.task.outcome, order).to(device)
        self.inputs: tuple[torch.Tensor, ...] = ()
        self._device = device

    @property
    def patient_count(self) -> int:
        return len(self.patients) - 1

    def normalise(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        found = inputs_of(self.encoded, mean, deviation)
        self.inputs = tuple(tensor.to(self._device) for tensor in found)

    def at(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[rows] for tensor in self.inputs)


class RowsLearner:
    """A site's rows and network (`client.tasks.base.Learner`).

    Args:
        code: the task's module.
        study: the study.
        train: records to learn from.
        held_out: records to measure on; no patient of `train`.
        device: where the network runs.
        module: the module to work in; absent: one of its own. Learners that share one take
            turns: each use begins with loading the trainable parameters.

    Raises:
        DataError: a record does not fit the study.
    """

    module: nn.Module

    def __init__(
        self,
        code: RowsTask,
        study: Study,
        train: Sequence[Record],
        held_out: Sequence[Record],
        *,
        device: torch.device,
        module: nn.Module | None = None,
    ) -> None:
        self._code, self._study, self._device = code, study, device
        self._scoring = scoring_of(study)
        self._losses = partial(losses_of, study.task.outcome)
        self._train = _Rows(code, study, train, device)
        self._held_out = _Rows(code, study, held_out, device)
        self.module = code.network(study.task).to(device) if module is None else module
        self._key: int | None = None
        self._names = _row_names(self._train.groups) if self.varies else np.zeros(0, np.uint64)
        # The identity, until the statistics of all hospitals arrive.
        count = study.feature_count
        self._normalise(np.zeros(count, np.float32), np.ones(count, np.float32))

    def probe(self) -> RowsLearner:
        """The same network over the task's invented records (see `Probing`)."""
        return probe_of(self._code, self._study, self._device)

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
        """The loss of each row. Shapes: rows (r,) int64; returns (r,) float32."""
        at = torch.from_numpy(rows).to(self._device)
        inputs = self._train.at(at)
        if self._key is not None and isinstance(self._code, VaryingTask):
            numbers = drawn(self._key, self._names[rows], self._code.draws(self._study.task))
            varied = torch.from_numpy(numbers).to(self._device)
            inputs = self._code.augment(self._study.task, inputs, varied)
        return self._losses(self.module(*inputs), self._train.targets[at])

    @property
    def varies(self) -> bool:
        """Whether the study varies training inputs (see `Varying`)."""
        return isinstance(self._code, VaryingTask) and self._code.draws(self._study.task) > 0

    def vary(self, key: int | None) -> None:
        """Vary training inputs as `key` says, or not at all (see `Varying`)."""
        self._key = key if self.varies else None

    def _normalise(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        for rows in (self._train, self._held_out):
            rows.normalise(mean, deviation)

    def measure(self) -> NDArray[np.float64]:
        """The metric vector over held-out patients (see `Learner`). Shapes: (M,)."""
        total: NDArray[np.float64] = self.measure_patients().sum(axis=0)
        return total

    def measure_patients(self) -> NDArray[np.float64]:
        """The same by held-out patient, where the scoring is. Shapes: (P, M), or (1, M) summed."""
        rows = self._held_out
        if rows.patient_count == 0:
            return np.zeros((0, self._scoring.length))
        with torch.no_grad():
            outputs = torch.cat([self.module(*rows.at(part)).float() for part in self._parts()])
        return measured(
            self._study.task.outcome,
            self._scoring,
            outputs,
            rows.targets,
            rows.patients,
            loss_cap=self._study.evaluation.loss_cap,
        )

    def _parts(self) -> list[torch.Tensor]:
        """Held-out rows that share a forward pass.

        Guarantee: under privacy a patient's rows go alone: in a shared batch the last bits of an
        output depend on the batch's size, and so on who else is held out.
        """
        patients = self._held_out.patients
        rows = torch.arange(int(patients[-1]), device=self._device)
        if self._study.privacy.mode == "none":
            return list(torch.split(rows, _BATCH))
        return list(torch.split(rows, np.diff(patients).tolist()))


class NormalisedRowsLearner(RowsLearner):
    """A learner of numeric features (`client.tasks.base.Normalising`)."""

    def statistic_words(self) -> NDArray[np.int64]:
        """The statistic words over training patients (see `Normalising`). Shapes: (3F,)."""
        values = self._train.encoded.values
        if values is None:
            raise TypeError("this task has no numeric features")
        total = np.zeros(StatisticsLayout(values.shape[-1]).words, np.int64)
        starts = self._train.patients
        for first, last in pairwise(starts):
            total += patient_words(values[first:last].reshape(-1, values.shape[-1]))
        return total

    def set_statistics(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        """Normalise by these from now on (see `Normalising`). Shapes: (F,) each."""
        self._normalise(mean, deviation)


def probe_of(code: RowsTask, study: Study, device: torch.device) -> RowsLearner:
    """The study's network over the task's invented records: tried before anybody's are."""
    made = rows_learner(code, study, code.probes(study.task), (), device=device)
    made.vary(_PROBE_KEY)
    return made


def rows_learner(
    code: RowsTask,
    study: Study,
    train: Sequence[Record],
    held_out: Sequence[Record],
    *,
    device: torch.device,
    module: nn.Module | None = None,
) -> RowsLearner:
    """The learner of a study's task (see `RowsLearner`)."""
    made = NormalisedRowsLearner if study.feature_count else RowsLearner
    return made(code, study, train, held_out, device=device, module=module)
