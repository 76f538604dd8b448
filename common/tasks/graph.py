"""The knowledge graph that a task names."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from common.config import Frozen
from common.fields import FilePath, Listed

__all__ = ["GraphChoice"]


def _inside(value: str) -> str:
    """A study must not say where else on a hospital's disk to look."""
    if value.startswith(("/", "~")) or "\\" in value or ".." in value.split("/"):
        raise ValueError(f"must lie inside the folder (got {value[:70]!a})")
    return value


_Inside = Annotated[FilePath, AfterValidator(_inside)]


class GraphChoice(Frozen):
    """The knowledge graph that all hospitals use: public edge files, pinned by their digest."""

    files: Annotated[Listed[_Inside], Field(min_length=1, max_length=20)] = Field(
        description="edge files (.tsv, .tsv.gz, .parquet): in a simulation relative to the folder "
        "of this file, at a hospital to `knowledge` of its site.yaml"
    )
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="of what the files state together, in any order"
    )
    width: int = Field(32, ge=4, le=256, description="numbers that stand for a node")
    steps: int = Field(6, ge=1, le=12, description="edges over which knowledge spreads")
