"""Which tensors of a network stay at each hospital (`training.personal`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from torch import nn

from common.errors import Code, ConfigError

__all__ = ["HEAD", "personal_names"]

HEAD: Final = "output"
"""What a task's own network calls its last layer."""


def personal_names(
    module: nn.Module, trainable: Collection[str], head: str, parts: Sequence[str]
) -> tuple[str, ...]:
    """The tensors of `parts`, sorted.

    Args:
        module: the network.
        trainable: its tensors that learn.
        head: the name of its last layer.
        parts: `head`, `norms` or both.

    Raises:
        ConfigError: PERSONAL_LAYERS, a part has no tensor that learns, or all tensors are in one.
    Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers" (head);
        Li et al. 2021, "FedBN" (norms).
    """
    found: set[str] = set()
    for part in parts:
        inside = {n for n in trainable if _belongs(module, n, head if part == "head" else None)}
        if not inside:
            raise ConfigError(
                Code.PERSONAL_LAYERS, f"training.personal: the network has no {part} that learn."
            )
        found |= inside
    if parts and found >= set(trainable):
        raise ConfigError(
            Code.PERSONAL_LAYERS,
            f"training.personal: {' and '.join(parts)} are all that learns; nothing would be "
            "common.",
        )
    return tuple(sorted(found))


def _belongs(module: nn.Module, name: str, head: str | None) -> bool:
    """Whether a tensor lies in the layer `head`; without one, whether it is of a norm."""
    if head is not None:
        return name.startswith(f"{head}.")
    owner = module.get_submodule(name.rpartition(".")[0])
    # Norms of transformers are classes of their own, by this name.
    return isinstance(owner, nn.LayerNorm | nn.GroupNorm) or type(owner).__name__.endswith("Norm")
