"""What every message of a deployment is signed with, both ways (PROTOCOL.md, "Envelope").

The transport is trusted with nothing: Flower signs a timestamp, TLS ends at whoever holds the
certificate. So the coordinator signs every question with the key that hospitals pinned when they
enrolled, and a hospital signs every answer with its key in the roster, over the question's nonce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from common.crypto import labels
from common.crypto.digest import tree_digest
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ProtocolError

COORDINATOR: Final = "coordinator"
NONCE_BYTES: Final = 16
MAX_PAYLOADS: Final = 64


@dataclass(frozen=True, slots=True)
class Envelope:
    """Who says the payloads that travel beside it, to whom, about which study.

    Attributes:
        study: the study digest.
        sender: a site id, or `coordinator`.
        recipient: the same; empty in the question that asks a node who it is.
        nonce: 16 bytes of the coordinator, one for every question; the answer repeats them.
        code: why there is no payload, as a code's label; empty where nothing went wrong.
        signature: Ed25519 over all of it and the digest of every payload.
    """

    study: bytes
    sender: str
    recipient: str
    nonce: bytes
    code: str
    signature: bytes


def payload_digest(payload: bytes | memoryview) -> bytes:
    """What an envelope says of one payload."""
    return tree_digest([payload])


def sign_envelope(
    key: SiteKey,
    *,
    study: bytes,
    sender: str,
    recipient: str,
    nonce: bytes,
    payloads: Sequence[bytes | memoryview],
    code: str = "",
    digest: Callable[[bytes | memoryview], bytes] = payload_digest,
) -> Envelope:
    """The envelope of `payloads` under `key`.

    `digest` is `payload_digest`, or what remembers its answers: one large message goes to many.
    """
    digests = tuple(digest(payload) for payload in payloads)
    signature = key.sign(labels.ENVELOPE, study, sender, recipient, nonce, code, digests)
    return Envelope(study, sender, recipient, nonce, code, signature)


def check_envelope(
    envelope: Envelope,
    payloads: Sequence[bytes | memoryview],
    *,
    public: bytes,
    study: bytes,
    sender: str,
    recipient: str,
    nonce: bytes,
) -> None:
    """Return if `public` signed these payloads for exactly this study, way and question.

    Guarantee: a message moved from another study, question, sender or recipient, altered,
    repeated, shortened or reordered does not pass.

    Raises:
        ProtocolError: MESSAGE_SIGNATURE; BAD_KEY where `public` is not a key.
    """
    told = (envelope.study, envelope.sender, envelope.recipient, envelope.nonce)
    expected = (study, sender, recipient, nonce)
    fits = told == expected and len(nonce) == NONCE_BYTES and len(payloads) <= MAX_PAYLOADS
    if not fits or not _signed(envelope, payloads, public):
        raise ProtocolError(
            Code.MESSAGE_SIGNATURE, f"A message said to come from {sender} is not signed by it."
        )


def _signed(envelope: Envelope, payloads: Sequence[bytes | memoryview], public: bytes) -> bool:
    digests = tuple(payload_digest(payload) for payload in payloads)
    return verify(
        public,
        envelope.signature,
        labels.ENVELOPE,
        envelope.study,
        envelope.sender,
        envelope.recipient,
        envelope.nonce,
        envelope.code,
        digests,
    )
