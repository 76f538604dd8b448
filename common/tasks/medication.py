"""The terms of the task `medication`: which drugs a patient with these diagnoses is given."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, repeats
from common.outcomes import LabelSet
from common.tasks.graph import GraphChoice

__all__ = ["MedicationColumns", "MedicationTask"]


class MedicationColumns(Frozen):
    """Which columns of the hospital's table hold what."""

    patient: Text | None = Field(
        "patient", description="the unit of privacy; null: every row is a patient of its own"
    )
    codes: Text = Field("codes", description="the codes of one visit, parted by spaces")
    drugs: Text = Field(
        "drugs",
        description="what was given, parted by spaces; what is not in task.labels is counted",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.codes != self.patient, "codes", "is also the patient column")
        rules.require(
            self.drugs not in {self.patient, self.codes}, "drugs", "is also another column"
        )
        rules.done()
        return self


class MedicationTask(Frozen):
    """What is learned: the drugs of a visit from its diagnosis codes.

    Codes are rolled up (ICD to categories and chapters): the model sees a code itself where it
    is in the vocabulary, and every group above it that is. Codes that are nowhere in it are
    counted and not seen.
    """

    pretrained: ClassVar[bool] = False
    features: ClassVar[tuple[Feature, ...]] = ()

    kind: Literal["medication"] = Field(description="medication: drugs from a visit's codes")
    labels: Annotated[Listed[Text], Field(min_length=2, max_length=1000)] = Field(
        description="every drug or drug group (ATC codes, where a graph is used), in the order of "
        "the model's outputs; never discovered from data"
    )
    codes: Annotated[Listed[Text], Field(min_length=1, max_length=20_000)] = Field(
        ("icd9:categories", "icd9:chapters", "icd10:categories", "icd10:chapters"),
        description="the vocabulary: single codes as system:code, and whole public sets as "
        "icd9:categories or icd10:chapters; never discovered from data",
    )
    code_system: Literal["icd", "icd9", "icd10", "atc", "rxnorm", "ndc", "none"] = Field(
        "icd",
        description="of codes that do not say theirs; icd: the form tells, and a code that could "
        "be either is counted and not seen; none: words of the vocabulary",
    )
    columns: MedicationColumns = Field(
        MedicationColumns(), description="column names in the hospitals' tables"
    )
    objective: Literal["bce", "mse"] = Field(
        "bce", description="cross-entropy of each drug, or the squared error of its probability"
    )
    max_codes: int = Field(
        64, ge=1, le=512, description="codes of a visit that are seen, groups included: the first"
    )
    max_visits: int = Field(
        16, ge=1, le=4096, description="visits of a patient that are read: the first, in file order"
    )
    width: int = Field(32, ge=4, le=512, description="numbers that stand for a code")
    heads: int = Field(4, ge=1, le=16, description="attention heads; divides width")
    layers: int = Field(1, ge=1, le=4, description="blocks of self-attention")
    graph: GraphChoice | None = Field(None, description="the knowledge graph, or none")

    @property
    def outcome(self) -> LabelSet:
        """Any of the drugs, each for itself."""
        return LabelSet(self.labels, squared=self.objective == "mse")

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        known = "" if self.graph is None else " over a knowledge graph"
        return f"{self.layers}-block self-attention of width {self.width}{known}"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for key in ("labels", "codes"):
            for index in repeats(getattr(self, key)):
                rules.require(False, f"{key}.{index}", "is listed twice")  # noqa: FBT003
        rules.require(self.width % self.heads == 0, "heads", f"must divide width ({self.width})")
        rules.done()
        return self
