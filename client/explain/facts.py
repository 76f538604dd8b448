"""What every explanation tells, whatever the input: no torch, so that a page needs none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Balance", "Curve", "Found"]

_TOLERANCE: Final = 0.02
_PART: Final = 0.05
PATHS: Final = "integrated gradients, points:"


@dataclass(frozen=True, slots=True)
class Balance:
    """Whether attributions add up: their sum should be score - baseline.

    Units:
        total: the sum of all attributions. score, baseline: the explained score of the record and
            of the blank record. steps: points of the path between them, or orders of the parts
            (`method` says which).
    Source: Sundararajan et al. 2017, "completeness".
    """

    total: float
    score: float
    baseline: float
    steps: int
    method: str = PATHS

    @property
    def difference(self) -> float:
        """What the attributions should add up to."""
        return self.score - self.baseline

    @property
    def gap(self) -> float:
        """By how much they do not."""
        return abs(self.total - self.difference)

    @property
    def complete(self) -> bool:
        """Whether the gap is small beside what is explained."""
        return self.gap <= _TOLERANCE + _PART * abs(self.difference)


@dataclass(frozen=True, slots=True)
class Curve:
    """What becomes of the answer while parts of the record are blanked, most important first.

    Units:
        removed: shares of the parts, from 0 to 1. ours, random: the explained probability (or
            quantity, or risk) after blanking in the order of the attributions, and the mean over
            several random orders. area, random_area: their means over the shares.
    Source: Samek et al. 2017; Petsiuk et al. 2018 ("deletion").
    """

    removed: tuple[float, ...]
    ours: tuple[float, ...]
    random: tuple[float, ...]
    area: float
    random_area: float

    @property
    def gain(self) -> float:
        """How much faster than by chance the answer falls; above 0 is faithful."""
        return self.random_area - self.area


@dataclass(frozen=True, slots=True)
class Found:
    """The answer for one record, what of it is explained, and how far the explanation holds.

    `answer` is what `predict` tells (client/tasks/outcomes.py); `explained` names a label, or
    `value` or `risk`; `unit` says in what the attributions are counted; `blank` says what the
    record is compared with.
    """

    answer: Mapping[str, Any]
    explained: str
    unit: str
    blank: str
    balance: Balance
    curve: Curve
