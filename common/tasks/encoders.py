"""Encoders that several tasks share, trained from the start; the vocabularies are public."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config import Frozen
from common.fields import Listed, Width

__all__ = ["TextEncoder"]

Kernel = Annotated[int, Field(ge=1, le=8)]


class TextEncoder(Frozen):
    """Convolutions over a text, each remembered where it answers loudest.

    Nothing about it is learned from data before training: a vocabulary counted from notes would
    tell of the patients who use a word. Source: Kim 2014; Zhang et al. 2015 (characters).
    """

    vocabulary: Literal["words", "gb2312", "gb2312-level-1"] = Field(
        "words",
        description="words: hashed into buckets; gb2312: single characters, ASCII and Chinese "
        "(6763 of them, or the 3755 commonest with -level-1), any other counted as unknown",
    )
    buckets: int = Field(
        4096, ge=16, le=1 << 20, description="places for words, which may share one; with words"
    )
    width: Width = Field(48, description="numbers that stand for a word or a character")
    kernels: Annotated[Listed[Kernel], Field(min_length=1, max_length=8)] = Field(
        (1, 2, 3), description="words or characters that a convolution sees at once"
    )
    channels: Width = Field(64, description="outputs of each convolution")

    @property
    def features(self) -> int:
        """Numbers that stand for a text."""
        return self.channels * len(self.kernels)
