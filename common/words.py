"""Words to read aloud: 88 bits of a digest as eight words of the BIP-39 English list.

Nobody can find other keys with the same words: after the hospital has made its keys the target is
fixed, and meeting it takes 2^88 tries. The words of an enrolment cover the coordinator's key as
well, so that one telephone call shows both that the coordinator admits the hospital's own keys and
that the hospital pinned the coordinator's own key.
"""

from __future__ import annotations

import hmac
from functools import cache
from typing import Final

from common.crypto import labels
from common.crypto.digest import Value, digest

__all__ = ["COUNT", "coordinator_words", "enrolment_words", "same_words"]

COUNT: Final = 8
_BITS: Final = 11  # the list has 2048 words
_BYTES: Final = COUNT * _BITS // 8


@cache
def _list() -> tuple[str, ...]:
    from mnemonic import Mnemonic

    return tuple(Mnemonic("english").wordlist)


def _words(*parts: Value) -> str:
    number = int.from_bytes(digest(labels.FINGERPRINT, *parts)[:_BYTES], "big")
    places = range((COUNT - 1) * _BITS, -1, -_BITS)
    return " ".join(_list()[number >> place & (1 << _BITS) - 1] for place in places)


def enrolment_words(*, site: str, identity: bytes, transport: bytes, coordinator: bytes) -> str:
    """What the hospital reads aloud and the coordinator compares, before a site is admitted.

    Args:
        site: its id.
        identity: its Ed25519 public key.
        transport: its transport public key, PEM.
        coordinator: the coordinator's Ed25519 public key, as this side knows it.
    """
    return _words("enrolment", site, identity, transport, coordinator)


def coordinator_words(public: bytes) -> str:
    """The coordinator's own fingerprint."""
    return _words("coordinator", public)


def same_words(said: str, expected: str) -> bool:
    """Whether `said` is `expected`, whatever its case, spacing and commas."""
    heard = " ".join(said.replace(",", " ").lower().split())
    return hmac.compare_digest(heard.encode(), expected.encode())
