"""The terms of the task `multimodal`: one answer from notes, images, numbers and series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, Width, repeats
from common.outcomes import Classes, Number
from common.tasks.encoders import TextEncoder
from common.tasks.imaging import ResidualNetwork, Window
from common.tasks.prognosis import PrognosisColumns, PrognosisTask, SeriesFeature
from common.tasks.tabular import Category, TabularColumns, TabularTask
from common.tasks.targets import NumberTarget

__all__ = [
    "ImageInput",
    "MultimodalColumns",
    "MultimodalTask",
    "NumbersInput",
    "SeriesInput",
    "TextInput",
]


class MultimodalColumns(Frozen):
    """Which columns of the hospital's table hold what, beside the inputs."""

    patient: Text | None = Field(
        "patient", description="the unit of privacy; null: every row is a patient of its own"
    )
    label: Text = Field("label", description="the class, one of task.labels")


class TextInput(Frozen):
    """A note of each row, read by convolutions that are trained from the start."""

    column: Text = Field("text", description="the note; empty where there is none")
    max_tokens: int = Field(
        128, ge=8, le=8192, description="words or characters that the model sees: the first"
    )
    encoder: TextEncoder = Field(TextEncoder(), description="what reads the note")


class ImageInput(Frozen):
    """An image of each row, seen by a residual network."""

    column: Text = Field(
        "image", description="its path, relative to the table's folder; empty where there is none"
    )
    size: int = Field(28, ge=8, le=1024, description="pixels of a side of what the model sees")
    channels: Literal[1, 3] = Field(1, description="1: gray; 3: colour")
    fit: Literal["pad", "crop", "stretch"] = Field(
        "pad", description="how an image that is not square becomes so"
    )
    window: Window | None = Field(
        None, description="the range of DICOM values shown; null: the one that the file names"
    )
    network: ResidualNetwork = Field(
        ResidualNetwork(kind="resnet"), description="what looks at the image"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        left = self.size // (self.network.stem_stride * 2 ** (len(self.network.widths) - 1))
        rules.require(left >= 2, "network", f"leaves {left} of {self.size} pixels a side")  # noqa: PLR2004
        rules.done()
        return self


class NumbersInput(Frozen):
    """Numbers and categories of each row, by a perceptron; it also sees which are missing."""

    features: Annotated[Listed[Feature], Field(min_length=1, max_length=1000)] = Field(
        description="numeric columns, in the inputs' order; empty where missing"
    )
    categories: Annotated[Listed[Category], Field(max_length=1000)] = Field(
        (), description="columns with a few public values, in the order of the inputs after"
    )
    hidden: Annotated[Listed[Width], Field(max_length=8)] = Field(
        (32,), description="widths of the hidden layers"
    )


class SeriesInput(Frozen):
    """Measurements by the hour, by an LSTM: in files of their own, that have the column `time`."""

    stay: Text = Field(
        "stay", description="joins the files: in the table one row for each; empty: no series"
    )
    time: Text = Field("time", description="since the start of the stay; a duration, or a number")
    unit: Literal["days", "hours", "minutes", "seconds"] = Field(
        "hours", description="of the column time, where it holds numbers"
    )
    features: Annotated[Listed[SeriesFeature], Field(min_length=1, max_length=1000)] = Field(
        description="columns of those files, in this order"
    )
    hours: int = Field(24, ge=1, le=8784, description="the first hours, which the model sees")
    width: int = Field(32, ge=1, le=2048, description="hidden units of the LSTM")
    layers: int = Field(1, ge=1, le=4, description="LSTM layers, one over the other")


class MultimodalTask(Frozen):
    """What is learned: a class or a number for each row, from whatever is known of it.

    Every kind of input has an encoder of its own; what they say is added up, weighed by gates that
    see which are there. A missing one adds nothing.
    """

    pretrained: ClassVar[bool] = False

    kind: Literal["multimodal"] = Field(
        description="multimodal: one answer from notes, images, numbers and series together"
    )
    labels: Annotated[Listed[Text], Field(max_length=1000)] = Field(
        (), description="every class, in the order of the model's outputs; never found in data"
    )
    number: NumberTarget | None = Field(None, description="instead of labels: a quantity")
    columns: MultimodalColumns = Field(
        MultimodalColumns(), description="column names in the hospitals' tables"
    )
    text: TextInput | None = Field(None, description="notes")
    image: ImageInput | None = Field(None, description="images")
    numbers: NumbersInput | None = Field(None, description="one row of numbers")
    series: SeriesInput | None = Field(None, description="measurements by the hour")
    width: Width = Field(32, description="numbers that stand for what an encoder says")
    max_records: int = Field(
        16, ge=1, le=4096, description="rows of a patient that are read: the first, in file order"
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
        rules.require(bool(self.modalities), "", "names no input: text, image, numbers, or series")
        named = list(self._columns())
        for index in repeats(name for _, name in named):
            rules.require(False, named[index][0], "is also another column")  # noqa: FBT003
        if self.series is not None:
            others = {self.series.stay, self.series.time}
            names = [feature.name for feature in self.series.features]
            for index in repeats(names):
                rules.require(False, f"series.features.{index}.name", "is listed twice")  # noqa: FBT003
            for index, name in enumerate(names):
                told = "is also another column"
                rules.require(name not in others, f"series.features.{index}.name", told)
        rules.done()
        return self

    def _columns(self) -> Iterator[tuple[str, str]]:
        """The table's columns by their keys."""
        if self.columns.patient is not None:
            yield "columns.patient", self.columns.patient
        yield (
            ("columns.label", self.columns.label)
            if self.number is None
            else ("number.column", self.number.column)
        )
        if self.text is not None:
            yield "text.column", self.text.column
        if self.image is not None:
            yield "image.column", self.image.column
        if self.series is not None:
            yield "series.stay", self.series.stay
            yield "series.time", self.series.time
        if self.numbers is not None:
            for index, feature in enumerate(self.numbers.features):
                yield f"numbers.features.{index}.name", feature.name
            for index, category in enumerate(self.numbers.categories):
                yield f"numbers.categories.{index}.name", category.name

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of input that the study names."""
        names = ("text", "image", "numbers", "series")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What is normalised: the numbers of a row, then those of its hours."""
        numbers = () if self.numbers is None else self.numbers.features
        return (*numbers, *(() if self.series is None else self.series.features))

    @property
    def outcome(self) -> Classes | Number:
        """What the model predicts."""
        return Classes(self.labels) if self.number is None else self.number.outcome

    @property
    def predicted(self) -> tuple[str, ...]:
        """The column of what is to be predicted."""
        return (self.columns.label if self.number is None else self.number.column,)

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        return f"gated fusion of {', '.join(self.modalities)}, width {self.width}"

    def as_tabular(self) -> TabularTask | None:
        """The numbers as a task of their own."""
        if self.numbers is None:
            return None
        return TabularTask(
            kind="tabular",
            labels=self.labels,
            number=self.number,
            columns=TabularColumns(patient=self.columns.patient, label=self.predicted[0]),
            features=self.numbers.features,
            categories=self.numbers.categories,
            hidden=self.numbers.hidden,
        )

    def as_prognosis(self) -> PrognosisTask | None:
        """The series as a task of their own, whose stays are all patients of their own."""
        if self.series is None:
            return None
        given = self.series
        label = next(n for n in ("label", "answer", "class") if n not in {given.stay, given.time})
        return PrognosisTask(
            kind="prognosis",
            labels=("no", "yes"),
            columns=PrognosisColumns(
                stay=given.stay, patient=None, time=given.time, unit=given.unit, label=label
            ),
            features=given.features,
            hours=given.hours,
            width=given.width,
            layers=given.layers,
        )
