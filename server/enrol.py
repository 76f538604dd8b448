"""Enrolment on the coordinator's side: its keys, its invites, whom it admitted, and the roster.

    identity.key          signs invites, rosters, offers and every question
    admin.token           opens the operator's port
    invites/SITE.json     the newest invite of a site, and whether it was used
    sites/SITE.json       who was admitted with which keys, and whether that was taken back
    roster.json           everybody admitted, numbered and signed

`sites/` is the truth; the roster follows from it and is written after it, so that a crash between
the two is mended by the next command. Changes hold a lock: two operators cannot interleave.
"""

from __future__ import annotations

import fcntl
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

from pydantic import Field, ValidationError

from common.config import Frozen
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, ProtocolError, StorageError
from common.fields import Listed, Name, Text
from common.ids import is_site_id
from common.invite import Guest, HexKey, Invite, Join, Moment, Pem, Version, save_small
from common.keys import key_file, secret_file
from common.ports import Entropy
from common.protocol.envelope import COORDINATOR
from common.roster import Roster, SignedRoster
from common.study import MAX_SITES
from common.words import same_words
from common.world import make_folder, write_durably
from server.config import CoordinatorConfig

if TYPE_CHECKING:
    from server.pki import Certificate

__all__ = [
    "Admitted",
    "Initialised",
    "Publication",
    "admin_token",
    "admit",
    "admitted",
    "coordinator_key",
    "examine",
    "initialise",
    "invite",
    "invited",
    "publish",
    "revoke",
    "site_id",
]

IDENTITY_FILE: Final = "identity.key"
TOKEN_FILE: Final = "admin.token"  # noqa: S105 - a file's name
ROSTER_FILE: Final = "roster.json"
_SITES, _INVITES, _LOCK = "sites", "invites", "enrol.lock"
_SEED_BYTES: Final = 32
_DAY: Final = 86400
_MAX_DAYS: Final = 90
_LONGEST_ID: Final = 63
_MAX_STATE_FILE: Final = 4 << 20


class _Keys(Frozen):
    """One pair of keys that a site held; `revoked`: it was put out with them, not rotated."""

    version: Version
    identity: HexKey
    transport: Pem
    revoked: bool = False


class _Site(Frozen):
    """sites/SITE.json; `since` is the roster version in which it last changed."""

    format: Literal["wardround-admitted/1"]
    site: Name
    name: Text
    version: Version
    identity: HexKey
    transport: Pem
    since: Annotated[int, Field(ge=1, lt=2**62)]
    admitted: Moment
    revoked: bool
    past: Listed[_Keys]


class _Invited(Frozen):
    """invites/SITE.json: what the coordinator keeps of the newest invite."""

    format: Literal["wardround-invited/1"]
    site: Name
    name: Text
    version: Version
    invite: str
    token: HexKey = Field(repr=False)
    expires: Moment
    used: Moment | None


M = TypeVar("M", bound=Frozen)


@dataclass(frozen=True)
class Admitted:
    """One hospital as the coordinator knows it.

    Attributes:
        site, name: its id, and what people call it.
        identity: its Ed25519 public key.
        transport: its transport public key, in the form that Flower registers (PEM).
        version: which pair of keys this is; 1 is the first.
        since: the roster version in which it was last admitted or revoked.
        admitted: when, seconds since 1970.
        revoked: whether it was put out; its keys open nothing any more.
        struck: every identity key that it was ever put out with. A study whose roster lists one
            goes on without the site, also after the site was admitted again with other keys.
    """

    site: str
    name: str
    identity: bytes
    transport: bytes
    version: int
    since: int
    admitted: int
    revoked: bool
    struck: frozenset[bytes] = frozenset()


# --------------------------------------------------------------------------------- init


@dataclass(frozen=True)
class Initialised:
    """What `server init` found or made."""

    public: bytes
    certificate: Certificate
    made: tuple[str, ...]


def initialise(
    config: CoordinatorConfig, state: Path, *, now: int, entropy: Entropy
) -> Initialised:
    """Make what the coordinator's state folder lacks; again is harmless.

    Raises:
        StorageError: a key file is open or damaged, or was lost while hospitals trust it.
    """
    from server.pki import ensure_certificate, make_authority

    make_folder(state, mode=0o700)
    with _locked(state):
        made = []
        path = state / IDENTITY_FILE
        if not path.exists():
            _refuse_second_identity(state)
            made.append(IDENTITY_FILE)
        key = SiteKey.from_seed(secret_file(path, entropy))
        for folder in (_SITES, _INVITES):
            make_folder(state / folder, mode=0o700)
        if make_authority(state, config.consortium, now):
            made.append("tls/ca.crt")
        certificate = ensure_certificate(state, config, now)
        if certificate.renewed:
            made.append("tls/server.crt")
        token = state / TOKEN_FILE
        if not token.exists():
            write_durably(token, [entropy.take(_SEED_BYTES).hex().encode()])
            made.append(TOKEN_FILE)
        admin_token(state)
    return Initialised(key.public, certificate, tuple(made))


