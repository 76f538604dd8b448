"""The acceptance gate: a model that got worse on the hospitals' held-out patients is rolled back.

Every party judges alike, from the masked and noised sums that the next round carries anyway, so
the verdict needs no new message and nobody can change it alone. The last accepted model stands
in the state beside the candidate, under its own names, and is in the model digest with it.

Guarantee: a candidate that measures more than `tolerance` below the best accepted model is rolled
    back and leaves no trace in the model: neither in its tensors, nor in the optimiser's slots,
    nor in the exponents. Accepted losses do not add up: the best score never falls because of a
    later, worse model. It is a mean over the measurements of one model, so that neither a lucky
    measurement of the standing model stays, nor an unlucky one lowers the bar.
Limits (docs/THREAT_MODEL.md): a change that held-out patients do not show, a backdoor say, passes;
    a hospital that lies about its measurement decides; masks hide who caused a rejection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.metrics import Scoring
from common.ports import Tensors
from common.statistics import PREFIX as STATISTICS

__all__ = ["PREFIX", "Gate", "Verdict", "split_state", "standing"]

PREFIX: Final = "accepted/"
_VERDICT: Final = PREFIX + "verdict"
_EXPONENTS: Final = PREFIX + "exponents"
_TENSOR: Final = PREFIX + "tensor/"

_NONE, _ONE = np.float32(0), np.float32(1)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """What follows from one measurement; `score` is the measured model's, in [0, 1]."""

    state: dict[str, Array]
    exponents: tuple[int, ...]
    rejected: bool
    score: float


@dataclass(frozen=True)
class _Record:
    """What the state holds about scores, as (4,) float32 in this order.

    Args:
        earlier: the best score of a model that was accepted before the standing one; -1: none.
        score: the standing model's, the mean of its measurements.
        count: how many measurements that mean is of.
        pending: 1 where the state's model is still to be judged, else 0.
    """

    earlier: np.float32
    score: np.float32
    count: np.float32
    pending: np.float32

    @staticmethod
    def of(state: Tensors) -> _Record:
        return _Record(*state[_VERDICT])

    @staticmethod
    def new() -> _Record:
        return _Record(np.float32(-1), _NONE, _NONE, _NONE)

    def candidate(self) -> _Record:
        """A model of the standing one is to be judged."""
        return _Record(self.earlier, self.score, self.count, _ONE)

    def back(self) -> _Record:
        """The candidate is gone; the scores are as they were."""
        return _Record(self.earlier, self.score, self.count, _NONE)

    def accepted(self, score: np.float32) -> _Record:
        """The candidate stands."""
        return _Record(self.best, score, _ONE, _NONE)

    def array(self) -> Array:
        return np.array([self.earlier, self.score, self.count, self.pending], np.float32)

    @property
    def best(self) -> np.float32:
        """The bar: the best score of any accepted model."""
        return np.float32(max(self.earlier, self.score))

    def again(self, score: np.float32) -> _Record:
        """The standing model was measured once more."""
        count = np.float32(self.count + _ONE)
        mean = np.float32(self.score + np.float32(score - self.score) / count)
        return _Record(self.earlier, mean, count, _NONE)


@dataclass(frozen=True)
class Gate:
    """The study's rule.

    Args:
        tolerance: how much score, in [0, 1], a candidate may lose against the best accepted.
        scoring: what is measured, and what of it is the score.
    """

    tolerance: float
    scoring: Scoring

    def initial(self, state: Tensors, exponents: tuple[int, ...]) -> dict[str, Array]:
        """The state before the first round: the initial model stands, unmeasured."""
        return _with(state, state, exponents, _Record.new())

    def judge(
        self, state: Tensors, exponents: tuple[int, ...], words: NDArray[np.int64]
    ) -> Verdict:
        """The state after a measurement of its model.

        Args:
            state: candidate and standing model, as `initial`, or `judge` and `moved`, left it.
            exponents: of the candidate.
            words: (M,) the summed metric words of the candidate.

        Guarantee: bit-identical wherever it is computed: a score of integers, rounded to float32
            (`Scoring.score`), then single float32 operations. A model that stands is
            never rejected by a later measurement of itself.
        """
        model, accepted = split_state(state)
        seen, score = _Record.of(state), self.scoring.score(words)
        if not seen.pending:
            after = _with(model, model, exponents, seen.again(score))
            return Verdict(after, exponents, rejected=False, score=float(score))
        if score < seen.best - np.float32(self.tolerance):
            kept = tuple(int(value) for value in state[_EXPONENTS])
            back = _with({**model, **accepted}, accepted, kept, seen.back())
            return Verdict(back, kept, rejected=True, score=float(score))
        after = _with(model, model, exponents, seen.accepted(score))
        return Verdict(after, exponents, rejected=False, score=float(score))

    def moved(self, state: Tensors, model: Tensors) -> dict[str, Array]:
        """The state once an update has made `model` of its standing one: a new candidate."""
        kept = {name: np.asarray(state[name]) for name in state if name.startswith(PREFIX)}
        kept[_VERDICT] = _Record.of(state).candidate().array()
        return {**{name: np.asarray(value) for name, value in model.items()}, **kept}


def standing(state: Tensors) -> dict[str, Array]:
    """The last accepted model, with the optimiser's slots and the statistics of its state.

    A candidate that nobody has judged yet never leaves a run, however early that ends. Without
    a gate it is the state itself.
    """
    own, accepted = split_state(state)
    return {**own, **accepted}


def split_state(state: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
    """(what is not the gate's own, the accepted model's tensors under their own names)."""
    own = {n: np.asarray(v) for n, v in state.items() if not n.startswith(PREFIX)}
    accepted = {
        name.removeprefix(_TENSOR): np.asarray(value)
        for name, value in state.items()
        if name.startswith(_TENSOR)
    }
    return own, accepted


def _with(
    state: Tensors,
    accepted: Tensors,
    exponents: tuple[int, ...],
    record: _Record,
) -> dict[str, Array]:
    """`state` with a standing model beside it. Statistics never change and are not kept twice."""
    kept = {
        _TENSOR + name: np.asarray(value)
        for name, value in accepted.items()
        if not name.startswith((STATISTICS, PREFIX))
    }
    own = {name: np.asarray(v) for name, v in state.items() if not name.startswith(PREFIX)}
    return {
        **own,
        **kept,
        _EXPONENTS: np.array(exponents, np.float32),
        _VERDICT: record.array(),
    }
