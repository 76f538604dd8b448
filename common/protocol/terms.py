"""What the round machines need of a signed study: pure numbers, keys and the model's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, ProtocolError
from common.gate import Gate, Verdict, split_state
from common.ports import Tensors
from common.secagg.masking import Lane
from common.secagg.quantise import limit, to_signed
from common.statistics import PREFIX, StatisticsLayout
from common.strategy import ServerOptimizer, mean_update, next_exponents
from common.tensors import Layout

Kind = Literal["statistics", "train", "evaluate"]

UPDATE_LANE = 0
METRIC_LANE = 1
STATISTIC_LANE = 2
METRIC_BITS = 64


@dataclass(frozen=True)
class Terms:
    """The signed study as the protocol sees it; the same at every hospital and the coordinator.

    `roster` maps every party to its Ed25519 key; `quorum` is computed from the number of
    parties and the study's colluders, never taken from a message; `weights` are public
    constants in (0, 1]. `turns` counts training rounds, `rounds` is the highest round number
    (statistics, training, the final evaluation, and rounds that may burn).

    `statistics` is None where the study has no numeric features; otherwise turn 0 counts their
    `statistic_words` words before anything is trained, and the state carries their mean and
    deviation, so that everybody normalises alike. With a `gate`, every round measures the model
    it starts from, and the state carries the last accepted model, too.
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
        return array.view(np.int64) if lane.bits == METRIC_BITS else to_signed(array, lane.bits)

    def apply(
        self,
        state: Tensors,
        exponents: tuple[int, ...],
        total: NDArray[np.int64],
        survivors: tuple[str, ...],
    ) -> tuple[Tensors, tuple[int, ...]]:
        """The state and the exponents after a training round's aggregate.

        Guarantee: bit-identical wherever it is computed (common.strategy); the statistics stay
            as they are.
        """
        shapes = self.layout.specs
        named = {s.name: e for s, e in zip(shapes, exponents, strict=True)}
        weights = [self.weights[site] for site in survivors]
        update = mean_update(total, shapes, named, weights)
        following = next_exponents(
            total,
            shapes,
            named,
            weights=weights,
            largest_weight=max(self.weights.values()),
            limit=limit(self.ring_bits, len(self.roster)),
        )
        own, _ = split_state(state)
        kept = {name: value for name, value in own.items() if name.startswith(PREFIX)}
        trained = {name: value for name, value in own.items() if name not in kept}
        moved = {**self.optimizer.apply(trained, update), **kept}
        after = moved if self.gate is None else self.gate.moved(state, moved)
        return after, tuple(following[s.name] for s in shapes)

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