def _refuse_second_identity(state: Path) -> None:
    """Hospitals have pinned the first key: a second one would lock every one of them out."""
    if any(True for folder in (_SITES, _INVITES) for _ in (state / folder).glob("*.json")):
        raise StorageError(
            Code.NOT_INITIALISED,
            f"{state / IDENTITY_FILE}: the coordinator's key is gone, and hospitals trust it.",
            remedy="Restore the file from a backup; only in an empty state folder is one made.",
        )


def coordinator_key(state: Path) -> SiteKey:
    """The coordinator's own key. Raises StorageError."""
    path = state / IDENTITY_FILE
    if not path.exists():
        raise StorageError(Code.NOT_INITIALISED, f"{state}: there is no coordinator here.")
    seed = key_file(path)
    if len(seed) != _SEED_BYTES:
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key file of this software.")
    return SiteKey.from_seed(seed)


def admin_token(state: Path) -> str:
    """What opens the operator's port. Raises StorageError."""
    path = state / TOKEN_FILE
    if not path.exists():
        raise StorageError(Code.NOT_INITIALISED, f"{path}: there is no such file.")
    token = key_file(path).decode("ascii", "replace").strip()
    if re.fullmatch(r"[0-9a-f]{64}", token) is None:
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a token of this software.")
    return token


# ------------------------------------------------------------------------------- invite


