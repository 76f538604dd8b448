"""Clipped sums of per-patient gradients, from one forward and one backward pass.

Hooks keep, for every layer with a trainable parameter, its input and the place of its output in
the autograd graph. One backward pass to those places (weight gradients are never asked for)
gives every layer's output gradient, row by row. From the two, the book-keeping engine's rules
compute the norms of the patients' gradients and then their clipped sum, without holding a
gradient per record where the layer is large. A layer without a rule of its own goes by Opacus'
sampler, which holds one gradient per record (`engine` has an engine made of these alone).

Source: Goodfellow 2015 (closed-form norms); Li et al. 2022 (ghost norms); Bu et al. 2023
(book-keeping); Opacus (`grad_sample`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from client.privacy.patients import Patients
from client.privacy.recurrence import Recurrence
from client.privacy.rules import Finish, Pairs, Rule, materialised, rule_for
from client.privacy.samplers import sampler_for
from common.errors import Code, RefusedError

__all__ = [
    "SLACK",
    "SLACK_REDUCED",
    "ClippedSum",
    "PerSampleEngine",
    "layers_of",
]

SLACK: Final = 1e-3
"""How far float32 arithmetic may carry a patient's contribution beyond the clip norm.

Covers the rounding of a sum of up to ten thousand patients; matrix products must not run in
TF32 (torch's default precision, `highest`, does not)."""

SLACK_REDUCED: Final = 1e-2
"""The same where the forward and backward pass run in bfloat16."""

_TINY: Final = 1e-30
_REENTRANT: Final = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class ClippedSum:
    """The sum over patients of their clipped gradients.

    `contributed`, the number of patients with finite gradients, is as secret as the sample; it
    stays on the device, so that nobody waits for it.
    """

    gradients: dict[str, Tensor]
    contributed: Tensor


@dataclass(frozen=True)
class _Capture:
    module: nn.Module
    activation: Tensor
    version: int
    edge: GradientEdge


class PerSampleEngine:
    """The book-keeping engine for one module; state keys and forward results stay as they are.

    Args:
        module: the model; its trainable layers keep their records on the first axis.
        trainable: the parameters to train, by name.
        clip_norm: C, the largest L2 norm of a patient's gradient.
        reduced_precision: whether the passes run under bfloat16 autocast.

    Raises:
        RefusedError: a parameter is shared between layers or lies in an unsupported layer, or
            `trainable` is not exactly what requires a gradient.
    """

    name: Literal["bookkeeping", "opacus"] = "bookkeeping"

    def __init__(
        self,
        module: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        clip_norm: float,
        *,
        reduced_precision: bool = False,
    ) -> None:
        if not clip_norm > 0:
            raise ValueError("the clip norm must be positive")
        self.clip_norm = clip_norm
        self.trainable = dict(trainable)
        self.reason = "asked for"
        self._slack = SLACK_REDUCED if reduced_precision else SLACK
        self._names = {id(parameter): name for name, parameter in self.trainable.items()}
        self._captures: list[_Capture] = []
        self._listening = True
        self._graph_checked = False
        self._handles: list[Any] = []
        self._layers = layers_of(module, self.trainable)
        self._learn_layers()
        for owner in self._layers:
            self._handles.append(owner.register_forward_hook(self._keep, with_kwargs=True))

    @property
    def sensitivity(self) -> float:
        """Most that one patient can change a clipped sum, rounding included; noise scales by it."""
        return self.clip_norm * (1 + self._slack)

    def close(self) -> None:
        """Take the hooks off the module and drop what they kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captures.clear()

    def clipped_sum(self, losses: Tensor, owner: NDArray[np.int64], patients: int) -> ClippedSum:
        """The sum over patients of clip(mean over his rows of the loss gradient).

        A patient with a non-finite loss or gradient contributes zero, and no other patient's
        contribution changes by it. On a GPU nothing here waits for the device.

        Shapes: losses (rows,), the graph of the last forward pass; owner (rows,) in
            0 .. patients - 1; one float32 gradient per trainable name, shaped as it is.
        Guarantee: adding or removing one patient changes the sum by at most `sensitivity`,
            provided the model computes each row on its own (`admission` checks it).

        Raises:
            RefusedError: the loss is not one number per row, or a layer lost the row axis.
        """
        captures, self._captures = self._captures, []
        if losses.shape != (len(owner),):
            raise RefusedError(
                Code.LOSS_SHAPE,
                f"the loss has shape {tuple(losses.shape)} for {len(owner)} records.",
            )
        found: dict[str, Tensor] = {}
        contributed = torch.zeros((), dtype=torch.int64, device=losses.device)
        if len(owner):
            # Whatever the caller's autocast, norms and sums are float32.
            with torch.autocast(losses.device.type, enabled=False), torch.no_grad():
                groups = Patients(owner, patients, losses.device)
                pairs = self._output_gradients(captures, losses, groups)
                found, contributed = self._sum(pairs, losses.detach(), groups)
        sums = {
            name: found[name].float() if name in found else torch.zeros_like(p, dtype=torch.float32)
            for name, p in self.trainable.items()
        }
        return ClippedSum(sums, contributed)

    def _learn_layers(self) -> None:
        """Find a rule for every layer, or refuse."""
        self._rules: dict[nn.Module, Rule] = {
            layer: _rule_of(layer, name) for layer, name in self._layers.items()
        }

    def _sum(
        self, pairs: dict[nn.Module, Pairs], losses: Tensor, groups: Patients
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The clipped gradients' sums by name, and how many patients contributed."""
        squares = torch.zeros(groups.count, dtype=torch.float64, device=groups.device)
        finished: list[Finish] = []
        for module in list(pairs):  # what a rule does not keep is let go at once
            square, finish = self._rules[module](module, pairs.pop(module), groups)
            squares += square
            finished.append(finish)
        groups.forget()
        factors, mask, contributed = self._factors(squares, losses, groups)
        sums: dict[str, Tensor] = {}
        while finished:
            for parameter, value in finished.pop()(factors, mask).items():
                sums[self._names[id(parameter)]] = value
        return sums, contributed

    def _factors(
        self, squares: Tensor, losses: Tensor, groups: Patients
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Every patient's clip factor, who is bad (None: nobody), how many are not."""
        lost = groups.total((~torch.isfinite(losses)).float()) > 0
        bad = ~torch.isfinite(squares) | lost
        factors = (self.clip_norm / squares.sqrt().clamp(min=_TINY)).clamp(max=1.0)
        factors = factors.masked_fill(bad, 0.0).float()
        # Masking nobody costs less than asking a GPU whether there is anybody, and on a CPU more.
        masked = bad.device.type != "cpu" or bool(bad.any())
        return factors, bad if masked else None, (~bad).sum()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._listening or not torch.is_grad_enabled():
            return
        if isinstance(module, Recurrence):
            given, place = module.product_of(args, output)
        else:
            given, place = args[0] if args else next(iter(kwargs.values())), output
        if not isinstance(given, Tensor) or not isinstance(place, Tensor):
            raise RefusedError(
                Code.PACKED_SEQUENCE,
                f"a trainable {type(module).__name__} takes or returns something other than "
                "one tensor.",
            )
        if not place.requires_grad:
            return
        # Tensors made under inference_mode, such as cached features, have no version.
        version = -1 if given.is_inference() else given._version  # noqa: SLF001
        edge = get_gradient_edge(place)
        self._captures.append(_Capture(module, given.detach(), version, edge))

    def _output_gradients(
        self, captures: list[_Capture], losses: Tensor, groups: Patients
    ) -> dict[nn.Module, Pairs]:
        """Per layer, its (input, output gradient) pairs, all with the rows on the first axis."""
        if not captures or not losses.requires_grad:
            raise RefusedError(
                Code.MODEL_UNSUPPORTED, "the loss does not depend on a trainable layer."
            )
        self._check_graph(losses)
        self._listening = False  # checkpointed layers run again during the backward pass
        try:
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                losses,
                [capture.edge for capture in captures],
                grad_outputs=groups.weights(losses),
                allow_unused=True,
            )
        finally:
            self._listening = True
        pairs: dict[nn.Module, Pairs] = {}
        for capture, gradient in zip(captures, gradients, strict=True):
            if gradient is None:  # a forward pass that this loss does not come from
                continue
            if capture.version >= 0 and capture.activation._version != capture.version:  # noqa: SLF001
                raise RuntimeError("a layer's input was changed in place after its forward pass")
            for tensor in (capture.activation, gradient):
                if not tensor.dim() or tensor.shape[0] != groups.rows:
                    raise RefusedError(
                        Code.BATCH_LOST,
                        f"a {type(capture.module).__name__} saw {tuple(tensor.shape)} for "
                        f"{groups.rows} records.",
                    )
            pairs.setdefault(capture.module, []).append((capture.activation, gradient))
        captures.clear()
        return pairs

    def _check_graph(self, losses: Tensor) -> None:
        """Refuse checkpoints that hide their layers from this pass (once: the model is fixed)."""
        if self._graph_checked:
            return
        waiting, seen = [losses.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == _REENTRANT:
                raise RefusedError(
                    Code.MODEL_UNSUPPORTED,
                    "gradient checkpointing is of the re-entrant kind (use_reentrant=True), "
                    "which hides layers; the other kind is exact.",
                )
            waiting.extend(following for following, _ in node.next_functions)
        self._graph_checked = True


def _rule_of(layer: nn.Module, name: str) -> Rule:
    return rule_for(layer, name) or materialised(sampler_for(layer, name))


def layers_of(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[nn.Module, str]:
    """Every layer with parameters of its own to train, and the name of the first of them."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    learning = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    if learning - set(names) or not all(p.requires_grad for p in trainable.values()):
        raise RefusedError(
            Code.TRAINABLES_DIFFER, "what requires a gradient is not what is to be trained."
        )
    layers: dict[nn.Module, str] = {}
    seen: set[int] = set()
    for layer in module.modules():
        mine = [id(p) for p in layer.parameters(recurse=False) if id(p) in names]
        if not mine:
            continue
        rule_for(layer, names[mine[0]])  # refuses what no engine may train
        if seen.intersection(mine):
            shared = names[next(key for key in mine if key in seen)]
            raise RefusedError(Code.MODEL_TIED, f"parameter {shared} belongs to two layers.")
        seen.update(mine)
        layers[layer] = names[mine[0]]
    missing = sorted(name for key, name in names.items() if key not in seen)
    if missing:
        raise RefusedError(Code.MODEL_UNSUPPORTED, f"parameter {missing[0]} is in no layer.")
    return layers
