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

__all__ = ["Learner", "Normalising", "Probing", "Varying", "owners_of"]

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

        Shapes: (M,) float64, as the study's scoring says (common/metrics.py).
        Guarantee: each patient changes it by at most the scoring's sensitivity.
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


@runtime_checkable
class Varying(Protocol):
    """A learner whose inputs may be varied at random while they train, never when measured."""

    @property
    def varies(self) -> bool:
        """Whether the study varies anything at all."""
        ...

    def vary(self, key: int | None) -> None:
        """Vary as `key` says in every call of `losses` from now on; None: as the records are.

        Args:
            key: 64 random bits, new in each step.

        Guarantee: for every key, a row's variation depends on that row's patient and place alone.
            It is the same in every call, so that whatever passes an engine makes over a record
            within a step see the same inputs; and nobody's depends on who else is there, so that
            the sensitivity of a step is untouched.
        """
        ...


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
