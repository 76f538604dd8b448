"""Masked lanes: what a hospital uploads, and how the coordinator adds it up.

A lane is a line of words of one width. On the wire it is one or two planes:

    24 bits   low 16 bits of every word, then high 8 bits     3 bytes per word
    32 bits   the words                                        4 bytes per word
    64 bits   the words                                        8 bytes per word

Masks are added modulo 2**32 and truncated on the wire, which is the same as masking modulo
2**24. Source: PROTOCOL.md, "Lanes".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.crypto.digest import Buffer, TreePart, flat_view, hkdf_expand, labelled, tree_root
from common.crypto.mask import Streams, Words, check_words
from common.errors import Code, ProtocolError
from common.secagg.quantise import BLOCK_WORDS, Quantiser

_PLANES: Final[dict[int, tuple[np.dtype[Any], ...]]] = {
    24: (np.dtype("<u2"), np.dtype("u1")),
    32: (np.dtype("<u4"),),
    64: (np.dtype("<u8"),),
}


@dataclass(frozen=True)
class Lane:
    """One line of masked words: its number in the round, its width, its length in words."""

    lane_id: int
    bits: int
    length: int

    def __post_init__(self) -> None:
        if self.bits not in _PLANES:
            raise ValueError(f"a lane has words of 24, 32 or 64 bits, not {self.bits}")
        if self.length < 0 or self.lane_id < 0:
            raise ValueError("a lane's number and length are not negative")

    @property
    def word(self) -> np.dtype[Any]:
        """The word that holds one element: uint32, or uint64 in a 64-bit lane."""
        return np.dtype("<u8") if self.bits == 64 else np.dtype("<u4")  # noqa: PLR2004

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """The exact length of every plane, in bytes."""
        return tuple(plane.itemsize * self.length for plane in _PLANES[self.bits])

    def zeros(self) -> Words:
        """An empty accumulator of this lane."""
        return np.zeros(self.length, self.word)


def stream_key(secret: bytes, label: str, lane: Lane, uh1: bytes) -> bytes:
    """The key of one lane's stream under one secret.

    Guarantee: lanes that differ in number, width or length have unrelated streams, as have
    rounds whose participants (digest `uh1`) differ.
    """
    return stream_keys([secret], label, lane, uh1)[0]


def stream_keys(secrets: Iterable[bytes], label: str, lane: Lane, uh1: bytes) -> list[bytes]:
    """`stream_key` of every secret, in their order."""
    purpose = labelled(label, lane.lane_id, lane.bits, lane.length, uh1)
    return [hkdf_expand(secret, purpose) for secret in secrets]


def pack(words: Words, bits: int) -> list[NDArray[Any]]:
    """The planes of `words`, reduced modulo 2**bits; a plane that fits is not copied."""
    _check_width(words, bits)
    if bits != 24:  # noqa: PLR2004
        return [words]
    planes = [np.empty(words.size, plane) for plane in _PLANES[24]]
    for start in range(0, words.size, BLOCK_WORDS):
        stop = start + BLOCK_WORDS
        _split24(words[start:stop], planes[0][start:stop], planes[1][start:stop])
    return planes


def unpack(planes: Sequence[Buffer], bits: int, length: int) -> Words:
    """The words that `pack` gave these planes (ProtocolError if their lengths are wrong)."""
    words = Lane(0, bits, length).zeros()
    add_packed(words, planes, bits)
    return words


def add_packed(accumulator: Words, planes: Sequence[Buffer], bits: int) -> None:
    """Add an upload's planes to the accumulator, in place, modulo the word size.

    Shapes:
        accumulator: (length,) uint32, or uint64 where bits is 64.

    Guarantee: every length is checked before the first word is added.

    Raises:
        ProtocolError: BAD_PLANES, if the planes are not exactly the accumulator's.
    """
    _check_width(accumulator, bits)
    arrays = _arrays(planes, bits, accumulator.size)
    scratch = np.zeros(min(BLOCK_WORDS, accumulator.size), np.uint32)
    for start in range(0, accumulator.size, BLOCK_WORDS):
        block = accumulator[start : start + BLOCK_WORDS]
        pieces = [array[start : start + BLOCK_WORDS] for array in arrays]
        addend = pieces[0] if len(pieces) == 1 else _join24(pieces[0], pieces[1], scratch)
        np.add(block, addend, out=block)


def planes_over(update: NDArray[np.float32], bits: int) -> list[NDArray[Any]]:
    """Planes for `masked_planes` that overwrite the update itself, as far as they fit.

    Saves the memory of another update and the time to get it from the system. With 32 bits
    nothing is allocated and the unmasked update is gone once it is masked; with 24, a quarter
    is allocated (the high bytes would run ahead of the words that they are made from) and the
    second half of the update's memory stays as it was.
    """
    _check_update(update)
    if bits == 24:  # noqa: PLR2004
        return [update.view("<u2")[: update.size], np.empty(update.size, _PLANES[24][1])]
    if bits == 32:  # noqa: PLR2004
        return [update.view("<u4")]
    raise ValueError(f"an update's lane has words of 24 or 32 bits, not {bits}")


def masked_planes(
    update: NDArray[np.float32],
    *,
    exponents: Sequence[int],
    sizes: Sequence[int],
    bits: int,
    parties: int,
    keys: Sequence[bytes],
    signs: Sequence[int],
    out: Sequence[NDArray[Any]] | None = None,
) -> tuple[list[NDArray[Any]], bytes]:
    """Quantise, mask, pack and hash an update in one pass over the memory.

    Guarantee: exactly `quantise_layout`, `add_streams`, `pack` and `tree_digest` in turn;
    no unmasked word is left anywhere but in a scratch block, which is masked in place.

    Args:
        update: (d,) float32.
        exponents: one per tensor, public.
        sizes: elements of each tensor.
        bits: 24 or 32.
        parties: how many updates may be summed.
        keys: one stream key per peer and for the self mask.
        signs: +1 or -1 per key.
        out: planes to write into: those of an earlier round, or `planes_over(update)`.

    Returns:
        The planes, and their tree digest.

    Raises:
        DataError: NON_FINITE, for a NaN or an infinity; nothing may be sent then.
    """
    quantiser = Quantiser(update, exponents=exponents, sizes=sizes, bits=bits, parties=parties)
    streams = Streams(keys, signs)
    fresh = [np.empty(update.size, kind) for kind in _PLANES[bits]] if out is None else out
    planes = _arrays(fresh, bits, update.size)
    hashed = [TreePart() for _ in planes]
    scratch = np.empty(min(BLOCK_WORDS, update.size), np.uint32)
    for start in range(0, update.size, BLOCK_WORDS):
        stop = min(start + BLOCK_WORDS, update.size)
        pieces = [plane[start:stop] for plane in planes]
        words = pieces[0] if len(planes) == 1 else scratch[: stop - start]
        quantiser.block(start, stop, words)
        streams.add(words)
        if len(pieces) > 1:
            _split24(words, pieces[0], pieces[1])
        for part, piece in zip(hashed, pieces, strict=True):
            part.update(piece)
    return planes, tree_root(hashed)


def _split24(words: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> None:
    low[...] = words.view("<u2")[::2]
    high[...] = words.view("u1")[2::4]


def _join24(low: NDArray[Any], high: NDArray[Any], scratch: NDArray[Any]) -> NDArray[Any]:
    """The words of two planes, in `scratch`, whose top bytes are and stay zero."""
    words = scratch[: low.size]
    words.view("<u2")[::2] = low
    words.view("u1")[2::4] = high
    return words


def _arrays(planes: Sequence[Buffer], bits: int, length: int) -> list[NDArray[Any]]:
    kinds = _PLANES[bits]
    views = [flat_view(plane) for plane in planes]
    if [len(view) for view in views] != [kind.itemsize * length for kind in kinds]:
        raise ProtocolError(Code.BAD_PLANES, "A masked update does not have its lane's planes.")
    return [np.frombuffer(view, kind) for view, kind in zip(views, kinds, strict=True)]


def _check_update(update: NDArray[np.float32]) -> None:
    check_words(update.view("<u4"))
    if update.dtype != np.float32:
        raise TypeError("an update is one line of float32")


def _check_width(words: Words, bits: int) -> None:
    check_words(words)
    if bits not in _PLANES or (words.itemsize == 8) != (bits == 64):  # noqa: PLR2004
        raise ValueError(f"{words.dtype} words hold no {bits}-bit lane")
