"""Attribution over any network: integrated gradients, Grad-CAM, and the deletion curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.explain.facts import Balance, Curve
from client.tasks.outcomes import answers
from common.errors import Code, DataError
from common.outcomes import Classes, Hazard, LabelSet, Number, Outcome

__all__ = [
    "Attributed",
    "Target",
    "deletion",
    "grad_cam",
    "integrated_gradients",
    "scorer",
    "still",
]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

STEPS: Final = 32
MOST_STEPS: Final = 256
POINTS: Final = 10
ORDERS: Final = 6
_STREAM: Final = 1703_01365  # any fixed number: the same page for the same record


@dataclass(frozen=True, slots=True)
class Target:
    """What is explained of a network's outputs: one label, or the one thing that is predicted.

    The score is linear in the outputs, so it adds up over a note's windows and over its parts.
    """

    outcome: Outcome
    column: int = 0

    @staticmethod
    def of(outcome: Outcome, outputs: Tensor, label: str | None = None) -> Target:
        """The label asked for, else the likeliest. Shapes: outputs (1, outcome.outputs).

        Raises:
            DataError: the model has no such label.
        """
        labelled = isinstance(outcome, Classes | LabelSet)
        if label is None:
            return Target(outcome, int(outputs[0].argmax()) if labelled else 0)
        if label in outcome.labels:
            return Target(outcome, outcome.labels.index(label))
        known = ", ".join(outcome.labels[:20]) or "none: it predicts no label"
        raise DataError(
            Code.DATA_LABEL,
            f"the model has no label {label[:100]!a}.",
            remedy=f"Leave --label out, or give one of the model's labels ({known}).",
        )

    @property
    def name(self) -> str:
        """The label, or what else is predicted."""
        if isinstance(self.outcome, Classes | LabelSet):
            return self.outcome.labels[self.column]
        return "value" if isinstance(self.outcome, Number) else "risk"

    @property
    def unit(self) -> str:
        """What the attributions are counted in."""
        if isinstance(self.outcome, Classes):
            return "logits above the mean of the other labels"
        if isinstance(self.outcome, LabelSet):
            return "logits"
        if isinstance(self.outcome, Hazard):
            return "logits of the event, mean over the intervals"
        return self.outcome.unit or "units of the predicted quantity"

    def score(self, outputs: Tensor) -> Tensor:
        """What is attributed to the inputs. Shapes: (n, outcome.outputs) to (n,)."""
        own = outputs[:, self.column]
        if isinstance(self.outcome, Classes):
            return own - (outputs.sum(1) - own) / (outputs.shape[1] - 1)
        if isinstance(self.outcome, Hazard):
            return outputs.mean(1)
        if isinstance(self.outcome, Number):
            return own * (self.outcome.high - self.outcome.low)
        return own

    def chances(self, outputs: Tensor) -> Array:
        """The probability, quantity or risk that a person reads. Shapes: (n, L) to (n,)."""
        told = answers(self.outcome, outputs)
        if isinstance(self.outcome, Classes | LabelSet):
            return np.array([found["probabilities"][self.name] for found in told])
        return np.array([found[self.name] for found in told])


@dataclass(frozen=True)
class Attributed:
    """Attributions of one record's inputs, each of its input's shape without the first axis."""

    values: tuple[Array, ...]
    balance: Balance


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Within it the module neither learns nor drops anything out; after it, it is as it was."""
    learns = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    trains = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        for parameter, _ in learns:
            parameter.requires_grad_(False)  # noqa: FBT003
        yield
    finally:
        for parameter, was in learns:
            parameter.requires_grad_(was)
        for part, was in trains:
            part.training = was


def scorer(
    network: nn.Module, inputs: Sequence[Tensor], target: Target, places: Sequence[int]
) -> Callable[..., Tensor]:
    """The score as a function of the inputs at `places`; one record's others are held fixed."""

    def score(*given: Tensor) -> Tensor:
        rows = len(given[0])
        filled = [tensor.expand(rows, *tensor.shape[1:]).contiguous() for tensor in inputs]
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        return target.score(network(*filled))

    return score


