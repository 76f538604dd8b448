"""Which parts of a record raise or lower the answer, whatever the record is made of.

A part is something that can be left out of a record: some words of a note, a number, a category,
the course of a measurement, an image, a code. Leaving out is what a missing input is to the model,
so no gradient is needed, and a network of any kind can be explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.records import Record
from client.explain.attribution import Mask, Target, deletion
from client.explain.facts import Balance, Found
from client.explain.numbers import NumbersExplanation
from client.explain.text import WORD
from client.tasks.outcomes import answers
from common.tasks.medication import MedicationTask

__all__ = ["Parts", "explain_parts", "parts_of"]

_ORDERS: Final = 24
_AT_ONCE: Final = 64
_MOST_PIECES: Final = 48
"""Pieces of a note: each costs an answer in every order."""
_SHOWN: Final = 80
_STREAM: Final = 1606  # any fixed number: the same page for the same record
_BLANK: Final = "the same record with every part missing"
_METHOD: Final = "Shapley values of leaving parts out, random orders:"


@dataclass(frozen=True)
class Parts:
    """A record's parts: name, what a person reads of it, and the record without some.

    `kept(mask)`: the record with the parts where `mask` is true; (P,) bool.
    """

    names: tuple[str, ...]
    shown: tuple[str, ...]
    kept: Callable[[Mask], Record]


@dataclass(frozen=True)
class _Part:
    name: str
    shown: str
    lose: Callable[[Record], Record]


def parts_of(task: Any, record: Record) -> Parts:
    """The parts of a record of any task; what is missing already is none."""
    if isinstance(task, MedicationTask):
        found = list(_codes(record))
    else:
        numbers = getattr(task, "numbers", task)
        features = tuple(f.name for f in getattr(numbers, "features", ()))
        categories = tuple(c.name for c in getattr(numbers, "categories", ()))
        found = [*_numbers(record, features), *_categories(record, categories)]
        found += [*_pieces(record), *_courses(task, record)]
        if record.image is not None:
            found.append(_Part("image", "", lambda r: replace(r, image=None)))

    def kept(mask: Mask) -> Record:
        left = record
        for part, stays in zip(found, mask, strict=True):
            if not stays:
                left = part.lose(left)
        return left

    return Parts(tuple(p.name for p in found), tuple(p.shown for p in found), kept)


def _codes(record: Record) -> Iterator[_Part]:
    def without(code: str) -> Callable[[Record], Record]:
        return lambda r: replace(r, codes=tuple(c for c in r.codes if c != code))

    for code in record.codes:
        yield _Part("code", code, without(code))


def _numbers(record: Record, names: Sequence[str]) -> Iterator[_Part]:
    def without(at: int) -> Callable[[Record], Record]:
        return lambda r: replace(r, values=(*r.values[:at], np.nan, *r.values[at + 1 :]))

    for at, (name, value) in enumerate(zip(names, record.values, strict=False)):
        if not np.isnan(value):
            yield _Part(name, f"{value:.6g}", without(at))


def _categories(record: Record, names: Sequence[str]) -> Iterator[_Part]:
    def without(at: int) -> Callable[[Record], Record]:
        return lambda r: replace(r, codes=(*r.codes[:at], "", *r.codes[at + 1 :]))

    for at, (name, code) in enumerate(zip(names, record.codes, strict=False)):
        if code:
            yield _Part(name, code, without(at))


def _pieces(record: Record) -> Iterator[_Part]:
    """A note in pieces of about as many words; a word that is left out becomes blanks."""

    def without(first: int, last: int) -> Callable[[Record], Record]:
        return lambda r: replace(r, text=r.text[:first] + " " * (last - first) + r.text[last:])

    spans = [found.span() for found in WORD.finditer(record.text)]
    size = -(-len(spans) // _MOST_PIECES)
    for at in range(0, len(spans), max(size, 1)):
        first, last = spans[at][0], spans[min(at + size, len(spans)) - 1][1]
        text = record.text[first:last]
        yield _Part(
            "note", text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…", without(first, last)
        )


def _courses(task: Any, record: Record) -> Iterator[_Part]:
    def without(at: int) -> Callable[[Record], Record]:
        def lose(left: Record) -> Record:
            if left.series is None:
                return left
            series = left.series.copy()
            series[:, at] = np.nan
            return replace(left, series=series)

        return lose

    hourly = getattr(task, "series", None) or task
    if record.series is None:
        return
    for at, feature in enumerate(hourly.features):
        course = record.series[:, at]
        there = course[~np.isnan(course)]
        if len(there):
            told = f"{len(there)} values, {there[0]:.5g} to {there[-1]:.5g}"
            yield _Part(feature.name, told, without(at))


def explain_parts(
    outputs: Callable[[Sequence[Record]], Tensor], parts: Parts, target: Target
) -> NumbersExplanation:
    """Shapley values of a record's parts, by sampled orders.

    Args:
        outputs: of records, (N, outcome.outputs).
        parts: of the record.
        target: what is explained.

    Guarantee: the values add up to score(record) - score(record without any part), whatever the
        number of orders; the same values for the same record.

    Source: Castro et al. 2009 (sampling); captum.
    """
    count = len(parts.names)

    def answered(masks: NDArray[np.bool_]) -> Tensor:
        found = [
            outputs([parts.kept(mask) for mask in masks[at : at + _AT_ONCE]]).double().cpu()
            for at in range(0, len(masks), _AT_ONCE)
        ]
        return torch.cat(found)

    both = answered(np.repeat([[True], [False]], count, axis=1))
    score, baseline = (float(value) for value in target.score(both))
    values = _shapley(lambda rows: target.score(answered(rows)), count)
    curve = deletion(lambda rows: target.chances(answered(rows)), values)
    balance = Balance(float(values.sum()), score, baseline, _ORDERS, _METHOD)
    answer = answers(target.outcome, both[:1])[0]
    found = Found(answer, target.name, target.unit, _BLANK, balance, curve)
    return NumbersExplanation(parts.names, parts.shown, values, found)


def _shapley(score: Callable[[NDArray[np.bool_]], Tensor], count: int) -> NDArray[np.float64]:
    """The values of `count` parts. `score`: of (k, count) bool, (k,)."""
    from captum.attr import ShapleyValueSampling

    if not count:
        return np.zeros(0)
    method: Any = ShapleyValueSampling(lambda rows: score(rows.numpy() > 0))
    with torch.random.fork_rng(devices=[]):  # captum draws its orders from torch's own stream
        torch.manual_seed(_STREAM + count)
        found = method.attribute(
            torch.ones(1, count, dtype=torch.float64),
            n_samples=_ORDERS,
            perturbations_per_eval=_AT_ONCE,
        )
    values: NDArray[np.float64] = found[0].numpy()
    return values
