"""What the coordinator remembers across a crash, and the blobs it keeps beside that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.crypto.digest import encode, flat_view
from common.crypto.mask import Words
from common.protocol.codec import DIGEST, ROUND, SITE, dump_record, mapping, record, sequence, text
from common.protocol.wire import SIGNED, Ready, Signed, Table
from common.secagg.masking import Lane

READY_BLOB, SUM_BLOB = "ready", "sums"
READIES = mapping(record(Ready))


@dataclass(frozen=True, slots=True)
class CoordinatorRecord:
    """What the coordinator must remember across a crash. It holds no secret of any site."""

    study: bytes
    run: bytes
    epoch: int
    members: tuple[str, ...]
    transcript: bytes
    round: int
    phase: str
    version: int
    receipts: dict[str, Signed]
    agreements: dict[str, Signed]
    burns: tuple[Signed, ...]
    aborted: int
    uncertified: int
    convicted: tuple[str, ...]
    spent: dict[str, Signed]
    ended: str

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("members", sequence(SITE)),
        ("transcript", DIGEST),
        ("round", ROUND),
        ("phase", text(16)),
        ("version", ROUND),
        ("receipts", mapping(SIGNED)),
        ("agreements", mapping(SIGNED)),
        ("burns", sequence(SIGNED, 65536)),
        ("aborted", ROUND),
        ("uncertified", ROUND),
        ("convicted", sequence(SITE)),
        ("spent", mapping(SIGNED)),
        ("ended", text(16)),
    )

    @staticmethod
    def fresh(study: bytes, run: bytes) -> CoordinatorRecord:
        """The record of a run that has not begun."""
        none = bytes(32)
        return CoordinatorRecord(study, run, 0, (), none, 0, "new", 0, {}, {}, (), 0, 0, (), {}, "")

    def dump(self) -> bytes:
        """Canonical bytes."""
        return encode(dump_record(self))


def chain_blobs(version: int) -> tuple[str, str]:
    """Where the link of a completed round and the state it trained from are kept."""
    return f"link-{version}", f"base-{version}"


def load_sums(lanes: tuple[Lane, ...], data: bytes) -> list[Words]:
    """The accumulators that were kept when the uploads were closed."""
    sums = [lane.zeros() for lane in lanes]
    start = 0
    for total in sums:
        flat_view(total)[:] = data[start : start + total.nbytes]
        start += total.nbytes
    return sums
