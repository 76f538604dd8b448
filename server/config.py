"""`coordinator.yaml`: where the coordinator keeps its state.

Nothing here can weaken a study: rounds, quorum, deadlines and privacy come from the signed terms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from common.config import Frozen, beside
from common.study import FilePath

__all__ = ["FORMAT", "CoordinatorConfig"]

FORMAT: Final = "wardround-coordinator/1"


class CoordinatorConfig(Frozen):
    """The operator's own settings."""

    format: Literal["wardround-coordinator/1"] = Field(description="this file's kind and version")
    state: FilePath = Field(description="folder of journal, checkpoints and audit log")
    checkpoints: int = Field(
        3, ge=1, le=1000, description="how many newest models are kept; the last is never removed"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level of the operator's log; no level holds data of patients"
    )

    def state_folder(self, config: str | Path) -> Path:
        """The state folder as the file `config` means it."""
        return beside(config, self.state)