def site_id(name: str) -> str:
    """The site id that a hospital's name suggests: `St. Mary` is `st-mary`; may be empty."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_LONGEST_ID].strip("-")


def invite(
    state: Path,
    config: CoordinatorConfig,
    *,
    name: str,
    site: str,
    url: str,
    days: int,
    now: int,
    entropy: Entropy,
) -> Invite:
    """A new invite for a hospital; one that was not used before it is void.

    A site that was admitted before is asked for new keys: its present ones stay good until the
    answer is admitted.

    Raises:
        ConfigError: SITE_TAKEN, CONFIG_INVALID.
        StorageError: NOT_INITIALISED, or the disk.
    """
    key = coordinator_key(state)
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(Code.CONFIG_INVALID, f"An invite is good for 1 to {_MAX_DAYS} days.")
    if not is_site_id(site) or site == COORDINATOR:
        raise ConfigError(Code.SITE_TAKEN, f"{site[:70]!a} cannot be a site id.")
    with _locked(state):
        present = {known.site: known for known in _sites(state)}
        _check_name(state, present.get(site), site, name)
        if len(present) >= MAX_SITES and site not in present:
            raise ConfigError(Code.SITE_TAKEN, f"A consortium has at most {MAX_SITES} hospitals.")
        token = entropy.take(_SEED_BYTES)
        version = present[site].version + 1 if site in present else 1
        try:
            issued = Invite.issue(
                key,
                consortium=config.consortium,
                guest=Guest(site, name, version),
                url=url,
                times=(now, now + days * _DAY),
                ca=_authority(state),
                token=token,
            )
        except ValidationError as error:
            what = ", ".join(str(detail["loc"][0]) for detail in error.errors() if detail["loc"])
            raise ConfigError(Code.CONFIG_INVALID, f"An invite cannot say this: {what}.") from None
        kept = _Invited(
            format="wardround-invited/1",
            site=site,
            name=name,
            version=version,
            invite=issued.id,
            token=issued.token,
            expires=issued.expires,
            used=None,
        )
        save_small(_invite_file(state, site), kept)
    return issued


def _authority(state: Path) -> str:
    """The CA certificate, PEM."""
    path = state / "tls" / "ca.crt"
    try:
        return path.read_text("ascii")
    except (OSError, ValueError):
        raise StorageError(Code.NOT_INITIALISED, f"{path}: there is no certificate.") from None


def _check_name(state: Path, known: _Site | None, site: str, name: str) -> None:
    """Two hospitals whose names suggest one id must not become one by accident."""
    other = known.name if known is not None else None
    if other is None:
        waiting = _invited(state, site)
        other = None if waiting is None else waiting.name
    if other is not None and other != name:
        raise ConfigError(
            Code.SITE_TAKEN,
            f"The site id {site} belongs to {other!r}.",
            remedy="Write the name as before for the same hospital, or choose another id with "
            "--site for another one.",
        )


def invited(state: Path) -> tuple[tuple[str, str, int], ...]:
    """(site, name, expiry) of every invite that was not used."""
    paths = sorted((state / _INVITES).glob("*.json"))
    kept = [_read(path, _Invited) for path in paths]
    return tuple((each.site, each.name, each.expires) for each in kept if each.used is None)


# -------------------------------------------------------------------------------- admit


def examine(state: Path, join: Join, now: int) -> bool:
    """Check a join file up to the telephone call; returns whether it brings new keys.

    Guarantee: whoever made it holds the newest invite of this site, unused and not expired, and
    both keys; the keys are no other site's, and were never given up. Whether they are the
    hospital's own, only the words tell.

    Raises:
        ConfigError: JOIN_UNINVITED, JOIN_USED, INVITE_STALE, INVITE_EXPIRED, JOIN_KEYS.
        ProtocolError: JOIN_PROOF.
    """
    kept = _invited(state, join.site)
    if kept is None:
        raise ConfigError(Code.JOIN_UNINVITED, f"No invite was made for {join.site}.")
    if join.coordinator != coordinator_key(state).public.hex():
        raise ProtocolError(
            Code.JOIN_PROOF,
            f"{join.site} joined under another coordinator's key than the one here.",
            culprit=join.site,
            remedy="Do not admit it: somebody may have exchanged the invite on its way. Send a "
            "new one over another channel, for a new state folder.",
        )
    if join.invite != kept.invite:
        raise ConfigError(
            Code.INVITE_STALE, f"The join file of {join.site} answers an older invite."
        )
    if kept.used is not None:
        raise ConfigError(Code.JOIN_USED, f"The invite of {join.site} was used before.")
    if now >= kept.expires:
        raise ConfigError(Code.INVITE_EXPIRED, f"The invite of {join.site} has expired.")
    if (join.name, join.version) != (kept.name, kept.version):
        raise ProtocolError(
            Code.JOIN_PROOF, f"The join file of {join.site} is not an answer to its invite."
        )
    join.check_proof(bytes.fromhex(kept.token))
    _check_fresh(join, _sites(state))
    return kept.version > 1


def _check_fresh(join: Join, sites: tuple[_Site, ...]) -> None:
    used: dict[str, str] = {}
    for known in sites:
        # Else a crash came between admitting it and saying so.
        again = known.site == join.site and known.version == join.version and not known.revoked
        present = [] if again else [(known.identity, known.transport)]
        for pair in [*present, *((old.identity, old.transport) for old in known.past)]:
            used |= dict.fromkeys(pair, known.site)
    for key in (join.identity, join.transport):
        if key in used:
            raise ConfigError(
                Code.JOIN_KEYS,
                f"The join file of {join.site} brings a key that {used[key]} has or had.",
            )


def admit(state: Path, join: Join, now: int, *, said: str) -> Admitted:
    """Admit a hospital whose words were heard, and number a new roster.

    Args:
        state: the coordinator's state folder.
        join: its join file.
        now: seconds since 1970.
        said: the words that the hospital read aloud.

    Raises:
        ProtocolError: WORDS_DIFFER, or as `examine`.
        ConfigError: as `examine`.
    """
    with _locked(state):
        examine(state, join, now)
        if not same_words(said, join.words):
            raise ProtocolError(
                Code.WORDS_DIFFER,
                f"The words given are not those of the join file of {join.site}.",
                culprit=join.site,
            )
        sites = _sites(state)
        before = next((known for known in sites if known.site == join.site), None)
        site = _Site(
            format="wardround-admitted/1",
            site=join.site,
            name=join.name,
            version=join.version,
            identity=join.identity,
            transport=join.transport,
            since=_highest(sites) + 1,
            admitted=now,
            revoked=False,
            past=_past(before, join),
        )
        _save_site(state, site)
        _settle(state)
        kept = _read(_invite_file(state, join.site), _Invited)
        save_small(_invite_file(state, join.site), kept.model_copy(update={"used": now}))
    return _told(site)


def _past(before: _Site | None, join: Join) -> tuple[_Keys, ...]:
    if before is None:
        return ()
    if (before.identity, before.transport) == (join.identity, join.transport):
        return before.past
    given_up = _Keys(
        version=before.version,
        identity=before.identity,
        transport=before.transport,
        revoked=before.revoked,
    )
    return (*before.past, given_up)


def revoke(state: Path, site: str) -> Admitted:
    """Put a hospital out; the roster goes on without it. Again is harmless.

    Raises:
        ConfigError: SITE_UNKNOWN.
    """
    with _locked(state):
        sites = _sites(state)
        known = next((each for each in sites if each.site == site), None)
        if known is None:
            raise ConfigError(Code.SITE_UNKNOWN, f"{site[:70]!a} has not been admitted.")
        if not known.revoked:
            known = known.model_copy(update={"revoked": True, "since": _highest(sites) + 1})
            _save_site(state, known)
        # An invite for new keys must not bring it back behind the operator's back.
        _invite_file(state, site).unlink(missing_ok=True)
        _settle(state)
    return _told(known)


def admitted(state: Path) -> tuple[Admitted, ...]:
    """Everybody who was ever admitted, ascending by site; see `Admitted.revoked`.

    Reads `sites/` anew: a running coordinator calls it to see who came and who left.

    Raises:
        StorageError: ENROL_STATE.
    """
    return tuple(_told(site) for site in _sites(state))


# ------------------------------------------------------------------------------ publish


@dataclass(frozen=True)
class Publication:
    """What `publish` wrote: the study and the roster that its offer binds."""

    study: bytes
    roster: bytes
    version: int
    sites: tuple[str, ...]


def publish(state: Path, folder: Path) -> Publication:
    """Put the signed roster and the offer into a bundle folder.

    Raises:
        ConfigError: SITE_NOT_ADMITTED, naming every hospital that is missing.
        StorageError: the bundle is damaged, or the disk.
    """
    from common.bundle import Bundle
    from common.offer import OFFER_FILE, Offer
    from common.offer import ROSTER_FILE as ROSTER_OF_BUNDLE

    key = coordinator_key(state)
    bundle = Bundle.load(folder)
    names = tuple(site.id for site in bundle.study.sites)
    with _locked(state):
        signed = _settle(state)
    present = () if signed is None else signed.roster.sites
    missing = [name for name in names if name not in present]
    if signed is None or missing:
        raise ConfigError(
            Code.SITE_NOT_ADMITTED,
            f"The study names hospitals that are not admitted: {', '.join(missing)}.",
        )
    digest = signed.roster.digest()
    signed.save(folder / ROSTER_OF_BUNDLE)
    Offer.sign(key, bundle.digest, digest).save(folder / OFFER_FILE)
    return Publication(bundle.digest, digest, signed.roster.version, names)


# -------------------------------------------------------------------------------- state


def _settle(state: Path) -> SignedRoster | None:
    """The roster that follows from `sites/`, written where it is not there yet; None of nobody."""
    sites = _sites(state)
    members = {site.site: bytes.fromhex(site.identity) for site in sites if not site.revoked}
    path = state / ROSTER_FILE
    if not members:
        path.unlink(missing_ok=True)
        return None
    signed = Roster.of(members, _highest(sites)).signed(coordinator_key(state))
    try:
        current = SignedRoster.load(path) if path.exists() else None
    except ConfigError:
        current = None  # damaged: everything it said is in `sites/`
    if current != signed:
        signed.save(path)
    return signed


def _highest(sites: tuple[_Site, ...]) -> int:
    """The number of the newest roster: it rises whenever a site changes, and never falls."""
    return max((site.since for site in sites), default=0)


def _sites(state: Path) -> tuple[_Site, ...]:
    found = []
    for path in sorted((state / _SITES).glob("*.json")):
        site = _read(path, _Site)
        if site.site != path.stem:
            raise StorageError(Code.ENROL_STATE, f"{path}: it is about another site.")
        found.append(site)
    return tuple(sorted(found, key=lambda site: site.site))


def _told(site: _Site) -> Admitted:
    return Admitted(
        site.site,
        site.name,
        bytes.fromhex(site.identity),
        site.transport.encode(),
        site.version,
        site.since,
        site.admitted,
        site.revoked,
        _struck(site),
    )


def _struck(site: _Site) -> frozenset[bytes]:
    keys = [pair.identity for pair in site.past if pair.revoked]
    return frozenset(bytes.fromhex(key) for key in [*keys, *([site.identity] * site.revoked)])


def _save_site(state: Path, site: _Site) -> None:
    make_folder(state / _SITES, mode=0o700)
    save_small(state / _SITES / f"{site.site}.json", site)


def _invite_file(state: Path, site: str) -> Path:
    return state / _INVITES / f"{site}.json"


def _invited(state: Path, site: str) -> _Invited | None:
    path = _invite_file(state, site)
    return _read(path, _Invited) if path.exists() else None


def _read(path: Path, model: type[M]) -> M:
    """One of our own JSON files. Raises StorageError ENROL_STATE."""
    try:
        with path.open("rb") as file:
            return model.model_validate_json(file.read(_MAX_STATE_FILE))
    except (OSError, ValidationError):
        raise StorageError(
            Code.ENROL_STATE, f"{path}: it cannot be read as it was written."
        ) from None


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One change at a time. Raises StorageError FOLDER_IN_USE."""
    try:
        handle = os.open(state / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{state}: cannot be written ({error.strerror})."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                Code.FOLDER_IN_USE, f"{state}: another command is changing it."
            ) from None
        yield
    finally:
        os.close(handle)
