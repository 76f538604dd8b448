"""The terms of the task `prognosis`: what becomes of a patient, from measurements hour by hour."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, repeats
from common.outcomes import Classes, Number
from common.tasks.targets import NumberTarget

__all__ = ["PrognosisColumns", "PrognosisTask", "SeriesFeature"]

_MOST_CELLS = 1 << 20


class PrognosisColumns(Frozen):
    """Which columns of the hospital's files hold what, beside the features.

    Files with the column `time` have a row for each stay and hour; the others have one for each
    stay. `stay` joins them.
    """

    stay: Text = Field("stay", description="one stay, in every file: rows with it belong together")
    patient: Text | None = Field(
        "patient", description="the unit of privacy; null: every stay is a patient of its own"
    )
    time: Text = Field("time", description="since the start of the stay; a duration, or a number")
    unit: Literal["days", "hours", "minutes", "seconds"] = Field(
        "hours", description="of the column time, where it holds numbers"
    )
    label: Text = Field("label", description="the class, one of task.labels")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        taken = (self.stay, self.patient, self.time, self.label)
        names = ("stay", "patient", "time", "label")
        told = [f"/{key}" if value is None else value for key, value in zip(names, taken)]  # noqa: B905
        for index in repeats(told):
            rules.require(False, names[index], "is also another column")  # noqa: FBT003
        rules.done()
        return self


class SeriesFeature(Feature):
    """One measurement and its declared range; public, never taken from data."""

    unit: Annotated[str, Field(max_length=40)] = Field(
        "", description="the only unit taken where a source names units; empty: any"
    )
    scale: Literal["linear", "log"] = Field(
        "linear", description="log: for what spans powers of ten; needs low > 0"
    )

    @model_validator(mode="after")
    def _scale(self) -> Self:
        rules = Rules()
        rules.require(self.scale == "linear" or self.low > 0, "low", "must be above 0 with log")
        rules.done()
        return self


class PrognosisTask(Frozen):
    """What is learned: a class or a number for each stay, from its first hours.

    Values are normalised by mean and deviation over all hospitals, as in `tabular`; the model also
    sees what was measured at all, and how long ago.
    """

    pretrained: ClassVar[bool] = False

    kind: Literal["prognosis"] = Field(
        description="prognosis: a class or a number for each stay, from measurements by the hour"
    )
    labels: Annotated[Listed[Text], Field(max_length=1000)] = Field(
        (), description="every class, in the order of the model's outputs; never found in data"
    )
    number: NumberTarget | None = Field(None, description="instead of labels: a quantity")
    last: Text | None = Field(
        None,
        description="with number: the feature whose last value, read between the number's bounds, "
        "is corrected by the model; the prediction without it: absent",
    )
    columns: PrognosisColumns = Field(
        PrognosisColumns(), description="column names in the hospitals' files"
    )
    features: Annotated[Listed[SeriesFeature], Field(min_length=1, max_length=1000)] = Field(
        description="what the model sees: columns by the hour, or by the stay (age), in this order"
    )
    hours: int = Field(
        24, ge=1, le=8784, description="the stay's first hours, which the model sees; no later one"
    )
    width: int = Field(32, ge=1, le=2048, description="hidden units of the LSTM")
    layers: int = Field(1, ge=1, le=4, description="LSTM layers, one over the other")
    max_stays: int = Field(
        16, ge=1, le=4096, description="stays of a patient that are read: the first, in file order"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(self.labels):
            rules.require(False, f"labels.{index}", "is listed twice")  # noqa: FBT003
        rules.require(
            bool(self.labels) or self.number is not None, "labels", "is missing (or number)"
        )
        rules.require(
            not self.labels or self.number is None, "number", "cannot stand beside labels"
        )
        rules.require(len(self.labels) != 1, "labels", "must list at least 2 (got 1)")
        names = [feature.name for feature in self.features]
        for index in repeats(names):
            rules.require(False, f"features.{index}.name", "is listed twice")  # noqa: FBT003
        given = self.columns
        taken = {given.stay, given.patient, given.time, *self.predicted}
        for index, name in enumerate(names):
            rules.require(name not in taken, f"features.{index}.name", "is also another column")
        if self.number is not None:
            others = {given.stay, given.patient, given.time}
            rules.require(self.number.column not in others, "number.column", "is another column")
        if self.last is not None:
            rules.require(
                self.number is not None, "last", "has no effect without number; remove it"
            )
            rules.require(self.last in names, "last", "is not among features")
        told = f"times {len(names)} features is more than {_MOST_CELLS} values a stay"
        rules.require(self.hours * len(names) <= _MOST_CELLS, "hours", told)
        rules.done()
        return self

    @property
    def predicted(self) -> tuple[str, ...]:
        """The column of what is to be predicted."""
        return (self.columns.label if self.number is None else self.number.column,)

    @property
    def outcome(self) -> Classes | Number:
        """What the model predicts."""
        return Classes(self.labels) if self.number is None else self.number.outcome

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        depth = "" if self.layers == 1 else f"{self.layers}-layer "
        return f"{depth}LSTM of {self.width} over {len(self.features)} measurements"
