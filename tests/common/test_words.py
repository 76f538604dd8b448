"""Words to read aloud: frozen, checked by a second implementation, and different for every change."""

from __future__ import annotations

import hashlib
import struct
from importlib.resources import files

import pytest

from common.words import coordinator_words, enrolment_words, same_words

BASE = {
    "site": "st-mary",
    "identity": bytes(range(32)),
    "transport": b"-----BEGIN PUBLIC KEY-----\n",
    "coordinator": bytes(range(32, 64)),
}
FROZEN = "worry citizen guilt spike exercise bring trash child"
FROZEN_COORDINATOR = "bottom sound blanket surge general great main canoe"


def by_hand(*parts: str | bytes) -> str:
    """The same words from PROTOCOL.md's encoding and the list's own file."""
    whole = struct.pack(">cQ", b"l", 1 + len(parts))
    for part in ("wardround/v1/fingerprint", *parts):
        raw = part.encode() if isinstance(part, str) else part
        whole += struct.pack(">cQ", b"s" if isinstance(part, str) else b"b", len(raw)) + raw
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(whole).digest()[:11])
    words = (files("mnemonic") / "wordlist/english.txt").read_text().split()
    assert len(words) == 2048
    return " ".join(words[int(bits[at : at + 11], 2)] for at in range(0, 88, 11))


def test_the_words_are_frozen_and_a_second_implementation_agrees() -> None:
    assert enrolment_words(**BASE) == FROZEN
    assert coordinator_words(bytes(range(32))) == FROZEN_COORDINATOR
    assert by_hand("enrolment", *BASE.values()) == FROZEN
    assert by_hand("coordinator", bytes(range(32))) == FROZEN_COORDINATOR


@pytest.mark.parametrize("part", BASE)
def test_another_site_or_key_has_other_words(part: str) -> None:
    value = BASE[part]
    changed = value + ("x" if isinstance(value, str) else b"x")
    assert enrolment_words(**{**BASE, part: changed}) != FROZEN


def test_what_is_heard_is_compared_without_case_spaces_and_commas() -> None:
    assert same_words(f" {FROZEN.upper()}\n", FROZEN)
    assert same_words(FROZEN.replace(" ", ", "), FROZEN)
    first, *others = FROZEN.split()
    assert not same_words(" ".join([*others, first]), FROZEN)
    assert not same_words(" ".join(others), FROZEN)
    assert not same_words("", FROZEN)
    assert not same_words("ünï", FROZEN)
