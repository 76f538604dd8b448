"""Clipped sums of per-patient gradients, from one forward and one backward pass.

Hooks keep, for every layer with a trainable parameter, its input and the place of its output in
the autograd graph. One backward pass to those places (weight gradients are never asked for)
gives every layer's output gradient, row by row; from the two, each layer's rule computes the
norms of the patients' gradients and then their clipped sum, without holding a gradient per
record where the layer is large. Layers without a rule of their own use Opacus' samplers.

Source: Goodfellow 2015 (closed-form norms); Li et al. 2022 (ghost norms); Bu et al. 2023
(book-keeping); Opacus (`grad_sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from common.errors import Code, RefusedError

SLACK = 1e-3
"""How far float32 arithmetic may carry a patient's contribution beyond the clip norm.

Covers the rounding of a sum of up to ten thousand patients; matrix products must not run in
TF32 (torch's default precision, `highest`, does not)."""

SLACK_REDUCED = 1e-2
"""The same where the forward and backward pass run in bfloat16."""

# Ghost norms subtract large numbers; this multiple of the largest possible sum is added to the
# squared norm so that rounding can only clip harder (four units in the last place of float32).
_GUARD = 2.0**-22
# Gradients per patient are kept, not recomputed, up to this many values per layer.
_KEEP = 1 << 24
_TINY = 1e-30

_Finish = Callable[[Tensor, Tensor | None], dict[nn.Parameter, Tensor]]
_Rule = Callable[[nn.Module, "list[tuple[Tensor, Tensor]]", "_Patients"], tuple[Tensor, _Finish]]


@dataclass(frozen=True)
class ClippedSum:
    """The sum over patients of their clipped gradients.

    `contributed`, the number of patients with finite gradients, is as secret as the sample.
    """

    gradients: dict[str, Tensor]
    contributed: int


@dataclass(frozen=True)
class _Capture:
    module: nn.Module
    activation: Tensor
    version: int
    edge: GradientEdge


class _Patients:
    """Which rows belong to whom: (rows,) owners among `count` patients."""

    def __init__(self, owner: NDArray[np.int64], count: int, device: torch.device) -> None:
        sizes = np.bincount(owner, minlength=count) if len(owner) else np.zeros(count, np.int64)
        if len(owner) and (owner.min() < 0 or len(sizes) > count):
            raise ValueError("an owner lies outside the patients")
        self.rows = len(owner)
        self.count = count
        self.single = self.rows == count and bool((owner == np.arange(count)).all())
        self.owner = torch.from_numpy(owner).to(device)
        self.weights = torch.from_numpy(1.0 / sizes[owner]).to(device) if self.rows else None
        self._longest = int(sizes.max(initial=0))
        if not self.single:
            order = np.argsort(owner, kind="stable")
            starts = np.cumsum(sizes) - sizes
            place = np.empty_like(owner)
            place[order] = np.arange(self.rows) - starts[owner[order]]
            self._slot = torch.from_numpy(owner * self._longest + place).to(device)

    def lengthen(self, rows: Tensor) -> Tensor:
        """(rows, T, d) to (patients, K * T, d): a patient's rows one after another, zero-padded."""
        if self.single:
            return rows
        padded = rows.new_zeros(self.count * self._longest, *rows.shape[1:])
        padded.index_copy_(0, self._slot, rows)
        return padded.reshape(self.count, self._longest * rows.shape[1], *rows.shape[2:])

    def total(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (patients, ...): the sum over a patient's rows."""
        if self.single:
            return rows
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self.owner, rows)


class PerSampleEngine:
    """Computes clipped sums for one module; state keys and forward results stay as they are.

    Args:
        module: the model; its trainable layers keep their records on the first axis.
        trainable: the parameters to train, by name.
        clip_norm: C, the largest L2 norm of a patient's gradient.
        reduced_precision: whether the passes run under bfloat16 autocast.

    Raises:
        RefusedError: a parameter is shared between layers or lies in an unsupported layer, or
            `trainable` is not exactly what requires a gradient.
    """

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
        self._slack = SLACK_REDUCED if reduced_precision else SLACK
        self._captures: list[_Capture] = []
        self._handles: list[Any] = []
        self._rules = _choose_rules(module, self.trainable)
        for owner in self._rules:
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
        contribution changes by it.

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
        sums = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in self.trainable.items()
        }
        if not len(owner):
            return ClippedSum(sums, 0)
        # Whatever the caller's autocast, norms and sums are float32.
        with torch.autocast(losses.device.type, enabled=False):
            contributed = self._sum_into(sums, captures, losses, owner, patients)
        return ClippedSum(sums, contributed)

    def _sum_into(
        self,
        sums: dict[str, Tensor],
        captures: Sequence[_Capture],
        losses: Tensor,
        owner: NDArray[np.int64],
        patients: int,
    ) -> int:
        """Add the clipped gradients to `sums`; the number of patients that contributed."""
        groups = _Patients(owner, patients, losses.device)
        squares = torch.zeros(patients, dtype=torch.float64, device=losses.device)
        finished: list[_Finish] = []
        for module, pairs in self._output_gradients(captures, losses, groups).items():
            square, finish = self._rules[module](module, pairs, groups)
            squares += square
            finished.append(finish)
        bad_rows = ~torch.isfinite(losses.detach())
        bad = ~torch.isfinite(squares) | (groups.total(bad_rows.float()) > 0)
        factors = (self.clip_norm / squares.sqrt().clamp(min=_TINY)).clamp(max=1.0)
        factors = factors.masked_fill(bad, 0.0).float()
        dropped = int(bad.sum())
        names = {id(parameter): name for name, parameter in self.trainable.items()}
        for finish in finished:
            for parameter, value in finish(factors, bad if dropped else None).items():
                sums[names[id(parameter)]] += value
        return patients - dropped

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        given = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise RefusedError(
                Code.PACKED_SEQUENCE,
                f"a trainable {type(module).__name__} takes or returns something other than "
                "one tensor.",
            )
        if output.requires_grad:
            # Tensors made under inference_mode, such as cached features, have no version.
            version = -1 if given.is_inference() else given._version  # noqa: SLF001
            self._captures.append(
                _Capture(module, given.detach(), version, get_gradient_edge(output))
            )

    def _output_gradients(
        self, captures: Sequence[_Capture], losses: Tensor, groups: _Patients
    ) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
        """Per layer, its (input, output gradient) pairs, all with the rows on the first axis."""
        assert groups.weights is not None  # noqa: S101 - there is at least one row
        if not captures or not losses.requires_grad:
            raise RefusedError(
                Code.MODEL_UNSUPPORTED, "the loss does not depend on a trainable layer."
            )
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            losses,
            [capture.edge for capture in captures],
            grad_outputs=groups.weights.to(losses.dtype),
            allow_unused=True,
        )
        pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
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
        return pairs


