"""One case of one patient, as a task sees it, and where it was read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.errors import Code, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Record", "by_patient", "require_disjoint"]


@dataclass(frozen=True, slots=True)
class Record:
    """A note, a row of numbers, an image, a series, or a list of codes: whatever the task reads.

    What a task does not read is empty. What it is to predict is `label` (one class), `labels` (any
    of several), `number` (a quantity, or a time) with `event` (whether the time ended in one);
    they are missing where a file is read to be predicted.

    Shapes:
        values: numbers in the order of the study's features, NaN where one is missing. series:
        (T, F) the same by hour. image: (H, W) or (H, W, 3) uint8.
    `patient` is the unit of privacy. `groups` are the subgroups it is counted in.
    `file` and `line` (1-based; the row's number in Parquet) say where the record begins.
    """

    patient: str
    text: str
    label: str | None
    site: str | None
    file: str
    line: int
    values: tuple[float, ...] = ()
    encounter: str = ""
    labels: tuple[str, ...] = ()
    number: float = math.nan
    event: bool | None = None
    series: NDArray[np.float32] | None = field(default=None, compare=False)
    codes: tuple[str, ...] = ()
    image: NDArray[np.uint8] | None = field(default=None, compare=False)
    groups: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """`file:line`, for messages: never the record's content."""
        return f"{self.file}:{self.line}"

    def __repr__(self) -> str:
        """The place alone, so that no log or traceback shows a patient."""
        return f"Record({self.where})"


def by_patient(records: Iterable[Record]) -> dict[str, list[int]]:
    """The positions of each patient's records, patients in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        groups.setdefault(record.patient, []).append(position)
    return groups


def require_disjoint(train: Sequence[Record], test: Sequence[Record]) -> None:
    """Check that no patient is in both. Raises DataError naming both places."""
    seen: dict[str, Record] = {}
    for record in train:
        seen.setdefault(record.patient, record)
    for record in test:
        other = seen.get(record.patient)
        if other is not None:
            raise DataError(
                Code.DATA_OVERLAP,
                f"{record.where}: this patient is also in the training data ({other.where}).",
            )
