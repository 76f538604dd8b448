"""What the coordinator's machine asks its driver to do, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import Code
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.transcript import Chain


@dataclass(frozen=True, slots=True)
class SendTo:
    """Hand bytes for one site to the transport."""

    site: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class SendEach:
    """Hand the transport a message for each of some sites, made only when it is.

    Such a message is as large as the model, and is made of blobs that earlier effects put.
    """

    messages: Callable[[], Iterable[tuple[str, bytes]]]


@dataclass(frozen=True, slots=True)
class Completed:
    """A round ended in an aggregate; `metrics` are the summed words of the model before it."""

    round: int
    turn: int
    kind: str
    cohort: tuple[str, ...]
    survivors: tuple[str, ...]
    bytes_up: int
    metrics: NDArray[np.int64] | None
    rejected: bool = False


@dataclass(frozen=True, slots=True)
class Aborted:
    """A round ended without an aggregate."""

    round: int
    code: Code
    phase: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOver:
    """The run is complete: the final chain."""

    chain: Chain


Effect = Persist | PutBlob | DropBlob | SendTo | SendEach | Note | Completed | Aborted | RunOver
