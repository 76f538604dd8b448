"""The two files of an enrolment: the coordinator's invite, and the hospital's answer to it.

    invite   who is invited to what, where the coordinator listens, under which CA and key, a
             one-time token and a last day; signed by the coordinator
    join     the hospital's two public keys, and proof that its sender holds both of them and
             the invite; the token itself stays with the two parties

Neither file is trusted by itself: two people compare words over the telephone (`common.words`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from common.address import Address
from common.config import ConfigFileError, Frozen, Problem, parse, read
from common.crypto import labels
from common.crypto.digest import digest, labelled
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ConfigError, ProtocolError
from common.fields import Name, Text
from common.words import coordinator_words, enrolment_words
from common.world import write_durably

__all__ = [
    "MAX_BYTES",
    "Guest",
    "Invite",
    "Join",
    "check_transport",
    "load_small",
    "new_transport",
    "transport_public",
]

MAX_BYTES: Final = 16 * 1024
TOKEN_BYTES: Final = 32
_UNSIGNED: Final = "0" * 128
_HASH: Final = hashes.SHA384()
_CURVE: Final = "secp384r1"

HexKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HexSignature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Pem = Annotated[str, Field(min_length=1, max_length=8192, pattern=r"^[ -~\n]+$")]
Version = Annotated[int, Field(ge=1, le=1_000_000)]
Moment = Annotated[int, Field(ge=0, lt=2**40)]
M = TypeVar("M", bound=Frozen)


def load_small(path: Path, model: type[M]) -> M:
    """The JSON file at `path`, at most 16 KiB, as a `model`.

    Raises:
        ConfigFileError: CONFIG_UNREADABLE where there is no such file; ENROL_FILE with every
            mistake by line where it is not what it should be.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        problem = Problem(str(path), 1, 1, "", f"longer than {MAX_BYTES // 1024} KiB")
        raise ConfigFileError(Code.ENROL_FILE, [problem])
    try:
        return read(path).validate(model)
    except ConfigFileError as error:
        raise _of_enrolment(error) from None


def parse_small(text: str, name: str, model: type[M]) -> M:
    """`text` as a `model`; `name` is what messages call it. Raises ConfigFileError."""
    if len(text) > MAX_BYTES:
        problem = Problem(name, 1, 1, "", f"longer than {MAX_BYTES // 1024} KiB")
        raise ConfigFileError(Code.ENROL_FILE, [problem])
    try:
        return parse(text, name, model)
    except ConfigFileError as error:
        raise _of_enrolment(error) from None


def _of_enrolment(error: ConfigFileError) -> ConfigFileError:
    if error.code is Code.CONFIG_UNREADABLE:
        return error
    return ConfigFileError(Code.ENROL_FILE, error.problems)


