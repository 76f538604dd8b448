"""Which parts of an image raise or lower the answer, and the overlay that shows it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.explain.attribution import (
    Mask,
    Target,
    deletion,
    grad_cam,
    integrated_gradients,
    scorer,
    still,
)
from client.explain.facts import Curve, Found
from client.tasks.outcomes import answers

__all__ = ["ImageExplanation", "explain_image", "overlay", "plain"]

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]

CELLS: Final = 8
"""Cells on a side: what the deletion curve blanks, and how fine the signed overlay is read."""

BLANK: Final = "a plain image of this image's mean brightness"
_PIXELS_AT_ONCE: Final = 1 << 19
_SIDE: Final = 336
_RAISES, _LOWERS = (213, 94, 0), (0, 114, 178)  # Okabe and Ito 2008
_STRONGEST: Final = 0.65


@dataclass(frozen=True)
class ImageExplanation:
    """One image's attributions.

    Shapes:
        picture: (H, W) or (H, W, 3) as it is shown. values: (H, W) integrated gradients, signed.
        cam: (H, W) Grad-CAM, from 0, in no unit; None where the network has no convolution.
    """

    picture: Picture
    values: Array
    cam: Array | None
    found: Found
    cam_curve: Curve | None


def explain_image(
    network: nn.Module,
    images: Tensor,
    target: Target,
    *,
    layer: nn.Module | None = None,
    rest: Sequence[Tensor] = (),
) -> ImageExplanation:
    """Integrated gradients and Grad-CAM of one image.

    Args:
        network: of the image and `rest`.
        images: (1, C, H, W), numbers in [0, 1]; C is 1 or 3.
        target: what is explained.
        layer: the maps that Grad-CAM looks at; absent: the last convolution's.
        rest: further inputs, one row each, held fixed.
    """
    inputs = (images, *rest)
    blank = images.mean(dim=(2, 3), keepdim=True).expand_as(images).contiguous()
    cell, count = _cells(images.shape[2], images.shape[3])
    place = torch.from_numpy(cell).to(images.device)

    def chances(kept: Mask) -> Array:
        seen = torch.from_numpy(kept).to(images.device)[:, place][:, None]
        rows = torch.where(seen, images, blank)
        with torch.no_grad():
            parts = [
                network(part, *(r.expand(len(part), *r.shape[1:]) for r in rest))
                for part in torch.split(rows, max(1, _PIXELS_AT_ONCE // images.numel()))
            ]
            return target.chances(torch.cat(parts))

    with still(network):
        score = scorer(network, inputs, target, (0,))
        at_once = _PIXELS_AT_ONCE // images.numel()
        attributed = integrated_gradients(score, (images,), (blank,), at_once=at_once)
        values = attributed.values[0].sum(axis=0)
        with torch.no_grad():
            answer = answers(target.outcome, network(*inputs))[0]
        curve = deletion(chances, _by_cell(values, cell, count))
        maps = layer or _last_convolution(network)
        cam = None if maps is None else grad_cam(score, images, maps)
        cam_curve = None if cam is None else deletion(chances, _by_cell(cam, cell, count))
    found = Found(answer, target.name, target.unit, BLANK, attributed.balance, curve)
    return ImageExplanation(plain(images), values, cam, found, cam_curve)


def _last_convolution(network: nn.Module) -> nn.Module | None:
    """The last one in the order in which the network lists its parts."""
    found = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    return found[-1] if found else None


def _cells(height: int, width: int) -> tuple[NDArray[np.int64], int]:
    """The cell that each pixel is in, (H, W), and how many there are."""
    down, across = min(CELLS, height), min(CELLS, width)
    rows = np.arange(height) * down // height
    columns = np.arange(width) * across // width
    return rows[:, None] * across + columns[None, :], down * across


def _by_cell(values: Array, cell: NDArray[np.int64], count: int) -> Array:
    total = np.zeros(count)
    np.add.at(total, cell, values)
    return total


def plain(images: Tensor) -> Picture:
    """One image, (1, C, H, W) in [0, 1], as bytes (H, W) or (H, W, 3)."""
    pixels = images[0].detach().double().cpu().numpy().clip(0, 1) * 255
    whole: Picture = np.rint(pixels).astype(np.uint8)
    return whole[0] if len(whole) == 1 else whole.transpose(1, 2, 0)


def overlay(picture: Picture, heat: Array | None) -> bytes:
    """The picture as a PNG, in orange where `heat` raises the answer and in blue where it lowers.

    Small pictures are enlarged. Shapes: picture (H, W) or (H, W, 3), heat (H, W) or None.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    times = max(1, _SIDE // max(height, width))
    size = (width * times, height * times)
    base = Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(base, np.float64)
    if heat is not None:
        # Pillow resizes 32-bit numbers as they are.
        wide = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        part = np.asarray(wide, np.float64)
        most = float(np.abs(part).max())
        part = part / most if most > 0 else part
        colour = np.where(part[..., None] > 0, np.array(_RAISES), np.array(_LOWERS))
        share = (_STRONGEST * np.abs(part))[..., None]
        pixels = (1 - share) * pixels + share * colour
    stream = io.BytesIO()
    Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()
