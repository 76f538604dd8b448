"""The terms of the task `custom`: rows as in `tabular`, learned by a network that is installed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.fields import Name
from common.tasks.tabular import RowTerms

__all__ = ["CustomTask"]

Setting = Annotated[bool | int | float | str, Field(union_mode="left_to_right")]


class CustomTask(RowTerms):
    """What is learned: an answer for each row, by a network of another package.

    Every party has that package installed; nothing is sent (docs/guides/adding-a-task.md). The
    digest of its file is part of what the study is signed over.
    """

    kind: Literal["custom"] = Field(description="custom: rows, by a network that is installed")
    name: Name = Field(description="what the package calls its task")
    settings: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], Setting] = Field(
        {}, max_length=100, description="whatever the network takes; public"
    )

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        return f"{self.name}, an installed network"
