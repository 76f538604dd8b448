"""Whether the rules that make cases give a task what it reads and what it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common.fields import Ranged
from common.outcomes import Classes, LabelSet, Number
from common.tasks.cases import (
    CaseRules,
    CodeAnswer,
    MortalityAnswer,
    NumberAnswer,
    Observable,
    SurvivalAnswer,
)
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.imaging import ImagingTask
from common.tasks.medication import MedicationTask
from common.tasks.multimodal import MultimodalTask
from common.tasks.prognosis import PrognosisTask

__all__ = ["misfits"]

Misfit = tuple[str, str]
"""A key of the rules, and what is wrong with it, in words that fit after the key."""


def misfits(task: Any, rules: CaseRules) -> Iterator[Misfit]:
    """What of `rules` does not suit `task`; nothing where they go together."""
    yield from _answer(task, rules)
    yield from _inputs(task, rules)


def _answer(task: Any, rules: CaseRules) -> Iterator[Misfit]:
    outcome, label = task.outcome, rules.label
    whole = isinstance(label, CodeAnswer) and label.several == "all"
    if isinstance(outcome, Classes):
        fits = isinstance(label, MortalityAnswer) or (isinstance(label, CodeAnswer) and not whole)
        wanted = "one label: codes, or mortality"
    elif isinstance(outcome, LabelSet):
        fits, wanted = whole, "several labels: codes with several: all"
    elif isinstance(outcome, Number):
        fits, wanted = isinstance(label, NumberAnswer), "a quantity: number"
    else:
        fits, wanted = isinstance(label, SurvivalAnswer), "a time: survival"
    if not fits:
        yield "label.kind", f"does not give what the task predicts, which is {wanted}"
        return
    given, known = rules.labels, outcome.labels
    for name in sorted(set(given) - set(known)):
        yield "label", f"gives {name}, which is not in task.labels"
    for name in sorted(set(known) - set(given)):
        yield "label", f"never gives {name}, which is in task.labels"


def _inputs(task: Any, rules: CaseRules) -> Iterator[Misfit]:
    mixed = isinstance(task, MultimodalTask)
    reads = task.text is not None if mixed else isinstance(task, DiagnosisTask)
    if reads != (rules.notes is not None):
        yield "notes", "is missing: the task reads a text" if reads else _unread("text")
    looks = isinstance(task, ImagingTask) or (mixed and task.image is not None)
    if looks != (rules.image != "none"):
        told = "is none, and the task reads an image: take the first, or the last"
        yield "image", told if looks else _unread("image")
    codes = isinstance(task, MedicationTask)
    if codes != (rules.codes is not None):
        yield "codes", "is missing: the task reads codes" if codes else _unread("code")
    row: Any = task.numbers if mixed else task
    hourly = task.series if mixed else task if isinstance(task, PrognosisTask) else None
    numbers: Sequence[Ranged] = ()
    if row is not None and row is not hourly:
        numbers = tuple(row.features) if hasattr(row, "features") else ()
    yield from _same("values", numbers, rules.values)
    if getattr(row, "categories", None):
        yield "values", "cannot give task.categories: give a number for each, or read tables"
    series = rules.series
    if (series is None) != (hourly is None):
        told = "is missing: the task reads measurements by the hour"
        yield "series", told if series is None else _unread("course")
    elif series is not None and hourly is not None:
        if series.hours != hourly.hours:
            yield "series.hours", f"must be the task's ({hourly.hours})"
        yield from _same("series.quantities", hourly.features, series.quantities)


def _unread(what: str) -> str:
    return f"has no effect: the task reads no {what}; remove it"


def _same(
    where: str, features: Iterable[Ranged], quantities: Sequence[Observable]
) -> Iterator[Misfit]:
    wanted, given = list(features), list(quantities)
    if [feature.name for feature in wanted] != [quantity.name for quantity in given]:
        names = ", ".join(feature.name for feature in wanted) or "nothing"
        yield where, f"must name the task's features, in their order: {names}"
        return
    for index, (feature, quantity) in enumerate(zip(wanted, given, strict=True)):
        if (feature.low, feature.high) != (quantity.low, quantity.high):
            bounds = f"{feature.low:g} to {feature.high:g}"
            yield f"{where}.{index}", f"must have the bounds of the task's feature ({bounds})"
