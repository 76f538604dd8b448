"""Which rows of a batch belong to which patient, and sums and norms per patient."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Patients", "parted", "squared", "weighted", "wide", "without"]

_BLOCK: Final = 4096


class Patients:
    """The owners of a batch's rows among `count` patients.

    Shapes: owner (rows,) in 0 .. count - 1; a patient may have several rows, or none.
    """

    def __init__(self, owner: NDArray[np.int64], count: int, device: torch.device) -> None:
        sizes = np.bincount(owner, minlength=count) if len(owner) else np.zeros(count, np.int64)
        if len(owner) and (owner.min() < 0 or len(sizes) > count):
            raise ValueError("an owner lies outside the patients")
        self.rows = len(owner)
        self.count = count
        self.device = device
        self.single = self.rows == count and bool((owner == np.arange(count)).all())
        self._recent: list[tuple[Tensor, Tensor]] = []
        if self.single:
            return
        self._longest = int(sizes.max(initial=0))
        order = np.argsort(owner, kind="stable")
        starts = np.cumsum(sizes) - sizes
        place = np.empty_like(owner)
        place[order] = np.arange(self.rows) - starts[owner[order]]
        self._slot = _moved(owner * self._longest + place, device)
        self._owner = _moved(owner, device)
        self._weights = _moved(1.0 / sizes[owner], device) if self.rows else None

    def weights(self, losses: Tensor) -> Tensor:
        """What a row's loss counts in its patient's mean, (rows,)."""
        if self.single or self._weights is None:
            return torch.ones_like(losses)
        return self._weights.to(losses.dtype)

    def lengthen(self, rows: Tensor) -> Tensor:
        """(rows, T, d) to (patients, K * T, d): a patient's rows one after another, zero-padded."""
        if self.single:
            return rows
        padded = rows.new_zeros(self.count * self._longest, *rows.shape[1:])
        padded.index_copy_(0, self._slot, rows)
        return padded.reshape(self.count, self._longest * rows.shape[1], *rows.shape[2:])

    def total(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (patients, ...): the sum over a patient's rows."""
        if self.single:
            return rows
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self._owner, rows)

    def gram(self, values: Tensor) -> Tensor:
        """(P, T, d) to (P, T, T): every inner product of a patient's steps.

        The last two are remembered: layers that share an input (queries, keys and values), or
        an output gradient (token, position and segment tables; the two matrices of a recurrent
        layer), come one after another.
        """
        for last, gram in self._recent:
            if (
                last.data_ptr() == values.data_ptr()
                and last.shape == values.shape
                and last.stride() == values.stride()
            ):
                return gram
        gram = torch.bmm(values, values.mT)
        self._recent = [*self._recent[-1:], (values, gram)]
        return gram

    def forget(self) -> None:
        """Drop what `gram` remembers."""
        self._recent = []


def _moved(values: NDArray[np.int64] | NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: norms and sums of bfloat16 rows must not round the other patients."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def parted(values: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    """A view with one axis in two."""
    shape = (*values.shape[:axis], *sizes, *values.shape[axis + 1 :])
    return values.reshape(shape)


def squared(values: Tensor) -> Tensor:
    """Squared L2 norm per patient, (patients,) float64.

    In blocks: a float32 norm of millions of values at once is off by 1e-4, of blocks by 1e-8.
    """
    flat = values.reshape(values.shape[0], -1)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    total: Tensor = torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()
    if whole:
        blocks = flat[:, :whole].reshape(flat.shape[0], -1, _BLOCK)
        total = total + torch.linalg.vector_norm(blocks, dim=2).double().square().sum(1)
    return total


def without(values: Tensor, bad: Tensor | None) -> Tensor:
    """Zero where a patient is bad: zero times infinity is not zero."""
    if bad is None:
        return values
    return values.masked_fill(bad.reshape(-1, *[1] * (values.dim() - 1)), 0.0)


def weighted(factors: Tensor, values: Tensor, bad: Tensor | None) -> Tensor:
    """Sum over patients of factor times value, (patients, ...) to (...)."""
    flat = without(values, bad).reshape(values.shape[0], -1)
    total: Tensor = factors.to(flat.dtype) @ flat
    return total.reshape(values.shape[1:])
