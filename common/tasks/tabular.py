"""The terms of the task `tabular`: a label, a number or a survival time for each row."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, Width, repeats
from common.outcomes import Classes, Outcome
from common.tasks.targets import NumberTarget, SurvivalTarget

__all__ = ["Category", "RowTerms", "TabularColumns", "TabularTask"]


class Category(Frozen):
    """One column with a few public values; any other value, or none, is told by no input."""

    name: Text = Field(description="the column in the hospitals' files")
    values: Annotated[Listed[Text], Field(min_length=1, max_length=1000)] = Field(
        description="every value; an input for each"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(self.values):
            rules.require(False, f"values.{index}", "is listed twice")  # noqa: FBT003
        rules.done()
        return self


class TabularColumns(Frozen):
    """Which columns of the hospital's files hold what, beside the features."""

    patient: Text | None = Field(
        "patient", description="the unit of privacy; null: every row is a patient of its own"
    )
    label: Text = Field("label", description="the class, one of task.labels")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.label != self.patient, "label", "is also the patient column")
        rules.done()
        return self


class RowTerms(Frozen):
    """One label, one number, or one survival time for each row of features, by any network.

    Numbers are normalised by mean and deviation over all hospitals, which are counted inside the
    secure sum before training (docs/PRIVACY.md, "Normalisation").
    """

    pretrained: ClassVar[bool] = False

    labels: Annotated[Listed[Text], Field(max_length=1000)] = Field(
        (), description="every class, in the order of the model's outputs; never found in data"
    )
    number: NumberTarget | None = Field(None, description="instead of labels: a quantity")
    survival: SurvivalTarget | None = Field(
        None, description="instead of labels: a time to an event, by a discrete-time hazard model"
    )
    columns: TabularColumns = Field(
        TabularColumns(), description="column names in the hospitals' files"
    )
    features: Annotated[Listed[Feature], Field(min_length=1, max_length=1000)] = Field(
        description="the numeric columns the model sees, in its inputs' order"
    )
    categories: Annotated[Listed[Category], Field(max_length=1000)] = Field(
        (), description="columns with a few public values, in the order of the inputs after"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(self.labels):
            rules.require(False, f"labels.{index}", "is listed twice")  # noqa: FBT003
        given = [bool(self.labels), self.number is not None, self.survival is not None]
        rules.require(sum(given) > 0, "labels", "is missing (or number, or survival)")
        rules.require(sum(given) < 2, "", "names more than one of labels, number and survival")  # noqa: PLR2004
        rules.require(len(self.labels) != 1, "labels", "must list at least 2 (got 1)")
        names = [feature.name for feature in self.features]
        names += [category.name for category in self.categories]
        for index in repeats(names):
            at = index - len(self.features)
            where = f"features.{index}" if at < 0 else f"categories.{at}"
            rules.require(False, f"{where}.name", "is listed twice")  # noqa: FBT003
        taken = {self.columns.patient, *self.predicted}
        for index, name in enumerate(names):
            at = index - len(self.features)
            where = f"features.{index}" if at < 0 else f"categories.{at}"
            rules.require(name not in taken, f"{where}.name", "is also another column")
        rules.done()
        return self

    @property
    def predicted(self) -> tuple[str, ...]:
        """The columns of what is to be predicted."""
        if self.survival is not None:
            return self.survival.time, self.survival.event
        return (self.columns.label,) if self.number is None else (self.number.column,)

    @property
    def outcome(self) -> Outcome:
        """What the model predicts."""
        target = self.number or self.survival
        return Classes(self.labels) if target is None else target.outcome

    @property
    def inputs(self) -> int:
        """Numbers that the network is given."""
        return len(self.features) + sum(len(found.values) for found in self.categories)


class TabularTask(RowTerms):
    """What is learned: an answer for each row, by regression or a perceptron."""

    kind: Literal["tabular"] = Field(description="tabular: one answer for each row of features")
    hidden: Annotated[Listed[Width], Field(max_length=8)] = Field(
        (), description="widths of the hidden layers; none is (logistic) regression"
    )

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        widths = (self.inputs, *self.hidden, self.outcome.outputs)
        return "-".join(str(width) for width in widths) + " perceptron"
