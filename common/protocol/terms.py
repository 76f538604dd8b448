"""What the round machines need of a signed study: pure numbers, keys and the model's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import Code, ProtocolError
from common.ports import Tensors
from common.secagg.masking import Lane
from common.secagg.quantise import limit, to_signed
from common.strategy import ServerOptimizer, mean_update, next_exponents
from common.tensors import Layout

Kind = Literal["train", "evaluate"]

UPDATE_LANE = 0
METRIC_LANE = 1
METRIC_BITS = 64


@dataclass(frozen=True)
class Terms:
    """The signed study as the protocol sees it; the same at every hospital and the coordinator.

    `roster` maps every party to its Ed25519 key; `quorum` is computed from the number of
    parties and the study's colluders, never taken from a message; `weights` are public
    constants in (0, 1]. `turns` counts training rounds, `rounds` is the highest round number
    (training, the final evaluation, and rounds that may burn).
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

    @property
    def parties(self) -> tuple[str, ...]:
        """Every site of the study, sorted: a site's Shamir point is its index plus one."""
        return tuple(sorted(self.roster))

    def point(self, site: str) -> int:
        """The site's Shamir x-coordinate."""
        return self.parties.index(site) + 1

    def kind(self, turn: int) -> Kind:
        """What the round of this turn is: training until `turns`, then one evaluation."""
        return "train" if turn <= self.turns else "evaluate"

    def measures(self, turn: int) -> bool:
        """Whether the round of this turn carries metrics of the model it starts from."""
        if turn > self.turns:
            return True
        return turn > 1 and (turn - 1) % self.evaluate_every == 0

    def lanes(self, turn: int) -> tuple[Lane, ...]:
        """The lanes of the upload of this turn."""
        lanes = []
        if self.kind(turn) == "train":
            lanes.append(Lane(UPDATE_LANE, self.ring_bits, self.layout.size))
        if self.measures(turn):
            lanes.append(Lane(METRIC_LANE, METRIC_BITS, self.metric_words))
        return tuple(lanes)

    def upload_bytes(self) -> int:
        """A bound on the size of any message that carries a model or an upload."""
        slots = sum(value.size for value in self.initial.values())
        return 2**22 + 4 * slots + 12 * self.layout.size + 16 * self.metric_words

    def signed_sum(self, lane: Lane, words: memoryview | bytes) -> NDArray[np.int64]:
        """A lane's published aggregate as signed integers. Raises ProtocolError on wrong length."""
        kind = "<u8" if lane.bits == METRIC_BITS else "<u4"
        if len(words) != lane.length * np.dtype(kind).itemsize:
            raise ProtocolError(Code.LINK_MALFORMED, "A link's aggregate has the wrong length.")
        array = np.frombuffer(words, kind)
        if lane.bits == METRIC_BITS:
            return array.view(np.int64)
        return to_signed(array, lane.bits)

    def apply(
        self,
        state: Tensors,
        exponents: tuple[int, ...],
        total: NDArray[np.int64],
        survivors: tuple[str, ...],
    ) -> tuple[Tensors, tuple[int, ...]]:
        """The state and the exponents after a training round's aggregate.

        Guarantee: bit-identical wherever it is computed (common.strategy).
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
        return self.optimizer.apply(state, update), tuple(following[s.name] for s in shapes)
