"""Named float32 tensors: flat form, digest, and files (safetensors, never pickle)."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.crypto.digest import flat_view, tensors_digest
from common.errors import Code, StorageError
from common.ports import Tensors

# Of tensors that lie in a file, so much may be in memory while they are gone through.
_RESIDENT_BYTES = 32 << 20


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

    @property
    def places(self) -> tuple[slice, ...]:
        """Where each tensor lies in the flat vector, in order."""
        ends = accumulate(self.sizes)
        return tuple(slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True))

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


class LazyTensors(Mapping[str, NDArray[np.float32]]):
    """Named tensors, each made anew whenever it is asked for: in memory as long as it is used.

    Args:
        names: of the tensors.
        make: makes one of them.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], NDArray[np.float32]]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class FiledTensors(Mapping[str, NDArray[np.float32]]):
    """Read-only tensors in a file without a name: next to no memory between two uses.

    Args:
        tensors: what is written there.
        folder: where room for them is; nobody can open the file by it.

    Guarantee: the file goes with the last array of it, or with the process.
    Raises StorageError where it cannot be written.
    """

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._used = 0
        at = 0
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for name, value in tensors.items():
                    self._places[name] = (at, tuple(value.shape))
                    at += file.write(flat_view(np.ascontiguousarray(value, "<f4")))
                file.flush()
                self._map = mmap.mmap(file.fileno(), at, access=mmap.ACCESS_READ) if at else None
        except OSError as error:
            raise StorageError(
                Code.JOURNAL_WRITE, f"{folder}: cannot be written ({error.strerror})."
            ) from None

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        at, shape = self._places[name]
        count = prod(shape)
        if self._map is None or not count:
            return np.zeros(shape, np.float32)
        if self._used > _RESIDENT_BYTES:
            # Arrays handed out before stay good: they are read from the file again.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._used = 0
        self._used += 4 * count
        return np.frombuffer(self._map, "<f4", count, at).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def filed(tensors: Tensors, folder: Path) -> Tensors:
    """The same tensors in a file (`FiledTensors`); as they are where they lie in one already."""
    return tensors if isinstance(tensors, FiledTensors) else FiledTensors(tensors, folder)


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write `tensors` as safetensors, atomically. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = path.with_suffix(path.suffix + ".part")
    try:
        save_file({n: np.ascontiguousarray(value) for n, value in tensors.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise StorageError(Code.JOURNAL_WRITE, f"{path}: cannot be written ({reason}).") from None


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
