"""From notes to token ids: optional classical clean-up, special tokens, truncation, windows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from common.tasks.diagnosis import DiagnosisTask

__all__ = ["ENGLISH_STOP_WORDS", "Cleaner", "Encoded", "Encoder", "Reading", "batch_inputs"]

_FUNCTION_WORDS: Final = """
    a about above after again all also am an and any are as at be because been before being below
    between both but by can could did do does doing down during each few for from further had has
    have having he her here hers herself him himself his how i if in into is it its itself just me
    more most my myself of off on once only or other our ours ourselves out over own same she
    should so some such than that the their theirs them themselves then there these they this
    those through to too under until up very was we were what when where which while who whom why
    will with would you your yours yourself yourselves
"""
ENGLISH_STOP_WORDS: Final = frozenset(_FUNCTION_WORDS.split())
"""Function words of English. Negations (no, not, nor, without, never) stay: in a note, "no
pneumonia" is a finding."""

_WORD: Final = re.compile(r"[^\W\d_]+|\d+(?:[.,/]\d+)*|[^\w\s]")
_NO_LIMIT: Final = 10**9


@dataclass(frozen=True, slots=True)
class Reading:
    """How a note is read: the part of `study.task` that a saved model must remember."""

    max_tokens: int
    long_notes: str
    window_stride: int
    max_windows: int
    stop_words: str
    stemming: str

    @staticmethod
    def of(task: DiagnosisTask) -> Reading:
        """The study's way of reading."""
        return Reading(
            max_tokens=task.max_tokens,
            long_notes=task.long_notes,
            window_stride=task.window_stride,
            max_windows=task.max_windows,
            stop_words=task.stop_words,
            stemming=task.stemming,
        )


class Cleaner:
    """Removes stop words and stems, where the study asks for the classical pipeline."""

    def __init__(self, reading: Reading) -> None:
        self._stop = ENGLISH_STOP_WORDS if reading.stop_words == "english" else frozenset()
        self._stem: Callable[[str], str] | None = None
        if reading.stemming == "english":
            import snowballstemmer

            self._stem = snowballstemmer.stemmer("english").stemWord

    def __call__(self, text: str) -> str:
        """The text as the tokenizer gets it; unchanged where nothing was asked for."""
        if not self._stop and self._stem is None:
            return text
        words = (word for word in _WORD.findall(text.lower()) if word not in self._stop)
        return " ".join(words if self._stem is None else map(self._stem, words))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids by row; record r owns the rows starts[r] to starts[r + 1] (at least one)."""

    rows: tuple[tuple[int, ...], ...]
    starts: NDArray[np.int64]


class Encoder:
    """Turns notes into rows of token ids with a tokenizer's own special tokens.

    A row of a truncated note equals `tokenizer(text, truncation=True, max_length=max_tokens)`.
    """

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self._tokenizer = tokenizer
        self._reading = reading
        self._clean = Cleaner(reading)
        self._prefix, self._suffix = _special_tokens(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The rows of `texts`, windows of a note in order."""
        if not texts:
            return Encoded((), np.zeros(1, np.int64))
        cleaned = [self._clean(text) for text in texts]
        bodies = self._tokenizer(
            cleaned, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        rows: list[tuple[int, ...]] = []
        starts = [0]
        for body in bodies:
            rows.extend(self._windows(body))
            starts.append(len(rows))
        return Encoded(tuple(rows), np.asarray(starts, np.int64))

    def _windows(self, body: Sequence[int]) -> list[tuple[int, ...]]:
        reading = self._reading
        room = reading.max_tokens - len(self._prefix) - len(self._suffix)
        step = min(reading.window_stride, room)
        count = 1
        if reading.long_notes == "window" and len(body) > room:
            count = 1 + -(-(len(body) - room) // step)
        firsts = [i * step for i in range(min(count, reading.max_windows))]
        return [(*self._prefix, *body[at : at + room], *self._suffix) for at in firsts]


def batch_inputs(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and their attention mask, both (B, T) int64."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after every text."""
    tokenizer.model_max_length = _NO_LIMIT  # we cut ourselves; it would warn about long notes
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return tuple(full[:at]), tuple(full[at + len(bare) :])
    raise ValueError("the tokenizer changes a text when it adds its special tokens")
