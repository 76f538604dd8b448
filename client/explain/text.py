"""Which words of a note raise or lower the answer of a saved text classifier."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.devices import choose_device
from client.explain.attribution import Mask, Target, deletion, integrated_gradients
from client.explain.facts import Balance, Found
from client.tasks.backbone import load_backbone
from client.tasks.network import input_maker, saved_reading
from client.tasks.outcomes import answers
from client.tasks.text import Cleaner, Encoder, batch_inputs
from common.errors import Code, DataError
from common.outcomes import Classes, LabelSet

__all__ = ["WORD", "Note", "TextExplanation", "TextModel"]

Array = NDArray[np.float64]
Index = NDArray[np.int64]

_TOKENS_AT_ONCE: Final = 1024
_TOKENS_ON_A_GPU: Final = 8192
_AGREEMENT: Final = 1e-3

# Scripts without spaces between words: every character is a word of its own.
_ALONE: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER: Final = rf"(?:(?![{_ALONE}])\w)"
WORD: Final = re.compile(
    rf"[{_ALONE}]|{_LETTER}+(?:(?:['\u2019/-]|(?<=\d)[.,](?=\d)){_LETTER}+)*|([^\w\s])\1*"
)
# What a cleaned note is made of, as client/tasks/text.py divides it.
_PIECE: Final = re.compile(r"[^\W\d_]+|\d+(?:[.,/]\d+)*|[^\w\s]")


@dataclass(frozen=True)
class Note:
    """A note, its words, and the model's rows of tokens.

    Shapes:
        words: (W, 2) where each word begins and ends in `text`. owners: for each row, the word of
            each of its tokens, -1 where it has none. read: (W,) whether any token shows the word.
        end: where the model stops reading, as a place in `text`.
    """

    text: str
    words: Index
    rows: tuple[tuple[int, ...], ...]
    owners: tuple[Index, ...]
    read: NDArray[np.bool_]
    end: int


@dataclass(frozen=True)
class TextExplanation:
    """Attributions of a note's words, (W,): exactly 0 for a word that the model does not read."""

    note: Note
    values: Array
    found: Found

    def strongest(self, count: int) -> list[tuple[str, int, float]]:
        """(word, how often, attribution together), strongest first, without regard to case."""
        total: dict[str, list[float]] = defaultdict(list)
        for (first, last), value in zip(self.note.words.tolist(), self.values, strict=True):
            word = self.note.text[first:last]
            if value and any(map(str.isalnum, word)):
                total[word.lower()].append(float(value))
        found = [(word, len(values), sum(values)) for word, values in total.items()]
        return sorted(found, key=lambda row: (-abs(row[2]), row[0]))[:count]


