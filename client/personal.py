"""The layers of a model that stay at one hospital: its own head, its own norms.

They never leave it. The secure sum holds the other layers alone (docs/STRATEGIES.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.aside import PendingVector
from common.crypto.seal import Vault
from common.ports import Journal, Tensors
from common.tensors import Layout

__all__ = ["PersonalLayers"]

Array = NDArray[np.float32]


class PersonalLayers:
    """Keeps a hospital's own layers in its journal from round to round (`client.aside.Aside`).

    Args:
        journal: of the hospital and the study.
        vault: seals what the journal holds.
        owner: the hospital's id.
        layout: of the hospital's own tensors, p numbers.
        first: their first values, the same everywhere.

    Guarantee: as `PendingVector`. A hospital that missed the link of a round keeps the layers from
        before it. With privacy mode `local` they are what noised steps made of the first values,
        so that what later updates tell of them is post-processing.
    Source: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers"; Li et al.
        2021, "FedBN".
    """

    def __init__(
        self, journal: Journal, vault: Vault, owner: str, layout: Layout, first: Tensors
    ) -> None:
        self._kept = PendingVector(journal, vault, owner, "personal")
        self._layout = layout
        self._first = layout.flatten(first)

    def settle(self, counted: int) -> None:
        """Take over the pending layers where they are of the round `counted`; else forget them."""
        self._kept.settle(counted)

    def given(self, state: Tensors) -> dict[str, Array]:
        """This hospital's own tensors."""
        del state
        return self.own()

    def own(self) -> dict[str, Array]:
        """This hospital's own tensors, by name."""
        return self._layout.unflatten(self._value())

    def keep(self, round_number: int, state: Tensors, trained: Array) -> Array:
        """Keep the layers after a round, pending; returns the update of the common ones.

        Shapes: trained (d + p,), common tensors first; returns (d,).
        """
        del state
        common = len(trained) - self._layout.size
        self._kept.propose(round_number, self._value() + trained[common:])
        return trained[:common]

    def _value(self) -> Array:
        kept = self._kept.value()
        return self._first if kept is None else kept
