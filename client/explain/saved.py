"""A saved network of a task's own, and one record at a time explained through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.records import Record
from client.explain.attribution import Target
from client.explain.image import ImageExplanation, explain_image
from client.explain.numbers import NumbersExplanation, explain_numbers
from client.explain.parts import explain_parts, parts_of
from client.explain.series import Grid, SeriesExplanation, explain_series
from client.knowledge.reasons import (
    contraindications,
    interactions,
    reasons,
    told_flag,
    told_reason,
)
from client.knowledge.shelf import graph_choice, graph_of
from client.knowledge.visits import known_codes
from client.saved import SavedRows

__all__ = ["RowsModel"]

RowsExplanation = NumbersExplanation | ImageExplanation | SeriesExplanation


class RowsModel:
    """What `wardround` wrote for a task with a network of its own.

    Args:
        folder: holds task.json and model.safetensors.
        device: auto, cpu or cuda[:N].
        knowledge: the folder of the graph that the model reads, where it does not lie beside it.

    Raises:
        DataError: the folder is not whole, or the model's graph is missing or another.
    """

    def __init__(self, folder: Path, device: str, knowledge: Path | None = None) -> None:
        self._saved = SavedRows(folder, device, knowledge)
        self.task: Any = self._saved.task

    def explain(self, record: Record, label: str | None = None) -> RowsExplanation:
        """Why the model answers as it does for this record. Raises DataError."""
        return _KINDS.get(self.task.kind, RowsModel._parts)(self, record, label)

    def _target(self, inputs: Sequence[Tensor], label: str | None) -> Target:
        with torch.no_grad():
            return Target.of(self.task.outcome, self._saved.network(*inputs), label)

    def _numbers(self, record: Record, label: str | None) -> NumbersExplanation:
        inputs = self._saved.inputs([record])
        features, categories = self.task.features, self.task.categories
        sizes = [1] * len(features) + [len(category.values) for category in categories]
        means = [
            f.low + float(m) * (f.high - f.low)
            for f, m in zip(features, self._saved.mean, strict=True)
        ]
        numbers = [
            f"missing, counts as {mean:.4g}"
            if np.isnan(value)
            else f"{value:.6g} (mean {mean:.4g})"
            for value, mean in zip(record.values, means, strict=True)
        ]
        return explain_numbers(
            self._saved.network,
            inputs,
            self._target(inputs, label),
            owner=np.repeat(np.arange(len(sizes)), sizes),
            names=[found.name for found in (*features, *categories)],
            shown=[*numbers, *(code or "missing" for code in record.codes)],
        )

    def _parts(self, record: Record, label: str | None) -> NumbersExplanation:
        """Whatever a record holds, part by part (client/explain/parts.py)."""
        target = self._target(self._saved.inputs([record]), label)
        return explain_parts(self._saved.outputs, parts_of(self.task, record), target)

    def _medication(self, record: Record, label: str | None) -> NumbersExplanation:
        """The same, with what the knowledge graph says for the drug and against it."""
        found = self._parts(record, label)
        choice = graph_choice(self.task)
        if choice is None:
            return found
        drug, graph, codes = (
            found.found.explained,
            graph_of(choice),
            known_codes(self.task, record),
        )
        given = found.found.answer["labels"]
        flags = (
            *contraindications(graph, codes, [drug]),
            *(f for f in interactions(graph, [drug, *given]) if drug in {f.label, f.against}),
        )
        told = [
            *(f"For: {told_reason(reason)}" for reason in reasons(graph, codes, [drug])[drug]),
            *(f"Against: {told_flag(flag)}" for flag in flags),
        ]
        none = f"The knowledge graph says nothing for or against {drug} here."
        return replace(found, notes=tuple(told) or (none,))

    def _image(self, record: Record, label: str | None) -> ImageExplanation:
        images = self._saved.inputs([record])[0]
        whole = images.float() / 255 if images.dtype == torch.uint8 else images
        return explain_image(self._saved.network, whole, self._target([whole], label))

    def _series(self, record: Record, label: str | None) -> SeriesExplanation:
        inputs = self._saved.inputs([record])
        names = [feature.name for feature in self.task.features]
        hours = inputs[0].shape[1]
        series = np.full((hours, len(names)), np.nan)
        if record.series is not None:
            series[: len(record.series)] = record.series[:hours]
        last = self.task.last
        return explain_series(
            self._saved.network,
            inputs,
            self._target(inputs, label),
            Grid.of(names, series),
            places=_HOURLY,
            start=None if last is None else (_START, names.index(last)),
            blanked=self._without(record),
        )

    def _without(self, record: Record) -> Callable[[NDArray[np.float64]], tuple[Tensor, ...]]:
        """Inputs of the same stay with other measurements, encoded as any stay is."""
        known = 0 if record.series is None else len(record.series)

        def blanked(lost: NDArray[np.float64]) -> tuple[Tensor, ...]:
            rows = [replace(record, series=one[:known].astype(np.float32)) for one in lost]
            return self._saved.inputs(rows)

        return blanked


# Of prognosis' inputs: values, masks and ages by hour; then lengths; then where it starts from.
_HOURLY: Final = (0, 1, 2)
_START: Final = 4
# Every other kind is explained by its records' parts.
_KINDS: Final[dict[str, Callable[[RowsModel, Record, str | None], RowsExplanation]]] = {
    "tabular": RowsModel._numbers,  # noqa: SLF001 - this module's own
    "imaging": RowsModel._image,  # noqa: SLF001 - this module's own
    "medication": RowsModel._medication,  # noqa: SLF001 - this module's own
    "prognosis": RowsModel._series,  # noqa: SLF001 - this module's own
}