# ---------------------------------------------------------------------- rules


def _choose_rules(
    module: nn.Module, trainable: Mapping[str, nn.Parameter]
) -> dict[nn.Module, _Rule]:
    names = {id(parameter): name for name, parameter in trainable.items()}
    learning = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    if learning - set(names) or not all(p.requires_grad for p in trainable.values()):
        raise RefusedError(
            Code.TRAINABLES_DIFFER, "what requires a gradient is not what is to be trained."
        )
    rules: dict[nn.Module, _Rule] = {}
    seen: set[int] = set()
    for layer in module.modules():
        mine = [id(p) for p in layer.parameters(recurse=False) if id(p) in names]
        if not mine:
            continue
        if seen.intersection(mine):
            shared = names[next(key for key in mine if key in seen)]
            raise RefusedError(Code.MODEL_TIED, f"parameter {shared} belongs to two layers.")
        seen.update(mine)
        rules[layer] = _rule_of(layer, names[mine[0]])
    missing = sorted(name for key, name in names.items() if key not in seen)
    if missing:
        raise RefusedError(Code.MODEL_UNSUPPORTED, f"parameter {missing[0]} is in no layer.")
    return rules


def _rule_of(layer: nn.Module, name: str) -> _Rule:
    # Exact types: a subclass may compute something else from the same parameters.
    if type(layer) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return _linear
    if type(layer) is nn.Embedding:
        if layer.scale_grad_by_freq or layer.max_norm is not None or layer.sparse:
            raise RefusedError(
                Code.MODEL_UNSUPPORTED, f"parameter {name}: an embedding option mixes records."
            )
        return _embedding
    if type(layer) is nn.LayerNorm:
        return _materialised(_layer_norm_sampler)
    # The import registers Opacus' samplers; the class itself is never instantiated.
    from opacus import GradSampleModule

    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
    if sampler is None or isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
        raise RefusedError(
            Code.MODEL_UNSUPPORTED,
            f"parameter {name} lies in a {type(layer).__name__}, for which there is no rule.",
        )
    return _materialised(sampler)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: norms and sums of bfloat16 rows must not round the other patients."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _squared(values: Tensor) -> Tensor:
    """Squared L2 norm per patient, (patients,) float64."""
    return values.reshape(values.shape[0], -1).square().sum(1).double()


def _without(values: Tensor, bad: Tensor | None) -> Tensor:
    """Zero where a patient is bad: zero times infinity is not zero."""
    if bad is None:
        return values
    return values.masked_fill(bad.reshape(-1, *[1] * (values.dim() - 1)), 0.0)


def _weighted(factors: Tensor, values: Tensor, bad: Tensor | None) -> Tensor:
    """Sum over patients of factor times value."""
    flat = _without(values, bad).reshape(values.shape[0], -1)
    return (factors.to(flat.dtype) @ flat).reshape(values.shape[1:])


