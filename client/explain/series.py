"""Which hour and which measurement of a trajectory raise or lower the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.explain.attribution import Mask, Target, deletion, integrated_gradients, scorer, still
from client.explain.facts import Found
from client.tasks.outcomes import answers

__all__ = ["Grid", "SeriesExplanation", "explain_series"]

Array = NDArray[np.float64]

_CELLS_AT_ONCE: Final = 1 << 16
BLANK: Final = "the federation's mean everywhere, nothing measured"


@dataclass(frozen=True)
class Grid:
    """A trajectory's hours and measurements.

    Shapes:
        values: (T, F) as measured, NaN where nothing was. latest: (T, F) the hour whose
            measurement still holds in an hour, -1 before the first.
    """

    names: tuple[str, ...]
    values: Array
    latest: NDArray[np.int64]

    @staticmethod
    def of(names: Sequence[str], values: Array) -> Grid:
        """The grid of a trajectory in which a measurement holds until the next."""
        hours = np.arange(len(values))[:, None]
        latest = np.maximum.accumulate(np.where(np.isnan(values), -1, hours), axis=0)
        return Grid(tuple(names), values, latest)


@dataclass(frozen=True)
class SeriesExplanation:
    """Attributions by hour and measurement, (T, F): each at the hour that was measured."""

    grid: Grid
    values: Array
    found: Found

    @property
    def by_hour(self) -> Array:
        """(T,)."""
        total: Array = self.values.sum(axis=1)
        return total

    @property
    def by_measurement(self) -> Array:
        """(F,)."""
        total: Array = self.values.sum(axis=0)
        return total


def explain_series(
    network: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    grid: Grid,
    *,
    places: Sequence[int] = (0,),
    start: tuple[int, int] | None = None,
    blanked: Callable[[Array], Sequence[Tensor]] | None = None,
) -> SeriesExplanation:
    """Integrated gradients of one trajectory; what is carried forward counts for its own hour.

    Args:
        network: of the inputs.
        inputs: one row each; those at `places` are (1, T, F) and blank at 0.
        target: what is explained.
        grid: the same trajectory as it was measured.
        places: which inputs tell of hours and measurements.
        start: (place, feature) of an input (1, 1) that repeats this feature's last measurement.
        blanked: the inputs, k rows each, of k trajectories (k, T, F) with NaN where a measurement
            is blanked; absent: the inputs at `places` become 0 there.
    """
    given = [*places, *([] if start is None else [start[0]])]
    chosen = tuple(inputs[place].float() for place in given)
    at_once = _CELLS_AT_ONCE // max(sum(tensor.numel() for tensor in chosen), 1)
    measured = np.argwhere(~np.isnan(grid.values))

    def chances(kept: Mask) -> Array:
        lost = np.broadcast_to(grid.values, (len(kept), *grid.values.shape)).copy()
        row, part = np.nonzero(~kept)
        lost[row, measured[part, 0], measured[part, 1]] = np.nan
        rows = _zeroed(inputs, places, lost) if blanked is None else blanked(lost)
        with torch.no_grad():
            return target.chances(network(*rows))

    with still(network):
        score = scorer(network, inputs, target, given)
        blanks = tuple(torch.zeros_like(tensor) for tensor in chosen)
        # cuDNN goes backward through recurrent layers only where they train.
        with torch.backends.cudnn.flags(enabled=False):
            attributed = integrated_gradients(score, chosen, blanks, at_once=at_once)
        raw = np.sum([attributed.values[at] for at in range(len(places))], axis=0)
        values = _to_measurement(raw, grid.latest)
        if start is not None:
            feature = start[1]
            last = max(int(grid.latest[-1, feature]), 0)
            values[last, feature] += float(attributed.values[-1].sum())
        with torch.no_grad():
            answer = answers(target.outcome, network(*inputs))[0]
        curve = deletion(chances, values[measured[:, 0], measured[:, 1]])
    found = Found(answer, target.name, target.unit, BLANK, attributed.balance, curve)
    return SeriesExplanation(grid, values, found)


def _to_measurement(raw: Array, latest: NDArray[np.int64]) -> Array:
    """Move every cell's share to the hour whose measurement holds there."""
    values = np.zeros_like(raw)
    hour, feature = np.indices(raw.shape)
    np.add.at(values, (np.where(latest < 0, hour, latest), feature), raw)
    return values


def _zeroed(inputs: Sequence[Tensor], places: Sequence[int], lost: Array) -> list[Tensor]:
    there = torch.from_numpy(~np.isnan(lost))
    rows = []
    for place, tensor in enumerate(inputs):
        wide = tensor.expand(len(lost), *tensor.shape[1:])
        rows.append(wide * there.to(tensor.device) if place in places else wide)
    return rows
