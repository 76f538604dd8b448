"""Randomness for privacy: a keystream nobody can predict, and Gaussian noise drawn from it.

The key comes from the Entropy port (the operating system's, in every real run) and never from
a configuration: whoever knows the seed can subtract the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.ports import Entropy

GRID_BITS = 20
"""Noised sums lie on a grid of 2**-20 of the noise's standard deviation, or finer."""

# Values in a cache's reach at a time; values under one key when drawn ahead.
_CHUNK = 1 << 16
_PIECE = 1 << 22
_WORKERS = 4
_Values = TypeVar("_Values", NDArray[np.float32], NDArray[np.float64], torch.Tensor)


class SecureNoise:
    """An AES-256-CTR keystream under a fresh key, and the draws that privacy needs.

    Guarantee: no two objects and no two keys ever repeat a draw; `renew` makes earlier draws
    irrecoverable from this object.
    """

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._ahead: _Ahead | None = None
        self.renew()

    def renew(self) -> None:
        """Forget the key and take a new one."""
        # The nonce may be constant because no key is ever used twice.
        cipher = Cipher(algorithms.AES(self._entropy.take(32)), modes.CTR(bytes(16)))
        self._keystream = cipher.encryptor()
        self._forget_ahead()

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """Uniform words, (count,)."""
        return np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8").astype(
            np.uint64, copy=False
        )

    def bernoulli(self, count: int, probability: float) -> NDArray[np.bool_]:
        """Independent coins, (count,), each True with `probability` to within 2**-64."""
        if not 0 <= probability <= 1:
            raise ValueError("a probability lies in [0, 1]")
        if probability == 1:
            return np.ones(count, np.bool_)
        # A float times 2**64 is exact, so the only rounding is to a whole threshold.
        return self.uint64(count) < np.uint64(int(probability * 2.0**64))

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniform order of 0 .. count - 1; ties among 64-bit keys are negligible."""
        return np.argsort(self.uint64(count), kind="stable").astype(np.int64, copy=False)

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Standard normal values, (count,) float64.

        Uniforms have 53 bits, so the largest value is 8.6: the missing tail weighs 1e-17.
        Source: Box and Muller 1958.
        """
        values = np.empty(count, np.float64)
        for start in range(0, count, _CHUNK):
            chunk = values[start : start + _CHUNK]
            _box_muller(self.uint64(2 * ((chunk.size + 1) // 2)), chunk)
        return values

    def prefetch(self, count: int) -> None:
        """Begin to draw, on other threads, the values that the next `add_gaussian` of `count` adds.

        Takes 8 bytes a value until then. Worth it where the caller's own work leaves processors
        idle, as on a GPU. What is drawn depends on the key alone, not on how threads run.

        Guarantee: every piece has a key of its own, 32 bytes of this keystream, used once;
            values are added once or forgotten.
        """
        self._forget_ahead()
        sizes = [min(_PIECE, count - start) for start in range(0, count, _PIECE)]
        workers = min(_WORKERS, len(sizes)) or 1
        pool = ThreadPoolExecutor(workers, thread_name_prefix="noise")
        keys = [self._keystream.update(bytes(32)) for _ in sizes]
        pieces = [
            pool.submit(_drawn_alone, key, size) for key, size in zip(keys, sizes, strict=True)
        ]
        self._ahead = _Ahead(count, pool, pieces)

    def add_gaussian(self, values: _Values, std: float) -> _Values:
        """`values` plus normal noise of standard deviation `std`, on a power-of-two grid.

        The sum is taken in float64 and the *result* rounded, which is post-processing and
        costs no privacy; the low-order bits that give a plain float sum away are gone. A tensor
        stays on its device, and nothing here waits for that.

        Shapes: as `values`; a tensor comes back float32 on its own device.
        Source: Mironov 2012; Holohan and Braghin 2021.
        """
        grid = grid_of(std)
        if isinstance(values, torch.Tensor):
            noised = torch.empty_like(values, dtype=torch.float32)
            self._add_into(noised.reshape(-1), values.detach().reshape(-1), std, grid)
            return noised
        given = torch.from_numpy(np.ascontiguousarray(values))
        result = torch.empty_like(given)
        self._add_into(result.reshape(-1), given.reshape(-1), std, grid)
        return result.numpy()

    def _add_into(
        self, noised: torch.Tensor, values: torch.Tensor, std: float, grid: float
    ) -> None:
        done = 0
        for normals in self._normals(len(values)):
            chunk = torch.from_numpy(normals).to(values.device, non_blocking=True)
            end = done + len(chunk)
            chunk.mul_(std).add_(values[done:end])
            chunk.div_(grid).round_().mul_(grid)
            noised[done:end].copy_(chunk)
            done = end

    def _normals(self, count: int) -> Iterator[NDArray[np.float64]]:
        """Fresh normal values, (count,) in chunks: those prefetched, or drawn now."""
        ahead = self._ahead
        if ahead is None or ahead.count != count:
            for start in range(0, count, _CHUNK):
                yield self.gaussian(min(_CHUNK, count - start))
            return
        self._ahead = None
        ahead.pieces.reverse()
        while ahead.pieces:
            yield ahead.pieces.pop().result()
        ahead.pool.shutdown()

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.pool.shutdown(wait=False, cancel_futures=True)
            self._ahead = None


@dataclass(frozen=True)
class _Ahead:
    """Values being drawn for the next sum of `count`."""

    count: int
    pool: ThreadPoolExecutor
    pieces: list[Future[NDArray[np.float64]]]


def _drawn_alone(key: bytes, count: int) -> NDArray[np.float64]:
    return SecureNoise(_Once(key)).gaussian(count)


class _Once:
    """Entropy that is one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def take(self, count: int) -> bytes:
        """The key, once."""
        key, self._key = self._key, b""
        if len(key) != count:
            raise ValueError("this entropy is spent")
        return key


def _box_muller(words: NDArray[np.uint64], values: NDArray[np.float64]) -> None:
    """Normal values from an even number of uniform words, in cache-sized pieces.

    Sines and cosines are torch's: numpy's cost five times as much, its logarithm a quarter.
    """
    half = words.size // 2
    uniform = (words >> np.uint64(11)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-53
    radius, angle = uniform[:half], torch.from_numpy(uniform[half:])
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0 * math.pi
    np.multiply(radius, torch.cos(angle).numpy(), out=values[:half])
    rest = values.size - half
    np.multiply(radius[:rest], torch.sin(angle).numpy()[:rest], out=values[half:])


def grid_of(std: float) -> float:
    """The power of two, at most std * 2**-GRID_BITS, on which noised sums lie."""
    if not (math.isfinite(std) and std > 0):
        raise ValueError("the noise's standard deviation must be positive and finite")
    return 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
