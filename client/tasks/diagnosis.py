"""The task `diagnosis`: one label, or several, for each clinical note, by a pretrained encoder.

With tuning `head` the encoder never changes, so a note's features are computed once and kept in
memory; what trains, federates and is measured is the classifier alone. With every other tuning
the whole network runs. Either way the module's names are the stock model's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data.records import Record, by_patient
from client.devices import computes_in_bfloat16
from client.tasks.backbone import Backbone
from client.tasks.base import Index, owners_of
from client.tasks.network import Network, network_for
from client.tasks.outcomes import losses_of, measured, targets_of
from client.tasks.text import Encoder, Reading, batch_inputs
from common.metrics import scoring_of
from common.study import Study
from common.tasks.diagnosis import DiagnosisTask

__all__ = ["DiagnosisLearner", "invented_notes", "probe_of"]

_FORWARD_ROWS: Final = 32
# Invented notes of several lengths, two of one patient: what a model is tried on at admission.
_PROBE: Final = (
    ("first", "Cough and fever for three days."),
    (
        "second",
        "Known heart failure. " + "Breathless at night, ankles swollen, no chest pain. " * 4,
    ),
    ("second", "Feels better today."),
    ("third", "Fall at home; " + "no fracture seen, wound cleaned and dressed. " * 40),
)


@dataclass(frozen=True)
class _Notes:
    """Notes sorted by patient, as the model reads them.

    `patients[p] : patients[p + 1]` are a patient's records; `starts` likewise gives each
    record's rows. Cached features have one row for each record.
    """

    labels: torch.Tensor
    patients: Index
    starts: Index
    rows: tuple[tuple[int, ...], ...]
    features: torch.Tensor | None

    @property
    def patient_count(self) -> int:
        return len(self.patients) - 1


class DiagnosisLearner:
    """A site's notes and network, for training and measurement (`client.tasks.base.Learner`).

    Args:
        study: labels, reading, tuning and precision; nothing is learned from the data about
            which labels there are.
        train: records to learn from.
        held_out: records to measure on; no patient of `train`.
        backbone: shared by every site of the process.
        device: where the network runs.
        module: the module to work in; absent: one of its own. Learners that share one take
            turns: each use begins with loading the trainable parameters.

    Raises:
        DataError: a label is not in the study, or the backbone does not fit the study.
    """

    module: nn.Module

    def __init__(
        self,
        study: Study,
        train: Sequence[Record],
        held_out: Sequence[Record],
        backbone: Backbone,
        *,
        device: torch.device,
        module: nn.Module | None = None,
    ) -> None:
        self._study, self._backbone = study, backbone
        self._device = device
        self._scoring = scoring_of(study)
        self._network = network_for(study, backbone, device)
        self._pad = int(backbone.tokenizer.pad_token_id or 0)
        self._private = study.privacy.mode != "none"
        self._half_features = not self._private and _half_features(study.network.precision, device)
        encoder = Encoder(backbone.tokenizer, Reading.of(study.diagnosis))
        self._train = self._prepare(train, encoder)
        self._held_out = self._prepare(held_out, encoder)
        self.module = self._network.replica() if module is None else module
        self._row_record = _members_of(self._train.starts)
        self._row_weight = _row_weights(self._train)

    @property
    def network(self) -> Network:
        """The shared network behind this learner."""
        return self._network

    def probe(self) -> DiagnosisLearner:
        """The same network over fixed public notes (see `Probing`)."""
        return probe_of(self._study, self._backbone, self._device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, sorted by name."""
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name] for name in self._network.names}

    def patient_count(self) -> int:
        """Patients to learn from."""
        return self._train.patient_count

    def held_out_count(self) -> int:
        """Patients to measure on."""
        return self._held_out.patient_count

    def rows_of(self, patients: Index) -> tuple[Index, Index]:
        """The rows of `patients` and whose each is (see `Learner`)."""
        notes = self._train
        if notes.features is not None:
            return owners_of(notes.patients, patients)
        return owners_of(notes.starts[notes.patients], patients)

    def losses(self, rows: Index) -> torch.Tensor:
        """The outcome's loss of each row; the rows of one note share their note's loss.

        Runs in the caller's precision: whoever clips must know it.

        Shapes: rows (r,) int64; returns (r,) float32.
        """
        notes = self._train
        if notes.features is not None:
            at = torch.from_numpy(rows).to(self._device)
            logits = self.module(notes.features[at]).float()
            return losses_of(self._study.task.outcome, logits, notes.labels[at])
        logits = self._forward(self.module, [notes.rows[row] for row in rows])
        distinct, where = np.unique(self._row_record[rows], return_inverse=True)
        place = torch.from_numpy(where).to(self._device)
        counts = torch.from_numpy(np.bincount(where)).to(self._device, logits.dtype)
        pooled = _sum_by(logits, place, len(distinct)) / counts[:, None]
        labels = notes.labels[torch.from_numpy(distinct).to(self._device)]
        losses = losses_of(self._study.task.outcome, pooled, labels)[place]
        weight = torch.from_numpy(self._row_weight[rows]).to(self._device)
        return losses * weight

    def measure(self) -> NDArray[np.float64]:
        """The metric vector over held-out patients (see `Learner`).

        Shapes: (M,) float64.
        """
        total: NDArray[np.float64] = self.measure_patients().sum(axis=0)
        return total

    def measure_patients(self) -> NDArray[np.float64]:
        """The same by held-out patient, where the scoring is. Shapes: (P, M), or (1, M) summed."""
        notes = self._held_out
        if notes.patient_count == 0:
            return np.zeros((0, self._scoring.length))
        with torch.no_grad():
            logits = self._logits(notes)
        return measured(
            self._study.task.outcome,
            self._scoring,
            logits,
            notes.labels,
            notes.patients,
            loss_cap=self._study.evaluation.loss_cap,
        )

    def _prepare(self, records: Sequence[Record], encoder: Encoder) -> _Notes:
        groups = by_patient(records)
        order = [records[at] for group in groups.values() for at in group]
        sizes = [0, *(len(group) for group in groups.values())]
        encoded = encoder([record.text for record in order])
        labels = targets_of(self._study.task.outcome, order)
        features = None
        if self._network.extractor is not None:
            features = self._pool(self._features(encoded.rows), encoded.starts)
        return _Notes(
            labels=labels.to(self._device),
            patients=np.cumsum(sizes, dtype=np.int64),
            starts=encoded.starts,
            rows=() if features is not None else encoded.rows,
            features=features,
        )

    def _features(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        extractor = self._network.extractor
        if extractor is None:
            raise RuntimeError("features are kept for tuning: head alone")
        half = self._half_features
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            return self._in_batches(extractor, rows)

    def _logits(self, notes: _Notes) -> torch.Tensor:
        if notes.features is None:
            return self._pool(self._in_batches(self.module, notes.rows), notes.starts)
        size = 1 if self._private else len(notes.features)
        pieces = torch.split(notes.features, size)
        return torch.cat([self.module(piece).float() for piece in pieces])

    def _in_batches(self, module: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Outputs in the order of `rows`; rows of like length share a batch.

        Guarantee: under privacy every row goes alone and unpadded. In a shared batch, width and
        kernels depend on the neighbours, and so would the last bits of a patient's features, or
        which side of a boundary a note falls on: one patient would change what others give.
        """
        if self._private:
            return self._one_by_one(module, rows)
        order = np.argsort([len(row) for row in rows], kind="stable")
        parts = [
            self._forward(module, [rows[at] for at in order[first : first + _FORWARD_ROWS]])
            for first in range(0, len(order), _FORWARD_ROWS)
        ]
        if not parts:
            return torch.zeros(0, 1, device=self._device)
        back = torch.from_numpy(np.argsort(order, kind="stable")).to(self._device)
        return torch.cat(parts)[back]

    def _one_by_one(self, module: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        if not rows:
            return torch.zeros(0, 1, device=self._device)
        return torch.cat([self._forward(module, [row]) for row in rows])

    def _forward(self, module: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids, mask = batch_inputs(rows, self._pad)
        inputs = self._network.inputs(ids.to(self._device), mask.to(self._device))
        output: torch.Tensor = module(**inputs).logits
        return output.float()

    def _pool(self, values: torch.Tensor, starts: Index) -> torch.Tensor:
        """The mean over each record's rows. The classifier is linear: features or logits alike."""
        records = len(starts) - 1
        if len(values) == records:
            return values
        place = torch.from_numpy(_members_of(starts)).to(self._device)
        counts = torch.from_numpy(np.diff(starts)).to(self._device, values.dtype)
        return _sum_by(values, place, records) / counts[:, None]


def _half_features(precision: str, device: torch.device) -> bool:
    """Whether frozen features are computed in bfloat16, in a study without privacy."""
    return precision == "bfloat16" or (precision == "auto" and computes_in_bfloat16(device))


def _members_of(starts: Index) -> Index:
    """For each member the group it belongs to, where group g holds starts[g] to starts[g + 1]."""
    return np.repeat(np.arange(len(starts) - 1, dtype=np.int64), np.diff(starts))


def _row_weights(notes: _Notes) -> NDArray[np.float32]:
    """Weights by which the mean over a patient's rows is the mean over the patient's notes.

    A patient has R rows in N notes, a note W of them: its rows weigh R / (N W); all ones where
    every note is one row.
    """
    windows = np.diff(notes.starts)
    counts = np.diff(notes.patients)
    rows = np.diff(notes.starts[notes.patients])
    owner = _members_of(notes.patients)
    by_note = rows[owner] / (counts[owner] * windows)
    return np.repeat(by_note, windows).astype(np.float32)


def _sum_by(values: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
    total = values.new_zeros(count, values.shape[1])
    return total.index_add(0, place, values)


def invented_notes(task: DiagnosisTask, notes: Sequence[tuple[str, str]]) -> tuple[Record, ...]:
    """Records of invented notes, (patient, text), with some answer of the task."""
    labels = task.labels
    return tuple(
        Record(
            patient,
            text,
            None if task.several else labels[at % len(labels)],
            None,
            "probe",
            at + 1,
            labels=labels[at % len(labels) :: 2] if task.several else (),
        )
        for at, (patient, text) in enumerate(notes)
    )


def probe_of(study: Study, backbone: Backbone, device: torch.device) -> DiagnosisLearner:
    """The study's network over fixed public notes: what is tried before anybody's records are."""
    records = invented_notes(study.diagnosis, _PROBE)
    return DiagnosisLearner(study, records, (), backbone, device=device)
