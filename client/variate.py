"""SCAFFOLD's control variate of one hospital: its mean gradient in the last round that counted.

It never leaves the hospital. What the federation needs of it is the mean of its changes, and with
the paper's option II that mean follows from the mean update and the global variate, which everybody
has: so the secure sum carries nothing more than an update (docs/STRATEGIES.md).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.crypto.seal import Vault
from common.ports import Journal, Tensors
from common.strategy import CORRECTION, OptimizerSettings, control
from common.tensors import Layout

__all__ = ["ControlVariate"]

Array = NDArray[np.float32]

_SETTLED: Final = "variate"
_PENDING: Final = "variate-next"
_ROUND_BYTES: Final = 8


class ControlVariate:
    """Keeps the variate c_i in the hospital's journal, sealed, from round to round.

    A round's new variate is pending until a certified link says that the round's sum holds this
    hospital's update; until then, and where it does not, the old one stays.

    Args:
        journal: of the hospital and the study.
        vault: seals what the journal holds.
        owner: the hospital's id.
        layout: the model's.
        settings: of the server's optimiser.

    Guarantee: durable before the update that it belongs to leaves the hospital. A hospital that
        missed the link of a round keeps the variate from before it: its steps are corrected by an
        older gradient, and nothing else is wrong.
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
        self._journal, self._vault, self._owner = journal, vault, owner
        self._layout = layout
        self._reach = np.float32(settings.reach)

    def settle(self, counted: int) -> None:
        """Take over the pending variate where it is of the round `counted`; else forget it."""
        pending = self._journal.get_blob(_PENDING)
        if pending is None:
            return
        number, value = self._opened(_PENDING, pending)
        if number == counted:
            self._put(_SETTLED, number, value)
        self._journal.drop_blob(_PENDING)

    def correction(self, state: Tensors) -> dict[str, Array]:
        """What every local step's gradient is moved by: c - c_i, by tensor."""
        moved = self._global(state) - self._own()
        named = self._layout.unflatten(moved)
        return {CORRECTION + name: value for name, value in named.items()}

    def propose(self, round_number: int, state: Tensors, update: Array) -> None:
        """Keep the variate after an update, pending: c_i - c - update / (K eta)."""
        value = self._own() - self._global(state) - update / self._reach
        self._put(_PENDING, round_number, value)

    def _global(self, state: Tensors) -> Array:
        return self._layout.flatten(control(state))

    def _own(self) -> Array:
        kept = self._journal.get_blob(_SETTLED)
        if kept is None:
            return np.zeros(self._layout.size, np.float32)
        return self._opened(_SETTLED, kept)[1]

    def _put(self, name: str, number: int, value: Array) -> None:
        plain = number.to_bytes(_ROUND_BYTES, "big") + value.astype("<f4").tobytes()
        self._journal.put_blob(name, (self._vault.seal(plain, self._place(name)),))

    def _opened(self, name: str, sealed: bytes) -> tuple[int, Array]:
        """(round, value). Raises StorageError where the blob is not this place's."""
        plain = self._vault.open(sealed, self._place(name))
        value = np.frombuffer(plain, "<f4", offset=_ROUND_BYTES).astype(np.float32)
        return int.from_bytes(plain[:_ROUND_BYTES], "big"), value

    def _place(self, name: str) -> bytes:
        return f"{self._owner}/{name}".encode()
