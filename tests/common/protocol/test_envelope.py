"""A message of a deployment counts for one study, one way, one question, and these payloads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError
from common.protocol.envelope import (
    COORDINATOR,
    MAX_PAYLOADS,
    NONCE_BYTES,
    check_envelope,
    sign_envelope,
)
from common.world import SeededEntropy

KEY = SiteKey.generate(SeededEntropy("a site"))
OTHER = SiteKey.generate(SeededEntropy("another site"))
STUDY, NONCE = b"s" * 32, b"n" * NONCE_BYTES
PAYLOADS = (b"first", b"", b"x" * 5_000_000)
TOLD = {"study": STUDY, "sender": "st-mary", "recipient": COORDINATOR, "nonce": NONCE}


def signed(key=KEY, payloads=PAYLOADS, code=""):
    return sign_envelope(key, **TOLD, payloads=payloads, code=code)


def check(envelope, payloads=PAYLOADS, public=KEY.public, **expected):
    check_envelope(envelope, payloads, public=public, **{**TOLD, **expected})


def test_what_was_signed_is_accepted_with_views_of_its_payloads_too():
    check(signed())
    check(signed(), [memoryview(p) for p in PAYLOADS])
    check(signed(payloads=(), code="WR-3001"), ())


ALTERED = {
    "another study is expected": lambda e: check(e, study=b"t" * 32),
    "another sender is expected": lambda e: check(e, sender="st-john"),
    "another recipient is expected": lambda e: check(e, recipient="st-john"),
    "it answers another question": lambda e: check(e, nonce=b"m" * NONCE_BYTES),
    "it is another key's": lambda e: check(e, public=OTHER.public),
    "a payload is changed": lambda e: check(e, (b"First", *PAYLOADS[1:])),
    "a payload is missing": lambda e: check(e, PAYLOADS[:-1]),
    "a payload is added": lambda e: check(e, (*PAYLOADS, b"")),
    "payloads change places": lambda e: check(e, (PAYLOADS[1], PAYLOADS[0], PAYLOADS[2])),
    "two payloads are joined": lambda e: check(e, (PAYLOADS[0] + PAYLOADS[1], PAYLOADS[2])),
    "the code is changed": lambda e: check(replace(e, code="WR-3001")),
    "the signature is changed": lambda e: check(replace(e, signature=bytes(64))),
    "the signature is short": lambda e: check(replace(e, signature=e.signature[:-1])),
    "the sender says it is another": lambda e: check(replace(e, sender="st-john"), sender="st-john"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ALTERED.values(), ids=list(ALTERED))
def test_anything_else_is_refused(attack):
    with pytest.raises(ProtocolError) as caught:
        attack(signed())
    assert caught.value.code is Code.MESSAGE_SIGNATURE


def test_a_short_nonce_and_too_many_payloads_are_refused_though_they_are_signed():
    short = sign_envelope(KEY, **{**TOLD, "nonce": b"n"}, payloads=())
    with pytest.raises(ProtocolError):
        check(short, (), nonce=b"n")
    many = (b"",) * (MAX_PAYLOADS + 1)
    with pytest.raises(ProtocolError):
        check(signed(payloads=many), many)
    check(signed(payloads=many[:-1]), many[:-1])
