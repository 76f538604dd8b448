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

__all__ = ["adder", "crossed", "fits"]

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


def fits(values: Tensor, times: int) -> bool:
    """Whether the product of these values with a matrix of so many other rows is for oneDNN."""
    here = values.device.type == "cpu" and values.dtype == torch.float32
    return here and _LINEAR is not None and values.numel() * times >= _LEAST
