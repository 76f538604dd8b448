"""What a hospital's machine asks its driver to do, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.ports import Tensors
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.transcript import Chain
from common.protocol.wire import Witness

UPLOAD_BLOB = "upload"


@dataclass(frozen=True, slots=True)
class SendBlob:
    """Send the kept bytes again."""

    name: str


@dataclass(frozen=True, slots=True)
class Send:
    """Hand the bytes to the transport."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Check approval, reserve the budget, count, train and measure; then call `worked`.

    `counted`: the round of the last link, where its sum holds this site's update; else 0.
    """

    round: int
    turn: int
    state: Tensors
    trains: bool
    measures: bool
    counts: bool = False
    counted: int = 0


@dataclass(frozen=True, slots=True)
class Worked:
    """What the work gave.

    Shapes: update (d,), words with joint privacy; metric words (m,); statistic words (s,).
    """

    update: NDArray[np.float32] | NDArray[np.int32] | None
    metrics: NDArray[np.int64] | None
    ledger: Witness = field(default_factory=lambda: Witness(0, bytes(32)))
    statistics: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Record in the ledger that this round's update is about to leave."""

    round: int


@dataclass(frozen=True, slots=True)
class Final:
    """The run is over and this is the model."""

    chain: Chain


Effect = Persist | PutBlob | SendBlob | DropBlob | Send | Work | Release | Final | Note
