"""A saved network of a task's own, and one record at a time explained through it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from client.data.records import Record
from client.devices import choose_device
from client.explain.attribution import Target
from client.explain.image import ImageExplanation, explain_image
from client.explain.numbers import NumbersExplanation, explain_numbers
from client.explain.series import Grid, SeriesExplanation, explain_series
from client.predict import MODEL_FORMAT, TASK_FILE, WEIGHTS_FILE
from client.tasks.kinds import code_of
from client.tasks.rows import inputs_of, loaded
from common.errors import Code, DataError
from common.study import Task
from common.tensors import load_tensors

__all__ = ["RowsModel"]

RowsExplanation = NumbersExplanation | ImageExplanation | SeriesExplanation


class RowsModel:
    """What `wardround` wrote for a task with a network of its own.

    Args:
        folder: holds task.json and model.safetensors.
        device: auto, cpu or cuda[:N].

    Raises:
        DataError: the folder is not whole, or its kind of task is not explained here.
    """

    def __init__(self, folder: Path, device: str) -> None:
        weights = load_tensors(folder / WEIGHTS_FILE)
        try:
            facts: Any = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
            known = {MODEL_FORMAT: facts["task"]}[facts["format"]]
            task: Any = TypeAdapter[Task](Task).validate_json(json.dumps(known))
            mean, deviation = (np.array(facts[name], np.float32) for name in ("mean", "deviation"))
            self._code = code_of(task)
            self._device = choose_device(device)
            self._network = loaded(self._code, task, weights).to(self._device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{folder}: not a whole model of this software ({type(error).__name__})."
            raise DataError(Code.MODEL_STATE, message) from None
        if task.kind not in _KINDS:
            raise DataError(
                Code.MODEL_FAMILY,
                f"{folder}: a model of kind {task.kind} is not explained by this command.",
                remedy=f"Explained are text classifiers and the kinds {', '.join(_KINDS)}.",
            )
        self.task = task
        self._mean, self._deviation = mean, deviation

    def explain(self, record: Record, label: str | None = None) -> RowsExplanation:
        """Why the model answers as it does for this record. Raises DataError."""
        return _KINDS[self.task.kind](self, record, label)

    def _inputs(self, records: Sequence[Record]) -> tuple[Tensor, ...]:
        found = inputs_of(self._code.encode(self.task, records), self._mean, self._deviation)
        return tuple(tensor.to(self._device) for tensor in found)

    def _target(self, inputs: Sequence[Tensor], label: str | None) -> Target:
        with torch.no_grad():
            return Target.of(self.task.outcome, self._network(*inputs), label)

    def _numbers(self, record: Record, label: str | None) -> NumbersExplanation:
        inputs = self._inputs([record])
        features, categories = self.task.features, self.task.categories
        sizes = [1] * len(features) + [len(category.values) for category in categories]
        means = [
            f.low + float(m) * (f.high - f.low) for f, m in zip(features, self._mean, strict=True)
        ]
        numbers = [
            f"missing, counts as {mean:.4g}"
            if np.isnan(value)
            else f"{value:.6g} (mean {mean:.4g})"
            for value, mean in zip(record.values, means, strict=True)
        ]
        return explain_numbers(
            self._network,
            inputs,
            self._target(inputs, label),
            owner=np.repeat(np.arange(len(sizes)), sizes),
            names=[found.name for found in (*features, *categories)],
            shown=[*numbers, *(code or "missing" for code in record.codes)],
        )

    def _image(self, record: Record, label: str | None) -> ImageExplanation:
        images = self._inputs([record])[0]
        whole = images.float() / 255 if images.dtype == torch.uint8 else images
        return explain_image(self._network, whole, self._target([whole], label))

    def _series(self, record: Record, label: str | None) -> SeriesExplanation:
        inputs = self._inputs([record])
        names = [feature.name for feature in self.task.features]
        hours = inputs[0].shape[1]
        series = np.full((hours, len(names)), np.nan)
        if record.series is not None:
            series[: len(record.series)] = record.series[:hours]
        last = self.task.last
        return explain_series(
            self._network,
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
            return self._inputs(rows)

        return blanked


# Of prognosis' inputs: values, masks and ages by hour; then lengths; then where it starts from.
_HOURLY: Final = (0, 1, 2)
_START: Final = 4
_KINDS: Final[dict[str, Callable[[RowsModel, Record, str | None], RowsExplanation]]] = {
    "tabular": RowsModel._numbers,  # noqa: SLF001 - this module's own
    "imaging": RowsModel._image,  # noqa: SLF001 - this module's own
    "prognosis": RowsModel._series,  # noqa: SLF001 - this module's own
}
