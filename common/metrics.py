"""Evaluation numbers: the metric words that are summed under masks, and what they mean.

A *scoring* says for a study what every held-out patient adds to the words, what is read out of
their sum, and how much one patient can change it. Words are fixed point. Under DP they carry
noise; everything here is then post-processing of a release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.outcomes import Classes, Hazard, LabelSet, Number, Outcome

if TYPE_CHECKING:
    from common.study import Study

__all__ = [
    "METRIC_SCALE",
    "TITLES",
    "ClassMetrics",
    "ClassScoring",
    "HazardScoring",
    "HistogramScoring",
    "LabelSetScoring",
    "Metrics",
    "NumberScoring",
    "Scoring",
    "risk_bin",
    "score_bin",
    "scoring_of",
    "words_from_counts",
]

METRIC_SCALE = 2**16
"""Fixed point: one patient is this many units."""

TITLES: Final[Mapping[str, str]] = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ece": "calibration error",
    "brier": "Brier score",
    "prauc": "PRAUC",
    "jaccard": "Jaccard",
    "f1": "F1",
    "mse": "MSE",
    "mae": "MAE",
    "r2": "R2",
    "c_index": "c-index",
}
"""How a score is written in tables and figures."""

FALLING: Final = frozenset({"mse", "mae", "ece", "brier"})
"""Scores of which less is better."""

HAZARD_BINS: Final = 64
"""Bins of the risk in the histogram that a c-index is read from."""

_WORD_BOUND = 2.0**62
_LOGIT_REACH = 8.0
_BOOTSTRAPS = 1000

Vector = NDArray[np.float64]
Interval = tuple[float, float]


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
    """The quality of a model over held-out patients; None where it cannot be said.

    Units:
        n, support and confusion: patients (fractions where a patient has several records, or
        noise was added). loss: per patient, each patient's loss capped by the study.
        scores: by name, the one that models are compared by first.
    """

    n: float
    loss: float | None
    scores: Mapping[str, float | None]
    classes: tuple[ClassMetrics, ...] = ()
    confusion: tuple[tuple[float, ...], ...] = ()

    @property
    def primary(self) -> float | None:
        """The score that models are compared by."""
        return next(iter(self.scores.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `metrics.json`."""
        return {
            "n": self.n,
            "loss": self.loss,
            "scores": dict(self.scores),
            "classes": [
                {name: getattr(row, name) for name in ClassMetrics.__slots__}
                for row in self.classes
            ],
            "confusion": [list(row) for row in self.confusion],
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Metrics:
        """The metrics that `to_json` wrote."""
        return Metrics(
            found["n"],
            found["loss"],
            dict(found["scores"]),
            tuple(ClassMetrics(**entry) for entry in found["classes"]),
            tuple(tuple(row) for row in found["confusion"]),
        )


class Scoring(Protocol):
    """What is measured in a study.

    Guarantee: a held-out patient, whatever its records, changes a metric vector by at most
        `sensitivity` in L2 (in patients, not in words).
    """

    @property
    def length(self) -> int:
        """M, the numbers of a metric vector."""
        ...

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the metric vector to one patient."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The scores that come out, the one that models are compared by first."""
        ...

    @property
    def by_patient(self) -> bool:
        """Whether `intervals` needs every patient's own vector."""
        ...

    @property
    def told(self) -> str:
        """What is released, in words, for the privacy statement."""
        ...

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """The metrics of summed words (M,). Raises ValueError where they have another length."""
        ...

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """How good a model is, in [0, 1], more is better; 0 where nobody was measured.

        Guarantee: bit-identical wherever it is computed.
        """
        ...

    def noise(self, count_noise: float, patients: float) -> float:
        """About the standard deviation of `score` where each count has that of `count_noise`."""
        ...

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """95 % bootstrap intervals by name, from exact vectors (k, M): one by patient, or sums.

        Only where exact counts may be shown (a simulation, a hospital's own screen): patients are
        drawn anew. Fixed draws, fixed answer. Raises ValueError where there is no patient.
        """
        ...


def words_from_counts(counts: Vector) -> NDArray[np.int64]:
    """Fixed-point words of a metric vector; add any noise before, so rounding is harmless.

    Raises:
        ValueError: a number is not finite or too large.
    """
    scaled = np.rint(counts * METRIC_SCALE)
    if not np.isfinite(scaled).all() or (scaled.size and np.abs(scaled).max() >= _WORD_BOUND):
        raise ValueError("a metric is not finite or does not fit into its word")
    return scaled.astype(np.int64)


def scoring_of(study: Study) -> Scoring:
    """What a study measures."""
    outcome: Outcome = study.task.outcome
    cap, bins = study.evaluation.loss_cap, study.evaluation.score_bins
    if isinstance(outcome, Classes):
        if bins:
            return HistogramScoring(outcome.labels, cap, bins, study.evaluation.threshold)
        return ClassScoring(outcome.labels, cap)
    if isinstance(outcome, LabelSet):
        return LabelSetScoring(outcome.labels, cap)
    if isinstance(outcome, Number):
        return NumberScoring(outcome)
    return HazardScoring(outcome, cap)


# ---------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class ClassScoring:
    """One of L labels: the confusion matrix.

    Shapes: (L*L + 1,) counts by (true, predicted), then the sum of min(loss, cap) / cap. A patient
        spreads a total weight of at most 1 over the counts (L2 at most 1) and adds at most 1 to
        the loss.
    """

    labels: tuple[str, ...]
    loss_cap: float
    names: tuple[str, ...] = ("accuracy", "macro_f1")
    sensitivity: float = math.sqrt(2.0)
    by_patient: bool = False
    told: str = "confusion matrix and bounded loss"

    @property
    def length(self) -> int:
        """M, the numbers of a metric vector."""
        return len(self.labels) ** 2 + 1

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """The metrics of the summed words.

        Noised counts can be negative or inconsistent. Each count that a ratio needs (hits, row
        sum, column sum, total) is taken from the unclipped cells and then clipped at zero, which
        adds less bias than clipping single cells; ratios are clipped to [0, 1]. Without noise
        this is the textbook value; macro F1 is the mean over the classes that occur.
        """
        counts = _counts(words, self.length)
        cells = counts[:-1].reshape(len(self.labels), len(self.labels))
        return _confusion_metrics(cells, float(counts[-1]), self.labels, self.loss_cap)

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """Accuracy: hits over patients, of noised counts."""
        if words.size != self.length:
            raise ValueError("the metric words belong to another study")
        cells = [int(word) for word in words[:-1]]
        return _quotient(sum(cells[:: len(self.labels) + 1]), sum(cells))

    def noise(self, count_noise: float, patients: float) -> float:
        """Of an accuracy of 1/2, from L*L cells."""
        return count_noise * len(self.labels) / 2 / patients

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """Drawing patients with replacement is drawing cells from a multinomial."""
        cells = vectors.sum(axis=0)[:-1].reshape(len(self.labels), len(self.labels))
        return _confusion_intervals(cells)


@dataclass(frozen=True)
class HistogramScoring:
    """One of two labels, with scores: histograms of the second label's log-odds.

    Shapes: (2B + 1,) counts by (true label, bin), then the bounded loss. The confusion matrix at
        the study's threshold follows from the counts, so a patient changes no more than it does
        in `ClassScoring`.

    Bins have equal width in log-odds, from -8 to 8; AUROC counts pairs within a bin by half.
    """

    labels: tuple[str, ...]
    loss_cap: float
    bins: int
    threshold: float = 0.5
    names: tuple[str, ...] = (
        "auroc",
        "auprc",
        "accuracy",
        "macro_f1",
        "sensitivity",
        "specificity",
        "ece",
        "brier",
    )
    sensitivity: float = math.sqrt(2.0)
    by_patient: bool = False
    told: str = "histograms of scores by label, and bounded loss"

    @property
    def length(self) -> int:
        """M, the numbers of a metric vector."""
        return 2 * self.bins + 1

    @property
    def cut(self) -> int:
        """The first bin that is read as the second label: the threshold, on the next edge."""
        odds = math.log(self.threshold / (1 - self.threshold))
        return min(max(round((odds / _LOGIT_REACH + 1) / 2 * self.bins), 1), self.bins - 1)

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """The metrics of the summed words; noised counts as in `ClassScoring.read`."""
        counts = _counts(words, self.length)
        table = counts[:-1].reshape(2, self.bins)
        halves = np.stack([table[:, : self.cut].sum(axis=1), table[:, self.cut :].sum(axis=1)])
        found = _confusion_metrics(halves.T, float(counts[-1]), self.labels, self.loss_cap)
        scores = {**_ranking(table), **found.scores, **_calibration(table)}
        scores["specificity"], scores["sensitivity"] = (
            (row.recall if row.support > 0 else None) for row in found.classes
        )
        return replace(found, scores={name: scores[name] for name in self.names})

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """AUROC of noised counts, in exact integers up to one division."""
        if words.size != self.length:
            raise ValueError("the metric words belong to another study")
        negative = [int(word) for word in words[: self.bins]]
        positive = [int(word) for word in words[self.bins : -1]]
        below, twice = 0, 0
        for first, second in zip(negative, positive, strict=True):
            twice += second * (2 * below + first)
            below += first
        return _quotient(twice, 2 * sum(negative) * sum(positive))

    def noise(self, count_noise: float, patients: float) -> float:
        """Of an AUROC where both labels are equally frequent."""
        return count_noise * math.sqrt(self.bins) * 2 / patients

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """Patients drawn anew are cells of the histogram drawn from a multinomial."""
        cells = vectors.sum(axis=0)[:-1]
        drawn = _redrawn(cells)
        read = [self.read(words_from_counts(np.append(row, 0.0))).scores for row in drawn]
        return _ends(read, self.names)


def score_bin(log_odds: Vector, bins: int) -> NDArray[np.int64]:
    """The bin of each score's log-odds, in [0, bins); what is no number is read as undecided."""
    placed = (np.nan_to_num(log_odds, nan=0.0) / _LOGIT_REACH + 1) / 2 * bins
    return np.clip(np.floor(placed), 0, bins - 1).astype(np.int64)


def _ranking(table: Vector) -> dict[str, float | None]:
    """AUROC and AUPRC of a histogram (2, B)."""
    negative, positive = table
    total, missed = float(positive.sum()), float(negative.sum())
    if total <= 0 or missed <= 0:
        return {"auroc": None, "auprc": None}
    below = np.cumsum(negative) - negative
    pairs = float((positive * (below + negative / 2)).sum())
    found = np.cumsum(positive[::-1]).clip(min=0)
    told = np.cumsum((positive + negative)[::-1])
    precision = np.divide(found, told, out=np.zeros_like(found), where=told > 0).clip(0, 1)
    return {
        "auroc": _ratio(pairs, total * missed),
        "auprc": _ratio(float((positive[::-1] * precision).sum()), total),
    }


def _calibration(table: Vector) -> dict[str, float | None]:
    """Expected calibration error in ten equal parts of [0, 1], and Brier score, at bin centres."""
    bins, total = table.shape[1], float(table.sum())
    if total <= 0:
        return {"ece": None, "brier": None}
    odds = (2 * (np.arange(bins) + 0.5) / bins - 1) * _LOGIT_REACH
    told = 1 / (1 + np.exp(-odds))
    part = np.minimum((told * 10).astype(np.int64), 9)
    gap = np.bincount(part, weights=table[1] - told * table.sum(axis=0), minlength=10)
    brier = float((table[0] * told**2 + table[1] * (1 - told) ** 2).sum())
    return {"ece": _ratio(float(np.abs(gap).sum()), total), "brier": _ratio(brier, total)}


# ---------------------------------------------------------------------------- sums by patient


@dataclass(frozen=True)
class LabelSetScoring:
    """Any of L labels: how well each patient's set was found.

    Shapes: (5,) patients, PRAUC, Jaccard, F1 and the bounded loss, each a patient's own value in
        [0, 1], summed. Source: SafeDrug (Yang et al. 2021), which averages by visit.
    """

    labels: tuple[str, ...]
    loss_cap: float
    names: tuple[str, ...] = ("prauc", "jaccard", "f1")
    sensitivity: float = math.sqrt(5.0)
    by_patient: bool = True
    length: int = 5
    told: str = "sums over patients of PRAUC, Jaccard, F1 and bounded loss"

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """The means over patients."""
        n, *sums, loss = (float(value) for value in _counts(words, self.length))
        return Metrics(
            n=max(n, 0.0),
            loss=_ratio(loss, n) * self.loss_cap if n > 0 else None,
            scores=dict(zip(self.names, (_share(value, n) for value in sums), strict=True)),
        )

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """The mean PRAUC."""
        if words.size != self.length:
            raise ValueError("the metric words belong to another study")
        return _quotient(int(words[1]), int(words[0]))

    def noise(self, count_noise: float, patients: float) -> float:
        """Of a mean over patients."""
        return count_noise / patients

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """Patients drawn anew."""
        return _from_patients(self, vectors)


@dataclass(frozen=True)
class NumberScoring:
    """A number: errors and spread.

    Shapes: (5,) patients, squared error, absolute error, value and its square, summed, all on the
        scale from 0 to 1 between the outcome's bounds.
    """

    outcome: Number
    names: tuple[str, ...] = ("mse", "mae", "r2")
    sensitivity: float = math.sqrt(5.0)
    by_patient: bool = True
    length: int = 5
    told: str = "sums over patients of squared and absolute error, value and square, bounded"

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """MSE and MAE in the data's unit, R2, and the mean squared error that training lowers."""
        n, squared, absolute, value, square = (float(v) for v in _counts(words, self.length))
        if n <= 0:
            return Metrics(0.0, None, dict.fromkeys(self.names))
        width = self.outcome.high - self.outcome.low
        spread = square - value * value / n
        return Metrics(
            n=n,
            loss=_ratio(squared, n),
            scores={
                "mse": _ratio(squared, n) * width**2,
                "mae": _ratio(absolute, n) * width,
                "r2": min(1 - max(squared, 0.0) / spread, 1.0) if spread > 0 else None,
            },
        )

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """One less the mean squared error on the scale from 0 to 1."""
        if words.size != self.length:
            raise ValueError("the metric words belong to another study")
        if words[0] <= 0:
            return np.float32(0)
        return np.float32(1) - _quotient(int(words[1]), int(words[0]))

    def noise(self, count_noise: float, patients: float) -> float:
        """Of a mean over patients."""
        return count_noise / patients

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """Patients drawn anew."""
        return _from_patients(self, vectors)


# ---------------------------------------------------------------------------- survival


@dataclass(frozen=True)
class HazardScoring:
    """A time to an event: who has it earlier.

    Shapes: (2TR + 1,) counts by (event seen, interval, bin of the risk), then the bounded loss.

    A pair is comparable where the one with the event has the smaller interval, or
    the same one and the other has no event; pairs in one bin of the risk count by half.
    Source: Harrell et al. 1982, on grouped times.
    """

    outcome: Hazard
    loss_cap: float
    names: tuple[str, ...] = ("c_index",)
    sensitivity: float = math.sqrt(2.0)
    by_patient: bool = False
    told: str = "histogram of risks by interval and event, and bounded loss"

    @property
    def length(self) -> int:
        """M, the numbers of a metric vector."""
        return 2 * self.outcome.outputs * HAZARD_BINS + 1

    def read(self, words: NDArray[np.int64]) -> Metrics:
        """The c-index of grouped times, and the bounded loss."""
        counts = _counts(words, self.length)
        n = max(float(counts[:-1].sum()), 0.0)
        found = self._concordance(words)
        return Metrics(
            n=n,
            loss=_ratio(float(counts[-1]), n) * self.loss_cap if n > 0 else None,
            scores={"c_index": None if found is None else float(found)},
        )

    def score(self, words: NDArray[np.int64]) -> np.float32:
        """The c-index."""
        found = self._concordance(words)
        return np.float32(0) if found is None else found

    def _concordance(self, words: NDArray[np.int64]) -> np.float32 | None:
        if words.size != self.length:
            raise ValueError("the metric words belong to another study")
        # Integers of any size: the same quotient everywhere.
        table = words[:-1].reshape(2, self.outcome.outputs, HAZARD_BINS).astype(object)
        censored, events = table
        twice, pairs = 0, 0
        later = np.zeros(HAZARD_BINS, object)
        for own, gone in zip(events[::-1], censored[::-1], strict=True):
            others = later + gone
            below = np.cumsum(others) - others
            twice += int((own * (2 * below + others)).sum())
            pairs += int(own.sum()) * int(others.sum())
            later = later + gone + own
        return None if pairs <= 0 else _quotient(twice, 2 * pairs)

    def noise(self, count_noise: float, patients: float) -> float:
        """Of a c-index where half of the patients have the event."""
        return count_noise * math.sqrt(self.length) * 2 / patients

    def intervals(self, vectors: Vector) -> dict[str, Interval]:
        """Patients drawn anew are cells of the histogram drawn from a multinomial."""
        drawn = _redrawn(vectors.sum(axis=0)[:-1], _BOOTSTRAPS // 5)
        read = [self.read(words_from_counts(np.append(row, 0.0))).scores for row in drawn]
        return _ends(read, self.names)


def risk_bin(risk: Vector) -> NDArray[np.int64]:
    """The bin of each risk in [0, 1]."""
    placed = np.floor(np.nan_to_num(risk, nan=0.5) * HAZARD_BINS)
    return np.clip(placed, 0, HAZARD_BINS - 1).astype(np.int64)


# ---------------------------------------------------------------------------- shared arithmetic


def _counts(words: NDArray[np.int64], length: int) -> Vector:
    if words.size != length:
        raise ValueError("the metric words belong to another study")
    return words.astype(np.float64) / METRIC_SCALE


def _confusion_metrics(
    cells: Vector, loss: float, labels: Sequence[str], loss_cap: float
) -> Metrics:
    total = max(float(cells.sum()), 0.0)
    known = total > 0
    classes, present = _per_class(cells, labels)
    return Metrics(
        n=total,
        loss=_ratio(loss, total) * loss_cap if known else None,
        scores={
            "accuracy": _ratio(float(np.trace(cells)), total) if known else None,
            "macro_f1": _mean([c.f1 for c, p in zip(classes, present, strict=True) if p]),
        },
        classes=tuple(classes),
        confusion=tuple(tuple(float(cell) for cell in row) for row in cells.clip(min=0.0)),
    )


def _confusion_intervals(cells: Vector) -> dict[str, Interval]:
    samples = _redrawn(cells.ravel()).reshape(-1, *cells.shape)
    hits = np.diagonal(samples, axis1=1, axis2=2)
    accuracy = hits.sum(axis=1) / samples.sum(axis=(1, 2))
    both = samples.sum(axis=1) + samples.sum(axis=2)
    present = both > 0
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=present)
    macro = f1.sum(axis=1) / present.sum(axis=1)
    return {"accuracy": _percentiles(accuracy), "macro_f1": _percentiles(macro)}


def _redrawn(cells: Vector, times: int = _BOOTSTRAPS) -> Vector:
    """Counts (times, cells) of as many patients drawn with replacement."""
    total = float(cells.sum())
    if total <= 0 or cells.min() < 0:
        raise ValueError("a bootstrap needs at least one patient and no negative count")
    draws = np.random.default_rng(0).multinomial(max(1, round(total)), cells / total, size=times)
    return draws.astype(np.float64)


def _from_patients(scoring: Scoring, vectors: Vector) -> dict[str, Interval]:
    if not len(vectors):
        raise ValueError("a bootstrap needs at least one patient")
    stream = np.random.default_rng(0)
    found = []
    for _ in range(_BOOTSTRAPS):
        weight = np.bincount(stream.integers(len(vectors), size=len(vectors)), minlength=1)
        summed = weight @ vectors[: len(weight)]
        found.append(scoring.read(words_from_counts(summed)).scores)
    return _ends(found, scoring.names)


def _ends(found: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, Interval]:
    """Percentiles of each score over the draws in which it could be told; else left out."""
    ends: dict[str, Interval] = {}
    for name in names:
        known = [value for row in found if (value := row[name]) is not None]
        if known:
            ends[name] = _percentiles(np.array(known))
    return ends


def _percentiles(values: Vector) -> Interval:
    lower, upper = np.percentile(values, (2.5, 97.5))
    return float(lower), float(upper)


def _per_class(cells: Vector, labels: Sequence[str]) -> tuple[list[ClassMetrics], list[bool]]:
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


def _quotient(part: int, whole: int) -> np.float32:
    """One float64 division of exact integers, cut to [0, 1], rounded once; 0 over nothing."""
    return np.float32(min(max(part / whole, 0.0), 1.0)) if whole > 0 else np.float32(0)


def _share(part: float, whole: float) -> float | None:
    return _ratio(part, whole) if whole > 0 else None


def _ratio(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
