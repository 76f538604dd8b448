"""The task `prognosis`: a class or a number for each stay, by an LSTM over its first hours.

A measurement that is not repeated still holds, so values are carried forward, within the stay
alone. That a value was measured, and how long ago, is itself a sign of how ill somebody is; both
go in beside it (Lipton et al. 2016; Che et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.records import Record
from client.privacy.recurrent import LoopLSTM, last_valid
from client.tasks.rows import Encoded, described, first_values
from common.errors import Code, DataError
from common.statistics import scaled
from common.tasks.prognosis import PrognosisTask, SeriesFeature
from common.tasks.targets import NumberTarget

__all__ = ["Trajectory", "architecture", "carried", "encode", "network", "probes"]

_CHANNELS: Final = 3  # of each feature: value, whether measured, how fresh
_GATE_SCALE: Final = 0.5  # first values are drawn for rectifiers; gates want smaller ones
_HALF_FRESH: Final = 6.0  # hours after which a value is half as fresh

# Whose invented stays, how many hours each, and where between its bounds a feature starts.
_PROBE: Final = (
    ("first", 0.9, 0.2),
    ("second", 0.3, 0.5),
    ("second", 1.0, 0.8),
    ("third", 0.6, 0.4),
)

Values = NDArray[np.float64]


def architecture(task: PrognosisTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    facts = task.model_dump(exclude={"kind", "columns", "max_stays"})
    return described("prognosis", facts)


class Trajectory(nn.Module):
    """An LSTM over the hours, whose state after the last one is read by linear layers.

    With `anchored`, a number is predicted as a correction of the last value s that was measured:
    s + s * gain(state) + output(state) + anchor(s, whether s is missing).

    Shapes: forward takes values, masks and freshness (B, T, F), lengths (B,) int64, and with
        `anchored` starts (B, 2); returns (B, outputs).
    """

    def __init__(
        self, features: int, width: int, outputs: int, *, layers: int, anchored: bool
    ) -> None:
        super().__init__()
        self.lstm = LoopLSTM(_CHANNELS * features, width, layers)
        self.output = nn.Linear(width, outputs)
        self.gain = nn.Linear(width, outputs) if anchored else None
        self.anchor = nn.Linear(2, outputs, bias=False) if anchored else None

    def forward(
        self,
        values: Tensor,
        masks: Tensor,
        fresh: Tensor,
        lengths: Tensor,
        starts: Tensor | None = None,
    ) -> Tensor:
        """What is predicted of each stay."""
        states = self.lstm(torch.cat([values, masks, fresh], dim=2), lengths)[0]
        last = last_valid(states, lengths)
        found: Tensor = self.output(last)
        if starts is not None and self.gain is not None and self.anchor is not None:
            found = found + starts[:, :1] * (1 + self.gain(last)) + self.anchor(starts)
        return found


def network(task: PrognosisTask) -> nn.Module:
    """The network at its first values.

    Forget gates start open (bias 1); the layers that predict are zero, so the first predictions
    favour no label, or are the last value measured.

    Guarantee: the same bits on every machine. Source: Jozefowicz et al. 2015 (forget gates).
    """
    module = Trajectory(
        len(task.features),
        task.width,
        task.outcome.outputs,
        layers=task.layers,
        anchored=task.last is not None,
    )
    first_values(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("lstm."):
                parameter.zero_()
            elif name.endswith("input.bias"):
                parameter[task.width : 2 * task.width] = 1.0
            elif parameter.ndim > 1:
                parameter.mul_(_GATE_SCALE)
    return module


def encode(task: PrognosisTask, records: Sequence[Record]) -> Encoded:
    """Stays as inputs, each from its own hours alone.

    Shapes: values, masks and freshness (N, T, F), lengths (N,), and where `last` is given
        starts (N, 2); T = task.hours.

    Raises DataError: a record has no series, or one of other features.
    """
    shape = (len(records), task.hours, len(task.features))
    series = np.full(shape, np.nan)
    lengths = np.zeros(len(records), np.int64)
    for row, record in enumerate(records):
        found = _hours_of(record, shape[2])[: task.hours]
        series[row, : len(found)] = found
        lengths[row] = len(found)
    there = (np.arange(task.hours) < lengths[:, None])[:, :, None]
    full, ages = carried(series)
    full = np.where(there, full, np.nan)
    fresh = np.where(there, np.exp2(-ages / _HALF_FRESH), 0.0)
    parts = _parts(task.features, full.reshape(-1, shape[2])).reshape(shape)
    masks = (~np.isnan(series)).astype(np.float32)
    inputs = [masks, fresh.astype(np.float32), lengths]
    if task.number is not None and task.last is not None:
        inputs.append(_starts(task, task.number, full, lengths))
    return Encoded(parts, tuple(torch.from_numpy(part) for part in inputs))


def _hours_of(record: Record, features: int) -> NDArray[np.float32]:
    """The record's series (T, F). Raises DataError."""
    found = record.series
    if found is None or found.ndim != 2 or found.shape[1] != features:  # noqa: PLR2004
        raise DataError(Code.DATA_VALUE, f"{record.where}: has no series of the study's features.")
    if np.isinf(found).any():
        raise DataError(Code.DATA_VALUE, f"{record.where}: has a value that is not finite.")
    return found


