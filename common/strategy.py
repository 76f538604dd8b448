"""Server optimisers on the mean update, in numpy, with the same bits on every machine.

The coordinator and every hospital apply the signed aggregate themselves and must then agree
on the model digest. So this module uses only elementwise float32 operations whose results
IEEE 754 fixes (add, subtract, multiply, divide, square root), no float reduction, no BLAS,
nothing fused; where a sum is needed it is a sum of integers, or `math.fsum`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from common.errors import AbortedRound, Code
from common.gate import PREFIX as GATE
from common.gate import standing
from common.ports import Tensors

__all__ = [
    "CORRECTION",
    "RANGE_FLOOR",
    "RANGE_MULTIPLE",
    "OptimizerName",
    "OptimizerSettings",
    "ServerOptimizer",
    "TensorShape",
    "control",
    "initial_exponents",
    "mean_update",
    "model_tensors",
    "next_exponents",
    "released",
]

OptimizerName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"]
Array = NDArray[np.float32]

RANGE_MULTIPLE = 64
"""A tensor's quantisation range is this many root mean squares of its last mean update."""

RANGE_FLOOR = 2.0**-12
"""The smallest quantisation range: a tensor that once stood still may still move."""

CORRECTION = "correction/"
"""A hospital's own part of a state, with scaffold: what its steps' gradients are moved by."""

_SLOT_PREFIX = "optimizer/"
_AVERAGE = "average"
_COUNT = _SLOT_PREFIX + "averaged"
_SLOTS: Mapping[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedavgm": ("m",),
    "fedadam": ("m", "v"),
    "fedyogi": ("m", "v"),
    "fedadagrad": ("m", "v"),
    "scaffold": ("c",),
}
_CHUNK = 1 << 16
_EXPONENT_BOUND = 120
_SUM_BOUND = 1 << 32
_INT64_MAX = (1 << 63) - 1
_HALF_BITS = 16
_HALF_MASK = (1 << _HALF_BITS) - 1


