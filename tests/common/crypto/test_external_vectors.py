"""Published vectors through our own wrappers: all hold, and none holds once a bit is flipped."""

from __future__ import annotations

from pathlib import Path

import cryptography_vectors
import numpy as np

from common.crypto.agree import EphemeralKeys, encapsulate
from common.crypto.digest import hkdf_expand, hkdf_extract
from common.crypto.identity import SiteKey, Verifier
from common.crypto.mask import Streams
from common.crypto.seal import Vault
from common.errors import ProtocolError, StorageError

unhex = bytes.fromhex
VECTORS = Path(cryptography_vectors.__file__).parent
ANY_KEM_SEED = bytes(64)
ANY_X25519 = bytes(31) + b"\x01"


def flipped(text: str) -> str:
    """The same hex string with one bit of its first byte changed."""
    raw = bytearray(unhex(text))
    raw[0] ^= 1
    return raw.hex()


def records(path: str) -> list[dict[str, str]]:
    """NIST-style `NAME = value` blocks, one dict per COUNT."""
    found: list[dict[str, str]] = []
    for line in (VECTORS / path).read_text().splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if name == "COUNT":
            found.append({})
        elif equals and found:
            found[-1][name.upper()] = value
    return found


# ----------------------------------------------------------------------------------- X25519
def x25519_holds(secret: str, public: str, shared: str) -> bool:
    keys = EphemeralKeys(unhex(secret), ANY_KEM_SEED)
    try:
        return keys.exchange(unhex(public)) == unhex(shared)
    except ProtocolError:
        return unhex(shared) == bytes(32)  # a small-order key must be refused, and only that


def test_every_wycheproof_x25519_vector_holds(wycheproof):
    pairs = wycheproof("x25519_test")
    assert all(x25519_holds(t["private"], t["public"], t["shared"]) for _, t in pairs)
    assert sum("ZeroSharedSecret" in t["flags"] for _, t in pairs) == 31
    assert not any(x25519_holds(t["private"], t["public"], flipped(t["shared"])) for _, t in pairs)


def test_rfc_7748_vectors_hold():
    vectors = records("asymmetric/X25519/rfc7748.txt")
    single = [v for v in vectors if v["INPUT_SCALAR"] != v["INPUT_U"]]
    assert len(single) >= 2
    for v in single:
        assert x25519_holds(v["INPUT_SCALAR"], v["INPUT_U"], v["OUTPUT_U"])
        assert not x25519_holds(v["INPUT_SCALAR"], v["INPUT_U"], flipped(v["OUTPUT_U"]))


# ---------------------------------------------------------------------------------- Ed25519
def ed25519_accepts(public: str, signature: str, message: str) -> bool:
    try:
        return Verifier().verify_message(unhex(public), unhex(signature), unhex(message))
    except ProtocolError:
        return False


def test_every_wycheproof_ed25519_vector_holds(wycheproof):
    pairs = wycheproof("ed25519_test")
    for group, test in pairs:
        accepted = ed25519_accepts(group["publicKey"]["pk"], test["sig"], test["msg"])
        assert accepted == (test["result"] == "valid"), test["tcId"]
    valid = [(g, t) for g, t in pairs if t["result"] == "valid"]
    assert len(valid) == 88
    assert not any(
        ed25519_accepts(g["publicKey"]["pk"], flipped(t["sig"]), t["msg"]) for g, t in valid
    )


def test_rfc_8032_vectors_sign_and_verify():
    lines = (VECTORS / "asymmetric/Ed25519/sign.input").read_text().split()
    assert len(lines) == 1024
    for line in lines[::16]:
        secret, public, message, signed, _ = line.split(":")
        key = SiteKey.from_seed(unhex(secret)[:32])
        signature = signed[:128]
        assert key.public == unhex(public)
        assert key._private.sign(unhex(message)) == unhex(signature)
        assert ed25519_accepts(public, signature, message)
        assert not ed25519_accepts(public, flipped(signature), message)


# ------------------------------------------------------------------------------------- HKDF
def hkdf_holds(ikm: str, salt: str, info: str, size: int, okm: str) -> bool:
    try:
        return hkdf_expand(hkdf_extract(unhex(salt), unhex(ikm)), unhex(info), size) == unhex(okm)
    except ValueError:
        return okm == ""


def test_every_wycheproof_hkdf_vector_holds(wycheproof):
    pairs = wycheproof("hkdf_sha256_test")
    assert all(hkdf_holds(t["ikm"], t["salt"], t["info"], t["size"], t["okm"]) for _, t in pairs)
    valid = [t for _, t in pairs if t["result"] == "valid"]
    assert len(valid) == 83
    assert not any(
        hkdf_holds(t["ikm"], t["salt"], t["info"], t["size"], flipped(t["okm"])) for t in valid
    )


