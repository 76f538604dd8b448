"""Frozen answers of our own constructions, checked by a second, slow implementation.

`primitives.json` holds inputs and outputs. The reference below shares no code with the
packages: it writes the encoding, the key schedule, the sharing and the masks out again from
their definitions, on top of AES, SHA-256 and HMAC alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.crypto import digest, labels, mask, share
from common.crypto.identity import SiteKey, fingerprint
from common.crypto.seal import seal
from common.secagg import masking
from common.secagg.quantise import quantise

FROZEN = json.loads((Path(__file__).parent / "primitives.json").read_text())
P = 2**256 + 297

KEY = bytes(range(32))
VALUE = ("text", -5, b"\x00\xff", [1, ()], {"b": 1, "a": b"", 3: {b"k": "é"}})


# ------------------------------------------------------------------- the slow reference
def ref_encode(value) -> bytes:
    def size(number: int) -> bytes:
        return number.to_bytes(8, "big")

    if isinstance(value, bytes):
        return b"b" + size(len(value)) + value
    if isinstance(value, str):
        raw = value.encode("utf-8")
        return b"s" + size(len(raw)) + raw
    if isinstance(value, int):
        return b"i" + (value % 2**128).to_bytes(16, "big")
    if isinstance(value, dict):
        rows = sorted((ref_encode(key), ref_encode(item)) for key, item in value.items())
        return b"d" + size(len(rows)) + b"".join(key + item for key, item in rows)
    return b"l" + size(len(value)) + b"".join(ref_encode(item) for item in value)


def ref_expand(key: bytes, info: bytes, length: int) -> bytes:
    output, block = b"", b""
    for counter in range(1, 256):
        block = hmac.new(key, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block
    return output[:length]


def ref_words(key: bytes, count: int, width: int) -> list[int]:
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the definition
    raw = b"".join(cipher.update(n.to_bytes(16, "big")) for n in range(count * width // 16 + 1))
    return [int.from_bytes(raw[at : at + width], "little") for at in range(0, count * width, width)]


def ref_shares(secret: bytes, coefficients: list[int], points: list[int]) -> dict[int, bytes]:
    terms = [int.from_bytes(secret, "big"), *coefficients]
    return {
        x: (sum(term * x**power for power, term in enumerate(terms)) % P).to_bytes(33, "big")
        for x in points
    }


class Coefficients:
    """Entropy that hands out known field elements."""

    def __init__(self, values: list[int]) -> None:
        self.values = list(reversed(values))  # the highest power is drawn first

    def take(self, count: int) -> bytes:
        return self.values.pop(0).to_bytes(count, "big")


# ------------------------------------------------------------------ what is being frozen
def product() -> dict[str, str]:
    """Every frozen answer, by the packages."""
    words = np.zeros(40, np.uint32)
    mask.add_streams(words, [KEY, bytes(32)], [1, -1])
    wide = np.zeros(10, np.uint64)
    mask.add_stream(wide, KEY, subtract=False)
    lane = masking.Lane(2, 24, 1000)
    update = np.array([0.5, -0.25, 1e9, -1e9, 3e-5], np.float32)
    shares = share.split(KEY, 3, [1, 2, 7], Coefficients([P - 1, 12345]))
    site = SiteKey.from_seed(KEY)
    return {
        "encode": digest.encode(VALUE).hex(),
        "digest": digest.digest("label", *VALUE).hex(),
        "expand": digest.expand(KEY, "label", *VALUE, length=80).hex(),
        "stream_key": masking.stream_key(KEY, labels.SELF_STREAM, lane, b"u" * 32).hex(),
        "mask_32": words.tobytes().hex(),
        "mask_64": wide.tobytes().hex(),
        "shares": "".join(shares[x].hex() for x in (1, 2, 7)),
        "quantised": quantise(update, 10, bits=24, parties=5).tobytes().hex(),
        "tree": digest.tree_digest([b"a" * (5 << 20), b""]).hex(),
        "tensors": digest.tensors_digest(
            {"w": np.ones((2, 1), np.float32), "b": np.zeros((), np.int64)}
        ).hex(),
        "signature": site.sign("label", *VALUE).hex(),
        "fingerprint": fingerprint(site.public),
        "sealed": seal(KEY, b"plain", b"place", 1).hex(),
    }


def reference() -> dict[str, str]:
    """The same answers where the reference has its own way to them."""
    sha = hashlib.sha256
    info = ref_encode(("label", *VALUE))
    lane = ("wardround/v1/self-stream", 2, 24, 1000, b"u" * 32)
    pairs = zip(ref_words(KEY, 40, 4), ref_words(bytes(32), 40, 4), strict=True)
    bound = (2**23 - 1) // 5
    quantised = [512, -256, bound, -bound, 0]
    long = b"a" * (5 << 20)
    leaves = sha(long[: 4 << 20]).digest() + sha(long[4 << 20 :]).digest()
    tensors = {
        "b": ("<i8", (), sha(bytes(8)).digest()),
        "w": ("<f4", (2, 1), sha(bytes.fromhex("0000803f" * 2)).digest()),
    }
    return {
        "encode": ref_encode(VALUE).hex(),
        "digest": sha(info).hexdigest(),
        "expand": ref_expand(KEY, info, 80).hex(),
        "stream_key": ref_expand(KEY, ref_encode(lane), 32).hex(),
        "mask_32": b"".join(((a - b) % 2**32).to_bytes(4, "little") for a, b in pairs).hex(),
        "mask_64": b"".join(w.to_bytes(8, "little") for w in ref_words(KEY, 10, 8)).hex(),
        "shares": b"".join(ref_shares(KEY, [P - 1, 12345], [1, 2, 7]).values()).hex(),
        "quantised": b"".join((q % 2**32).to_bytes(4, "little") for q in quantised).hex(),
        "tree": sha(ref_encode(("wardround/v1/tree", [(len(long), leaves), (0, b"")]))).hexdigest(),
        "tensors": sha(ref_encode(("wardround/v1/tensors", tensors))).hexdigest(),
    }


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_the_frozen_answer_has_not_changed(name):
    assert product()[name] == FROZEN[name]


def test_every_construction_is_frozen():
    assert product().keys() == FROZEN.keys()


@pytest.mark.parametrize("name", sorted(reference()))
def test_the_second_implementation_agrees(name):
    assert reference()[name] == FROZEN[name]
