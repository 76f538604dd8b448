"""The coordinator's offer: its signature over one study and the roster that the study is run with.

    BUNDLE/roster.json    every enrolled site's key, numbered and signed
    BUNDLE/offer.json     the study's digest and the roster's, signed together

A hospital follows a study only under an offer of its pinned coordinator. The study keeps the keys
of this roster to its end, whatever later rosters say of a site's newer keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from common.config import Frozen
from common.crypto import labels
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ConfigError, ProtocolError
from common.invite import load_small, save_small
from common.roster import Roster, SignedRoster

__all__ = ["OFFER_FILE", "ROSTER_FILE", "Offer", "open_offer"]

OFFER_FILE: Final = "offer.json"
ROSTER_FILE: Final = "roster.json"

_HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Offer(Frozen):
    """A study and a roster, bound together by the coordinator."""

    format: Literal["wardround-offer/1"]
    study: _HexDigest
    roster: _HexDigest
    coordinator: _HexDigest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def sign(cls, key: SiteKey, study: bytes, roster_digest: bytes) -> Offer:
        """The offer of the study with this digest under the roster with that one."""
        return cls(
            format="wardround-offer/1",
            study=study.hex(),
            roster=roster_digest.hex(),
            coordinator=key.public.hex(),
            signature=key.sign(labels.OFFER, study, roster_digest).hex(),
        )

    @property
    def study_digest(self) -> bytes:
        """The study's digest."""
        return bytes.fromhex(self.study)

    @property
    def roster_digest(self) -> bytes:
        """The roster's digest."""
        return bytes.fromhex(self.roster)

    def verified(self, public: bytes, *, study: bytes, roster: bytes) -> Offer:
        """The offer itself, if `public` (pinned) signed it, for this study and this roster.

        Raises:
            ConfigError: OFFER_SIGNATURE.
        """
        parts = (self.study_digest, self.roster_digest)
        try:
            held = verify(public, bytes.fromhex(self.signature), labels.OFFER, *parts)
        except ProtocolError:
            held = False
        if not held or self.coordinator != public.hex():
            raise ConfigError(
                Code.OFFER_SIGNATURE, "The offer is not signed by the pinned coordinator."
            )
        if parts != (study, roster):
            raise ConfigError(
                Code.OFFER_SIGNATURE, "The offer is for another study or another roster."
            )
        return self

    def save(self, path: Path) -> None:
        """Write the file. Raises StorageError."""
        save_small(path, self)

    @staticmethod
    def load(path: Path) -> Offer:
        """The file at `path`; `verified` judges its signature. Raises ConfigFileError."""
        return load_small(path, Offer)


def open_offer(
    folder: Path, *, public: bytes, study: bytes, in_use: Roster | None = None
) -> SignedRoster:
    """The roster that a bundle folder offers the study `study` with.

    Guarantee: the pinned coordinator `public` signed the roster, and signed it for this study;
    it does not replace a newer one (`in_use`).

    Raises:
        ConfigError: a file is damaged; NOT_PUBLISHED, OFFER_SIGNATURE, ROSTER_SIGNATURE,
            ROSTER_ROLLBACK.
    """
    if not ((folder / ROSTER_FILE).exists() and (folder / OFFER_FILE).exists()):
        raise ConfigError(Code.NOT_PUBLISHED, "The bundle has no roster and no offer.")
    signed = SignedRoster.load(folder / ROSTER_FILE)
    roster = signed.verified(public, in_use=in_use)
    Offer.load(folder / OFFER_FILE).verified(public, study=study, roster=roster.digest())
    return signed
