"""One hospital's own records: read from its own files, divided by its own key. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from client.config import SiteConfig
from client.data.intake import Names, Received, System, receive, receive_cases
from client.data.partition import MIN_PATIENTS
from client.data.records import Record
from client.privacy.ledger import HeldOutSplit
from common.config import beside
from common.errors import Code, DataError
from common.study import Study

__all__ = ["FLOOR", "LocalFiles", "divide", "local_files"]

FLOOR: Final = MIN_PATIENTS // 2
"""Fewest patients that a hospital trains with."""


@dataclass(frozen=True)
class LocalFiles:
    """Where a hospital's records lie, its own names of the study's columns, and its graphs.

    Attributes:
        files: tables; none where the records lie in `system`.
    """

    files: tuple[Path, ...]
    names: Names = Names()  # noqa: RUF009 - frozen
    knowledge: Path | None = None
    system: System | None = None

    def receive(self, study: Study) -> Received:
        """Every record, and what was left out. Raises DataError, naming file and line."""
        if self.system is not None:
            return receive_cases(study, self.system)
        return receive(study.task, self.files, names=self.names)

    def read(self, study: Study) -> tuple[Record, ...]:
        """Every record. Raises DataError, naming file and line."""
        return self.receive(study).records

    def dump(self) -> dict[str, Any]:
        """As plain text, for the trainer."""
        return {
            "files": tuple(str(path) for path in self.files),
            "knowledge": "" if self.knowledge is None else str(self.knowledge),
            "system": () if self.system is None else self.system.dump(),
            **{name: value or "" for name, value in asdict(self.names).items()},
        }

    @staticmethod
    def load(fields: Mapping[str, Any]) -> LocalFiles:
        """The inverse of `dump`."""
        return LocalFiles(
            tuple(Path(path) for path in fields["files"]),
            Names(*(fields[name] or None for name in ("patient", "text", "label"))),
            Path(fields["knowledge"]) if fields["knowledge"] else None,
            System.load(fields["system"]) if fields["system"] else None,
        )


def local_files(config: SiteConfig, path: Path) -> LocalFiles:
    """What `site.yaml` at `path` says about the records."""
    names = config.data.columns
    files = tuple(beside(path, name).absolute() for name in config.data.files)
    graphs, system = config.knowledge_folder(path), config.data.system
    return LocalFiles(
        files,
        Names(names.patient, names.text, names.label),
        None if graphs is None else graphs.absolute(),
        None if system is None else System.of(system, path),
    )


def divide(
    records: Sequence[Record], split: HeldOutSplit
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, held out) by the hospital's own key: a patient is on one side for ever.

    Raises:
        DataError: either side is too small.
    """
    train = tuple(r for r in records if not split.holds_out(r.patient))
    held_out = tuple(r for r in records if split.holds_out(r.patient))
    if len({r.patient for r in train}) < FLOOR or not held_out:
        raise DataError(
            Code.SPLIT_IMPOSSIBLE,
            f"Fewer than {FLOOR} patients are left to train with, or none to measure on.",
        )
    return train, held_out