def test_rfc_5869_vectors_hold():
    vectors = [v for v in records("KDF/rfc-5869-HKDF-SHA256.txt") if v["HASH"] == "SHA-256"]
    assert len(vectors) >= 3
    for v in vectors:
        salt, info = v.get("SALT", ""), v.get("INFO", "")
        assert hkdf_extract(unhex(salt), unhex(v["IKM"])) == unhex(v["PRK"])
        assert hkdf_holds(v["IKM"], salt, info, int(v["L"]), v["OKM"])
        assert not hkdf_holds(v["IKM"], salt, info, int(v["L"]), flipped(v["OKM"]))


# ------------------------------------------------------------------------------ AES-256-GCM
class Fixed:
    def __init__(self, nonce: bytes) -> None:
        self.nonce = nonce

    def take(self, count: int) -> bytes:
        assert count == len(self.nonce)
        return self.nonce


def gcm_opens(test: dict, tag: str) -> bool:
    vault = Vault(unhex(test["key"]), Fixed(b""))
    try:
        opened = vault.open(unhex(test["iv"] + test["ct"] + tag), unhex(test["aad"]))
    except StorageError:
        return False
    return opened == unhex(test["msg"])


def test_every_wycheproof_aes_256_gcm_vector_of_our_shape_holds(wycheproof):
    tests = [
        t
        for g, t in wycheproof("aes_gcm_test")
        if (g["keySize"], g["ivSize"], g["tagSize"]) == ("256", "96", "128")
        or (g["keySize"], g["ivSize"], g["tagSize"]) == (256, 96, 128)
    ]
    valid = [t for t in tests if t["result"] == "valid"]
    assert len(tests) > 60
    assert len(valid) > 30
    for test in tests:
        assert gcm_opens(test, test["tag"]) == (test["result"] == "valid"), test["tcId"]
    for test in valid:
        vault = Vault(unhex(test["key"]), Fixed(unhex(test["iv"])))
        sealed = vault.seal(unhex(test["msg"]), unhex(test["aad"]))
        assert sealed == unhex(test["iv"] + test["ct"] + test["tag"])
        assert not gcm_opens(test, flipped(test["tag"]))


# ------------------------------------------------------------------------------- ML-KEM-768
def kem_answer(test: dict) -> str | None:
    """The decapsulated secret, or None where seed or ciphertext was refused."""
    try:
        keys = EphemeralKeys.from_revealed(ANY_X25519, unhex(test["seed"]))
        return keys.decapsulate(unhex(test["c"])).hex()
    except ProtocolError:
        return None


def test_every_wycheproof_mlkem_768_vector_holds(wycheproof):
    tests = [t for _, t in wycheproof("mlkem_768_test")]
    for test in tests:
        expected = test["K"] if test["result"] == "valid" else None
        assert kem_answer(test) == expected, test["tcId"]
        if expected is not None:
            keys = EphemeralKeys.from_revealed(ANY_X25519, unhex(test["seed"]))
            assert keys.public[1] == unhex(test["ek"])
            changed = {**test, "c": flipped(test["c"])}
            assert kem_answer(changed) not in (None, expected)
    assert sum(t["result"] == "valid" for t in tests) == 153


def test_every_wycheproof_mlkem_768_encapsulation_key_is_judged_right(wycheproof):
    """The vectors fix the encapsulation's randomness, which our wrapper leaves to the library:
    the judgement of every key is checked here, the secret itself by the round trip below."""
    outcomes = []
    for _, test in wycheproof("mlkem_768_encaps_test"):
        try:
            shared, ciphertext = encapsulate(unhex(test["ek"]))
            accepted = (len(shared), len(ciphertext)) == (32, 1088)
        except ProtocolError:
            accepted = False
        assert accepted == (test["result"] == "valid"), test["tcId"]
        outcomes.append(accepted)
    assert (outcomes.count(True), outcomes.count(False)) == (133, 132)


def test_an_encapsulated_secret_is_decapsulated_by_its_key_alone(seeded):
    first, second = (EphemeralKeys.generate(seeded(seed)) for seed in (1, 2))
    shared, ciphertext = encapsulate(first.public[1])
    assert first.decapsulate(ciphertext) == shared
    assert second.decapsulate(ciphertext) != shared


# ------------------------------------------------------------------------------ AES-256-CTR
def test_mask_streams_are_aes_256_ctr_of_sp_800_38a_and_rfc_3686():
    sp800_38a = {
        "KEY": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "IV": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
        "PLAINTEXT": "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
        "CIPHERTEXT": "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
    }
    for v in [sp800_38a, *records("ciphers/AES/CTR/aes-256-ctr.txt")]:
        plain, cipher = unhex(v["PLAINTEXT"]), unhex(v["CIPHERTEXT"])
        expected = bytes(a ^ b for a, b in zip(plain, cipher, strict=True))
        words = np.zeros(16, np.uint32)
        start = int.from_bytes(unhex(v["IV"]), "big") * 16
        Streams([unhex(v["KEY"])], [1], start=start).add(words)
        assert words.tobytes()[: len(expected)] == expected
        other = np.zeros(16, np.uint32)
        Streams([unhex(flipped(v["KEY"]))], [1], start=start).add(other)
        assert other.tobytes()[: len(expected)] != expected
