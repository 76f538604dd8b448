"""Distinct things of a long stream, counted in eight bytes each; what they are is not kept."""

from __future__ import annotations

import hashlib
from array import array
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["HashCounts", "hashed"]

_BUFFER: Final = 1 << 16


def hashed(*parts: str) -> int:
    """64 bits that stand for the parts, each apart from the next."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


class HashCounts:
    """How often each hash was seen.

    Guarantee: about 16 bytes for each distinct hash, up to three times that while merging.
    """

    def __init__(self) -> None:
        self._keys: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._counts: NDArray[np.int64] = np.empty(0, np.int64)
        self._fresh = array("Q")

    def add(self, key: int) -> None:
        """Count one more."""
        self._fresh.append(key)
        # A buffer that grows with what is kept sorts every entry a few times, not once a chunk.
        if len(self._fresh) >= max(_BUFFER, len(self._keys) // 4):
            self._merge()

    @property
    def keys(self) -> NDArray[np.uint64]:
        """The distinct hashes, sorted."""
        self._merge()
        return self._keys

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of `keys` was seen."""
        self._merge()
        return self._counts

    def __len__(self) -> int:
        return len(self.keys)

    def _merge(self) -> None:
        if not self._fresh:
            return
        fresh, seen = np.unique(np.frombuffer(self._fresh, np.uint64), return_counts=True)
        keys, places = np.unique(np.concatenate((self._keys, fresh)), return_inverse=True)
        weights = np.concatenate((self._counts, seen))
        self._counts = np.bincount(places, weights=weights).astype(np.int64)
        self._keys = keys
        self._fresh = array("Q")
