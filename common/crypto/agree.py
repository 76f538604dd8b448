"""Hybrid key agreement: X25519 and ML-KEM-768, so that either alone protects a pair key."""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.crypto import labels
from common.crypto.digest import Value, encode, hkdf_expand, hkdf_extract
from common.errors import Code, ProtocolError
from common.ports import Entropy

X25519_BYTES: Final = 32
KEM_SEED_BYTES: Final = 64


class EphemeralKeys:
    """One site's key pair for one run handshake; its repr shows nothing secret."""

    __slots__ = ("_kem", "_kem_seed", "_x25519", "public")

    def __init__(self, x25519_secret: bytes, kem_seed: bytes) -> None:
        self._x25519 = X25519PrivateKey.from_private_bytes(x25519_secret)
        self._kem = MLKEM768PrivateKey.from_seed_bytes(kem_seed)
        self._kem_seed = kem_seed
        self.public: tuple[bytes, bytes] = (
            self._x25519.public_key().public_bytes_raw(),
            self._kem.public_key().public_bytes_raw(),
        )

    @classmethod
    def generate(cls, entropy: Entropy) -> EphemeralKeys:
        """Fresh keys."""
        return cls(entropy.take(X25519_BYTES), entropy.take(KEM_SEED_BYTES))

    @classmethod
    def from_revealed(cls, x25519_secret: bytes, kem_seed: bytes) -> EphemeralKeys:
        """The keys that a peer revealed in a dispute.

        Raises:
            ProtocolError: BAD_AGREEMENT, if the secrets do not have their lengths.
        """
        if len(x25519_secret) != X25519_BYTES or len(kem_seed) != KEM_SEED_BYTES:
            raise ProtocolError(Code.BAD_AGREEMENT, "Revealed keys do not have their lengths.")
        return cls(x25519_secret, kem_seed)

    def reveal(self) -> tuple[bytes, bytes]:
        """Both secrets; only after the run they belong to was discarded."""
        return self._x25519.private_bytes_raw(), self._kem_seed

    def exchange(self, peer_x25519: bytes) -> bytes:
        """The X25519 result with a peer's public key. Source: RFC 7748.

        Raises:
            ProtocolError: BAD_AGREEMENT, for a key that is malformed or of small order
                (an all-zero result).
        """
        try:
            return self._x25519.exchange(X25519PublicKey.from_public_bytes(peer_x25519))
        except ValueError:
            raise ProtocolError(
                Code.BAD_AGREEMENT, "An X25519 key is malformed or of small order."
            ) from None

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The 32-byte secret a peer encapsulated to this key. Source: FIPS 203.

        Raises:
            ProtocolError: BAD_AGREEMENT, for a ciphertext of the wrong length. An altered one
                gives an unrelated secret, which key confirmation then catches.
        """
        try:
            return self._kem.decapsulate(ciphertext)
        except ValueError:
            raise ProtocolError(
                Code.BAD_AGREEMENT, "An ML-KEM-768 ciphertext is malformed."
            ) from None

    def __repr__(self) -> str:
        return f"EphemeralKeys(x25519={self.public[0][:6].hex()})"


def encapsulate(kem_public: bytes) -> tuple[bytes, bytes]:
    """A fresh 32-byte secret and its ciphertext for the holder of `kem_public`.

    The randomness is the cryptographic library's own, from the operating system. Source: FIPS 203.

    Raises:
        ProtocolError: BAD_AGREEMENT, for a malformed key (the modulus check included).
    """
    try:
        return MLKEM768PublicKey.from_public_bytes(kem_public).encapsulate()
    except ValueError:
        raise ProtocolError(Code.BAD_AGREEMENT, "An ML-KEM-768 key is malformed.") from None


def pair_key(
    *,
    own: EphemeralKeys,
    peer_x25519: bytes,
    kem_shared: bytes,
    ciphertext: bytes,
    salt: bytes,
    low: Value,
    high: Value,
) -> bytes:
    """The 32-byte key that two sites share for one run.

    Args:
        own: this site's keys of the run.
        peer_x25519: the other site's X25519 public key.
        kem_shared: the encapsulated secret.
        ciphertext: its ciphertext, bound by digest.
        salt: the run transcript, which holds every public key.
        low: the lesser of the two site names.
        high: the greater.

    Raises:
        ProtocolError: BAD_AGREEMENT, as `EphemeralKeys.exchange`.

    Source: PROTOCOL.md, "Pair keys".
    """
    secret = own.exchange(peer_x25519) + kem_shared
    info = encode((labels.PAIR_KEY, low, high, hashlib.sha256(ciphertext).digest()))
    return hkdf_expand(hkdf_extract(salt, secret), info)
