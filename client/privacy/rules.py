"""How each kind of layer turns inputs and output gradients into norms and clipped sums.

A rule sees a layer's (input, output gradient) pairs, one for each time the layer was used, rows
first. It returns the squared norm of every patient's gradient, and a function that, given every
patient's clip factor, returns the weighted sum of the gradients.

Source: Goodfellow 2015 (closed-form norms); Li et al. 2022 (ghost norms); Bu et al. 2022
(convolutions) and 2023 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.privacy.patients import Patients, parted, squared, weighted, wide, without
from client.privacy.products import crossed
from client.privacy.recurrence import Projection, Recurrence
from common.errors import Code, RefusedError

__all__ = ["Finish", "Pairs", "Rule", "materialised", "norm_gradients", "rule_for"]

Pairs = list[tuple[Tensor, Tensor]]
Finish = Callable[[Tensor, "Tensor | None"], dict[nn.Parameter, Tensor]]
Rule = Callable[[nn.Module, Pairs, Patients], tuple[Tensor, Finish]]
Sampler = Callable[[nn.Module, Tensor, Tensor], Mapping[nn.Parameter, Tensor]]

# Ghost norms subtract large numbers; this multiple of the largest possible sum is added to the
# squared norm so that rounding can only clip harder (four units in the last place of float32).
_GUARD: Final = 2.0**-22
# Squares below this are lost in float32; times a huge factor they would be missed in the norm.
_LOST: Final = 2.0**-126
# Per-patient gradients are kept where they are at most so many times as large as the inputs and
# output gradients that they are made from, and which are then let go; small ones a bit more.
_KEEP: Final = 2
_KEEP_SMALL: Final = 4
_SMALL: Final = 1 << 22
# With few steps, inner products cost less than reading the gradients again.
_KEEP_SHORT: Final = 1
_SHORT: Final = 64


_RECURRENT: Final = frozenset({"RNNBase", "RNNCellBase", "DPRNNBase", "DPRNNCellBase"})
"""Torch's recurrent layers and Opacus' (known by name, so that Opacus is not imported)."""


def rule_for(layer: nn.Module, name: str) -> Rule | None:
    """The rule for a layer with a trainable parameter; None where only Opacus may know one.

    Types are compared exactly: a subclass may compute something else from its parameters.

    Raises:
        RefusedError: the layer cannot be told apart by patients at all.
    """
    ancestors = {kind.__name__ for kind in type(layer).__mro__}
    if ancestors & _RECURRENT:
        raise RefusedError(
            Code.MODEL_RECURRENT,
            f"parameter {name} lies in a {type(layer).__name__}.",
        )
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.EmbeddingBag):  # noqa: SLF001
        raise unsupported(layer, name)
    if getattr(layer, "track_running_stats", False):
        raise RefusedError(
            Code.MODEL_BATCH_NORM, f"parameter {name} lies in a layer with running statistics."
        )
    if type(layer) is nn.Embedding and (
        layer.scale_grad_by_freq or layer.max_norm is not None or layer.sparse
    ):
        raise RefusedError(
            Code.MODEL_UNSUPPORTED, f"parameter {name}: an embedding option mixes records."
        )
    if isinstance(layer, Recurrence):
        return _linear
    return _RULES.get(type(layer))


def unsupported(layer: nn.Module, name: str) -> RefusedError:
    """The refusal of a layer for which there is no rule."""
    return RefusedError(
        Code.MODEL_UNSUPPORTED,
        f"parameter {name} lies in a {type(layer).__name__}, for which there is no rule.",
    )


# ---------------------------------------------------------------------- products of two factors


def _product(
    activation: Tensor, gradient: Tensor, blocks: int, patients: Patients
) -> tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]:
    """Gradients g^T a per patient, in `blocks` parts that share nothing.

    Shapes: activation (P * blocks, T, d), gradient (P * blocks, T, p); the norms are (P,), the
        weighted sum (blocks, p, d).
    """
    length, outputs = gradient.shape[1:]
    inputs = activation.shape[2]
    count = patients.count

    def again(factors: Tensor, bad: Tensor | None) -> Tensor:
        if blocks > 1:
            factors = factors.repeat_interleave(blocks)
            bad = None if bad is None else bad.repeat_interleave(blocks)
        left, right = without(gradient, bad), without(activation, bad)
        scale = factors.to(left.dtype)[:, None, None]
        if outputs <= inputs:
            left = left * scale
        else:
            right = right * scale
        if blocks == 1:
            if left.transpose(0, 1).is_contiguous():  # as a recurrent layer leaves it
                left, right = left.transpose(0, 1), right.transpose(0, 1)
            return crossed(left.reshape(-1, outputs), right.reshape(-1, inputs))[None]
        return torch.einsum(
            "pbto,pbti->boi",
            parted(left, 0, (count, blocks)),
            parted(right, 0, (count, blocks)),
        )

    if length == 1 and blocks == 1:
        # In float64: a tiny gradient times a huge activation must not underflow to no norm.
        norms = [
            torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64)
            for part in (gradient, activation)
        ]
        return (norms[0] * norms[1]).square(), again
    most = _KEEP_SMALL if count * outputs * inputs <= _SMALL else _KEEP
    if length < _SHORT:
        most = min(most, _KEEP_SHORT)
    if count == 1 or outputs * inputs <= most * length * (outputs + inputs):
        kept = parted(torch.bmm(gradient.mT, activation), 0, (count, blocks))
        return squared(kept), lambda factors, bad: weighted(factors, kept, bad)
    squares = _ghost(activation, gradient, patients)
    return squares.reshape(count, blocks).sum(1), again


def _ghost(activation: Tensor, gradient: Tensor, patients: Patients) -> Tensor:
    """Squared norms of g^T a from inner products alone, (P,) float64, never too small."""
    left, right = patients.gram(gradient), patients.gram(activation)
    found = (left * right).sum((1, 2)).double().clamp(min=0)
    lost = [_LOST * gradient.shape[2], _LOST * activation.shape[2]]
    sizes = [
        (gram.diagonal(dim1=1, dim2=2).double() + least).sqrt()
        for gram, least in zip((left, right), lost, strict=True)
    ]
    rounding = _GUARD * (sizes[0] * sizes[1]).sum(1).square()
    underflow = lost[0] * sizes[1].sum(1).square() + lost[1] * sizes[0].sum(1).square()
    return found + rounding + underflow


def _steps(tensors: Sequence[Tensor], patients: Patients) -> Tensor:
    """(rows, T, d) of one layer, used once or several times, T being all its other axes."""
    parts = [wide(t).reshape(patients.rows, -1, t.shape[-1]) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _with_bias(
    layer: nn.Module,
    per_bias: Callable[[], Tensor],
    weight: Callable[[], tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]],
    patients: Patients,
) -> tuple[Tensor, Finish]:
    """The rule of a layer whose bias is added to a product of its weight."""
    squares = torch.zeros(patients.count, dtype=torch.float64, device=patients.device)
    parts: list[tuple[nn.Parameter, Callable[[Tensor, Tensor | None], Tensor]]] = []
    if isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad:
        sums = patients.total(per_bias())
        squares += squared(sums)
        parts.append((layer.bias, lambda factors, bad: weighted(factors, sums, bad)))
    if isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad:
        square, finish = weight()
        squares += square
        parts.append((layer.weight, finish))

    def finish_all(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
        return {p: finish(factors, bad).reshape(p.shape) for p, finish in parts}

    return squares, finish_all


def _linear(layer: nn.Module, pairs: Pairs, patients: Patients) -> tuple[Tensor, Finish]:
    gradient = _steps([g for _, g in pairs], patients)

    def weight() -> tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]:
        activation = _steps([a for a, _ in pairs], patients)
        return _product(patients.lengthen(activation), patients.lengthen(gradient), 1, patients)

    return _with_bias(layer, lambda: gradient.sum(1), weight, patients)


# ---------------------------------------------------------------------- convolutions

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _convolution(layer: nn.Module, pairs: Pairs, patients: Patients) -> tuple[Tensor, Finish]:
    """A convolution is a Linear over the patches of its input, group by group."""
    assert isinstance(layer, _Convolution)  # noqa: S101 - chosen by type
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    gradients = [wide(g).flatten(2) for _, g in pairs]
    gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients, 2)

    def weight() -> tuple[Tensor, Callable[[Tensor, Tensor | None], Tensor]]:
        patches = [_patches(layer, wide(a)) for a, _ in pairs]
        activation = patches[0] if len(patches) == 1 else torch.cat(patches, 2)
        left = parted(gradient, 1, (groups, outputs)).mT
        return _product(
            _lengthen_blocks(activation, patients),
            _lengthen_blocks(left, patients),
            groups,
            patients,
        )

    return _with_bias(layer, lambda: gradient.sum(2), weight, patients)


def _lengthen_blocks(values: Tensor, patients: Patients) -> Tensor:
    """(rows, blocks, T, d) to (patients * blocks, K * T, d)."""
    if patients.single:
        return values.flatten(0, 1)
    blocks = values.shape[1]
    long = patients.lengthen(values.movedim(1, 2).flatten(2))
    return parted(long, 2, (blocks, -1)).movedim(2, 1).flatten(0, 1)


def _patches(layer: _Convolution, values: Tensor) -> Tensor:
    """(rows, C, *space) to (rows, groups, places, C / groups * kernel)."""
    sizes = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    padding = layer._reversed_padding_repeated_twice  # noqa: SLF001 - as its own forward pass
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    view = functional.pad(values, padding, mode=mode) if any(padding) else values
    for axis, (kernel, stride, dilation) in enumerate(sizes, start=2):
        view = view.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    rank = len(sizes)
    view = parted(view, 1, (layer.groups, -1))  # rows, groups, C / groups, *places, *kernel
    places = range(3, 3 + rank)
    order = [0, 1, *places, 2, *range(3 + rank, 3 + 2 * rank)]
    return view.permute(order).flatten(2 + rank).flatten(2, 1 + rank)


# ---------------------------------------------------------------------- tables


def _embedding(layer: nn.Module, pairs: Pairs, patients: Patients) -> tuple[Tensor, Finish]:
    assert isinstance(layer, nn.Embedding)  # noqa: S101 - chosen by type
    tokens = torch.cat([a.reshape(patients.rows, -1) for a, _ in pairs], 1)
    gradient = _steps([g for _, g in pairs], patients)
    tokens = patients.lengthen(tokens.unsqueeze(-1)).squeeze(-1)
    gradient = patients.lengthen(gradient)
    counted = None if layer.padding_idx is None else tokens != layer.padding_idx
    if tokens.shape[1] == 1:
        squares = squared(gradient)
        if counted is not None:  # torch gives the padding row no gradient
            squares = squares * counted.squeeze(1)
    else:
        same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
        if counted is not None:
            same &= counted.unsqueeze(2)
        grams = patients.gram(gradient)
        sizes = grams.diagonal(dim1=1, dim2=2).double().sqrt()
        found = (grams * same).sum((1, 2)).double()
        squares = found.clamp(min=0) + _GUARD * sizes.sum(1).square()

    def finish(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
        scaled = without(gradient, bad) * factors.to(gradient.dtype)[:, None, None]
        table = torch.zeros_like(layer.weight, dtype=scaled.dtype)
        table.index_add_(0, tokens.reshape(-1), scaled.reshape(-1, scaled.shape[-1]))
        if layer.padding_idx is not None:
            table[layer.padding_idx] = 0
        return {cast(nn.Parameter, layer.weight): table}

    return squares, finish


# ---------------------------------------------------------------------- one gradient per row


def materialised(sampler: Sampler) -> Rule:
    """A rule from a sampler that returns one gradient per row and parameter."""

    def rule(layer: nn.Module, pairs: Pairs, patients: Patients) -> tuple[Tensor, Finish]:
        per_row: dict[nn.Parameter, Tensor] = {}
        for activation, gradient in pairs:
            broad = wide(gradient)
            for parameter, value in sampler(layer, activation.to(broad.dtype), broad).items():
                if parameter.requires_grad:
                    before = per_row.get(parameter)
                    per_row[parameter] = value if before is None else before + value
        grouped = {parameter: patients.total(value) for parameter, value in per_row.items()}
        squares = torch.zeros(patients.count, dtype=torch.float64, device=patients.device)
        for value in grouped.values():
            squares += squared(value)

        def finish(factors: Tensor, bad: Tensor | None) -> dict[nn.Parameter, Tensor]:
            return {p: weighted(factors, value, bad) for p, value in grouped.items()}

        return squares, finish

    return rule


def norm_gradients(
    layer: nn.Module, activation: Tensor, gradient: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-row gradients of a normalisation's scale and shift, which are small.

    Shapes: activation and gradient as the layer's input; values (rows, *parameter).
    """
    if isinstance(layer, nn.LayerNorm):
        kept = len(layer.normalized_shape)
        axes = list(range(1, gradient.dim() - kept))
    else:
        axes = list(range(2, gradient.dim()))
    per_row: dict[nn.Parameter, Tensor] = {}
    if isinstance(layer.bias, nn.Parameter):
        per_row[layer.bias] = gradient.sum(axes) if axes else gradient
    if isinstance(layer.weight, nn.Parameter):
        if isinstance(layer, nn.LayerNorm):
            normal = functional.layer_norm(activation, layer.normalized_shape, eps=layer.eps)
        elif isinstance(layer, nn.GroupNorm):
            normal = functional.group_norm(activation, layer.num_groups, eps=layer.eps)
        else:
            assert isinstance(layer.eps, float)  # noqa: S101 - an instance norm
            normal = functional.instance_norm(activation, eps=layer.eps)
        normal *= gradient
        per_row[layer.weight] = normal.sum(axes) if axes else normal
    return per_row


_RULES: Final[dict[type[nn.Module], Rule]] = {
    nn.Linear: _linear,
    Projection: _linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: materialised(norm_gradients),
    nn.GroupNorm: materialised(norm_gradients),
    nn.InstanceNorm1d: materialised(norm_gradients),
    nn.InstanceNorm2d: materialised(norm_gradients),
    nn.InstanceNorm3d: materialised(norm_gradients),
}