def save_small(path: Path, model: Frozen) -> None:
    """Write `model` as JSON, readable by its owner only. Raises StorageError."""
    # Not ASCII-only: an escaped surrogate pair is not YAML.
    text = json.dumps(model.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_durably(path, [text.encode() + b"\n"])


# --------------------------------------------------------------------------------- invite


@dataclass(frozen=True)
class Guest:
    """Who is invited: site id, name, and which pair of keys is asked for (1: the first)."""

    site: str
    name: str
    version: int


class Invite(Frozen):
    """What the coordinator gives one hospital.

    Attributes:
        version: which keys of the hospital it asks for: 1 are the first, more are new ones.
        url: `host:port` that the hospital dials.
        issued, expires: seconds since 1970.
        ca: the certificate, PEM, that the coordinator's TLS certificates stand under.
        token: 32 secret bytes, used once.
    """

    format: Literal["wardround-invite/1"]
    consortium: Text
    site: Name
    name: Text
    version: Version
    url: Address
    issued: Moment
    expires: Moment
    coordinator: HexKey
    ca: Pem
    token: HexKey = Field(repr=False)
    signature: HexSignature

    @classmethod
    def issue(
        cls,
        key: SiteKey,
        *,
        consortium: str,
        guest: Guest,
        url: str,
        times: tuple[int, int],
        ca: str,
        token: bytes,
    ) -> Invite:
        """An invite under the coordinator's key; `times` are when it was issued and expires."""
        draft = cls(
            format="wardround-invite/1",
            consortium=consortium,
            site=guest.site,
            name=guest.name,
            version=guest.version,
            url=url,
            issued=times[0],
            expires=times[1],
            coordinator=key.public.hex(),
            ca=ca,
            token=token.hex(),
            signature=_UNSIGNED,
        )
        signature = key.sign(labels.INVITE, draft._told())
        return draft.model_copy(update={"signature": signature.hex()})

    def _told(self) -> dict[str, str | int]:
        """Everything but the signature: every key is signed, also one added later."""
        return self.model_dump(exclude={"signature"})

    def verified(self, now: int) -> Invite:
        """The invite itself, if it may be followed now.

        Guarantee: the key it names signed every word of it. Whose key that is, only the words
        read over the telephone tell.

        Raises:
            ProtocolError: INVITE_SIGNATURE.
            ConfigError: INVITE_EXPIRED; ENROL_FILE where its certificate is none.
        """
        try:
            held = verify(self.key, bytes.fromhex(self.signature), labels.INVITE, self._told())
        except ProtocolError:
            held = False
        if not held:
            raise ProtocolError(
                Code.INVITE_SIGNATURE, "The invite was changed, or another key signed it."
            )
        if now >= self.expires:
            hours = (now - self.expires) // 3600
            raise ConfigError(
                Code.INVITE_EXPIRED, f"The invite expired {hours} hours ago by this clock."
            )
        self._check_ca()
        return self

    def _check_ca(self) -> None:
        if not _is_ca(self.ca):
            raise ConfigError(Code.ENROL_FILE, "The invite's `ca` is not one CA certificate.")

    @property
    def key(self) -> bytes:
        """The coordinator's public key."""
        return bytes.fromhex(self.coordinator)

    @property
    def id(self) -> str:
        """Names the invite without telling its token."""
        return invite_id(bytes.fromhex(self.token))

    @property
    def words(self) -> str:
        """The coordinator's fingerprint."""
        return coordinator_words(self.key)

    def save(self, path: Path) -> None:
        """Write the file; it holds the token, so only its owner may read it."""
        save_small(path, self)

    @staticmethod
    def load(path: Path) -> Invite:
        """The file at `path`, not yet verified. Raises ConfigFileError."""
        return load_small(path, Invite)


def _is_ca(pem: str) -> bool:
    """Whether `pem` is one certificate that may sign others."""
    from cryptography import x509

    # What a certificate made to confuse a reader raises, beside ValueError.
    confusing = (
        x509.DuplicateExtension,
        x509.ExtensionNotFound,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    )
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
        constraints = found[0].extensions.get_extension_for_class(x509.BasicConstraints)
    except (ValueError, *confusing):
        return False
    return len(found) == 1 and constraints.value.ca


def invite_id(token: bytes) -> str:
    """What a join file calls its invite: 128 bits of the token's digest."""
    return digest(labels.INVITE, token)[:16].hex()


# ----------------------------------------------------------------------------------- join


class Join(Frozen):
    """What the hospital sends back.

    Attributes:
        invite: the id of the invite it answers.
        identity: the Ed25519 public key that signs what the hospital says.
        transport: the EC P-384 public key, PEM, that the hospital's connection is known by.
        identity_proof, transport_proof: signatures by the two keys over all of it and the token.
    """

    format: Literal["wardround-join/1"]
    site: Name
    name: Text
    version: Version
    invite: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    coordinator: HexKey
    identity: HexKey
    transport: Pem
    identity_proof: HexSignature
    transport_proof: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2}){8,120}$")]

    @classmethod
    def make(cls, invite: Invite, identity: SiteKey, transport: ec.EllipticCurvePrivateKey) -> Join:
        """The answer to an invite, proved by both keys."""
        told: dict[str, str | int] = {
            "site": invite.site,
            "name": invite.name,
            "version": invite.version,
            "invite": invite.id,
            "coordinator": invite.coordinator,
            "identity": identity.public.hex(),
            "transport": transport_public(transport).decode(),
        }
        token = bytes.fromhex(invite.token)
        message = labelled(labels.JOIN, token, told)
        return cls.model_validate(
            {
                "format": "wardround-join/1",
                **told,
                "identity_proof": identity.sign(labels.JOIN, token, told).hex(),
                "transport_proof": transport.sign(message, ec.ECDSA(_HASH)).hex(),
            }
        )

    def check_proof(self, token: bytes) -> None:
        """Return if the holder of both keys and of the invite's token made this file.

        Raises:
            ProtocolError: JOIN_PROOF.
        """
        told: dict[str, str | int] = self.model_dump(
            exclude={"format", "identity_proof", "transport_proof"}
        )
        message = labelled(labels.JOIN, token, told)
        try:
            transport = check_transport(self.transport.encode())
            transport.verify(bytes.fromhex(self.transport_proof), message, ec.ECDSA(_HASH))
            held = verify(
                self.identity_key, bytes.fromhex(self.identity_proof), labels.JOIN, token, told
            )
        except (ProtocolError, InvalidSignature):
            held = False
        if not held:
            raise ProtocolError(
                Code.JOIN_PROOF,
                f"The join file of {self.site} is not signed by both of its keys over this invite.",
                culprit=self.site,
            )

    @property
    def identity_key(self) -> bytes:
        """The Ed25519 public key."""
        return bytes.fromhex(self.identity)

    @property
    def words(self) -> str:
        """What the hospital reads aloud."""
        return enrolment_words(
            site=self.site,
            identity=self.identity_key,
            transport=self.transport.encode(),
            coordinator=bytes.fromhex(self.coordinator),
        )

    def save(self, path: Path) -> None:
        """Write the file. Raises StorageError."""
        save_small(path, self)

    @staticmethod
    def load(path: Path) -> Join:
        """The file at `path`, not yet checked. Raises ConfigFileError."""
        return load_small(path, Join)


# ------------------------------------------------------------------------- transport keys


def new_transport() -> ec.EllipticCurvePrivateKey:
    """A fresh EC P-384 key, from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def transport_public(private: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key in the one form that is registered and compared: PEM, SubjectPublicKeyInfo."""
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def check_transport(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-384 key in `pem`, which must be its canonical form. Raises ProtocolError BAD_KEY."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ProtocolError(Code.BAD_KEY, "A transport key is not a public key.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE:
        raise ProtocolError(Code.BAD_KEY, "A transport key is not on the curve P-384.")
    again = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    if again != pem:
        raise ProtocolError(Code.BAD_KEY, "A transport key is not in its canonical form.")
    return key
