"""The terms of the task `imaging`: one label for each image."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import Feature, Listed, Text, Width, repeats
from common.outcomes import Classes

__all__ = [
    "Augmentation",
    "BackboneNetwork",
    "ImagingColumns",
    "ImagingTask",
    "ResidualNetwork",
    "Window",
]


class ImagingColumns(Frozen):
    """Which columns of the hospital's table hold what."""

    patient: Text | None = Field(
        "patient", description="the unit of privacy; null: every row is a patient of its own"
    )
    image: Text = Field("image", description="the image's path, relative to the table's folder")
    label: Text = Field("label", description="the class, one of task.labels")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.image != self.patient, "image", "is also the patient column")
        rules.require(
            self.label not in {self.patient, self.image}, "label", "is also another column"
        )
        rules.done()
        return self


class Window(Frozen):
    """The range of a DICOM image's rescaled values that is shown, as radiologists set it."""

    center: float = Field(ge=-1e6, le=1e6, description="the value shown as middle gray")
    width: float = Field(ge=1, le=1e6, description="from black to white")


class ResidualNetwork(Frozen):
    """A residual network of 3x3 convolutions and group norms.

    Source: He et al. 2016; Wu and He 2018.
    """

    kind: Literal["resnet"] = Field(description="resnet: a small one, trained from the start")
    widths: Annotated[Listed[Width], Field(min_length=1, max_length=6)] = Field(
        (16, 32, 64), description="channels of each stage; from the second on, each halves the size"
    )
    blocks: int = Field(1, ge=1, le=8, description="residual blocks in each stage")
    groups: int = Field(8, ge=1, le=64, description="groups of a norm; divides every width")
    stem_stride: Literal[1, 2, 4] = Field(
        1, description="the first layer's step; more for images above 64 pixels"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index, width in enumerate(self.widths):
            rules.require(
                width % self.groups == 0,
                f"widths.{index}",
                f"must be a multiple of groups ({self.groups})",
            )
        rules.done()
        return self


class BackboneNetwork(Frozen):
    """An architecture of a public library, trained from the start.

    Its batch norms are replaced by group norms and its dropout is taken out; what is left must
    pass admission.
    """

    kind: Literal["backbone"] = Field(description="backbone: an architecture of a library")
    name: Annotated[str, Field(pattern=r"^(timm|torchvision):[a-z0-9_]{1,100}$")] = Field(
        description="timm:NAME or torchvision:NAME, for example timm:resnet18"
    )
    groups: int = Field(
        32, ge=1, le=64, description="most groups of a norm; fewer where they do not divide it"
    )


class Augmentation(Frozen):
    """How training images are varied at random, each by itself; public terms, off by default."""

    flip: Literal["none", "horizontal", "both"] = Field("none", description="mirrored by a coin")
    shift: float = Field(0.0, ge=0, le=0.5, description="most, as a part of the size")
    rotate: float = Field(0.0, ge=0, le=180, description="most, in degrees")
    zoom: float = Field(0.0, ge=0, le=0.5, description="most, as a part of the size")
    brightness: float = Field(0.0, ge=0, le=0.5, description="most, as a part of the full range")
    contrast: float = Field(0.0, ge=0, le=0.9, description="most, as a part")

    @property
    def active(self) -> bool:
        """Whether anything is varied at all."""
        parts = (self.shift, self.rotate, self.zoom, self.brightness, self.contrast)
        return self.flip != "none" or any(parts)


class ImagingTask(Frozen):
    """What is learned: one label for each image.

    Images are PNG, JPEG or DICOM, in gray or colour, and are brought to one size. A patient may
    have several.
    """

    pretrained: ClassVar[bool] = False
    features: ClassVar[tuple[Feature, ...]] = ()

    kind: Literal["imaging"] = Field(description="imaging: one label for each image")
    labels: Annotated[Listed[Text], Field(min_length=2, max_length=1000)] = Field(
        description="every class, in the order of the model's outputs; never discovered from data"
    )
    columns: ImagingColumns = Field(
        ImagingColumns(), description="column names in the hospitals' tables"
    )
    size: int = Field(28, ge=8, le=1024, description="pixels of a side of what the model sees")
    channels: Literal[1, 3] = Field(1, description="1: gray; 3: colour")
    fit: Literal["pad", "crop", "stretch"] = Field(
        "pad", description="how an image that is not square becomes so"
    )
    window: Window | None = Field(
        None, description="the range of DICOM values shown; null: the one that the file names"
    )
    max_images: int = Field(
        16, ge=1, le=4096, description="images of a patient that are read: the first, in file order"
    )
    network: Annotated[ResidualNetwork | BackboneNetwork, Field(discriminator="kind")] = Field(
        ResidualNetwork(kind="resnet"), description="what looks at the image"
    )
    augmentation: Augmentation = Field(
        Augmentation(), description="random variation of training images"
    )

    @property
    def outcome(self) -> Classes:
        """What the model predicts."""
        return Classes(self.labels)

    @property
    def predicted(self) -> tuple[str, ...]:
        """The columns of what is to be predicted."""
        return (self.columns.label,)

    @property
    def network_name(self) -> str:
        """What learns, in words."""
        if isinstance(self.network, BackboneNetwork):
            return self.network.name
        widths = "-".join(str(width) for width in self.network.widths)
        return f"{widths} residual network"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(self.labels):
            rules.require(False, f"labels.{index}", "is listed twice")  # noqa: FBT003
        if isinstance(self.network, ResidualNetwork):
            halvings = len(self.network.widths) - 1
            left = self.size // (self.network.stem_stride * 2**halvings)
            rules.require(
                left >= 2,  # noqa: PLR2004 - a single place is nothing to convolve
                "network",
                f"leaves {left} of {self.size} pixels a side; take fewer widths or a smaller "
                "stem_stride",
            )
        rules.done()
        return self