def carried(series: Values) -> tuple[Values, Values]:
    """Values carried forward, and the hours since each was measured.

    Shapes: (N, T, F) with NaN where nothing was measured; returns two of them: NaN, and infinity,
        before the first measurement.
    """
    hours = np.arange(series.shape[1])[None, :, None]
    latest = np.maximum.accumulate(np.where(np.isnan(series), -1, hours), axis=1)
    full = np.take_along_axis(series, np.maximum(latest, 0), axis=1)
    return full, np.where(latest < 0, np.inf, hours - latest)


def _parts(features: Sequence[SeriesFeature], values: Values) -> Values:
    """Values as parts of their declared ranges. Shapes: (n, F)."""
    low = np.array([feature.low for feature in features], np.float64)
    high = np.array([feature.high for feature in features], np.float64)
    logs = [at for at, feature in enumerate(features) if feature.scale == "log"]
    values = np.clip(values, low, high)
    for part in (values, low, high):
        part[..., logs] = np.log(part[..., logs])
    return scaled(values, low, high)


def _starts(
    task: PrognosisTask, number: NumberTarget, full: Values, lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The last value between the number's bounds, and whether there is none, (N, 2)."""
    place = [feature.name for feature in task.features].index(task.last or "")
    last = full[np.arange(len(full)), np.maximum(lengths - 1, 0), place]
    part = scaled(last[:, None], np.array([number.low]), np.array([number.high]))
    return np.concatenate([np.nan_to_num(part), np.isnan(part)], axis=1).astype(np.float32)


def probes(task: PrognosisTask) -> tuple[Record, ...]:
    """Four invented stays of three patients, of several lengths and with gaps."""
    return tuple(_probe(task, at) for at in range(len(_PROBE)))


def _probe(task: PrognosisTask, at: int) -> Record:
    patient, share, place = _PROBE[at]
    hours = max(1, round(share * task.hours))
    low = np.array([feature.low for feature in task.features])
    high = np.array([feature.high for feature in task.features])
    hour, feature = np.arange(hours)[:, None], np.arange(len(low))[None, :]
    part = (0.37 * (hour + 1) + 0.61 * feature + place) % 1.0
    series = low + part * (high - low)
    series[(hour + 2 * feature + at) % 3 == 0] = np.nan
    told = task.number
    return Record(
        patient,
        "",
        task.labels[at % len(task.labels)] if task.labels else None,
        None,
        "probe",
        at + 1,
        number=math.nan if told is None else told.low + place * (told.high - told.low),
        series=series.astype(np.float32),
    )
