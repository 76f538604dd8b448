"""What a task owes to training: a module, its trainable tensors, and losses by record.

Training, privacy and evaluation know tasks only through `Learner`; a new task is a new module
beside this one, and nothing else changes.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["Learner", "Normalising", "Probing", "metric_vector", "owners_of", "spread_evenly"]

Index = NDArray[np.int64]


class Learner(Protocol):
    """One site's data and model, as training sees them.

    A *row* is one input of the model. Most records are one row; a long note read by windows is
    several. The mean of the losses of a patient's rows is the patient's loss (the mean over the
    notes), and so are the gradients. All rows of a patient belong into the same call of `losses`.
    """

    module: nn.Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, sorted by name: exactly the study layout's tensors."""
        ...

    def patient_count(self) -> int:
        """Patients to learn from; private, never leaves the site."""
        ...

    def held_out_count(self) -> int:
        """Patients to measure on; private, never leaves the site."""
        ...

    def rows_of(self, patients: Index) -> tuple[Index, Index]:
        """The rows of `patients`, and for each row the position of its patient in `patients`.

        Shapes: patients (p,) int64 in [0, patient_count()); returns two (r,) int64.
        """
        ...

    def losses(self, rows: Index) -> torch.Tensor:
        """The loss of every row, unreduced, with a graph to the trainable parameters.

        Shapes: rows (r,) int64, r >= 1; returns (r,) float32.
        Guarantee: a row's loss depends on rows of the same patient alone.
        """
        ...

    def measure(self) -> NDArray[np.float64]:
        """The metric vector of the module as it stands, over held-out patients, without noise.

        Shapes: (L*L + 1,) float64: confusion counts by (true, predicted), then the sum of
            min(loss, cap) / cap.
        Guarantee: each patient adds a total of 1 to the counts and at most 1 to the loss.
        """
        ...


@runtime_checkable
class Normalising(Protocol):
    """What a learner of numeric features offers besides."""

    def statistic_words(self) -> NDArray[np.int64]:
        """The statistic words over training patients, without noise (common.statistics).

        Shapes: (3F,) int64.
        Guarantee: one patient changes them by at most `StatisticsLayout.sensitivity` *
            STATISTIC_SCALE in L2.
        """
        ...

    def set_statistics(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        """Normalise by these from now on, and by nothing of this site's own.

        Shapes: (F,) float32 each.
        """
        ...


@runtime_checkable
class Probing(Protocol):
    """A learner that can be tried on public records instead of its site's own."""

    def probe(self) -> Learner:
        """The same network over a few fixed, public records.

        Guarantee: nothing about it depends on this site's patients, so that whether a model is
        admitted tells nothing about them.
        """
        ...


def metric_vector(
    logits: torch.Tensor, labels: torch.Tensor, weight: NDArray[np.float64], loss_cap: float
) -> NDArray[np.float64]:
    """The metric vector of weighted records (see `Learner.measure`).

    Shapes: logits (r, L), labels (r,) int64, weight (r,); returns (L*L + 1,) float64.
    """
    count = logits.shape[1]
    vector = np.zeros(count * count + 1)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    found = logits.argmax(dim=1).cpu().numpy()
    np.add.at(vector, labels.cpu().numpy() * count + found, weight)
    capped = np.nan_to_num(losses.double().cpu().numpy(), nan=loss_cap, posinf=np.inf)
    vector[-1] = float(weight @ np.minimum(capped, loss_cap)) / loss_cap
    return vector


def owners_of(starts: Index, chosen: Index) -> tuple[Index, Index]:
    """The members of chosen groups, where group g holds members starts[g] to starts[g + 1].

    Shapes: starts (groups + 1,) rising; chosen (p,); returns members (r,) and, for each, the
        position of its group in `chosen` (r,).
    """
    sizes = starts[chosen + 1] - starts[chosen]
    owner = np.repeat(np.arange(len(chosen), dtype=np.int64), sizes)
    first = np.cumsum(sizes) - sizes
    members = np.arange(len(owner), dtype=np.int64) - first[owner] + starts[chosen][owner]
    return members, owner


def spread_evenly(starts: Index) -> NDArray[np.float64]:
    """A weight for each member such that every group weighs 1 in total."""
    sizes = np.diff(starts)
    return np.repeat(1.0 / np.maximum(sizes, 1), sizes)
