"""Audit events of a round machine, into the audit log: every completed round is signed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.audit import AuditLog, Value

_SIGNED_EVENTS = frozenset({"round.completed", "run.finished", "study.stopped"})


class Evidence(Protocol):
    """Where a party's audit events go."""

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Durably append one event."""
        ...


@dataclass
class AuditEvidence:
    """The audit log behind a party's events; its head is signed at every completed round."""

    log: AuditLog

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Append one event. Raises StorageError."""
        self.log.append(event, fields)
        if event in _SIGNED_EVENTS:
            self.log.checkpoint()
