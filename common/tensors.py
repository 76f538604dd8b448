"""Named float32 tensors: flat form, digest, and files (safetensors, never pickle)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.crypto.digest import tensors_digest
from common.errors import Code, StorageError
from common.ports import Tensors


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The trainable tensors of a study, sorted by name: how they lie in one flat vector.

    Shapes: `flatten` returns (d,) float32 with d = `size`; `unflatten` is its inverse.
    """

    specs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if names != sorted(set(names)):
            raise ValueError("a layout's tensors are sorted by name and distinct")

    @staticmethod
    def of(tensors: Tensors) -> Layout:
        """The layout of `tensors`."""
        return Layout(tuple(TensorSpec(n, tuple(tensors[n].shape)) for n in sorted(tensors)))

    @property
    def size(self) -> int:
        """d, the number of values of the flat vector."""
        return sum(spec.size for spec in self.specs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values per tensor, in order."""
        return tuple(spec.size for spec in self.specs)

    def flatten(self, tensors: Tensors) -> NDArray[np.float32]:
        """The tensors as one vector, (d,) float32."""
        if not self.specs:
            return np.zeros(0, np.float32)
        return np.concatenate(
            [np.ascontiguousarray(tensors[s.name], np.float32).reshape(-1) for s in self.specs]
        )

    def unflatten(self, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The vector (d,) as named tensors: views, not copies."""
        if flat.shape != (self.size,):
            raise ValueError(f"expected ({self.size},), got {flat.shape}")
        tensors: dict[str, NDArray[np.float32]] = {}
        start = 0
        for spec in self.specs:
            tensors[spec.name] = flat[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return tensors


def state_digest(tensors: Tensors) -> bytes:
    """SHA-256 over names, types, shapes and values: what "the same model" means."""
    return tensors_digest(tensors)


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write `tensors` as safetensors, atomically. Raises StorageError."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    temporary = path.with_suffix(path.suffix + ".part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{path}: cannot be written ({error.strerror})."
        ) from None


def load_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read float32 tensors from a safetensors file. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        loaded: Mapping[str, NDArray[np.float32]] = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise StorageError(
            Code.BUNDLE_DAMAGED,
            f"{path}: not a readable safetensors file ({type(error).__name__}).",
        ) from None
    for name, value in loaded.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise StorageError(Code.BUNDLE_DAMAGED, f"{path}: tensor {name} is not finite float32.")
    return dict(loaded)
