"""What is to be predicted, where it is no class: a number, or the time to an event."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Listed, Text
from common.outcomes import Hazard, Number

__all__ = ["NumberTarget", "SurvivalTarget"]

Time = Annotated[float, Field(gt=0, le=1e9)]


class NumberTarget(Frozen):
    """A quantity and its public range."""

    column: Text = Field(description="the column in the hospitals' files")
    low: float = Field(ge=-1e100, le=1e100, description="values below are read as this")
    high: float = Field(ge=-1e100, le=1e100, description="values above are read as this")
    unit: Annotated[str, Field(max_length=40)] = Field("", description="for reports")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.low < self.high, "high", f"must be more than low ({self.low:g})")
        rules.done()
        return self

    @property
    def outcome(self) -> Number:
        """What the model predicts."""
        return Number(self.low, self.high, self.unit)


class SurvivalTarget(Frozen):
    """A time to an event, in public intervals."""

    time: Text = Field(description="the column with the time to the event, or to the last contact")
    event: Text = Field(description="the column with 1 where the event came, 0 where it did not")
    edges: Annotated[Listed[Time], Field(min_length=1, max_length=100)] = Field(
        description="ends of the intervals, rising, in the unit of `time`; the last has no end"
    )
    proportional: bool = Field(
        default=False,
        description="true: one score for a row, that moves the odds of every interval alike, as in "
        "Cox's model; false: weights of its own for each interval",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index, (first, second) in enumerate(pairwise(self.edges), start=1):
            message = f"must be more than the one before ({first:g})"
            rules.require(first < second, f"edges.{index}", message)
        rules.require(self.time != self.event, "event", "is also the time column")
        rules.done()
        return self

    @property
    def outcome(self) -> Hazard:
        """What the model predicts."""
        return Hazard(self.edges)
