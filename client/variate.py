"""SCAFFOLD's control variate of one hospital: its mean gradient in the last round that counted.

It never leaves the hospital. What the federation needs of it is the mean of its changes, and with
the paper's option II that mean follows from the mean update and the global variate, which everybody
has: so the secure sum carries nothing more than an update (docs/STRATEGIES.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.aside import PendingVector
from common.crypto.seal import Vault
from common.ports import Journal, Tensors
from common.strategy import CORRECTION, OptimizerSettings, control
from common.tensors import Layout

__all__ = ["ControlVariate"]

Array = NDArray[np.float32]


class ControlVariate:
    """Keeps the variate c_i in the hospital's journal from round to round (`client.aside.Aside`).

    Args:
        journal: of the hospital and the study.
        vault: seals what the journal holds.
        owner: the hospital's id.
        layout: the model's.
        settings: of the server's optimiser.

    Guarantee: as `PendingVector`. A hospital that missed the link of a round has its steps
        corrected by an older gradient, and nothing else is wrong.
    Source: Karimireddy et al. 2020, "SCAFFOLD", Algorithm 1, option II.
    """

    def __init__(
        self,
        journal: Journal,
        vault: Vault,
        owner: str,
        layout: Layout,
        settings: OptimizerSettings,
    ) -> None:
        self._kept = PendingVector(journal, vault, owner, "variate")
        self._layout = layout
        self._reach = np.float32(settings.reach)

    def settle(self, counted: int) -> None:
        """Take over the pending variate where it is of the round `counted`; else forget it."""
        self._kept.settle(counted)

    def given(self, state: Tensors) -> dict[str, Array]:
        """What every local step's gradient is moved by: c - c_i, by tensor."""
        moved = self._global(state) - self._own()
        named = self._layout.unflatten(moved)
        return {CORRECTION + name: value for name, value in named.items()}

    def own(self) -> dict[str, Array]:
        """Nothing: the model is everybody's."""
        return {}

    def keep(self, round_number: int, state: Tensors, trained: Array) -> Array:
        """Keep the variate after an update, pending: c_i - c - update / (K eta)."""
        value = self._own() - self._global(state) - trained / self._reach
        self._kept.propose(round_number, value)
        return trained

    def _global(self, state: Tensors) -> Array:
        return self._layout.flatten(control(state))

    def _own(self) -> Array:
        kept = self._kept.value()
        return np.zeros(self._layout.size, np.float32) if kept is None else kept
