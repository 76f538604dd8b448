"""Where a network runs, and what the place computes in."""

from __future__ import annotations

import torch

__all__ = ["choose_device", "computes_in_bfloat16"]


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda[:N]`: auto takes a GPU where there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
