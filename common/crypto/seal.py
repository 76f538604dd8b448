"""Authenticated encryption: single-use keys between sites, a vault for records at rest."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.crypto.digest import Value, encode
from common.errors import Code, ProtocolError, StorageError
from common.ports import Entropy

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
_ZERO_NONCE = bytes(NONCE_BYTES)


def seal(key: bytes, plaintext: bytes, *associated: Value) -> bytes:
    """AES-256-GCM of `plaintext` under a key that seals exactly one message, ever.

    The nonce is zero, so a key must never seal a second message: keys come from
    `digest.expand` over everything that makes the message unique. `associated` is bound
    but not sent. Output: 16 bytes longer than the plaintext.
    """
    return _cipher(key).encrypt(_ZERO_NONCE, plaintext, encode(associated))


def unseal(key: bytes, sealed: bytes, *associated: Value) -> bytes:
    """What `seal` sealed under the same key and associated values.

    Raises:
        ProtocolError: BROKEN_SEAL, if anything differs.
    """
    try:
        return _cipher(key).decrypt(_ZERO_NONCE, sealed, encode(associated))
    except InvalidTag:
        raise ProtocolError(
            Code.BROKEN_SEAL, "A sealed message does not open under its key and place."
        ) from None


class Vault:
    """Seals a party's own records at rest: AES-256-GCM with random 96-bit nonces.

    Good for 2**32 records under one key (the bound for random nonces, NIST SP 800-38D).
    """

    __slots__ = ("_cipher", "_entropy")

    def __init__(self, key: bytes, entropy: Entropy) -> None:
        self._cipher = _cipher(key)
        self._entropy = entropy

    def seal(self, plaintext: bytes | memoryview, context: bytes) -> bytes:
        """Nonce, ciphertext and tag; `context` names the record's place and is bound."""
        nonce = self._entropy.take(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plaintext, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed in this place.

        Raises:
            StorageError: BROKEN_VAULT, if the record, its place or the key differs.
        """
        view = memoryview(sealed)
        try:
            # A record too short for a nonce and a tag fails like one with a wrong tag.
            nonce = bytes(view[:NONCE_BYTES]).ljust(NONCE_BYTES, b"\0")
            return self._cipher.decrypt(nonce, view[NONCE_BYTES:], context)
        except InvalidTag:
            raise StorageError(
                Code.BROKEN_VAULT, "A sealed record does not open in its place under this key."
            ) from None

    def __repr__(self) -> str:
        return "Vault()"


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ValueError("an AES-256 key has 32 bytes")
    return AESGCM(key)
