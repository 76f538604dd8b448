"""The terms of the task `diagnosis`: one label, or several, for each clinical note."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, repeats
from common.outcomes import Classes, LabelSet
from common.tasks.encoders import TextEncoder
from common.tasks.graph import GraphChoice

__all__ = ["OWN_NETWORK", "DiagnosisColumns", "DiagnosisTask"]

OWN_NETWORK: Final = "text convolutions over "
"""How the name of an encoder that is no pretrained one begins."""


class DiagnosisColumns(Frozen):
    """Which columns of the hospital's files hold what."""

    patient: Text = Field("patient", description="who the record is about: the unit of privacy")
    text: Text = Field("text", description="the clinical note")
    label: Text = Field(
        "label",
        description="the diagnosis, one of task.labels; with task.several, any, parted by ;",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.text != self.patient, "text", "is also the patient column")
        rules.require(
            self.label not in {self.patient, self.text}, "label", "is also another column"
        )
        rules.done()
        return self


class DiagnosisTask(Frozen):
    """What is learned: one label, or several, for each clinical note.

    The encoder is a pretrained one (section `model`), or `encoder`, trained from the start.
    """

    features: ClassVar[tuple[Feature, ...]] = ()

    kind: Literal["diagnosis"] = Field(description="diagnosis: labels for each clinical note")
    labels: Annotated[Listed[Text], Field(min_length=2, max_length=1000)] = Field(
        description="every class, in the order of the model's outputs; never discovered from data"
    )
    several: bool = Field(
        default=False, description="a note may have several labels, or none; each is told by itself"
    )
    columns: DiagnosisColumns = Field(
        DiagnosisColumns(), description="column names in the hospitals' files"
    )
    max_tokens: int = Field(128, ge=8, le=8192, description="tokens of a note that the model sees")
    long_notes: Literal["truncate", "window"] = Field(
        "truncate", description="cut a long note, or slide a window and pool the logits"
    )
    window_stride: int = Field(
        64, ge=1, le=8191, description="tokens from one window to the next; with long_notes: window"
    )
    max_windows: int = Field(4, ge=1, le=64, description="windows of one note that are kept")
    max_notes: int = Field(
        64, ge=1, le=4096, description="notes of a patient that are read: the first, in file order"
    )
    stop_words: Literal["none", "english"] = Field("none", description="words removed before")
    stemming: Literal["none", "english"] = Field("none", description="stemmer applied before")
    encoder: TextEncoder | None = Field(
        None, description="instead of the section model: a small encoder, trained from the start"
    )
    graph: GraphChoice | None = Field(
        None,
        description="with an encoder: a knowledge graph; what it knows of the diseases and drugs "
        "that a note names is read beside the note",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(self.labels):
            rules.require(False, f"labels.{index}", "is listed twice")  # noqa: FBT003
        window = self.long_notes == "window"
        rules.require(
            not window or self.window_stride < self.max_tokens,
            "window_stride",
            f"must be less than max_tokens ({self.max_tokens}), or tokens between two windows are "
            f"never read (is {self.window_stride})",
        )
        rules.require(
            not window or self.encoder is None,
            "long_notes",
            "must be truncate with an encoder, which reads the first max_tokens",
        )
        rules.require(
            self.graph is None or self.encoder is not None,
            "graph",
            "needs an encoder: a pretrained network keeps its own architecture, so that what is "
            "saved loads everywhere",
        )
        for index, label in enumerate(self.labels):
            whole = not self.several or ";" not in label
            rules.require(whole, f"labels.{index}", "has a semicolon, which parts labels")
        rules.done()
        return self

    @property
    def pretrained(self) -> bool:
        """Whether the section `model` names what learns."""
        return self.encoder is None

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        if self.encoder is None:
            return "text encoder"
        known = "" if self.graph is None else " beside a knowledge graph"
        return f"{OWN_NETWORK}{self.encoder.vocabulary}{known}"

    @property
    def outcome(self) -> Classes | LabelSet:
        """What the model predicts."""
        return LabelSet(self.labels) if self.several else Classes(self.labels)
