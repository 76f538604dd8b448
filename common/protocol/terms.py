"""What the round machines need of a signed study: pure numbers, keys and the model's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, ProtocolError
from common.gate import PREFIX as STANDING
from common.gate import Gate, Verdict
from common.ports import Tensors
from common.secagg.masking import Lane
from common.secagg.quantise import limit, to_signed
from common.statistics import PREFIX, StatisticsLayout
from common.strategy import ServerOptimizer, mean_update, next_exponents
from common.tensors import Layout, LazyTensors

Kind = Literal["statistics", "train", "evaluate"]

UPDATE_LANE = 0
METRIC_LANE = 1
STATISTIC_LANE = 2
METRIC_BITS = 64


@dataclass(frozen=True)
class _SignedWords:
    """Words of a ring as signed integers, made piece by piece: in int64 they are two models.

    As much of an array as `common.strategy` uses of an aggregate.
    """

    words: NDArray[np.uint32]
    bits: int

    @property
    def size(self) -> int:
        return self.words.size

    def __getitem__(self, part: slice) -> _SignedWords:
        return _SignedWords(self.words[part], self.bits)

    def astype(self, kind: type[np.generic], *, copy: bool = True) -> NDArray[Any]:
        return to_signed(self.words, self.bits).astype(kind, copy=copy)


@dataclass(frozen=True)
class Terms:
    """The signed study as the protocol sees it; the same at every hospital and the coordinator.

    `roster` maps every party to its Ed25519 key; `quorum` is computed from the number of
    parties and the study's colluders, never taken from a message; `weights` are public
    constants in (0, 1]. `turns` counts training rounds, `rounds` is the highest round number
    (statistics, training, the final evaluation, and rounds that may burn).

    `statistics` is None where the study has no numeric features; otherwise turn 0 counts their
    `statistic_words` words before anything is trained, and the state carries their mean and
    deviation, so that everybody normalises alike. `joint`: updates are words that already carry
    a share of the noise, and their grid never changes. With a `gate`, every round measures the
    model it starts from, and the state carries the last accepted model, too.
    """

    study: bytes
    roster: Mapping[str, bytes]
    quorum: int
    weights: Mapping[str, float]
    layout: Layout
    ring_bits: int
    metric_words: int
    initial: Tensors
    exponents: tuple[int, ...]
    optimizer: ServerOptimizer
    turns: int
    evaluate_every: int
    rounds: int
    private: bool
    burns_tolerated: int
    statistic_words: int = 0
    statistics: StatisticsLayout | None = None
    gate: Gate | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        counted = 0 if self.statistics is None else self.statistics.words
        if self.statistic_words != counted:
            raise ValueError("the statistics' words are not those of their layout")

    @property
    def first_turn(self) -> int:
        """The turn of the first round: 0 where statistics are counted before training."""
        return 0 if self.statistic_words else 1

    @property
    def parties(self) -> tuple[str, ...]:
        """Every site of the study, sorted: a site's Shamir point is its index plus one."""
        return tuple(sorted(self.roster))

    @property
    def colluders(self) -> int:
        """How many colluding parties the quorum withstands."""
        return min(2 * self.quorum - len(self.roster) - 1, self.quorum - 2)

    def point(self, site: str) -> int:
        """The site's Shamir x-coordinate."""
        return self.parties.index(site) + 1

    def kind(self, turn: int) -> Kind:
        """What the round of this turn is: training until `turns`, then one evaluation.

        Turn 0, where there is one, counts the statistics.
        """
        if turn == 0:
            return "statistics"
        return "train" if turn <= self.turns else "evaluate"

    def measures(self, turn: int) -> bool:
        """Whether the round of this turn carries metrics of the model it starts from."""
        if turn > self.turns or (self.gate is not None and turn > 0):
            return True
        return turn > 1 and (turn - 1) % self.evaluate_every == 0

    def lanes(self, turn: int) -> tuple[Lane, ...]:
        """The lanes of the upload of this turn."""
        if self.kind(turn) == "statistics":
            return (Lane(STATISTIC_LANE, METRIC_BITS, self.statistic_words),)
        lanes = []
        if self.kind(turn) == "train":
            lanes.append(Lane(UPDATE_LANE, self.ring_bits, self.layout.size))
        if self.measures(turn):
            lanes.append(Lane(METRIC_LANE, METRIC_BITS, self.metric_words))
        return tuple(lanes)

    def upload_bytes(self) -> int:
        """A bound on the size of any message that carries a model or an upload."""
        slots = sum(value.size for value in self.initial.values())
        words = self.metric_words + self.statistic_words
        return 2**22 + 4 * slots + 12 * self.layout.size + 16 * words

    def checked_sum(
        self, lane: Lane, words: memoryview | bytes
    ) -> NDArray[np.uint32] | NDArray[np.uint64]:
        """A lane's published aggregate as the lane's words.

        Raises ProtocolError where it is not the one form of that sum: length, and no bit above
        the ring.
        """
        array = np.frombuffer(words, lane.word) if len(words) % lane.word.itemsize == 0 else None
        if array is None or array.size != lane.length:
            raise ProtocolError(Code.LINK_MALFORMED, "A link's aggregate has the wrong length.")
        if lane.bits < 8 * lane.word.itemsize and array.size and int(array.max()) >> lane.bits:
            raise ProtocolError(Code.LINK_MALFORMED, "A link's aggregate is not in the ring.")
        return array

    def signed_sum(self, lane: Lane, words: memoryview | bytes) -> NDArray[np.int64]:
        """A lane's published aggregate as signed integers. Raises as `checked_sum`."""
        array = self.checked_sum(lane, words)
        if lane.bits == METRIC_BITS:
            return array.view(np.int64)
        return cast("NDArray[np.int64]", _SignedWords(array.view(np.uint32), lane.bits))

    def apply(
        self,
        state: Tensors,
        exponents: tuple[int, ...],
        total: NDArray[np.int64],
        survivors: tuple[str, ...],
    ) -> tuple[Tensors, tuple[int, ...]]:
        """The state and the exponents after a training round's aggregate.

        Guarantee: bit-identical wherever it is computed (common.strategy); the statistics stay
            as they are. What is in memory beside both states is of one tensor at a time.
        """
        shapes = self.layout.specs
        named = {s.name: e for s, e in zip(shapes, exponents, strict=True)}
        weights = [self.weights[site] for site in survivors]
        places = dict(zip((s.name for s in shapes), self.layout.places, strict=True))
        specs = {s.name: s for s in shapes}

        def mean_of(name: str) -> NDArray[np.float32]:
            return mean_update(total[places[name]], [specs[name]], named, weights)[name]

        following = named if self.joint else self._following(total, named, weights)
        kept = {name: np.asarray(state[name]) for name in state if name.startswith(PREFIX)}
        apart = (PREFIX, STANDING)
        trained = [name for name in state if not name.startswith(apart)]
        model = LazyTensors(trained, state.__getitem__)
        update = LazyTensors(places, mean_of)
        part = math.fsum(weights) / math.fsum(self.weights.values())
        moved = {**self.optimizer.apply(model, update, part=part), **kept}
        after = moved if self.gate is None else self.gate.moved(state, moved)
        return after, tuple(following[s.name] for s in shapes)

    def _following(
        self, total: NDArray[np.int64], named: Mapping[str, int], weights: Sequence[float]
    ) -> dict[str, int]:
        return next_exponents(
            total,
            self.layout.specs,
            named,
            weights=weights,
            largest_weight=max(self.weights.values()),
            limit=limit(self.ring_bits, len(self.roster)),
        )

    def judge(
        self, state: Tensors, exponents: tuple[int, ...], words: NDArray[np.int64]
    ) -> Verdict | None:
        """What the gate says of the state's model, measured as `words`; None without a gate."""
        return None if self.gate is None else self.gate.judge(state, exponents, words)

    def count(self, state: Tensors, total: NDArray[np.int64], sites: int) -> Tensors:
        """The state after the statistics of `sites` survivors; nothing else of it changes.

        Guarantee: bit-identical wherever it is computed (common.statistics).
        """
        if self.statistics is None:
            raise AssertionError("a study without numeric features has no statistics round")
        return {**state, **self.statistics.resolve(total, sites)}
