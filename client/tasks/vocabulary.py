"""Texts by public vocabularies, and a small network over them that is trained from the start.

A vocabulary is a rule, not a list counted from notes: words fall into buckets by a checksum, and
characters are those of GB 2312, which every Python can spell out. So hospitals agree on it without
a file, and it tells of no patient.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from common.tasks.encoders import TextEncoder

__all__ = [
    "TextConvolution",
    "characters",
    "spread_embedding",
    "text_places",
    "text_tensor",
    "vocabulary_size",
]

_EMPTY: Final = 0
_UNKNOWN: Final = 1
_SPECIAL: Final = 2
_SCALE: Final = 10.0  # from 0.02 to 0.2: convolutions add up few of them
_WORD: Final = re.compile(r"[^\W\d_]+|\d+(?:[.,/]\d+)*")
_ASCII: Final = range(0x20, 0x7F)
_WIDE: Final = range(0xFF01, 0xFF5F)  # full-width forms of ASCII
_WIDE_SHIFT: Final = 0xFEE0
# Rows of GB 2312 by their first byte: punctuation; the commonest characters; the rest.
_MARKS: Final = range(0xA1, 0xA2)
_FIRST_LEVEL: Final = range(0xB0, 0xD8)
_SECOND_LEVEL: Final = range(0xD8, 0xF8)
_CELLS: Final = range(0xA1, 0xFF)


def _row(first: int) -> str:
    """The characters of one row of GB 2312; some cells are empty."""
    cells = (bytes((first, second)).decode("gb2312", errors="ignore") for second in _CELLS)
    return "".join(cells)


@cache
def characters(name: str) -> Mapping[str, int]:
    """Every character of a list and its place, from 2 on; 0 is empty and 1 unknown.

    Guarantee: the same on every machine. Source: GB 2312-1980, rows 1, 16 to 55, 56 to 87.
    """
    rows = [*_MARKS, *_FIRST_LEVEL, *(() if name == "gb2312-level-1" else _SECOND_LEVEL)]
    every = [*map(chr, _ASCII), *"".join(map(_row, rows))]
    kept = dict.fromkeys(_plain(one) for one in every)
    return MappingProxyType({one: at for at, one in enumerate(kept, start=_SPECIAL)})


def _plain(text: str) -> str:
    """Full-width forms as ASCII, letters small."""
    folded = (chr(ord(c) - _WIDE_SHIFT) if ord(c) in _WIDE else c for c in text)
    return "".join(folded).lower()


def vocabulary_size(encoder: TextEncoder) -> int:
    """Rows of the embedding table, the two special ones included."""
    if encoder.vocabulary == "words":
        return _SPECIAL + encoder.buckets
    return _SPECIAL + len(characters(encoder.vocabulary))


def text_places(encoder: TextEncoder, text: str, most: int) -> list[int]:
    """The first `most` words or characters of a text, as places in the vocabulary."""
    if encoder.vocabulary == "words":
        words = (found.group() for found in _WORD.finditer(text.lower()))
        return [
            _SPECIAL + zlib.crc32(word.encode()) % encoder.buckets
            for word, _ in zip(words, range(most), strict=False)
        ]
    known = characters(encoder.vocabulary)
    told = (known.get(one, _UNKNOWN) for one in _plain(text) if not one.isspace())
    return [place for place, _ in zip(told, range(most), strict=False)]


def text_tensor(encoder: TextEncoder, texts: Sequence[str], most: int) -> Tensor:
    """Texts as places, 0 after their ends.

    Shapes: (N, most) int64. Guarantee: every row has the same length whatever the texts hold, so
        that no patient's text changes another's arithmetic.
    """
    found = torch.full((len(texts), most), _EMPTY, dtype=torch.int64)
    for row, text in enumerate(texts):
        places = text_places(encoder, text, most)
        found[row, : len(places)] = torch.tensor(places, dtype=torch.int64)
    return found


class TextConvolution(nn.Module):
    """Convolutions of several widths, and of each the loudest answer.

    Shapes: (B, T) int64 to (B, encoder.features).
    """

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size(encoder), encoder.width, padding_idx=_EMPTY)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(encoder.width, encoder.channels, size, padding=size - 1)
            for size in encoder.kernels
        )

    def forward(self, places: Tensor) -> Tensor:
        """What each text says. A text without a word gives the same as any other without."""
        rows = self.embedding(places).transpose(1, 2)
        return torch.cat([torch.relu(f(rows)).amax(dim=2) for f in self._each()], dim=1)

    def _each(self) -> Sequence[Callable[[Tensor], Tensor]]:
        return list(self.convolutions)


def spread_embedding(module: TextConvolution) -> None:
    """First values of the table, after `first_values`: as wide as convolutions want them."""
    with torch.no_grad():
        module.embedding.weight.mul_(_SCALE)
        module.embedding.weight[_EMPTY].zero_()
