"""Losses, measurements and answers by outcome (common/outcomes.py): the same for every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from client.data.records import Record
from common.errors import Code, DataError
from common.metrics import HAZARD_BINS, HistogramScoring, Scoring, risk_bin, score_bin
from common.outcomes import Classes, Hazard, LabelSet, Number, Outcome

__all__ = ["answers", "losses_of", "measured", "targets_of"]

Vector = NDArray[np.float64]

_THRESHOLD: Final = 0.5


def targets_of(outcome: Outcome, records: Sequence[Record]) -> torch.Tensor:
    """What the records' outcomes are.

    Shapes: Classes (N,) int64; LabelSet (N, L) zeros and ones; Number (N,) in [0, 1]; Hazard
        (N, 2): interval, and 1 where the event was seen.

    Raises DataError naming file and line: a label is not in the study, or nothing is known.
    """
    if isinstance(outcome, Classes):
        known = {label: at for at, label in enumerate(outcome.labels)}
        return torch.tensor([_place(known, r, r.label or "") for r in records], dtype=torch.int64)
    if isinstance(outcome, LabelSet):
        known = {label: at for at, label in enumerate(outcome.labels)}
        found = torch.zeros(len(records), len(outcome.labels))
        for row, record in enumerate(records):
            for label in record.labels:
                found[row, _place(known, record, label)] = 1
        return found
    numbers = np.array([_number(record) for record in records], np.float64)
    if isinstance(outcome, Number):
        scaled = (numbers - outcome.low) / (outcome.high - outcome.low)
        return torch.from_numpy(scaled.clip(0, 1).astype(np.float32))
    interval = np.searchsorted(np.array(outcome.edges), numbers, side="right")
    seen = np.array([_event(record) for record in records], np.int64)
    return torch.from_numpy(np.stack([interval, seen], axis=1).reshape(-1, 2))


def _place(known: dict[str, int], record: Record, label: str) -> int:
    if label not in known:
        message = f"{record.where}: has a label that is not in the study."
        raise DataError(Code.DATA_LABEL, message)
    return known[label]


def _number(record: Record) -> float:
    if not math.isfinite(record.number):
        raise DataError(Code.DATA_VALUE, f"{record.where}: what is to be predicted is missing.")
    return record.number


def _event(record: Record) -> bool:
    if record.event is None:
        raise DataError(Code.DATA_VALUE, f"{record.where}: whether the event came is missing.")
    return record.event


def losses_of(outcome: Outcome, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each row, with a graph.

    Shapes: outputs (r, outcome.outputs), targets as `targets_of`; returns (r,) float32.
    """
    outputs = outputs.float()
    if isinstance(outcome, Classes):
        return functional.cross_entropy(outputs, targets, reduction="none")
    if isinstance(outcome, LabelSet):
        if outcome.squared:
            return (torch.sigmoid(outputs) - targets).square().mean(dim=1)
        found = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return found.mean(dim=1)
    if isinstance(outcome, Number):
        return (outputs[:, 0] - targets).square()
    return _hazard_losses(outputs, targets)


def _hazard_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log of the chance of what was seen: survived the earlier intervals, then event or not.

    A censored interval itself counts for nothing. Source: Gensheimer and Narasimhan 2019, eq. 3.
    """
    place = torch.arange(outputs.shape[1], device=outputs.device)
    survived = place < targets[:, :1]
    died = (place == targets[:, :1]) & (targets[:, 1:] > 0)
    return (functional.softplus(outputs) * survived + functional.softplus(-outputs) * died).sum(1)


def measured(
    outcome: Outcome,
    scoring: Scoring,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    patients: NDArray[np.int64],
    *,
    loss_cap: float,
) -> Vector:
    """Metric vectors of rows sorted by patient; each patient weighs 1.

    Shapes: outputs (r, outcome.outputs); patients (P + 1,) the first row of each, then r. Returns
        (P, M) where the scoring is by patient, else (1, M), summed.
    """
    count = len(patients) - 1
    owner = np.repeat(np.arange(count), np.diff(patients))
    weight = 1.0 / np.maximum(np.diff(patients), 1)[owner]
    losses = losses_of(outcome, outputs, targets).double().cpu().numpy()
    capped = np.nan_to_num(losses, nan=loss_cap, posinf=loss_cap).clip(0, loss_cap) / loss_cap
    found, truth = outputs.double().cpu().numpy(), targets.cpu().numpy()
    if isinstance(outcome, LabelSet):
        own = np.column_stack([np.ones(len(found)), *_sets(found, truth), capped])
    elif isinstance(outcome, Number):
        own = _errors(found[:, 0], truth.astype(np.float64))
    else:
        total = np.zeros(scoring.length)
        cells = _cells(outcome, scoring, found, truth)
        np.add.at(total, cells, weight)
        total[-1] = float(weight @ capped)
        return total[None]
    vectors = np.zeros((count, scoring.length))
    np.add.at(vectors, owner, own * weight[:, None])
    return vectors


def _cells(
    outcome: Classes | Hazard, scoring: Scoring, found: Vector, truth: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The counted cell of each row."""
    if isinstance(outcome, Hazard):
        risk = risk_bin(_risk(found))
        return (truth[:, 1] * outcome.outputs + truth[:, 0]) * HAZARD_BINS + risk
    if isinstance(scoring, HistogramScoring):
        return truth * scoring.bins + score_bin(found[:, 1] - found[:, 0], scoring.bins)
    told: NDArray[np.int64] = truth * len(outcome.labels) + np.nan_to_num(found).argmax(axis=1)
    return told


