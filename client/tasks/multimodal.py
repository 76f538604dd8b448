"""The task `multimodal`: one answer from notes, images, numbers and series, whichever are there.

Late fusion: every kind of input has an encoder of its own, the same as in the task that has it
alone; a gate for each, which sees what all of them say and which are there, weighs it; one linear
layer adds them up. A missing input adds nothing, so that a patient with none of them gets what is
common, and nobody has to be left out. Source: Arevalo et al. 2017 (gated multimodal units).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.images import fitted, look_of
from client.data.records import Record
from client.tasks import prognosis, tabular
from client.tasks.convolution import Residual
from client.tasks.prognosis import Trajectory
from client.tasks.rows import Encoded, described, first_values
from client.tasks.tabular import Perceptron, invented
from client.tasks.vocabulary import TextConvolution, spread_embedding, text_tensor
from common.tasks.multimodal import ImageInput, MultimodalTask

__all__ = ["Fusion", "architecture", "encode", "network", "present", "probes"]

_NOTES: Final = (
    "Cough and fever for three days. 咳嗽、发热三天。",
    "",
    "Breathless at night, ankles swollen, no chest pain. " * 6,
    "Better today.",
)
_WHOSE: Final = ("first", "second", "second", "third")
# Which kinds of input each invented row lacks, by their places: every kind is there and missing.
_LACKS: Final = ((), (0, 3), (1, 2), (1, 3))


def architecture(task: MultimodalTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    facts: dict[str, Any] = task.model_dump(
        mode="json", exclude={"kind": True, "columns": True, "max_records": True}
    )
    return described("multimodal", facts)


# ---------------------------------------------------------------------- network


class Fusion(nn.Module):
    """Encoders, gates and one linear layer.

    Shapes: forward takes, of what the task names and in this order: values (B, T, F); which inputs
        are there (B, M); text (B, L) int64; images (B, C, H, W) uint8; categories with what is
        missing of the numbers (B, K); masks and freshness (B, T, S) and lengths (B,). Returns
        (B, outputs).
    Guarantee: a row depends on no other; a missing input's values have no part in it.
    """

    def __init__(self, task: MultimodalTask) -> None:
        super().__init__()
        self._task = task
        self._count = 0 if task.numbers is None else len(task.numbers.features)
        width, names = task.width, task.modalities
        if task.text is not None:
            self.text = TextConvolution(task.text.encoder)
            self.text_code = nn.Linear(task.text.encoder.features, width)
        if task.image is not None:
            seen = task.image.network
            self.image = Residual(
                task.image.channels,
                seen.widths,
                width,
                blocks=seen.blocks,
                groups=seen.groups,
                stem_stride=seen.stem_stride,
            )
        numbers = task.as_tabular()
        if numbers is not None:
            inputs = numbers.inputs + len(numbers.features)
            self.numbers = Perceptron(inputs, numbers.hidden, width)
        if task.series is not None:
            given = task.series
            self.series = Trajectory(
                len(given.features), given.width, width, layers=given.layers, anchored=False
            )
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in names})
        self.gate = nn.Linear(len(names) * (width + 1), len(names))
        self.output = nn.Linear(len(names) * width, task.outcome.outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What is predicted of each row."""
        left = list(inputs)
        values = left.pop(0) if self._task.features else None
        there = left.pop(0)
        codes = []
        for at, name in enumerate(self._task.modalities):
            code = self.norms[name](self._code(name, values, left))
            # Not a product: where an input is missing, whatever came of it must not pass.
            codes.append(torch.where(there[:, at : at + 1] > 0, code, torch.zeros_like(code)))
        gates = 2 * torch.sigmoid(self.gate(torch.cat([*codes, there], dim=1)))
        weighed = [code * gates[:, at : at + 1] for at, code in enumerate(codes)]
        return cast("Tensor", self.output(torch.cat(weighed, dim=1)))

    def _code(self, name: str, values: Tensor | None, left: list[Tensor]) -> Tensor:
        """What one encoder says, (B, width); takes its inputs off `left`."""
        if name == "text":
            return cast("Tensor", self.text_code(self.text(left.pop(0))))
        if name == "image":
            return cast("Tensor", self.image(left.pop(0)))
        assert values is not None  # noqa: S101 - numbers and series have features
        if name == "numbers":
            return cast("Tensor", self.numbers(values[:, 0, : self._count], left.pop(0)))
        masks, fresh, lengths = (left.pop(0) for _ in range(3))
        return cast("Tensor", self.series(values[:, :, self._count :], masks, fresh, lengths))


