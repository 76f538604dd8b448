"""What a hospital remembers across a crash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from client.round.shares import OPEN_SHARES
from common.crypto.digest import decode, encode
from common.protocol.codec import (
    DIGEST,
    ROUND,
    SITE,
    dump_record,
    load_record,
    mapping,
    octets,
    record,
    sequence,
    text,
)
from common.protocol.wire import Table, Witness


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What a hospital must remember across a crash; sealed at rest.

    Holds pair keys (ratcheted once per round), the shares received for the open round, and
    what was signed. Never: b, e, pair seeds, ephemeral keys, the update, noise, the sample.
    """

    study: bytes
    run: bytes
    epoch: int
    transcript: bytes
    keys: dict[str, bytes]
    ratchet: int
    round: int
    stage: str
    header: bytes
    participants: bytes
    cohort: tuple[str, ...]
    shares: dict[str, bytes]
    survivors: bytes
    survivor_set: tuple[str, ...]
    sent: dict[str, bytes]
    version: int
    prev: bytes
    attempted: bytes
    attempts: tuple[int, ...]
    agreed: dict[str, bytes]
    burned: tuple[int, ...]
    burns: int
    witnessed: dict[str, Witness]
    ended: str
    confirmed: int

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("transcript", DIGEST),
        ("keys", mapping(octets(32, 32))),
        ("ratchet", ROUND),
        ("round", ROUND),
        ("stage", text(16)),
        ("header", DIGEST),
        ("participants", DIGEST),
        ("cohort", sequence(SITE)),
        ("shares", mapping(octets(OPEN_SHARES, OPEN_SHARES))),
        ("survivors", DIGEST),
        ("survivor_set", sequence(SITE)),
        ("sent", mapping(octets(1, 2**24), text(16))),
        ("version", ROUND),
        ("prev", DIGEST),
        ("attempted", DIGEST),
        ("attempts", sequence(ROUND, 4096)),
        ("agreed", mapping(DIGEST, text(16), 4096)),
        ("burned", sequence(ROUND, 2**20)),
        ("burns", ROUND),
        ("witnessed", mapping(record(Witness))),
        ("ended", text(16)),
        ("confirmed", ROUND),
    )

    @staticmethod
    def fresh(study: bytes) -> SiteRecord:
        """The record of a site that has not begun."""
        none = bytes(32)
        return SiteRecord(
            study,
            none,
            0,
            none,
            {},
            0,
            0,
            "idle",
            none,
            none,
            (),
            {},
            none,
            (),
            {},
            0,
            none,
            none,
            (),
            {},
            (),
            0,
            {},
            "",
            0,
        )

    def dump(self) -> bytes:
        """Canonical bytes."""
        return encode(dump_record(self))

    @staticmethod
    def load(data: bytes) -> SiteRecord:
        """The record in `data`; a damaged one is a bug or a broken seal, and surfaces."""
        return load_record(SiteRecord, decode(data, max_bytes=2**28, max_items=2**22))
