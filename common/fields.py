"""The kinds of values that configuration files are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Protocol, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from common.config import Frozen, Rules
from common.ids import is_site_id

__all__ = ["Feature", "FilePath", "Listed", "Name", "Ranged", "Seconds", "Text", "Width", "repeats"]

T = TypeVar("T")
Listed = Annotated[tuple[T, ...], Field(strict=False)]  # YAML has lists; a frozen model has tuples


def _named(value: str) -> str:
    if not is_site_id(value):
        raise ValueError(f"must be 1 to 63 of a-z, 0-9 and inner hyphens (got {value[:70]!a})")
    return value


def _plain(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable text without spaces at its ends")
    return value


Name = Annotated[str, AfterValidator(_named)]
Text = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]
Width = Annotated[int, Field(ge=1, le=4096)]


class Ranged(Protocol):
    """A number with its public range, however a task declares it."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def low(self) -> float:
        """The lower bound."""
        ...

    @property
    def high(self) -> float:
        """The upper bound."""
        ...


class Feature(Frozen):
    """One numeric column and its declared range; public, never taken from data."""

    name: Text = Field(description="the column in the hospitals' files")
    low: float = Field(ge=-1e100, le=1e100, description="values below are read as this")
    high: float = Field(ge=-1e100, le=1e100, description="values above are read as this")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.low < self.high, "high", f"must be more than low ({self.low:g})")
        rules.done()
        return self


def repeats(values: Iterable[str]) -> list[int]:
    """Positions of values that stand earlier too."""
    seen: set[str] = set()
    found = []
    for index, value in enumerate(values):
        if value in seen:
            found.append(index)
        seen.add(value)
    return found
