"""What a hospital keeps for itself from round to round, beside the common model.

It follows the rounds that counted: what a round made is pending until a certified link says that
the round's sum holds this hospital's update.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.crypto.seal import Vault
from common.ports import Journal, Tensors

__all__ = ["Aside", "PendingVector"]

Array = NDArray[np.float32]

_ROUND_BYTES: Final = 8


class Aside(Protocol):
    """What a strategy has every hospital keep: control variates, or layers of its own."""

    def settle(self, counted: int) -> None:
        """Take over what the round `counted` made, where it is pending; else forget it."""
        ...

    def given(self, state: Tensors) -> Tensors:
        """What training is given beside the state."""
        ...

    def own(self) -> Tensors:
        """Tensors of the model that are this hospital's alone."""
        ...

    def keep(self, round_number: int, state: Tensors, trained: Array) -> Array:
        """Keep a round's part of what was trained, pending; returns the update to send."""
        ...


class PendingVector:
    """A vector in the hospital's journal, sealed; its next value waits for its round to count.

    Args:
        journal: of the hospital and the study.
        vault: seals what the journal holds.
        owner: the hospital's id.
        name: of the blob; the pending one is called `NAME-next`.

    Guarantee: durable before the update that it belongs to leaves the hospital. A hospital that
        missed the link of a round keeps the value from before it.
    """

    def __init__(self, journal: Journal, vault: Vault, owner: str, name: str) -> None:
        self._journal, self._vault, self._owner = journal, vault, owner
        self._settled, self._pending = name, f"{name}-next"

    def settle(self, counted: int) -> None:
        """Take over the pending value where it is of the round `counted`; else forget it."""
        pending = self._journal.get_blob(self._pending)
        if pending is None:
            return
        number, value = self._opened(self._pending, pending)
        if number == counted:
            self._put(self._settled, number, value)
        self._journal.drop_blob(self._pending)

    def value(self) -> Array | None:
        """The settled value, or None before the first one."""
        kept = self._journal.get_blob(self._settled)
        return None if kept is None else self._opened(self._settled, kept)[1]

    def propose(self, round_number: int, value: Array) -> None:
        """Keep a round's value, pending."""
        self._put(self._pending, round_number, value)

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
