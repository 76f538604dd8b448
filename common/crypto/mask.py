"""Mask streams: AES-256 in counter mode from zero, as little-endian words, added in place.

Every key belongs to exactly one stream. Work goes block by block so that words, key stream
and zeros stay in a core's second-level cache. Source: NIST SP 800-38A; PROTOCOL.md, "Masks".
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint32] | NDArray[np.uint64]

BLOCK_BYTES: Final = 256 << 10
_KEY_BYTES = 32
_CIPHER_BLOCK = 16
_SLACK = 16  # update_into wants room for one cipher block more
_ZEROS: Final = memoryview(bytes(BLOCK_BYTES))
_DTYPES: Final = (np.dtype("<u4"), np.dtype("<u8"))


class Streams:
    """Several mask streams, taken forward together: `add` continues where it left off."""

    __slots__ = ("_contexts", "_output", "_scratch")

    def __init__(self, keys: Sequence[bytes], signs: Sequence[int], *, start: int = 0) -> None:
        """Open one stream per key, each added (+1) or subtracted (-1), from byte `start`."""
        if len(keys) != len(signs) or any(sign not in (1, -1) for sign in signs):
            raise ValueError("every stream key has one sign, +1 or -1")
        if len(set(keys)) != len(keys):
            raise ValueError("a stream key is used twice")
        self._contexts = [
            (_open(key, start), np.add if sign > 0 else np.subtract)
            for key, sign in zip(keys, signs, strict=True)
        ]
        self._make_room(0)

    def add(self, target: Words) -> None:
        """Add the next len(target) words of every stream to `target`, in place."""
        check_words(target)
        step = BLOCK_BYTES // target.itemsize
        block = min(BLOCK_BYTES, target.nbytes)
        if self._scratch.size < block + _SLACK:
            self._make_room(block)
        for start in range(0, target.size, step):
            self._add_block(target[start : start + step])

    def _make_room(self, block: int) -> None:
        self._output = bytearray(block + _SLACK)
        self._scratch = np.frombuffer(self._output, np.uint8)

    def _add_block(self, block: NDArray[Any]) -> None:
        zeros = _ZEROS[: block.nbytes]
        stream = self._scratch[: block.nbytes].view(block.dtype)
        for context, operation in self._contexts:
            context.update_into(zeros, self._output)
            operation(block, stream, out=block)


def add_stream(target: Words, key: bytes, *, subtract: bool) -> None:
    """Add `key`'s stream to `target` in place, or subtract it, modulo the word size."""
    Streams([key], [-1 if subtract else 1]).add(target)


def add_streams(
    target: Words, keys: Sequence[bytes], signs: Sequence[int], threads: int = 1
) -> None:
    """Add or subtract one stream per key to `target`, in place, modulo the word size.

    Args:
        target: (d,) uint32 or uint64, contiguous, changed in place.
        keys: distinct 32-byte keys; each may serve this one stream and no other, ever.
        signs: +1 to add, -1 to subtract, one per key.
        threads: how many slabs are worked on at once; the result does not depend on it.
    """
    check_words(target)
    blocks = -(-target.nbytes // BLOCK_BYTES)
    slab = -(-blocks // max(1, threads)) * BLOCK_BYTES
    starts = range(0, target.nbytes, slab) if target.nbytes else range(0)
    if len(starts) <= 1:
        Streams(keys, signs).add(target)
        return

    def work(start: int) -> None:
        words = target[start // target.itemsize : (start + slab) // target.itemsize]
        Streams(keys, signs, start=start).add(words)

    with ThreadPoolExecutor(len(starts)) as pool:
        for _ in pool.map(work, starts):
            pass


def check_words(words: Words) -> None:
    """Raise TypeError unless `words` is a writable, contiguous line of 32- or 64-bit words."""
    flags = words.flags
    if words.ndim != 1 or not flags.c_contiguous or not flags.writeable:
        raise TypeError("words are one contiguous, writable line")
    if words.dtype not in _DTYPES:
        raise TypeError(f"words are little-endian uint32 or uint64, not {words.dtype}")


def _open(key: bytes, start: int) -> CipherContext:
    if len(key) != _KEY_BYTES:
        raise ValueError("a stream key has 32 bytes")
    if start % _CIPHER_BLOCK:
        raise ValueError("a stream starts on a cipher block")
    counter = (start // _CIPHER_BLOCK).to_bytes(_CIPHER_BLOCK, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
