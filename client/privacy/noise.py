"""Randomness for privacy: a keystream nobody can predict, and Gaussian noise drawn from it.

The key comes from the Entropy port (the operating system's, in every real run) and never from
a configuration: whoever knows the seed can subtract the noise.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.ports import Entropy

GRID_BITS = 20
"""Noised sums lie on a grid of 2**-20 of the noise's standard deviation, or finer."""

_CHUNK = 1 << 18
_Values = TypeVar("_Values", NDArray[np.float32], NDArray[np.float64], torch.Tensor)


class SecureNoise:
    """An AES-256-CTR keystream under a fresh key, and the draws that privacy needs.

    Guarantee: no two objects and no two keys ever repeat a draw; `renew` makes earlier draws
    irrecoverable from this object.
    """

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self.renew()

    def renew(self) -> None:
        """Forget the key and take a new one."""
        # The nonce may be constant because no key is ever used twice.
        cipher = Cipher(algorithms.AES(self._entropy.take(32)), modes.CTR(bytes(16)))
        self._keystream = cipher.encryptor()

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
            size = min(_CHUNK, count - start)
            half = (size + 1) // 2
            uniform = (self.uint64(2 * half) >> np.uint64(11)).astype(np.float64)
            uniform += 0.5
            uniform *= 2.0**-53
            radius = np.sqrt(-2.0 * np.log(uniform[:half]))
            angle = uniform[half:]
            angle *= 2.0 * math.pi
            values[start : start + half] = radius * np.cos(angle)
            values[start + half : start + size] = (radius * np.sin(angle))[: size - half]
        return values

    def add_gaussian(self, values: _Values, std: float) -> _Values:
        """`values` plus normal noise of standard deviation `std`, on a power-of-two grid.

        The sum is taken in float64 and the *result* rounded, which is post-processing and
        costs no privacy; the low-order bits that give a plain float sum away are gone.

        Shapes: as `values`; a tensor comes back float32 on its own device.
        Source: Mironov 2012; Holohan and Braghin 2021.
        """
        grid = grid_of(std)
        if isinstance(values, torch.Tensor):
            flat = values.detach().to("cpu", torch.float64).reshape(-1).numpy()
            noised = torch.from_numpy(self._on_grid(flat, std, grid).astype(np.float32))
            return noised.reshape(values.shape).to(values.device)
        flat = values.astype(np.float64).reshape(-1)
        return self._on_grid(flat, std, grid).astype(values.dtype).reshape(values.shape)

    def _on_grid(self, flat: NDArray[np.float64], std: float, grid: float) -> NDArray[np.float64]:
        noised = self.gaussian(flat.size)
        noised *= std
        noised += flat
        noised /= grid
        np.rint(noised, out=noised)
        noised *= grid
        return noised


def grid_of(std: float) -> float:
    """The power of two, at most std * 2**-GRID_BITS, on which noised sums lie."""
    if not (math.isfinite(std) and std > 0):
        raise ValueError("the noise's standard deviation must be positive and finite")
    return 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
