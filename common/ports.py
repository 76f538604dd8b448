"""The five seams between pure code and the world: Clock, Entropy, Transport, Journal, Trainer.

Deployment, simulation and the fault schedules run the same round code and differ only in
what they plug in here (ARCHITECTURE.md, "One code path").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:  # numpy's import is a sixth of what a verb without tensors costs
    import numpy as np
    from numpy.typing import NDArray

Tensors: TypeAlias = "Mapping[str, NDArray[np.float32]]"


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never goes back while the process lives."""
        ...


class Entropy(Protocol):
    """Where secrets come from."""

    def take(self, count: int) -> bytes:
        """`count` bytes that nobody else can predict."""
        ...


class Transport(Protocol):
    """Carries sealed envelopes between the coordinator and the sites."""

    def send(self, recipient: str, payload: bytes) -> None:
        """Hand `payload` over for delivery; delivery may fail, repeat or come late."""
        ...


class Journal(Protocol):
    """Durable state of one party: the last record stored, and named blobs.

    Guarantee: when `store` or a durable `put_blob` returns, a crash or a power cut at any later
    moment leaves exactly that record or blob; one before it returns leaves the old or the new
    one. A record of a grouped journal is durable once its group has settled, which comes before
    anything that was sent is delivered. A blob that is not durable survives the process, but
    perhaps not a power cut.
    """

    def load(self) -> bytes | None:
        """The last durable record, or None where there is none."""
        ...

    def store(self, record: bytes) -> None:
        """Make `record` the last durable record. Raises StorageError, keeping the old one."""
        ...

    def put_blob(
        self, name: str, parts: Iterable[bytes | memoryview], *, durable: bool = True
    ) -> None:
        """Write the concatenation of `parts` under `name`, replacing what was there."""
        ...

    def get_blob(self, name: str) -> bytes | None:
        """The blob called `name`, or None."""
        ...

    def drop_blob(self, name: str) -> None:
        """Forget the blob called `name`; no error where there is none."""
        ...


class Trainer(Protocol):
    """Turns a hospital's records into numbers; the only port that sees a record."""

    def train(self, state: Tensors, round_number: int) -> NDArray[np.float32] | NDArray[np.int32]:
        """The local update after training from `state`, flat, tensors by name.

        Shapes: (d,) float32; with joint privacy (d,) int32, on the study's grid and with this
            site's share of the noise; with layers of the site's own (d + p,), theirs last.
        """
        ...

    def measure(self, state: Tensors, round_number: int) -> NDArray[np.int64]:
        """The metric words of `state` on held-out patients: (m,) int64, noised under DP."""
        ...

    def statistics(self) -> NDArray[np.int64]:
        """The statistic words of the training patients: (s,) int64, noised under DP.

        Asked only where the study has numeric features.
        """
        ...