def _risk(logits: Vector) -> Vector:
    """One less the mean chance of having survived each interval, (r,) in [0, 1]."""
    survival = np.cumprod(1 - _sigmoid(logits), axis=1)
    mean: Vector = survival.mean(axis=1)
    return 1 - mean


def _sets(found: Vector, truth: Vector) -> tuple[Vector, Vector, Vector]:
    """(average precision, Jaccard, F1) of each row; an empty truth scores as nothing told."""
    chances = _sigmoid(found)
    told = chances >= _THRESHOLD
    hits = (told * truth).sum(axis=1)
    either = np.maximum(told, truth).sum(axis=1)
    both = told.sum(axis=1) + truth.sum(axis=1)
    jaccard = np.divide(hits, either, out=np.ones_like(hits), where=either > 0)
    f1 = np.divide(2 * hits, both, out=np.ones_like(hits), where=both > 0)
    order = np.argsort(-chances, axis=1, kind="stable")
    sorted_truth = np.take_along_axis(truth, order, axis=1)
    precision = np.cumsum(sorted_truth, axis=1) / np.arange(1, truth.shape[1] + 1)
    meant = truth.sum(axis=1)
    area = (precision * sorted_truth).sum(axis=1)
    ranked = np.divide(area, meant, out=np.zeros_like(area), where=meant > 0)
    return ranked, jaccard, f1


def _errors(found: Vector, truth: Vector) -> Vector:
    gap = np.nan_to_num(found, nan=0.0).clip(0, 1) - truth
    return np.column_stack([np.ones(len(truth)), gap**2, np.abs(gap), truth, truth**2])


def _sigmoid(values: Vector) -> Vector:
    known = np.nan_to_num(values, nan=0.0).clip(-60, 60)
    chances: Vector = 1 / (1 + np.exp(-known))
    return chances


def answers(outcome: Outcome, outputs: torch.Tensor) -> list[dict[str, Any]]:
    """What is told of each row, as plain values: the answer first, then what stands behind it."""
    found = outputs.double().cpu().numpy()
    if isinstance(outcome, Classes):
        powers = np.exp(found - found.max(axis=1, keepdims=True))
        shares = powers / powers.sum(axis=1, keepdims=True)
        return [
            {"label": outcome.labels[int(row.argmax())], "probabilities": _named(outcome, row)}
            for row in shares
        ]
    if isinstance(outcome, LabelSet):
        return [
            {
                "labels": [
                    label
                    for label, chance in zip(outcome.labels, row, strict=True)
                    if chance >= _THRESHOLD
                ],
                "probabilities": _named(outcome, row),
            }
            for row in _sigmoid(found)
        ]
    if isinstance(outcome, Number):
        width = outcome.high - outcome.low
        return [{"value": outcome.low + width * float(min(max(row, 0), 1))} for row in found[:, 0]]
    survival = np.cumprod(1 - _sigmoid(found), axis=1)
    ends = [*(f"{edge:g}" for edge in outcome.edges), "later"]
    return [
        {"risk": float(risk), "survival": dict(zip(ends, map(float, row), strict=True))}
        for risk, row in zip(_risk(found), survival, strict=True)
    ]


def _named(outcome: Classes | LabelSet, row: Vector) -> dict[str, float]:
    return dict(zip(outcome.labels, map(float, row), strict=True))
