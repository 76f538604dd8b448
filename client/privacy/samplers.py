"""Opacus' gradients by row, with what they get wrong set right or refused.

Opacus gives padding tokens a gradient (torch does not), has none for a LayerNorm without bias,
and takes every convolution for zero-padded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from client.privacy.patients import wide
from client.privacy.recurrence import Projection, Recurrence
from client.privacy.rules import norm_gradients, unsupported

__all__ = ["sampler_for"]

Sampler = Callable[[nn.Module, Tensor, Tensor], dict[nn.Parameter, Tensor]]


def sampler_for(layer: nn.Module, name: str) -> Sampler:
    """A function of (layer, input, output gradient) to one gradient per row and parameter.

    Raises:
        RefusedError: Opacus knows no such layer, or the layer mixes records.
    """
    # The import registers the samplers; the class itself is never instantiated.
    from opacus import GradSampleModule
    from opacus.layers.dp_rnn import RNNLinear

    if isinstance(layer, Recurrence):
        return _recurrence
    if isinstance(layer, nn.LayerNorm) and getattr(layer, "bias", None) is None:
        return norm_gradients
    kind = nn.Linear if isinstance(layer, Projection) else type(layer)
    found = GradSampleModule.GRAD_SAMPLERS.get(kind)
    if found is None or isinstance(layer, RNNLinear):
        raise unsupported(layer, name)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise unsupported(layer, name)

    def sample(
        layer: nn.Module, activation: Tensor, gradient: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        broad = wide(gradient)
        if isinstance(layer, nn.Embedding):
            if layer.padding_idx is not None:
                broad = broad * (activation != layer.padding_idx).unsqueeze(-1)
            given = activation
        else:
            given = activation.to(broad.dtype)
        values: dict[nn.Parameter, Tensor] = found(layer, [given], broad)
        return values

    return sample


def _recurrence(
    layer: nn.Module, activation: Tensor, gradient: Tensor
) -> dict[nn.Parameter, Tensor]:
    """A recurrent weight is a Linear over the hidden states before each step."""
    assert isinstance(layer, Recurrence)  # noqa: S101 - chosen by type
    broad = wide(gradient)
    values = {layer.weight: torch.einsum("rtp,rtd->rpd", broad, activation.to(broad.dtype))}
    if layer.bias is not None:
        values[layer.bias] = broad.sum(1)
    return values
