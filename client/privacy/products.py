"""Products of large float32 matrices on a CPU, by oneDNN.

PyTorch's own recurrent and convolution layers compute in oneDNN, its matrix products in MKL, which
leaves half the speed of another maker's CPU unused. Where oneDNN is not at hand, a product is
PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["adder", "affine", "crossed", "fits"]

# A kernel is made once for each shape, so that small products are not worth one.
_LEAST: Final = 1 << 18


def _linear() -> Any:
    """The operation that PyTorch's compiler takes for linear layers; None where there is none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR: Final = _linear()


def adder(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (addend, values): addend + values @ weight.T, in memory of its own.

    Shapes: weight (m, n); addend (rows, m), values (rows, n).
    """
    if not fits(weight, rows):
        turned = weight.t()
        return lambda addend, values: torch.addmm(addend, values, turned)
    binary = _LINEAR.binary
    return lambda addend, values: binary(values, addend, weight, None, "add")


def crossed(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right. Shapes: (n, p) and (n, d), as they lie; returns (p, d)."""
    if not fits(left, right.shape[1]) or left.dtype != right.dtype:
        return left.T @ right
    found: Tensor = _LINEAR(right.T, left.T, None, "none", [], "")
    return found.T.contiguous()


def affine(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An affine map, values @ weight.T + bias, without writing the bias out for every row first.

    Shapes: values (..., n), weight (m, n), bias (m,) or None.
    """
    rows = values.numel() // max(values.shape[-1], 1)
    mixed = torch.is_autocast_enabled(values.device.type) or values.dtype != weight.dtype
    if mixed or not fits(weight, rows):
        return functional.linear(values, weight, bias)
    found: Tensor = _Affine.apply(values, weight, bias)
    return found


class _Affine(torch.autograd.Function):
    """A linear layer by oneDNN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: (..., n), (m, n) and (m,) to (..., m)."""
        ctx.save_for_backward(values, weight)
        found: Tensor = _LINEAR(values, weight, bias, "none", [], "")
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is asked for, and nothing else."""
        values, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient @ weight if wanted[0] else None,
            crossed(rows, values.reshape(-1, values.shape[-1])) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def fits(values: Tensor, times: int) -> bool:
    """Whether the product of these values with a matrix of so many other rows is for oneDNN."""
    here = values.device.type == "cpu" and values.dtype == torch.float32
    return here and _LINEAR is not None and values.numel() * times >= _LEAST