def integrated_gradients(
    score: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    blanks: tuple[Tensor, ...],
    *,
    at_once: int,
    steps: int = STEPS,
) -> Attributed:
    """The inputs' shares in score(inputs) - score(blanks), along the straight path between them.

    Gauss-Legendre quadrature; its points are doubled until the shares add up, at most to
    `MOST_STEPS`.

    Args:
        score: of n rows, (n,).
        inputs: floating point, one row each.
        blanks: what they are compared with, of the same shapes.
        at_once: rows of the path that are in memory together.
        steps: points of the path to begin with.

    Source: Sundararajan et al. 2017 (arXiv:1703.01365); captum.
    """
    from captum.attr import IntegratedGradients

    # The same figures again for the same record, also on a GPU.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True):
        with torch.no_grad():
            ends = [float(score(*at)[0]) for at in (inputs, blanks)]
        method: Any = IntegratedGradients(score)
        while True:
            shares = method.attribute(
                inputs, baselines=blanks, n_steps=steps, internal_batch_size=max(1, at_once)
            )
            values = tuple(share[0].detach().double().cpu().numpy() for share in shares)
            total = float(sum(value.sum() for value in values))
            found = Attributed(values, Balance(total, ends[0], ends[1], steps))
            if found.balance.complete or 2 * steps > MOST_STEPS:
                return found
            steps *= 2


def grad_cam(score: Callable[[Tensor], Tensor], images: Tensor, layer: nn.Module) -> Array:
    """Where the layer's maps raise the score of one image; from 0, in no unit.

    Shapes: images (1, C, H, W) floating point; returns (H, W).
    Source: Selvaraju et al. 2017 (arXiv:1610.02391); captum.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    given = images.detach().clone().requires_grad_(True)  # noqa: FBT003
    method: Any = LayerGradCam(score, layer)
    maps = method.attribute(given, relu_attributions=True)
    size = tuple(images.shape[2:])
    whole = LayerAttribution.interpolate(maps, size, interpolate_mode="bilinear")
    found: Array = whole[0, 0].detach().double().cpu().numpy()
    return found


def deletion(
    chances: Callable[[Mask], Array], values: Array, *, points: int = POINTS, orders: int = ORDERS
) -> Curve:
    """Blank the parts with the greatest attribution first and see how fast the answer falls.

    Args:
        chances: the answer by row of a mask (k, parts), False where a part is blanked; (k,).
        values: the attributions, (parts,).
        points: how many times, evenly, the answer is looked at after the first.
        orders: random orders to compare with; always the same ones.

    Guarantee: (1 + orders) * points answers at most, whatever the number of parts.
    """
    count = len(values)
    cuts = np.unique(np.rint(np.linspace(0, count, min(points, count) + 1)).astype(np.int64))
    shares = cuts / max(count, 1)
    ends = chances(np.repeat([[True], [False]], max(count, 1), axis=1)[:, :count])
    between = cuts[1:-1]

    def curve(order: NDArray[np.int64]) -> Array:
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        inner = chances(place[None, :] >= between[:, None]) if len(between) else np.zeros(0)
        return np.concatenate([ends[:1], inner, ends[1:]])[: len(cuts)]

    ours = curve(np.argsort(-values, kind="stable"))
    stream = np.random.Generator(np.random.PCG64([_STREAM, count]))
    other: Array = np.mean([curve(stream.permutation(count)) for _ in range(orders)], axis=0)
    return Curve(
        removed=tuple(map(float, shares)),
        ours=tuple(map(float, ours)),
        random=tuple(map(float, other)),
        area=_area(ours, shares),
        random_area=_area(other, shares),
    )


def _area(heights: Array, shares: Array) -> float:
    return float(np.trapezoid(heights, shares)) if len(shares) > 1 else float(heights[0])
