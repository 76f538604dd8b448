"""Networks that look at images: a small residual one, and architectures of libraries made safe.

Under differential privacy every record must be computed on its own: batch norms become group
norms, dropout goes, and nothing works in place (hooks would see overwritten values).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.privacy.admission import refuse_batch_norm
from common.errors import Code, DataError

__all__ = ["Residual", "library_network", "made_safe"]

_COLOURS: Final = 3
_BYTE: Final = 255.0
# Where gray and its spread lie in ordinary pictures; fixed, so that no image tells of another.
_MIDDLE: Final = 0.5
_SPREAD: Final = 0.25
_DROPPING: Final = frozenset({"DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d"})


def _levels(images: Tensor) -> Tensor:
    """Bytes, or numbers in [0, 1], as the layers see them."""
    part = images.float() / _BYTE if images.dtype == torch.uint8 else images
    return (part - _MIDDLE) / _SPREAD


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = _conv(inputs, outputs, 1, stride)

    def forward(self, values: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        inner = functional.relu(self.norm1(self.conv1(values)))
        inner = self.norm2(self.conv2(inner))
        return functional.relu(inner + self.shortcut(values))


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False)


class Residual(nn.Module):
    """A small residual network with group norms.

    Shapes: (B, channels, H, W), bytes or numbers in [0, 1], to (B, outputs).
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        outputs: int,
        *,
        blocks: int,
        groups: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        kernel = 3 if stem_stride <= 2 else 7  # noqa: PLR2004 - a step of 4 must not skip pixels
        self.stem = _conv(channels, widths[0], kernel, stem_stride)
        self.norm = nn.GroupNorm(groups, widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(_Block(before, width, groups, stride))
                before = width
        self.blocks = nn.Sequential(*layers)
        self.output = nn.Linear(before, outputs)

    def features(self, images: Tensor) -> Tensor:
        """The last feature maps, (B, width, h, w): what an explanation looks at."""
        values = functional.relu(self.norm(self.stem(_levels(images))))
        found: Tensor = self.blocks(values)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The logits of each image."""
        logits: Tensor = self.output(self.features(images).mean((2, 3)))
        return logits


# ---------------------------------------------------------------------- libraries' architectures


class _Library(nn.Module):
    """A library's network of colour images, for gray ones too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W), bytes or numbers in [0, 1], to (B, outputs)."""
        values = _levels(images)
        found: Tensor = self.network(values.expand(-1, _COLOURS, -1, -1))
        return found


def library_network(name: str, outputs: int, *, size: int, groups: int) -> nn.Module:
    """An architecture of timm or torchvision, made safe for privacy and tried on an image.

    Args:
        name: `timm:NAME` or `torchvision:NAME`; weights are never fetched.
        outputs: logits of an image.
        size: pixels of a side.
        groups: most groups of a norm.

    Raises:
        DataError: the library is absent, has no such architecture, or it does not classify
            images of this size.
        RefusedError: a normalisation of batches is left.
    """
    library, _, short = name.partition(":")
    try:
        made = _make(importlib.import_module(_FACTORIES[library]), library, short, outputs)
    except ModuleNotFoundError:
        raise DataError(
            Code.MODEL_FOLDER,
            f"the network {name} needs the package {library}, which is not installed.",
            remedy=f"Install {library} at every hospital, or choose network kind resnet.",
        ) from None
    except (RuntimeError, ValueError, TypeError):
        raise _unusable(name, "is not known to the library installed here") from None
    network = _Library(made_safe(made, groups))
    refuse_batch_norm(network)
    try:
        with torch.no_grad():
            found = network.eval()(torch.zeros(1, _COLOURS, size, size))
    except (RuntimeError, ValueError, AssertionError, TypeError):
        raise _unusable(name, f"does not take images of {size} by {size} pixels") from None
    if not isinstance(found, Tensor) or found.shape != (1, outputs):
        raise _unusable(name, "does not give one number for each label")
    return network.train()


_FACTORIES: Final = {"timm": "timm.models", "torchvision": "torchvision.models"}


def _make(factory: Any, library: str, name: str, outputs: int) -> nn.Module:
    if library == "timm":
        made: nn.Module = factory.create_model(name, pretrained=False, num_classes=outputs)
    else:
        made = factory.get_model(name, weights=None, num_classes=outputs)
    return made


def _unusable(name: str, why: str) -> DataError:
    return DataError(
        Code.MODEL_FOLDER,
        f"the network {name} {why}.",
        remedy="Name an image classifier that the library lists and that fits task.size.",
    )


def made_safe(module: nn.Module, groups: int) -> nn.Module:
    """The module with batch norms replaced by group norms, without dropout, nothing in place.

    Group norms have as many groups as divide the channels, at most `groups`. Running statistics
    are thrown away with the batch norms: they were other people's.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - their ancestor
        return _grouped(module, groups)
    dropping = isinstance(module, nn.modules.dropout._DropoutNd)  # noqa: SLF001 - likewise
    if dropping or type(module).__name__ in _DROPPING:
        return nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, made_safe(child, groups))
    if getattr(module, "inplace", False):
        setattr(module, "inplace", False)  # noqa: B010 - activations have it, modules do not
    return module


def _grouped(module: nn.modules.batchnorm._BatchNorm, groups: int) -> nn.Module:
    """What stands for a batch norm; timm's carries an activation with it."""
    norm = nn.GroupNorm(
        math.gcd(groups, module.num_features),
        module.num_features,
        eps=module.eps,
        affine=module.affine,
    )
    act = getattr(module, "act", None)
    return norm if not isinstance(act, nn.Module) else nn.Sequential(norm, made_safe(act, groups))