class TensorShape(Protocol):
    """One tensor's place in the flat update: its name and shape."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        ...


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The study's `aggregation.optimizer`: which server optimiser, and its constants.

    `reach`, with scaffold: K * eta, the hospitals' steps in a round times their learning rate.

    Raises:
        ValueError: a constant lies outside its range (the study's loader refuses it first).
    """

    name: OptimizerName = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    average: float | None = None
    reach: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _SLOTS:
            raise ValueError(f"unknown server optimiser {self.name!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError("the server learning rate must be positive and finite")
        if not all(0 <= share < 1 for share in (self.momentum, self.beta1, self.beta2)):
            raise ValueError("momentum, beta1 and beta2 must lie in [0, 1)")
        if self.name == "scaffold" and not (math.isfinite(self.reach) and self.reach > 0):
            raise ValueError("scaffold needs the reach of the hospitals' steps")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError("the decay of the average must lie in (0, 1)")
        if not (math.isfinite(self.tau) and np.float32(self.tau) * np.float32(self.tau) > 0):
            raise ValueError("tau must be positive, and its square a float32")


class ServerOptimizer:
    """One of the server optimisers, as a pure function from state to state.

    The state is one flat mapping: the model's tensors under their own names, and the
    optimiser's slots under `optimizer/m/<tensor>` and `optimizer/v/<tensor>`, scaffold's global
    control variate under `optimizer/c/<tensor>`. With `average`
    the running average of the models lies under `optimizer/average/<tensor>`: what is measured
    and released (`released`). Its decay grows to `average` as min(average, (1 + t) / (10 + t)),
    so that the first models are soon forgotten.

    Guarantee: the same state and mean update give the same bits on every IEEE 754 machine.
    Source: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2 (FedAdam,
    FedYogi, FedAdagrad: no bias correction, v starts at tau squared); Hsu et al. 2019,
    "Measuring the Effects of Non-Identical Data Distribution" (FedAvgM); Karimireddy et al.
    2020, Algorithm 1, option II (SCAFFOLD): a hospital's variate changes by -c - update / (K eta),
    so the mean of the changes needs no sum of its own.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self._slots = _SLOTS[settings.name]
        self._rate = np.float32(settings.learning_rate)
        self._reach = np.float32(settings.reach)
        self._tau = np.float32(settings.tau)
        self._momentum = np.float32(settings.momentum)
        self._beta1, self._rest1 = np.float32(settings.beta1), np.float32(1.0 - settings.beta1)
        self._beta2, self._rest2 = np.float32(settings.beta2), np.float32(1.0 - settings.beta2)

    def initial(self, tensors: Tensors) -> dict[str, Array]:
        """The state before the first round: copies of the model's tensors, and fresh slots."""
        start = {"m": np.float32(0), "c": np.float32(0), "v": self._tau * self._tau}
        state = {name: _float32(value).copy() for name, value in tensors.items()}
        if any(name.startswith(_SLOT_PREFIX) for name in state):
            raise ValueError(f"a model tensor may not be named {_SLOT_PREFIX}...")
        for name in sorted(tensors):
            for slot in self._slots:
                state[_slot_name(slot, name)] = np.full(tensors[name].shape, start[slot])
            if self.settings.average is not None:
                state[_slot_name(_AVERAGE, name)] = state[name].copy()
        if self.settings.average is not None:
            state[_COUNT] = np.zeros(1, np.float32)
        return state

    def apply(self, state: Tensors, mean_update: Tensors, *, part: float = 1.0) -> dict[str, Array]:
        """The state after adding `mean_update` the optimiser's way; the inputs stay as they are.

        `part`: the survivors' part of all hospitals' weights; scaffold alone asks for it.

        Raises:
            AbortedRound: a value became infinite or not a number, or this machine's
                floating point drops subnormal numbers (its digest would differ).
            ValueError: the tensors' names or shapes do not match the state.
        """
        _require_subnormals()
        names = sorted(name for name in state if not name.startswith(_SLOT_PREFIX))
        averaging = self.settings.average is not None
        slots = (*self._slots, _AVERAGE) if averaging else self._slots
        expected = set(names) | {_slot_name(s, name) for name in names for s in slots}
        expected |= {_COUNT} if averaging else set()
        if set(state) != expected or set(mean_update) != set(names):
            raise ValueError("the mean update's tensors or the optimiser's slots do not match")
        result: dict[str, Array] = {}
        with np.errstate(all="ignore"):
            for name in names:
                moved = self._apply_one(name, state, _float32(mean_update[name]), np.float32(part))
                result.update(moved)
            if self.settings.average is not None:
                result.update(_averaged(state, result, names, np.float32(self.settings.average)))
        return result

    def _apply_one(
        self, name: str, state: Tensors, update: Array, share: np.float32
    ) -> dict[str, Array]:
        keys = [name, *(_slot_name(slot, name) for slot in self._slots)]
        if any(state[key].shape != update.shape for key in keys):
            raise ValueError("a tensor of the mean update has another shape than the state's")
        old = [_float32(state[key]).reshape(-1) for key in keys]
        new = [np.empty(update.shape, np.float32) for _ in keys]
        flat = [array.reshape(-1) for array in new]
        delta = update.reshape(-1)
        for part in _parts(delta.size):
            stepped = self._step(share, delta[part], *(array[part] for array in old))
            for target, value in zip(flat, stepped, strict=True):
                target[part] = value
                if not np.isfinite(value).all():
                    raise AbortedRound(
                        Code.MODEL_DIVERGED, f"Tensor {name} left the finite numbers."
                    )
        return dict(zip(keys, new, strict=True))

    def _step(
        self, share: np.float32, delta: Array, weights: Array, *slots: Array
    ) -> tuple[Array, ...]:
        if self.settings.name == "fedavg":
            return (weights + self._rate * delta,)
        if self.settings.name == "fedavgm":
            velocity = self._momentum * slots[0] + delta
            return weights + self._rate * velocity, velocity
        if self.settings.name == "scaffold":
            gradient: Array = slots[0] + delta / self._reach
            return weights + self._rate * delta, slots[0] - share * gradient
        first = self._beta1 * slots[0] + self._rest1 * delta
        second = self._second_moment(slots[1], delta * delta)
        root: Array = np.sqrt(second)
        step: Array = (self._rate * first) / (root + self._tau)
        return weights + step, first, second

    def _second_moment(self, second: Array, square: Array) -> Array:
        if self.settings.name == "fedadagrad":
            return second + square
        if self.settings.name == "fedyogi":
            sign: Array = np.sign(second - square)
            return second - (self._rest2 * square) * sign
        return self._beta2 * second + self._rest2 * square


def _averaged(
    state: Tensors, moved: Mapping[str, Array], names: Sequence[str], decay: np.float32
) -> dict[str, Array]:
    """The average's slots after one more model."""
    count = _float32(state[_COUNT]) + np.float32(1)
    young = (np.float32(1) + count) / (np.float32(10) + count)
    rest = np.float32(1) - np.minimum(decay, young)
    result = {_COUNT: count}
    for name in names:
        old = _float32(state[_slot_name(_AVERAGE, name)]).reshape(-1)
        new, model = np.empty_like(old), moved[name].reshape(-1)
        for part in _parts(old.size):
            new[part] = old[part] + rest * (model[part] - old[part])
        result[_slot_name(_AVERAGE, name)] = new.reshape(moved[name].shape)
    return result


def released(state: Tensors) -> dict[str, Array]:
    """The model of a state as it is measured and given away: the average, where one is kept.

    Without the optimiser's slots; statistics are part of a model.
    """
    prefix = _slot_name(_AVERAGE, "")
    averages = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    own = {n: v for n, v in state.items() if not n.startswith((_SLOT_PREFIX, GATE))}
    return {name: _float32(averages.get(name, value)) for name, value in own.items()}


def control(state: Tensors) -> dict[str, Array]:
    """Scaffold's global control variate, by tensor."""
    prefix = _slot_name("c", "")
    return {n.removeprefix(prefix): _float32(state[n]) for n in state if n.startswith(prefix)}


def model_tensors(state: Tensors) -> dict[str, Array]:
    """The model that a state leaves to the world: without the optimiser's slots.

    Where an acceptance gate watches, it is the last accepted one.
    """
    return released(standing(state))


def mean_update(
    signed_sum: NDArray[np.integer[Any]],
    shapes: Sequence[TensorShape],
    exponents: Mapping[str, int],
    weights: Sequence[float],
) -> dict[str, Array]:
    """The weighted mean of the survivors' updates, from the sum of their integers.

    Each survivor contributed round(weight * update * 2**exponent), so the mean is
    sum * 2**-exponent / sum(weights): one float64 division, rounded once to float32.

    Shapes:
        signed_sum: (d,), the tensors of `shapes` one after the other, each in C order.

    Guarantee: independent of the order of `weights` and of the machine.

    Raises:
        ValueError: the sizes do not match, or the weights do not sum to a positive number.
    """
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0):
        raise ValueError("the survivors' weights must sum to a positive number")
    means: dict[str, Array] = {}
    for shape, part in _tensor_parts(signed_sum.size, shapes):
        exponent = _checked(exponents[shape.name])
        divisor = np.float64(math.ldexp(total, exponent))
        mean = np.empty(part.stop - part.start, np.float32)
        words = signed_sum[part]
        for piece in _parts(mean.size):
            mean[piece] = words[piece].astype(np.float64) / divisor
        means[shape.name] = mean.reshape(shape.shape)
    return means


