"""One clinical note, or one row of numbers, of one patient, and where it was read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import Code, DataError

__all__ = ["Record", "by_patient", "require_disjoint"]


@dataclass(frozen=True, slots=True)
class Record:
    """A note, or a row of numbers, as it stands in a file.

    `text` is empty where a file has numbers; `values` are those, NaN where one is missing.
    `patient` is the unit of privacy. `label` is None only where a file is read to be predicted.
    `file` and `line` (1-based; the row's number in Parquet) say where the record begins.
    """

    patient: str
    text: str
    label: str | None
    site: str | None
    file: str
    line: int
    values: tuple[float, ...] = ()

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
