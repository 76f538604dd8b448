"""The roster: which site holds which signing key, as one signed and numbered list.

Every hospital pins the roster's digest and compares it out of band, once. After that nobody,
the coordinator included, can add a hospital, drop one or exchange a key without being seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from common.config import Frozen, load
from common.crypto.digest import digest
from common.crypto.identity import SiteKey, check_public, verify
from common.errors import Code, ConfigError, ProtocolError, StorageError
from common.fields import Listed, Name
from common.ids import SiteId, is_site_id
from common.study import MAX_SITES

__all__ = ["FORMAT", "Roster", "SignedRoster"]

FORMAT: Final = "wardround-roster/1"
LABEL: Final = "wardround/v1/roster"
SIGNED_LABEL: Final = "wardround/v1/roster-signature"

_HexKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_HexSignature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class _Entry(Frozen):
    site: Name
    key: _HexKey


class _File(Frozen):
    """roster.json: JSON is YAML, so the strict loader names its mistakes by line too."""

    format: Literal["wardround-roster/1"]
    version: Annotated[int, Field(ge=1, lt=2**63)]
    sites: Annotated[Listed[_Entry], Field(min_length=1, max_length=MAX_SITES)]
    signer: _HexKey
    signature: _HexSignature


@dataclass(frozen=True)
class Roster:
    """Site ids and their Ed25519 public keys, ascending by id.

    Guarantee: ids are valid and distinct; keys are distinct canonical points, none of small
    order, so that no two names are one hospital.
    """

    version: int
    members: tuple[tuple[SiteId, bytes], ...]

    @classmethod
    def of(cls, members: Mapping[str, bytes], version: int = 1) -> Roster:
        """The roster of these sites.

        Raises:
            ConfigError: ROSTER_INVALID, naming the site.
        """
        return cls(version, tuple(sorted((SiteId(site), key) for site, key in members.items())))

    def __post_init__(self) -> None:
        if self.version < 1:
            raise _invalid(f"its version is {self.version}, and versions count from 1")
        if not 1 <= len(self.members) <= MAX_SITES:
            raise _invalid(f"it lists {len(self.members)} sites, and may list 1 to {MAX_SITES}")
        owners: dict[bytes, str] = {}
        names = [site for site, _ in self.members]
        if names != sorted(set(names)):
            raise _invalid("a site is listed twice or the sites are not in ascending order")
        for site, key in self.members:
            if not is_site_id(site):
                raise _invalid("a site has a name that is no site id")
            if key in owners:
                raise _invalid(f"{owners[key]} and {site} have the same key")
            owners[key] = site
            _check_key(site, key)

    def __contains__(self, site: object) -> bool:
        return any(site == name for name, _ in self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def sites(self) -> tuple[SiteId, ...]:
        """Every site id, ascending."""
        return tuple(site for site, _ in self.members)

    def keys(self) -> dict[SiteId, bytes]:
        """Every site's public key."""
        return dict(self.members)

    def digest(self) -> bytes:
        """What hospitals pin and compare. Source: PROTOCOL.md, roster."""
        return digest(LABEL, self.version, dict(self.members))

    def signed(self, key: SiteKey) -> SignedRoster:
        """This roster under the consortium's key."""
        return SignedRoster(self, key.public, key.sign(SIGNED_LABEL, self.digest()))


@dataclass(frozen=True)
class SignedRoster:
    """A roster with the consortium's signature, as it lies on disk."""

    roster: Roster
    signer: bytes
    signature: bytes

    def verified(self, signer: bytes, *, in_use: Roster | None = None) -> Roster:
        """The roster, if `signer` (pinned) signed it and it does not replace a newer one.

        Raises:
            ConfigError: ROSTER_SIGNATURE or ROSTER_ROLLBACK.
        """
        held = self.signer == signer and verify(
            signer, self.signature, SIGNED_LABEL, self.roster.digest()
        )
        if not held:
            raise ConfigError(
                Code.ROSTER_SIGNATURE, "The roster is not signed by the pinned consortium key."
            )
        if in_use is not None and not _may_replace(self.roster, in_use):
            raise ConfigError(
                Code.ROSTER_ROLLBACK,
                f"The roster has version {self.roster.version}; version {in_use.version} with "
                "other content is already in use.",
            )
        return self.roster

    def save(self, path: str | Path) -> None:
        """Write the roster as JSON, whole or not at all. Raises StorageError."""
        text = json.dumps(
            {
                "format": FORMAT,
                "version": self.roster.version,
                "sites": [{"site": site, "key": key.hex()} for site, key in self.roster.members],
                "signer": self.signer.hex(),
                "signature": self.signature.hex(),
            },
            indent=1,
        )
        draft = Path(f"{path}.new")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise StorageError(Code.ROSTER_WRITE, "The roster could not be written.") from None

    @classmethod
    def load(cls, path: str | Path) -> SignedRoster:
        """The file at `path`; its signature is judged by `verified`, under a pinned key.

        Raises:
            ConfigError: every mistake by line, or ROSTER_INVALID.
        """
        file = load(path, _File)
        members = {entry.site: bytes.fromhex(entry.key) for entry in file.sites}
        if len(members) != len(file.sites):
            raise _invalid("a site is listed twice")
        roster = Roster.of(members, file.version)
        return cls(roster, bytes.fromhex(file.signer), bytes.fromhex(file.signature))


def _may_replace(new: Roster, old: Roster) -> bool:
    """A higher version, or the very same roster again."""
    return new.version > old.version or new.digest() == old.digest()


def _check_key(site: str, key: bytes) -> None:
    try:
        check_public(key)
    except ProtocolError as error:
        raise _invalid(f"the key of {site} is not usable: {error.message}") from None


def _invalid(why: str) -> ConfigError:
    return ConfigError(Code.ROSTER_INVALID, f"The roster is not valid: {why}.")