class TextModel:
    """A saved text classifier that explains itself; reads notes as `predict` does.

    Args:
        folder: a Hugging Face folder with a sequence classifier.
        device: auto, cpu or cuda[:N].

    Raises:
        DataError: the folder is no such model, or its tokenizer does not say where tokens stand.
    """

    def __init__(self, folder: Path, device: str) -> None:
        import transformers
        from safetensors import SafetensorError

        backbone = load_backbone(str(folder.resolve()))
        try:
            model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            message = f"{folder}: does not load as a text classifier ({type(error).__name__})."
            raise DataError(Code.MODEL_FAMILY, message) from None
        self._tokenizer = backbone.tokenizer
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                Code.MODEL_FOLDER,
                f"{folder}: its tokenizer does not tell where in a note its tokens stand.",
                remedy="Save the model with a tokenizer.json.",
            )
        self._folder = folder
        self._device = choose_device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)  # noqa: FBT003
        self._inputs = input_maker(model)
        self._table = model.get_input_embeddings()
        self._pad = int(self._tokenizer.pad_token_id or 0)
        masks = self._tokenizer.mask_token_id
        self._blank = self._pad if masks is None else int(masks)
        self._reading = saved_reading(model.config)
        self._encode = Encoder(self._tokenizer, self._reading)
        self._clean = Cleaner(self._reading)
        names = model.config.id2label
        labels = tuple(str(names[index]) for index in sorted(names))
        many = model.config.problem_type == "multi_label_classification"
        self.outcome: Classes | LabelSet = LabelSet(labels) if many else Classes(labels)

    @property
    def blank(self) -> str:
        """What a note is compared with."""
        name = "masked" if self._blank != self._pad else "padding"
        return f"the same note with every word replaced by the model's {name} token"

    def explain(self, text: str, label: str | None = None) -> TextExplanation:
        """Integrated gradients over the word embeddings, added up to the note's own words.

        A note that is read in several windows is explained in each; a word's share is the mean,
        as the answer is.

        Raises:
            DataError: the model has no such label, or reads embeddings otherwise than tokens.
        """
        note = self.locate(text)
        whole = self._mean(note, np.ones((1, len(note.words)), np.bool_))
        self._check(note, whole)
        target = Target.of(self.outcome, whole, label)
        values, balance = self._attribute(note, target)

        def chances(kept: Mask) -> Array:
            every = np.ones((len(kept), len(note.words)), np.bool_)
            every[:, note.read] = kept
            return target.chances(self._mean(note, every))

        curve = deletion(chances, values[note.read])
        answer = answers(self.outcome, whole)[0]
        found = Found(answer, target.name, target.unit, self.blank, balance, curve)
        return TextExplanation(note, values, found)

    # -------------------------------------------------------------------- reading

    def locate(self, text: str) -> Note:
        """Where the model's tokens stand in the note, window by window."""
        cleaned, origin = self._cleaned(text)
        words = np.array([m.span() for m in WORD.finditer(text)], np.int64).reshape(-1, 2)
        encoding = self._tokenizer(cleaned, return_attention_mask=False, verbose=False)
        inside = [at for at, part in enumerate(encoding.sequence_ids(0)) if part is not None]
        ids = encoding["input_ids"]
        before = inside[0] if inside else len(ids)
        after = len(ids) - 1 - inside[-1] if inside else 0
        rows = self._encode([text]).rows
        starts = self._starts(rows, before + after)
        owners = []
        end = 0
        for row, start in zip(rows, starts, strict=True):
            owner = np.full(len(row), -1, np.int64)
            for at in range(before, len(row) - after):
                if ids[start + at] != row[at]:
                    raise RuntimeError("the note was divided otherwise than it is read")
                span = encoding.token_to_chars(start + at)
                if span is not None:
                    first, last = origin(span.start, span.end)
                    owner[at] = _word_at(words, text, first, last)
                    end = max(end, last)
            owners.append(owner)
        read = np.zeros(len(words), np.bool_)
        for owner in owners:
            read[owner[owner >= 0]] = True
        return Note(text, words, rows, tuple(owners), read, end)

    def _starts(self, rows: Sequence[Sequence[int]], special: int) -> list[int]:
        """Which token of the note each window begins with (see `Encoder`)."""
        step = min(self._reading.window_stride, self._reading.max_tokens - special)
        return [at * step for at in range(len(rows))]

    def _cleaned(self, text: str) -> tuple[str, Callable[[int, int], tuple[int, int]]]:
        """The note as the tokenizer gets it, and where a part of that stands in the note."""
        cleaned = self._clean(text)
        if cleaned == text:
            return text, lambda first, last: (first, last)
        lower = text.lower()
        # A letter's lower case may be two letters: the place in the note of each.
        places = [at for at, char in enumerate(text) for _ in char.lower()]
        spans, kept, at = [], [], 0
        for match in _PIECE.finditer(lower):
            piece = self._clean(match.group())
            if piece:
                kept.append(piece)
                spans.append((at, places[match.start()], places[match.end() - 1] + 1))
                at += len(piece) + 1
        if " ".join(kept) != cleaned:
            raise RuntimeError("the note was cleaned otherwise than it is read")
        begins = np.array([span[0] for span in spans], np.int64)

        def origin(first: int, last: int) -> tuple[int, int]:
            one, other = np.searchsorted(begins, [first, max(first, last - 1)], side="right") - 1
            return spans[max(int(one), 0)][1], spans[max(int(other), 0)][2]

        return cleaned, origin

    # -------------------------------------------------------------------- computing

    def _outputs(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Logits from word embeddings. Shapes: (n, T, H), (n, T) to (n, L)."""
        given = self._inputs(mask, mask)  # of the ids, only the shape is used
        del given["input_ids"]
        found: Tensor = self._model(inputs_embeds=vectors, **given).logits
        return found

    def _at_once(self, tokens: int) -> int:
        most = _TOKENS_AT_ONCE if self._device.type == "cpu" else _TOKENS_ON_A_GPU
        return max(1, most // tokens)

    def _mean(self, note: Note, kept: Mask) -> Tensor:
        """Outputs with some words blanked, mean over windows. Shapes: (k, W) to (k, L)."""
        flat = []
        for keep in kept:
            seen = np.append(keep, np.True_)  # for the tokens of no word: owner -1
            for row, owner in zip(note.rows, note.owners, strict=True):
                gone = ~seen[owner]
                flat.append(tuple(np.where(gone, self._blank, row).tolist()))
        size = self._at_once(max(map(len, flat)))
        parts = []
        with torch.no_grad(), self._exact():
            for first in range(0, len(flat), size):
                ids, mask = batch_inputs(flat[first : first + size], self._pad)
                vectors = self._table(ids.to(self._device))
                parts.append(self._outputs(vectors, mask.to(self._device)).double().cpu())
        return torch.cat(parts).reshape(len(kept), len(note.rows), -1).mean(1)

    def _attribute(self, note: Note, target: Target) -> tuple[Array, Balance]:
        values = np.zeros(len(note.words))
        total, ends, steps = 0.0, [0.0, 0.0], 0
        share = 1.0 / len(note.rows)
        for row, owner in zip(note.rows, note.owners, strict=True):
            ids = torch.tensor([row], device=self._device)
            gone = torch.from_numpy(owner >= 0).to(self._device)[None]
            mask = torch.ones_like(ids)

            def score(vectors: Tensor, mask: Tensor = mask) -> Tensor:
                return target.score(self._outputs(vectors, mask.repeat(len(vectors), 1)))

            vectors = self._table(ids).detach()
            blanks = self._table(ids.masked_fill(gone, self._blank)).detach()
            with self._exact():
                found = integrated_gradients(
                    score, (vectors,), (blanks,), at_once=self._at_once(len(row))
                )
            tokens = found.values[0].sum(axis=1)
            np.add.at(values, owner[owner >= 0], share * tokens[owner >= 0])
            total += share * found.balance.total
            ends[0] += share * found.balance.score
            ends[1] += share * found.balance.baseline
            steps = max(steps, found.balance.steps)
        return values, Balance(total, ends[0], ends[1], steps)

    def _exact(self) -> AbstractContextManager[None]:
        """On a GPU, attention whose sums are always in the same order."""
        if self._device.type == "cpu":
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return found

    def _check(self, note: Note, whole: Tensor) -> None:
        """That the model answers the same from embeddings as from tokens."""
        size = self._at_once(max(map(len, note.rows)))
        parts = []
        with torch.no_grad(), self._exact():
            for first in range(0, len(note.rows), size):
                ids, mask = batch_inputs(note.rows[first : first + size], self._pad)
                inputs = self._inputs(ids.to(self._device), mask.to(self._device))
                parts.append(self._model(**inputs).logits.double().cpu())
        plain = torch.cat(parts).mean(0)
        if not torch.allclose(plain, whole[0], rtol=_AGREEMENT, atol=_AGREEMENT):
            raise DataError(
                Code.MODEL_FAMILY,
                f"{self._folder}: answers otherwise from word embeddings than from words, so its "
                "answers cannot be divided among words.",
            )


def _word_at(words: Index, text: str, first: int, last: int) -> int:
    """The word in which the token's first letter stands, or -1."""
    while first < last and text[first].isspace():
        first += 1
    if first >= last:
        return -1
    at = int(np.searchsorted(words[:, 0], first, side="right")) - 1
    return at if at >= 0 and first < words[at, 1] else -1
