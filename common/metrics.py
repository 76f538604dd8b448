"""Evaluation numbers: the metric words that are summed under masks, and what they mean.

The words are the confusion matrix and the bounded loss of the held-out patients, in fixed
point. Under DP they carry noise; everything here is then post-processing of a release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "METRIC_SCALE",
    "PATIENT_SENSITIVITY",
    "ClassMetrics",
    "Intervals",
    "Metrics",
    "bootstrap_interval",
    "metric_length",
    "metrics_from_words",
    "words_from_counts",
]

METRIC_SCALE = 2**16
"""Fixed point: one patient is this many units."""

PATIENT_SENSITIVITY = math.sqrt(2.0)
"""L2 sensitivity of the metric vector to one held-out patient, in patients (not in words).

Each patient spreads a total weight of at most 1 over the confusion matrix (L2 at most 1)
and adds at most 1 to the bounded loss.
"""

_WORD_BOUND = 2.0**62


def metric_length(labels: int) -> int:
    """The number of metric words for `labels` classes: the confusion matrix and the loss."""
    return labels * labels + 1


def words_from_counts(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Fixed-point words of a metric vector; add any noise before, so rounding is harmless.

    Shapes:
        counts: (L*L + 1,) confusion matrix by rows (true, predicted), then the sum over
            patients of min(loss, cap) / cap.

    Raises:
        ValueError: the length is not L*L + 1, or a number is not finite or too large.
    """
    _label_count(counts.size)
    scaled = np.rint(counts * METRIC_SCALE)
    if not np.isfinite(scaled).all() or np.abs(scaled).max() >= _WORD_BOUND:
        raise ValueError("a metric is not finite or does not fit into its word")
    return scaled.astype(np.int64)


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class: how often it was meant (`support`, in patients), and how well it was found."""

    label: str
    precision: float
    recall: float
    f1: float
    support: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """The quality of a model over held-out patients; None where there were no patients.

    Units:
        n, support and confusion: patients (fractions where a patient has several notes, or
        noise was added). loss: nats per patient, each patient's loss capped by the study.
    """

    n: float
    accuracy: float | None
    macro_f1: float | None
    loss: float | None
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `metrics.json`."""
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Metrics:
        """The metrics that `to_json` wrote."""
        fields = dict(found)
        fields["classes"] = tuple(ClassMetrics(**entry) for entry in fields["classes"])
        fields["confusion"] = tuple(tuple(row) for row in fields["confusion"])
        return Metrics(**fields)


def metrics_from_words(
    words: NDArray[np.int64], labels: Sequence[str], *, loss_cap: float
) -> Metrics:
    """The metrics of the summed words.

    Noised counts can be negative or inconsistent. Each count that a ratio needs (hits, row
    sum, column sum, total) is taken from the unclipped cells and then clipped at zero, which
    adds less bias than clipping single cells; ratios are clipped to [0, 1]. Without noise
    this is the textbook value; macro F1 is the mean over the classes that occur.
    """
    if _label_count(words.size) != len(labels):
        raise ValueError("the metric words belong to another number of labels")
    counts = words.astype(np.float64) / METRIC_SCALE
    cells = counts[:-1].reshape(len(labels), len(labels))
    total = max(float(cells.sum()), 0.0)
    known = total > 0
    classes, present = _per_class(cells, labels)
    return Metrics(
        n=total,
        accuracy=_ratio(float(np.trace(cells)), total) if known else None,
        macro_f1=_mean([c.f1 for c, p in zip(classes, present, strict=True) if p]),
        loss=_ratio(float(counts[-1]), total) * loss_cap if known else None,
        classes=tuple(classes),
        confusion=tuple(tuple(float(cell) for cell in row) for row in cells.clip(min=0.0)),
    )


@dataclass(frozen=True, slots=True)
class Intervals:
    """95 % bootstrap intervals, lower and upper end, of one confusion matrix."""

    accuracy: tuple[float, float]
    macro_f1: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `metrics.json`."""
        return {"accuracy": list(self.accuracy), "macro_f1": list(self.macro_f1)}


def bootstrap_interval(
    confusion: NDArray[np.float64] | Sequence[Sequence[float]], *, n_boot: int = 1000, seed: int = 0
) -> Intervals:
    """The 95 % percentile interval of accuracy and macro F1 by resampling patients.

    Only for tables where exact counts may be shown (a simulation, a hospital's own screen):
    it takes the un-noised confusion matrix. Drawing patients with replacement is drawing the
    cells of the confusion matrix from a multinomial. Fixed `seed`, fixed answer.

    Raises:
        ValueError: no patient, or a negative cell.
    """
    cells = np.asarray(confusion, np.float64)
    total = float(cells.sum())
    if total <= 0 or cells.min() < 0:
        raise ValueError("a bootstrap needs at least one patient and no negative count")
    draws = np.random.default_rng(seed).multinomial(
        max(1, round(total)), (cells / total).ravel(), size=n_boot
    )
    samples = draws.reshape(n_boot, *cells.shape).astype(np.float64)
    hits = np.diagonal(samples, axis1=1, axis2=2)
    accuracy = hits.sum(axis=1) / samples.sum(axis=(1, 2))
    both = samples.sum(axis=1) + samples.sum(axis=2)
    present = both > 0
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=present)
    macro = f1.sum(axis=1) / present.sum(axis=1)
    return Intervals(accuracy=_percentiles(accuracy), macro_f1=_percentiles(macro))


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    lower, upper = np.percentile(values, (2.5, 97.5))
    return float(lower), float(upper)


def _per_class(
    cells: NDArray[np.float64], labels: Sequence[str]
) -> tuple[list[ClassMetrics], list[bool]]:
    found: list[ClassMetrics] = []
    present: list[bool] = []
    for index, label in enumerate(labels):
        support = max(float(cells[index].sum()), 0.0)
        predicted = max(float(cells[:, index].sum()), 0.0)
        hits = float(cells[index, index])
        metrics = ClassMetrics(
            label=label,
            precision=_ratio(hits, predicted),
            recall=_ratio(hits, support),
            f1=_ratio(2 * hits, support + predicted),
            support=support,
        )
        found.append(metrics)
        present.append(support + predicted > 0)
    return found, present


def _ratio(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _label_count(length: int) -> int:
    labels = math.isqrt(max(length - 1, 0))
    if labels < 1 or metric_length(labels) != length:
        raise ValueError("metric words come as L*L + 1 numbers")
    return labels
