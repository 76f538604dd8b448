"""Ed25519 identities: a site's signing key, and the verification of what others signed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.crypto import labels
from common.crypto.digest import Value, digest, labelled
from common.errors import Code, ProtocolError
from common.ports import Entropy

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
REMEMBERED: Final = 4096

_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
# The y-coordinates of the eight points of small order; a signature under such a key can
# verify for every message.
_SMALL_ORDER: Final = frozenset(
    {
        0,
        1,
        _P - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303021640 % _P,
        -2707385501144840649318225287225658788936804267575313519463743609750303021640 % _P,
    }
)


class SiteKey:
    """A site's long-term signing key; its repr shows the fingerprint only."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, entropy: Entropy) -> SiteKey:
        """A fresh key."""
        return cls.from_seed(entropy.take(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> SiteKey:
        """The key with this 32-byte seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def seed(self) -> bytes:
        """The 32 secret bytes, for the site's own key file and for nothing else."""
        return self._private.private_bytes_raw()

    def sign(self, label: str, *parts: Value) -> bytes:
        """A 64-byte signature over the encoding of (label, *parts). Source: RFC 8032."""
        return self._private.sign(labelled(label, *parts))

    def sign_bytes(self, message: bytes) -> bytes:
        """A signature over a message that begins with a label of its own (the audit log's)."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"SiteKey({fingerprint(self.public)})"


class Verifier:
    """Verifies signatures and remembers those that held.

    The same certificates are shown again in later phases. Only positive answers are kept,
    under a digest of key, signature and message; at most `capacity` of them, the longest
    unused forgotten first (in two generations, which needs no lock).
    """

    __slots__ = ("_half", "_older", "_recent")

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self._half = max(1, capacity // 2)
        self._recent: set[bytes] = set()
        self._older: set[bytes] = set()

    def verify(self, public: bytes, signature: bytes, label: str, *parts: Value) -> bool:
        """Whether `signature` is `public`'s over the encoding of (label, *parts).

        Raises:
            ProtocolError: BAD_KEY, if `public` is malformed or of small order.
        """
        return self.verify_message(public, signature, labelled(label, *parts))

    def verify_message(self, public: bytes, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is `public`'s over exactly these bytes."""
        key = _public_key(public)
        if len(signature) != SIGNATURE_BYTES:
            return False
        # Key and signature have fixed lengths, so their concatenation is unambiguous.
        known = hashlib.sha256(public + signature + message).digest()
        if known in self._recent:
            return True
        if known not in self._older:
            try:
                key.verify(signature, message)
            except InvalidSignature:
                return False
        self._remember(known)
        return True

    def _remember(self, known: bytes) -> None:
        if len(self._recent) >= self._half:
            self._older = self._recent
            self._recent = set()
        self._recent.add(known)

    def __len__(self) -> int:
        return len(self._recent | self._older)


_DEFAULT: Final = Verifier()


def verify(public: bytes, signature: bytes, label: str, *parts: Value) -> bool:
    """`Verifier.verify` with one memory for the whole process."""
    return _DEFAULT.verify(public, signature, label, *parts)


def fingerprint(public: bytes) -> str:
    """128 bits of the key's digest in eight groups of four hex digits, for reading aloud."""
    text = digest(labels.FINGERPRINT, public)[:16].hex()
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))


def check_public(public: bytes) -> None:
    """Raise ProtocolError unless `public` is a canonical point that is not of small order."""
    _public_key(public)


@lru_cache(maxsize=REMEMBERED)
def _public_key(public: bytes) -> Ed25519PublicKey:
    if len(public) != KEY_BYTES:
        raise ProtocolError(Code.BAD_KEY, "A signing key does not have 32 bytes.")
    y = int.from_bytes(public, "little") & (2**255 - 1)
    if y >= _P:
        raise ProtocolError(Code.BAD_KEY, "A signing key is not canonically encoded.")
    if y in _SMALL_ORDER:
        raise ProtocolError(Code.BAD_KEY, "A signing key is a point of small order.")
    if not _on_curve(y):
        raise ProtocolError(Code.BAD_KEY, "A signing key is not a point of the curve.")
    return Ed25519PublicKey.from_public_bytes(public)


def _on_curve(y: int) -> bool:
    """Whether (y^2 - 1) / (d y^2 + 1) is a square. Source: RFC 8032, section 5.1.3."""
    square = y * y % _P
    ratio = (square - 1) * pow(_D * square + 1, -1, _P) % _P
    return pow(ratio, (_P - 1) // 2, _P) <= 1
