"""The task `imaging`: one label for each image, by a convolutional network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.data.images import fitted, look_of
from client.data.records import Record
from client.tasks.convolution import Residual, library_network
from client.tasks.rows import Encoded, described, first_values
from common.errors import Code, DataError
from common.tasks.imaging import Augmentation, BackboneNetwork, ImagingTask

__all__ = ["architecture", "augment", "draws", "encode", "network", "probes"]

_BYTE: Final = 255.0
# The numbers that one image's variation takes, whatever is switched on.
_DRAWS: Final = 8
_PROBE: Final = (("first", 3), ("second", 5), ("second", 9), ("third", 2))


def architecture(task: ImagingTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle.

    A library's architecture is described by its layers, so that another version of the library
    with other layers is another network.

    Raises:
        DataError: the library or the architecture is not there.
    """
    facts: dict[str, Any] = {
        "size": task.size,
        "channels": task.channels,
        "labels": list(task.labels),
        "network": task.network.model_dump(),
    }
    if isinstance(task.network, BackboneNetwork):
        facts["layers"] = _layers(_bare(task))
    return described("imaging", facts)


def _layers(module: nn.Module) -> str:
    """A digest of every layer's name, kind and settings, and every parameter's shape."""
    lines = [f"{name}: {type(x).__name__}({x.extra_repr()})" for name, x in module.named_modules()]
    lines += [f"{name}: {tuple(p.shape)}" for name, p in module.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def network(task: ImagingTask) -> nn.Module:
    """The network with its first values: (N, channels, size, size) to (N, labels).

    Guarantee: the same bits on every machine; the last layer is zero, so the first predictions
        favour no label.

    Raises:
        DataError: the library or the architecture is not there.
    """
    module = _bare(task)
    # What a library scales its layers by is a constant of the architecture, not a random start.
    scales = {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.ndim == 1 and not name.endswith((".weight", ".bias"))
    }
    first_values(module)
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for name, value in scales.items():
            module.get_parameter(name).copy_(value)
        if linear:
            linear[-1].weight.zero_()
    return module


def _bare(task: ImagingTask) -> nn.Module:
    terms = task.network
    if isinstance(terms, BackboneNetwork):
        return library_network(terms.name, len(task.labels), size=task.size, groups=terms.groups)
    return Residual(
        task.channels,
        terms.widths,
        len(task.labels),
        blocks=terms.blocks,
        groups=terms.groups,
        stem_stride=terms.stem_stride,
    )


def encode(task: ImagingTask, records: Sequence[Record]) -> Encoded:
    """The records' images, as bytes: a quarter of the memory of numbers.

    Shapes: one tensor (N, channels, size, size) uint8.

    Raises:
        DataError: a record has no image, or one in colour where gray is declared.
    """
    look = look_of(task)
    pixels = np.empty((len(records), task.channels, task.size, task.size), np.uint8)
    for at, record in enumerate(records):
        if record.image is None:
            raise DataError(Code.DATA_VALUE, f"{record.where}: has no image.")
        image = fitted(record.image, look, where=record.where)
        pixels[at] = image if image.ndim == 2 else image.transpose(2, 0, 1)  # noqa: PLR2004
    return Encoded(values=None, tensors=(torch.from_numpy(pixels),))


def probes(task: ImagingTask) -> tuple[Record, ...]:
    """Four invented images of three patients: stripes of several widths, for admission."""
    return tuple(
        Record(
            patient,
            "",
            task.labels[at % len(task.labels)],
            None,
            "probe",
            at + 1,
            image=_stripes(task, width, at),
        )
        for at, (patient, width) in enumerate(_PROBE)
    )


def _stripes(task: ImagingTask, width: int, turn: int) -> NDArray[np.uint8]:
    place = np.arange(task.size)
    wave = (place[:, None] + turn * place[None, :]) // width % 5
    gray = (wave * 60).astype(np.uint8)
    return gray if task.channels == 1 else np.stack([gray, gray.T, 255 - gray], axis=-1)


# ---------------------------------------------------------------------- variation


def draws(task: ImagingTask) -> int:
    """Numbers that the variation of one image takes; 0: the study varies nothing."""
    return _DRAWS if task.augmentation.active else 0


def augment(task: ImagingTask, inputs: tuple[Tensor, ...], drawn: Tensor) -> tuple[Tensor, ...]:
    """The same images, each varied within the study's public terms; for training alone.

    Shapes: one tensor (N, channels, H, W), bytes or numbers in [0, 1], and drawn (N, 8) in [0, 1);
    returns numbers in [0, 1] of the images' shape.

    Guarantee: an image's variation depends on that image and on its own row of `drawn`; no image
        enters another's.
    """
    (images,) = inputs
    terms = task.augmentation
    if not terms.active:
        return inputs
    part = images.float() / _BYTE if images.dtype == torch.uint8 else images
    grid = functional.affine_grid(_turns(terms, drawn), list(part.shape), align_corners=False)
    part = functional.grid_sample(
        part, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    spread = _between(drawn[:, 6], terms.contrast)[:, None, None, None]
    light = _between(drawn[:, 7], terms.brightness)[:, None, None, None]
    return (((part - 0.5) * (1.0 + spread) + 0.5 + light).clamp(0.0, 1.0),)


def _between(drawn: Tensor, most: float) -> Tensor:
    """From [0, 1) to [-most, most)."""
    return (2.0 * drawn - 1.0) * most


def _turns(terms: Augmentation, drawn: Tensor) -> Tensor:
    """Where in its image every place of a varied image comes from, (N, 2, 3)."""
    angle = _between(drawn[:, 2], math.radians(terms.rotate))
    scale = 1.0 + _between(drawn[:, 3], terms.zoom)
    across = torch.ones_like(angle)
    if terms.flip != "none":
        across = torch.where(drawn[:, 0] < 0.5, -1.0, 1.0)  # noqa: PLR2004 - a coin
    down = torch.ones_like(angle)
    if terms.flip == "both":
        down = torch.where(drawn[:, 1] < 0.5, -1.0, 1.0)  # noqa: PLR2004 - a coin
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # The grid runs from -1 to 1: two units are the whole side.
    right, below = (_between(drawn[:, at], 2.0 * terms.shift) for at in (4, 5))
    rows = [cos * across, -sin * down, right, sin * across, cos * down, below]
    return torch.stack(rows, dim=1).reshape(-1, 2, 3)
