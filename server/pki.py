"""The coordinator's own certificate authority and its TLS certificate.

One CA, ten years, signs server certificates and nothing else; hospitals pin it with their invite
and trust no other. The server certificate lasts 90 days and is made anew, under the same key, when
30 are left, when the coordinator's names change, or on demand.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.address import is_ip
from common.errors import Code, StorageError
from common.keys import key_file
from common.world import make_folder, write_durably

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.config import CoordinatorConfig

__all__ = [
    "Certificate",
    "ensure_certificate",
    "make_authority",
    "present_certificate",
    "tls_folder",
]

CA_DAYS: Final = 3650
SERVER_DAYS: Final = 90
RENEW_DAYS: Final = 30
# A hospital whose clock is behind must get as far as being told so, over TLS.
BACKDATED: Final = timedelta(days=7)
_LONGEST_NAME: Final = 64
_PEM: Final = serialization.Encoding.PEM


@dataclass(frozen=True)
class Certificate:
    """The coordinator's TLS files.

    Attributes:
        cert, key, ca: PEM files; `cert` is the server's own, `ca` what hospitals pin.
        names: host names and addresses it is good for.
        expires: its last second, seconds since 1970.
        renewed: whether it was made just now.
    """

    cert: Path
    key: Path
    ca: Path
    names: tuple[str, ...]
    expires: int
    renewed: bool


def tls_folder(state: Path) -> Path:
    """Where certificates and their keys lie."""
    return state / "tls"


def make_authority(state: Path, consortium: str, now: int) -> bool:
    """Make the CA where there is none; returns whether it did.

    A key without its certificate is what a crash left: nobody has seen that key, so it goes on
    being used. A certificate without its key is damage, and is refused.

    Raises:
        StorageError: CERTIFICATE_UNUSABLE, KEY_FILE_OPEN, or the disk.
    """
    folder = tls_folder(state)
    make_folder(folder, mode=0o700)
    if (folder / "ca.crt").exists():
        _authority(folder)
        return False
    key = _own_key(folder / "ca.key")
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium[:_LONGEST_NAME]),
            x509.NameAttribute(NameOID.COMMON_NAME, "wardround coordinator CA"),
        ]
    )
    start = _moment(now)
    certificate = (
        _builder(name, name, key.public_key(), start, start + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_durably(folder / "ca.crt", [certificate.public_bytes(_PEM)])
    return True


def ensure_certificate(
    state: Path, config: CoordinatorConfig, now: int, *, force: bool = False
) -> Certificate:
    """The server's certificate, made anew where it is absent, nearly over or for other names.

    Args:
        state: the coordinator's state folder.
        config: its names go into the certificate.
        now: seconds since 1970.
        force: make it anew in any case.

    Raises:
        StorageError: NOT_INITIALISED, CERTIFICATE_UNUSABLE, KEY_FILE_OPEN, or the disk.
    """
    folder = tls_folder(state)
    if not (folder / "ca.crt").exists():
        raise StorageError(Code.NOT_INITIALISED, f"{folder}: there is no certificate authority.")
    ca_key, ca = _authority(folder)
    if _moment(now) >= ca.not_valid_after_utc:
        raise StorageError(Code.CERTIFICATE_UNUSABLE, f"{folder}: the CA certificate is over.")
    path, key = folder / "server.crt", _own_key(folder / "server.key")
    current = None if force else _usable(path, key, ca, config.names, now)
    made = current is None
    if current is None:
        current = _server_certificate(key, ca_key, ca, config.names, now)
        write_durably(path, [current.public_bytes(_PEM)])
    expires = int(current.not_valid_after_utc.timestamp())
    return Certificate(
        path, folder / "server.key", folder / "ca.crt", tuple(config.names), expires, made
    )


def present_certificate(state: Path, config: CoordinatorConfig, now: int) -> Certificate | None:
    """The server's certificate as it lies there; None where one is made at the next start.

    Raises StorageError as `ensure_certificate` does, and makes nothing.
    """
    folder = tls_folder(state)
    if not (folder / "ca.crt").exists():
        raise StorageError(Code.NOT_INITIALISED, f"{folder}: there is no certificate authority.")
    _, ca = _authority(folder)
    if _moment(now) >= ca.not_valid_after_utc:
        raise StorageError(Code.CERTIFICATE_UNUSABLE, f"{folder}: the CA certificate is over.")
    path, key = folder / "server.crt", folder / "server.key"
    found = _usable(path, _private(key), ca, config.names, now) if key.exists() else None
    if found is None:
        return None
    expires = int(found.not_valid_after_utc.timestamp())
    return Certificate(path, key, folder / "ca.crt", tuple(config.names), expires, renewed=False)


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    names: Sequence[str],
    now: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wardround coordinator")])
    start = _moment(now)
    end = min(start + timedelta(days=SERVER_DAYS), ca.not_valid_after_utc)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_ip(name) else x509.DNSName(name)


def _usable(
    path: Path,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    names: Sequence[str],
    now: int,
) -> x509.Certificate | None:
    """The certificate at `path`, if it will do for 30 days more."""
    if not path.exists():
        return None
    try:
        found = x509.load_pem_x509_certificate(_read(path))
        found.verify_directly_issued_by(ca)
        san = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return None
    left = found.not_valid_after_utc - _moment(now)
    fits = found.public_key() == key.public_key() and list(san) == [_general(n) for n in names]
    return found if fits and left > timedelta(days=RENEW_DAYS) else None


def _authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA's key and certificate, which must belong together."""
    try:
        ca = x509.load_pem_x509_certificate(_read(folder / "ca.crt"))
    except ValueError:
        raise _unusable(folder / "ca.crt", "not a certificate") from None
    key = _private(folder / "ca.key")
    if ca.public_key() != key.public_key():
        raise _unusable(folder / "ca.crt", "not the certificate of ca.key")
    return key, ca


def _own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in the file, made on first use."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        content = key.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(path, [content])
    return _private(path)


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(key_file(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StorageError(
            Code.KEY_FILE_DAMAGED, f"{path}: not an unencrypted PEM private key."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not an elliptic-curve key.")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from None


def _unusable(path: Path, why: str) -> StorageError:
    return StorageError(Code.CERTIFICATE_UNUSABLE, f"{path}: {why}.")


def _moment(now: int) -> datetime:
    return datetime.fromtimestamp(now, UTC)
