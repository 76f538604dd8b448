"""Enrolment on the hospital's side: pins the coordinator, makes the keys, answers the invite.

    coordinator.json   whom this hospital follows: address, key, its own site id; and ca.crt
    identity.key       signs what this hospital says; identity-N.key are earlier ones
    transport.key      what its connection is known by; transport-N.key likewise
    vault.key          seals its journals at rest

The coordinator is pinned before a key is made. So nobody who wants to pose as the coordinator
knows the hospital's keys in time to look for words that would fit both sides.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.address import Address
from common.config import Frozen
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError
from common.fields import Name, Text
from common.invite import (
    HexKey,
    Invite,
    Join,
    Moment,
    Version,
    load_small,
    new_transport,
    save_small,
)
from common.keys import key_file, secret_file
from common.ports import Entropy
from common.world import make_folder, write_durably

__all__ = [
    "Joined",
    "Pinned",
    "join",
    "key_of",
    "pinned",
    "rotate",
    "transport_keys",
]

IDENTITY, TRANSPORT = "identity", "transport"
PIN_FILE: Final = "coordinator.json"
CA_FILE: Final = "ca.crt"
VAULT_FILE: Final = "vault.key"
_SEED_BYTES: Final = 32


class _Pin(Frozen):
    """coordinator.json."""

    format: Literal["wardround-pinned/1"]
    consortium: Text
    coordinator: HexKey
    url: Address
    site: Name
    name: Text
    version: Version
    issued: Moment


@dataclass(frozen=True)
class Pinned:
    """Whom this hospital follows, and as whom.

    Attributes:
        url: `host:port` to dial.
        coordinator: the coordinator's Ed25519 public key.
        site, name: this hospital.
        ca: the file of the one certificate authority that is trusted.
        consortium: what the consortium calls itself.
        version: which pair of keys this hospital last made.
        issued: when the invite was made that all of this comes from.
    """

    url: str
    coordinator: bytes
    site: str
    name: str
    ca: Path
    consortium: str
    version: int
    issued: int


@dataclass(frozen=True)
class Joined:
    """What a join or a rotation gives: the file to send back, and whether keys were made."""

    answer: Join
    fresh: bool


def pinned(state: Path) -> Pinned:
    """Whom the hospital with this state folder follows.

    Raises:
        ConfigError: NOT_ENROLLED, or the file is damaged.
    """
    path = state / PIN_FILE
    if not path.exists():
        raise ConfigError(Code.NOT_ENROLLED, f"{state}: no consortium has been joined here.")
    pin = load_small(path, _Pin)
    return Pinned(
        pin.url,
        bytes.fromhex(pin.coordinator),
        pin.site,
        pin.name,
        state / CA_FILE,
        pin.consortium,
        pin.version,
        pin.issued,
    )


def join(state: Path, invite: Invite, *, now: int, entropy: Entropy) -> Joined:
    """Follow an invite: pin its coordinator, make the keys that are not there, answer it.

    Again with the same invite is harmless and gives the same keys; a newer invite of the same
    coordinator may bring another address or CA.

    Raises:
        ProtocolError: INVITE_SIGNATURE, COORDINATOR_CHANGED.
        ConfigError: INVITE_EXPIRED, INVITE_STALE, SITE_MISMATCH, INVITE_OTHER_STEP.
        StorageError: KEYS_UNPINNED, KEY_FILE_OPEN, or the disk.
    """
    invite.verified(now)
    make_folder(state, mode=0o700)
    if (state / PIN_FILE).exists():
        present = _follows(state, invite)
        if invite.version != present.version:
            raise ConfigError(
                Code.INVITE_OTHER_STEP,
                f"{state}: this hospital has keys already, and the invite asks for new ones.",
            )
    elif (state / f"{IDENTITY}.key").exists() or (state / f"{TRANSPORT}.key").exists():
        raise StorageError(Code.KEYS_UNPINNED, f"{state}: there are keys, but no coordinator.json.")
    _pin(state, invite)
    fresh = not (state / f"{TRANSPORT}.key").exists()
    identity = SiteKey.from_seed(secret_file(state / f"{IDENTITY}.key", entropy))
    secret_file(state / VAULT_FILE, entropy)
    if fresh:
        _write_transport(state / f"{TRANSPORT}.key")
    return Joined(Join.make(invite, identity, _transport(state / f"{TRANSPORT}.key")), fresh)


def rotate(state: Path, invite: Invite, *, now: int, entropy: Entropy) -> Joined:
    """Make new keys beside the present ones, and answer the invite that asks for them.

    The old keys stay under their number: studies that began under them end under them, and the
    connection goes on under the old one until the coordinator admits the new.

    Guarantee: a crash at any moment, then the same invite again, gives one new pair and loses
    neither the old one nor the new.

    Raises:
        ProtocolError: INVITE_SIGNATURE, COORDINATOR_CHANGED.
        ConfigError: INVITE_EXPIRED, INVITE_STALE, SITE_MISMATCH, NOT_ENROLLED, INVITE_OTHER_STEP.
        StorageError: KEY_FILE_OPEN, or the disk.
    """
    invite.verified(now)
    pinned(state)
    present = _follows(state, invite)
    if invite.version < max(2, present.version):
        raise ConfigError(Code.INVITE_OTHER_STEP, f"{state}: the invite does not ask for new keys.")
    fresh = invite.version > present.version
    if fresh:
        for kind in (IDENTITY, TRANSPORT):
            _put_aside(state, kind, present.version)
        if key_file(state / f"{IDENTITY}.key") == key_file(_numbered(state, IDENTITY, present)):
            write_durably(state / f"{IDENTITY}.key", [entropy.take(_SEED_BYTES)])
        if key_file(state / f"{TRANSPORT}.key") == key_file(_numbered(state, TRANSPORT, present)):
            _write_transport(state / f"{TRANSPORT}.key")
    _pin(state, invite)
    identity = SiteKey.from_seed(secret_file(state / f"{IDENTITY}.key", entropy))
    return Joined(Join.make(invite, identity, _transport(state / f"{TRANSPORT}.key")), fresh)


def key_of(state: Path, public: bytes) -> SiteKey:
    """This hospital's identity whose public key a study's roster lists: the newest, or an older.

    Raises:
        ConfigError: SITE_MISMATCH where none of its keys is the one.
        StorageError: KEY_FILE_OPEN, KEY_FILE_DAMAGED.
    """
    for path in _newest_first(state, IDENTITY):
        seed = key_file(path)
        if len(seed) != _SEED_BYTES:
            raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key file of this software.")
        key = SiteKey.from_seed(seed)
        if hmac.compare_digest(key.public, public):
            return key
    raise ConfigError(
        Code.SITE_MISMATCH, f"{state}: the roster lists a key that this hospital does not hold."
    )


def transport_keys(state: Path) -> tuple[Path, ...]:
    """The files of the connection's keys, newest first.

    After a rotation the coordinator knows the older one until it admits the newer: a link that is
    told `not registered` tries the next.

    Raises:
        ConfigError: NOT_ENROLLED.
        StorageError: KEY_FILE_OPEN, KEY_FILE_DAMAGED.
    """
    paths = _newest_first(state, TRANSPORT)
    if not paths:
        raise ConfigError(Code.NOT_ENROLLED, f"{state}: no consortium has been joined here.")
    for path in paths:
        _transport(path)
    return tuple(paths)


# -------------------------------------------------------------------------------- inside


def _follows(state: Path, invite: Invite) -> Pinned:
    """The pin, if the invite may go on from it."""
    present = pinned(state)
    if invite.key != present.coordinator:
        raise ConfigError(
            Code.COORDINATOR_CHANGED, f"{state}: another coordinator's key is pinned here."
        )
    if invite.site != present.site:
        raise ConfigError(
            Code.SITE_MISMATCH, f"The invite is for {invite.site}; {present.site} is at home here."
        )
    if invite.issued < present.issued:
        raise ConfigError(Code.INVITE_STALE, "The invite is older than the one followed before.")
    return present


def _pin(state: Path, invite: Invite) -> None:
    write_durably(state / CA_FILE, [invite.ca.encode()])
    pin = _Pin(
        format="wardround-pinned/1",
        consortium=invite.consortium,
        coordinator=invite.coordinator,
        url=invite.url,
        site=invite.site,
        name=invite.name,
        version=invite.version,
        issued=invite.issued,
    )
    save_small(state / PIN_FILE, pin)


def _numbered(state: Path, kind: str, present: Pinned) -> Path:
    return state / f"{kind}-{present.version}.key"


def _put_aside(state: Path, kind: str, version: int) -> None:
    """Keep the present key under its number, once."""
    aside = state / f"{kind}-{version}.key"
    if not aside.exists():
        write_durably(aside, [key_file(state / f"{kind}.key")])


def _newest_first(state: Path, kind: str) -> list[Path]:
    numbered: list[tuple[int, Path]] = []
    for path in state.glob(f"{kind}-*.key"):
        number = re.fullmatch(rf"{kind}-([1-9][0-9]{{0,6}})", path.stem)
        if number is not None:
            numbered.append((int(number[1]), path))
    newest = state / f"{kind}.key"
    older = [path for _, path in sorted(numbered, reverse=True)]
    return [newest, *older] if newest.exists() else older


def _write_transport(path: Path) -> None:
    content = new_transport().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_durably(path, [content])


def _transport(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-384 key in an OpenSSH file without a passphrase. Raises StorageError."""
    try:
        key = serialization.load_ssh_private_key(key_file(path), None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        raise StorageError(
            Code.KEY_FILE_DAMAGED, f"{path}: not an OpenSSH key without a passphrase."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key on the curve P-384.")
    return key