def _rows(tensors: Sequence[Tensor], groups: _Patients) -> Tensor:
    """(rows, T, d) of one layer, used once or several times, T being all its other axes."""
    parts = [_wide(t).reshape(groups.rows, -1, t.shape[-1]) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _linear(
    layer: nn.Module, pairs: list[tuple[Tensor, Tensor]], groups: _Patients
) -> tuple[Tensor, _Finish]:
    weight, bias = layer.weight, layer.bias
    gradient = _rows([g for _, g in pairs], groups)
    squares = torch.zeros(groups.count, dtype=torch.float64, device=gradient.device)
    parts: list[tuple[nn.Parameter, _Finish]] = []
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        per_bias = groups.total(gradient.sum(1))
        squares += _squared(per_bias)
        parts.append((bias, lambda c, bad: {bias: _weighted(c, per_bias, bad)}))
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        square, finish = _linear_weight(
            weight, groups.lengthen(_rows([a for a, _ in pairs], groups)), groups.lengthen(gradient)
        )
        squares += square
        parts.append((weight, finish))

    def finish_all(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
        return {p: finish(factors, bad)[p] for p, finish in parts}

    return squares, finish_all


def _linear_weight(
    weight: nn.Parameter, activation: Tensor, gradient: Tensor
) -> tuple[Tensor, _Finish]:
    """Gradient g^T a per patient. Shapes: activation (P, T, d), gradient (P, T, p)."""
    patients, length, outputs = gradient.shape
    inputs = activation.shape[-1]

    def finish(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
        scaled = _without(gradient, bad) * factors[:, None, None]
        flat = _without(activation, bad).reshape(-1, inputs)
        return {weight: scaled.reshape(-1, outputs).T @ flat}

    if length == 1:
        # In float64: a tiny gradient times a huge activation must not underflow to no norm.
        return _squared(gradient.double()) * _squared(activation.double()), finish
    if 2 * length * length > outputs * inputs:  # the gradient itself is smaller than two Grams
        per_weight = torch.bmm(gradient.mT, activation)
        square = _squared(per_weight)
        if patients * outputs * inputs <= _KEEP:
            return square, lambda c, bad: {weight: _weighted(c, per_weight, bad)}
        return square, finish
    grams = torch.bmm(gradient, gradient.mT) * torch.bmm(activation, activation.mT)
    bound = (gradient.norm(dim=2) * activation.norm(dim=2)).sum(1).double().square()
    return grams.sum((1, 2)).double().clamp(min=0) + _GUARD * bound, finish


def _embedding(
    layer: nn.Module, pairs: list[tuple[Tensor, Tensor]], groups: _Patients
) -> tuple[Tensor, _Finish]:
    assert isinstance(layer, nn.Embedding)  # noqa: S101 - chosen by type
    tokens = torch.cat([a.reshape(groups.rows, -1) for a, _ in pairs], 1)
    gradient = _rows([g for _, g in pairs], groups)
    if layer.padding_idx is not None:  # torch gives the padding row no gradient
        gradient = gradient * (tokens != layer.padding_idx).unsqueeze(-1)
    tokens, gradient = groups.lengthen(tokens.unsqueeze(-1)).squeeze(-1), groups.lengthen(gradient)
    if tokens.shape[1] == 1:
        squares = _squared(gradient)
    else:
        same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
        bound = gradient.norm(dim=2).sum(1).double().square()
        grams = (torch.bmm(gradient, gradient.mT) * same).sum((1, 2)).double()
        squares = grams.clamp(min=0) + _GUARD * bound

    def finish(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
        scaled = _without(gradient, bad) * factors[:, None, None]
        table = torch.zeros_like(layer.weight, dtype=scaled.dtype)
        table.index_add_(0, tokens.reshape(-1), scaled.reshape(-1, scaled.shape[-1]))
        return {cast(nn.Parameter, layer.weight): table}

    return squares, finish


def _materialised(sampler: Callable[..., dict[nn.Parameter, Tensor]]) -> _Rule:
    """A rule from a sampler that returns one gradient per row and parameter."""

    def rule(
        layer: nn.Module, pairs: list[tuple[Tensor, Tensor]], groups: _Patients
    ) -> tuple[Tensor, _Finish]:
        per_row: dict[nn.Parameter, Tensor] = {}
        for activation, gradient in pairs:
            wide = _wide(gradient)
            for parameter, value in sampler(layer, [activation.to(wide.dtype)], wide).items():
                per_row[parameter] = per_row[parameter] + value if parameter in per_row else value
        grouped = {
            parameter: groups.total(value)
            for parameter, value in per_row.items()
            if parameter.requires_grad
        }
        squares = torch.zeros(groups.count, dtype=torch.float64, device=groups.owner.device)
        for value in grouped.values():
            squares += _squared(value)

        def finish(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
            return {p: _weighted(factors, value, bad) for p, value in grouped.items()}

        return squares, finish

    return rule


def _layer_norm_sampler(
    layer: nn.LayerNorm, activations: list[Tensor], gradient: Tensor
) -> dict[nn.Parameter, Tensor]:
    """As Opacus', and for layers without a bias as well (ModernBERT has such)."""
    middle = list(range(1, gradient.dim() - len(layer.normalized_shape)))
    per_row: dict[nn.Parameter, Tensor] = {}
    if isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad:
        normal = functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
        product = normal * gradient
        per_row[layer.weight] = product.sum(middle) if middle else product
    if isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad:
        per_row[layer.bias] = gradient.sum(middle) if middle else gradient
    return per_row
