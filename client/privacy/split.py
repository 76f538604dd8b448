"""Which patients are held out from training, for ever."""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

__all__ = ["HeldOutSplit"]

_SPLIT_LABEL = b"wardround/ledger/split/1\x00"


@dataclass(frozen=True, slots=True)
class HeldOutSplit:
    """Which patients are held out: a fixed keyed hash of the patient's identifier.

    Guarantee: whether a patient is held out depends on his identifier and the key alone, not
    on any other patient or record; `identity` names the pair of disjoint sets without
    revealing the key.
    """

    key: bytes
    fraction: float

    @property
    def identity(self) -> str:
        """The split's name in ledger rows: 64 hex digits."""
        fraction = struct.pack(">d", self.fraction)
        return hashlib.sha256(_SPLIT_LABEL + self.key + fraction).hexdigest()

    def holds_out(self, patient: str) -> bool:
        """Whether this patient is held out from training."""
        digest = hmac.digest(self.key, patient.encode(), "sha256")
        return int.from_bytes(digest[:8], "big") < int(self.fraction * 2.0**64)