def network(task: MultimodalTask) -> nn.Module:
    """The network at its first values: gates half open, and no answer is favoured.

    Guarantee: the same bits on every machine.
    """
    module = Fusion(task)
    first_values(module)
    if task.text is not None:
        spread_embedding(module.text)
    alone = task.as_prognosis()
    if alone is not None:
        started = cast("Trajectory", prognosis.network(alone))
        module.series.lstm.load_state_dict(started.lstm.state_dict())
    with torch.no_grad():
        module.gate.weight.zero_()
        module.output.weight.zero_()
    return module


# ---------------------------------------------------------------------- records


def present(task: MultimodalTask, record: Record) -> tuple[bool, ...]:
    """Which of the task's kinds of input the record has."""
    series = record.series
    found = {
        "text": bool(record.text.strip()),
        "image": record.image is not None,
        "numbers": not np.isnan(record.values).all() or any(record.codes),
        "series": series is not None and not np.isnan(series).all(),
    }
    return tuple(found[name] for name in task.modalities)


def encode(task: MultimodalTask, records: Sequence[Record]) -> Encoded:
    """The records as inputs of `Fusion`, each by itself; what is missing is empty.

    The numbers of a row hold through all its hours.
    """
    there = np.array([present(task, one) for one in records], np.float32)
    tensors = [torch.from_numpy(there.reshape(len(records), len(task.modalities)))]
    parts: list[NDArray[np.float64]] = []
    if task.text is not None:
        notes = [record.text for record in records]
        tensors.append(text_tensor(task.text.encoder, notes, task.text.max_tokens))
    if task.image is not None:
        tensors.append(_images(task.image, records))
    hours = 1 if task.series is None else task.series.hours
    numbers = task.as_tabular()
    if numbers is not None:
        found = tabular.encode(numbers, records)
        values = cast("NDArray[np.float64]", found.values)
        parts.append(np.repeat(values[:, None], hours, axis=1))
        missing = torch.from_numpy(np.isnan(values).astype(np.float32))
        tensors.append(torch.cat([found.tensors[0], missing], dim=1))
    alone = task.as_prognosis()
    if alone is not None:
        nothing = np.full((1, len(alone.features)), np.nan, np.float32)
        told = [r if r.series is not None else replace(r, series=nothing) for r in records]
        found = prognosis.encode(alone, told)
        parts.append(cast("NDArray[np.float64]", found.values))
        tensors += found.tensors
    return Encoded(np.concatenate(parts, axis=2) if parts else None, tuple(tensors))


def _images(given: ImageInput, records: Sequence[Record]) -> Tensor:
    """(N, C, H, W) uint8, black where there is none. Raises DataError."""
    look = look_of(given)
    pixels = np.zeros((len(records), given.size, given.size, given.channels), np.uint8)
    for at, record in enumerate(records):
        if record.image is not None:
            image = fitted(record.image, look, where=record.where)
            pixels[at] = image.reshape(pixels.shape[1:])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def probes(task: MultimodalTask) -> tuple[Record, ...]:
    """Four invented rows of three patients, each with other inputs missing."""
    numbers, alone = task.as_tabular(), task.as_prognosis()
    rows = tabular.probes(numbers) if numbers is not None else ()
    stays = prognosis.probes(alone) if alone is not None else ()
    return tuple(_probe(task, at, rows, stays) for at in range(len(_WHOSE)))


def _probe(
    task: MultimodalTask, at: int, rows: Sequence[Record], stays: Sequence[Record]
) -> Record:
    kinds = len(task.modalities)
    lacks = {place for place in _LACKS[at] if place < kinds and kinds > 1}
    has = [name for place, name in enumerate(task.modalities) if place not in lacks]
    values: tuple[float, ...] = ()
    codes: tuple[str, ...] = ()
    if task.numbers is not None:
        known = "numbers" in has
        values = tuple(value if known else np.nan for value in rows[at].values)
        codes = tuple(code if known else "" for code in rows[at].codes)
    return replace(
        invented(task.outcome, _WHOSE[at], at, values=values, codes=codes),
        text=_NOTES[at] if "text" in has else "",
        image=_stripes(task.image, at) if task.image is not None and "image" in has else None,
        series=stays[at].series if "series" in has else None,
    )


def _stripes(given: ImageInput, turn: int) -> NDArray[np.uint8]:
    place = np.arange(given.size)
    gray = ((place[:, None] // (2 + turn) + turn * place[None, :]) % 5 * 60).astype(np.uint8)
    return gray if given.channels == 1 else np.stack([gray, gray.T, 255 - gray], axis=-1)