def initial_exponents(
    shapes: Sequence[TensorShape], *, limit: int, largest: float
) -> dict[str, int]:
    """The first round's quantisation exponents: every tensor has the same public range.

    Args:
        shapes: the tensors of the update.
        limit: the largest integer one site may contribute (`common.secagg.quantise`).
        largest: the largest absolute value of weight times update that must fit.
    """
    ratio = Fraction(limit) / Fraction(largest)
    exponent = _floor_log2(ratio.numerator, ratio.denominator)
    return {shape.name: _clamped(exponent) for shape in shapes}


def next_exponents(
    signed_sum: NDArray[np.integer[Any]],
    shapes: Sequence[TensorShape],
    exponents: Mapping[str, int],
    *,
    weights: Sequence[float],
    largest_weight: float,
    limit: int,
) -> dict[str, int]:
    """The next round's quantisation exponent of every tensor, from the last published sum.

    A tensor's range is `largest_weight` times 64 root mean squares of its mean update, at
    least `RANGE_FLOOR`; its exponent is floor(log2(limit / range)). All of it is integer
    and rational arithmetic, so every machine finds the same exponents.

    Args:
        signed_sum: the last aggregate, (d,) integers below 2**32 in size.
        shapes: the tensors of the update, in the order of `signed_sum`.
        exponents: the exponents that `signed_sum` was made with.
        weights: the survivors' public weights.
        largest_weight: the largest weight among the study's sites.
        limit: the largest integer one site may contribute next round.

    Source: research on ranges: with 8 instead of 64, single updates saturate at any width.
    """
    # range² = scale² * 4**-exponent * squares / count, or the floor's where that is larger.
    scale = Fraction(RANGE_MULTIPLE) * Fraction(largest_weight) / Fraction(math.fsum(weights))
    floor = Fraction(RANGE_FLOOR) * Fraction(largest_weight)
    above, below = limit * limit * scale.denominator**2, scale.numerator**2
    finest = _floor_log2(limit * limit * floor.denominator**2, floor.numerator**2)
    chosen: dict[str, int] = {}
    for shape, part in _tensor_parts(signed_sum.size, shapes):
        exponent = _checked(exponents[shape.name])
        squares = _square_sum(signed_sum[part])
        count = max(1, part.stop - part.start)
        fitting = _floor_log2(above * count, below * squares) + 2 * exponent if squares else finest
        # floor(log2(limit / range)) is half of floor(log2(limit² / range²)), rounded down.
        chosen[shape.name] = _clamped(min(fitting, finest) // 2)
    return chosen


def _square_sum(words: NDArray[np.integer[Any]]) -> int:
    """The exact sum of squares, whatever int64 holds of them."""
    total = 0
    for part in _parts(words.size):
        piece = words[part].astype(np.int64, copy=False)
        largest = max(int(piece.max(initial=0)), -int(piece.min(initial=0)))
        if largest >= _SUM_BOUND:
            raise ValueError("an aggregate of a ring up to 32 bits is below 2**32 in size")
        if largest * largest * piece.size <= _INT64_MAX:
            total += int(np.dot(piece, piece))
            continue
        # By 16-bit halves, so that no int64 product can overflow.
        high, low = piece >> _HALF_BITS, piece & _HALF_MASK
        total += int((high * high).sum()) << (2 * _HALF_BITS)
        total += int((high * low).sum()) << (_HALF_BITS + 1)
        total += int((low * low).sum())
    return total


def _floor_log2(numerator: int, denominator: int) -> int:
    """The largest integer e with 2**e <= numerator / denominator, both positive, exactly."""
    estimate = numerator.bit_length() - denominator.bit_length()
    left, right = (
        (numerator, denominator << estimate)
        if estimate >= 0
        else (numerator << -estimate, denominator)
    )
    return estimate if left >= right else estimate - 1


def _clamped(exponent: int) -> int:
    return max(-_EXPONENT_BOUND, min(_EXPONENT_BOUND, exponent))


def _checked(exponent: int) -> int:
    if abs(exponent) > _EXPONENT_BOUND:
        raise ValueError(f"a quantisation exponent lies within ±{_EXPONENT_BOUND}")
    return exponent


def _tensor_parts(size: int, shapes: Sequence[TensorShape]) -> list[tuple[TensorShape, slice]]:
    parts: list[tuple[TensorShape, slice]] = []
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape.shape)
        parts.append((shape, slice(start, stop)))
        start = stop
    if start != size:
        raise ValueError(f"the aggregate has {size} numbers, the tensors have {start}")
    return parts


def _parts(size: int) -> Iterator[slice]:
    """Pieces that stay in cache, so that temporaries cost no memory traffic."""
    for start in range(0, size, _CHUNK):
        yield slice(start, min(size, start + _CHUNK))


def _float32(value: NDArray[Any]) -> Array:
    if value.dtype != np.float32:
        raise ValueError("a model tensor is float32")
    return cast("Array", value)


def _slot_name(slot: str, name: str) -> str:
    return f"{_SLOT_PREFIX}{slot}/{name}"


def _require_subnormals() -> None:
    """Refuse a thread whose floating point flushes subnormals: some libraries switch that on."""
    smallest = np.full(1, np.finfo(np.float32).smallest_subnormal)
    if not (smallest * np.float32(1)).view(np.uint32)[0]:
        raise AbortedRound(
            Code.ARITHMETIC_FLUSHES, "This process replaces tiny numbers by zero while adding."
        )
