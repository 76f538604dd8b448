"""Identities, key agreement, sealing and sharing."""

from __future__ import annotations

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from common.crypto import share
from common.crypto.agree import EphemeralKeys, encapsulate, pair_key
from common.crypto.digest import encode
from common.crypto.identity import SiteKey, Verifier, check_public, fingerprint, verify
from common.crypto.seal import Vault, seal, unseal
from common.errors import Code, ProtocolError, StorageError

P = 2**255 - 19
ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303021640


# ------------------------------------------------------------------------------ identity
def test_a_signature_holds_for_its_label_and_parts_only(seeded):
    key = SiteKey.generate(seeded(1))
    signature = key.sign("label", 1, b"x")
    assert verify(key.public, signature, "label", 1, b"x")
    assert not verify(key.public, signature, "other", 1, b"x")
    assert not verify(key.public, signature, "label", 1, b"y")
    assert not verify(key.public, signature[:-1], "label", 1, b"x")
    assert not verify(SiteKey.generate(seeded(2)).public, signature, "label", 1, b"x")


def test_a_key_survives_its_seed_and_hides_it(seeded):
    key = SiteKey.generate(seeded(1))
    again = SiteKey.from_seed(key.seed())
    assert again.public == key.public
    assert again.sign("l") == key.sign("l")
    for shown in (repr(key), str(key)):
        assert key.seed().hex() not in shown
        assert repr(key.seed()) not in shown
        assert fingerprint(key.public) in shown


def test_a_fingerprint_is_eight_groups_of_four(seeded):
    text = fingerprint(SiteKey.generate(seeded(1)).public)
    assert [len(group) for group in text.split(" ")] == [4] * 8
    assert text != fingerprint(SiteKey.generate(seeded(2)).public)


@pytest.mark.parametrize("y", [0, 1, P - 1, P, P + 1, ORDER_8, P - ORDER_8, 2, 2**255 - 1])
@pytest.mark.parametrize("sign", [0, 1])
def test_a_weak_or_malformed_public_key_is_refused(y, sign):
    """The eight points of small order, non-canonical encodings, and a y that is no point."""
    public = (y | sign << 255).to_bytes(32, "little")
    with pytest.raises(ProtocolError) as caught:
        verify(public, bytes(64), "label")
    assert caught.value.code is Code.BAD_KEY


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_public_key_of_another_length_is_refused(length):
    with pytest.raises(ProtocolError):
        check_public(bytes(length))


def test_without_the_check_a_small_order_key_signs_every_message():
    """The control: what the library accepts and `verify` must not."""
    identity = (1).to_bytes(32, "little")
    forged = identity + bytes(32)
    for message in (b"one", b"another"):
        Ed25519PublicKey.from_public_bytes(identity).verify(forged, message)
    with pytest.raises(ProtocolError):
        Verifier().verify_message(identity, forged, b"one")


def test_ordinary_keys_are_points_of_the_curve(seeded):
    for seed in range(50):
        check_public(SiteKey.generate(seeded(seed)).public)


def test_only_signatures_that_held_are_remembered(seeded):
    verifier = Verifier()
    key = SiteKey.generate(seeded(1))
    signature = key.sign("l", 1)
    for _ in range(3):
        assert verifier.verify(key.public, signature, "l", 1)
        assert not verifier.verify(key.public, signature, "l", 2)
    assert len(verifier) == 1


def test_a_remembered_signature_vouches_for_no_other_signature_key_or_message(seeded):
    verifier = Verifier()
    key, other = SiteKey.generate(seeded(1)), SiteKey.generate(seeded(2))
    signature = key.sign("l", 1)
    assert verifier.verify(key.public, signature, "l", 1)
    assert not verifier.verify(key.public, other.sign("l", 1), "l", 1)
    assert not verifier.verify(key.public, bytes(64), "l", 1)
    assert not verifier.verify(other.public, signature, "l", 1)
    assert not verifier.verify(key.public, signature, "l", 2)


def test_the_memory_of_signatures_is_bounded_and_forgetting_changes_no_answer(seeded):
    verifier = Verifier(capacity=8)
    key = SiteKey.generate(seeded(1))
    signatures = [key.sign("l", number) for number in range(30)]
    for _ in range(2):
        for number, signature in enumerate(signatures):
            assert verifier.verify(key.public, signature, "l", number)
            assert len(verifier) <= 8
    assert not verifier.verify(key.public, signatures[0], "l", 1)


# ----------------------------------------------------------------------------- agreement
def agree(own, peer, shared, ciphertext, **changes):
    arguments = {
        "own": own,
        "peer_x25519": peer.public[0],
        "kem_shared": shared,
        "ciphertext": ciphertext,
        "salt": b"s" * 32,
        "low": "a",
        "high": "b",
    }
    return pair_key(**{**arguments, **changes})


def test_both_sides_reach_one_key_and_every_input_is_bound(seeded):
    a, b, c = (EphemeralKeys.generate(seeded(seed)) for seed in (1, 2, 3))
    shared, ciphertext = encapsulate(b.public[1])
    assert b.decapsulate(ciphertext) == shared
    key = agree(a, b, shared, ciphertext)
    assert agree(b, a, shared, ciphertext) == key
    others = [
        agree(a, c, shared, ciphertext),
        agree(a, b, bytes(32), ciphertext),
        agree(a, b, shared, ciphertext + b"x"),
        agree(a, b, shared, ciphertext, salt=b"t" * 32),
        agree(a, b, shared, ciphertext, low="b", high="a"),
        agree(a, b, shared, ciphertext, high="c"),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_revealed_keys_are_the_keys_and_seeded_entropy_repeats_them(seeded):
    keys = EphemeralKeys.generate(seeded(1))
    assert EphemeralKeys.from_revealed(*keys.reveal()).public == keys.public
    assert EphemeralKeys.generate(seeded(1)).public == keys.public
    assert keys.reveal()[0].hex() not in repr(keys)
    assert keys.reveal()[1].hex() not in repr(keys)


def test_malformed_or_weak_agreement_material_is_refused(seeded):
    keys = EphemeralKeys.generate(seeded(1))
    attempts = [
        lambda: keys.exchange(bytes(32)),
        lambda: keys.exchange(b"\x01" + bytes(31)),
        lambda: keys.exchange(bytes(31)),
        lambda: keys.decapsulate(bytes(1087)),
        lambda: encapsulate(bytes(1183)),
        lambda: encapsulate(b"\xff" * 1184),
        lambda: EphemeralKeys.from_revealed(bytes(31), bytes(64)),
        lambda: EphemeralKeys.from_revealed(bytes(32), bytes(63)),
    ]
    for attempt in attempts:
        with pytest.raises(ProtocolError) as caught:
            attempt()
        assert caught.value.code is Code.BAD_AGREEMENT


# ------------------------------------------------------------------------------- sealing
def test_a_sealed_message_opens_in_its_place_only():
    key = bytes(range(32))
    sealed = seal(key, b"shares", b"hh", "site-a", 3)
    assert sealed == AESGCM(key).encrypt(bytes(12), b"shares", encode((b"hh", "site-a", 3)))
    assert unseal(key, sealed, b"hh", "site-a", 3) == b"shares"
    wrong = [
        (bytes(32), sealed, (b"hh", "site-a", 3)),
        (key, sealed, (b"hh", "site-b", 3)),
        (key, sealed, (b"hh", "site-a")),
        (key, sealed[:-1] + bytes((sealed[-1] ^ 1,)), (b"hh", "site-a", 3)),
        (key, sealed[:10], (b"hh", "site-a", 3)),
        (key, b"", (b"hh", "site-a", 3)),
    ]
    for attempt, ciphertext, associated in wrong:
        with pytest.raises(ProtocolError) as caught:
            unseal(attempt, ciphertext, *associated)
        assert caught.value.code is Code.BROKEN_SEAL


def test_sealing_twice_under_one_key_shows_the_difference_of_the_plaintexts():
    """The control that says why a key seals once: equal nonces make equal key streams."""
    key = bytes(range(32))
    one, two = seal(key, b"\x00" * 8), seal(key, b"\x0f" * 8)
    assert bytes(x ^ y for x, y in zip(one[:8], two[:8], strict=True)) == b"\x0f" * 8


def test_a_vault_record_opens_in_its_place_under_its_key_only(seeded):
    vault = Vault(bytes(range(32)), seeded(1))
    sealed = vault.seal(b"state", b"place")
    assert vault.open(sealed, b"place") == b"state"
    assert vault.seal(b"state", b"place") != sealed
    for other, record, context in [
        (vault, sealed, b"elsewhere"),
        (Vault(bytes(32), seeded(1)), sealed, b"place"),
        (vault, sealed[:-1], b"place"),
        (vault, sealed[:27], b"place"),
        (vault, b"", b"place"),
    ]:
        with pytest.raises(StorageError) as caught:
            other.open(record, context)
        assert caught.value.code is Code.BROKEN_VAULT
    with pytest.raises(ValueError, match="32 bytes"):
        Vault(bytes(16), seeded(1))


# ------------------------------------------------------------------------------- sharing
def test_any_threshold_of_the_shares_recover_the_secret(seeded):
    secret = bytes(range(32))
    shares = share.split(secret, 3, range(1, 7), seeded(1))
    assert {len(part) for part in shares.values()} == {33}
    for size in (3, 4, 6):
        for points in itertools.combinations(shares, size):
            assert share.combine({x: shares[x] for x in points}, 3) == secret


@given(st.binary(min_size=32, max_size=32), st.integers(2, 12), st.data())
def test_random_subsets_recover_random_secrets(seeded, secret, parties, data):
    threshold = data.draw(st.integers(1, parties))
    points = data.draw(
        st.lists(st.integers(1, 65535), min_size=parties, max_size=parties, unique=True)
    )
    shares = share.split(secret, threshold, points, seeded(data.draw(st.integers(0, 2**32))))
    chosen = data.draw(st.permutations(points))[:threshold]
    assert share.combine({x: shares[x] for x in chosen}, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_extreme_secrets_are_field_elements(seeded, secret):
    shares = share.split(secret, 2, (1, 2, 3), seeded(1))
    assert share.combine(shares, 2) == secret


def completion(shares: dict[int, bytes], point: int, secret: bytes) -> bytes:
    """The share at `point` that would make `shares` and itself mean `secret`."""
    points = tuple(sorted((*shares, point)))
    weights = dict(zip(points, share._weights_at_zero(points), strict=True))
    known = sum(weights[x] * int.from_bytes(part, "big") for x, part in shares.items())
    missing = (int.from_bytes(secret, "big") - known) * pow(weights[point], -1, share.PRIME)
    return (missing % share.PRIME).to_bytes(33, "big")


@given(st.binary(min_size=32, max_size=32))
def test_shares_below_the_threshold_fit_every_secret_and_at_the_threshold_one(seeded, other):
    secret = bytes(range(32))
    shares = share.split(secret, 3, (1, 2, 3, 4), seeded(1))
    two = {x: shares[x] for x in (1, 3)}
    invented = completion(two, 4, other)
    assert share.combine({**two, 4: invented}, 3) == other
    # The control: three shares leave one secret, and one value for every other share.
    assert (invented == shares[4]) == (other == secret)
    assert completion({x: shares[x] for x in (1, 3)}, 2, secret) == shares[2]


def test_shares_below_the_threshold_look_the_same_for_any_secret(seeded):
    """One share of two, over many splits: its mean does not move with the secret."""

    def mean(secret: bytes, threshold: int) -> float:
        values = [
            int.from_bytes(share.split(secret, threshold, (1, 2), seeded(seed))[1], "big")
            for seed in range(400)
        ]
        return sum(values) / len(values) / share.PRIME

    low, high = bytes(32), b"\xff" * 32
    assert abs(mean(low, 2) - mean(high, 2)) < 0.08  # standard error 0.02
    # The control: with threshold 1 a single share is the secret.
    assert abs(mean(low, 1) - mean(high, 1)) > 0.9


def test_malformed_shares_are_refused_and_foreign_ones_do_not_pass_for_the_secret(seeded):
    secret = bytes(range(32))
    shares = share.split(secret, 2, (1, 2, 3), seeded(1))
    for bad in (b"", shares[1][:-1], share.PRIME.to_bytes(33, "big"), b"\xff" * 33):
        with pytest.raises(ProtocolError) as caught:
            share.combine({1: bad, 2: shares[2]}, 2)
        assert caught.value.code is Code.BAD_SHARE
    foreign = share.split(secret, 2, (1, 2, 3), seeded(2))
    assert share.combine({1: shares[1], 2: foreign[2]}, 2) != secret
    overflow = {1: share.split(bytes(32), 1, (1,), seeded(1))[1]}
    overflow[1] = (2**256).to_bytes(33, "big")
    with pytest.raises(ProtocolError):
        share.combine(overflow, 1)


def test_sharing_refuses_what_has_no_meaning(seeded):
    entropy = seeded(1)
    for secret, threshold, points in [
        (bytes(31), 2, (1, 2)),
        (bytes(32), 3, (1, 2)),
        (bytes(32), 0, (1, 2)),
        (bytes(32), 2, (1, 1)),
        (bytes(32), 2, (0, 1)),
        (bytes(32), 2, (1, 65536)),
    ]:
        with pytest.raises(ValueError, match=r"bytes|threshold|points"):
            share.split(secret, threshold, points, entropy)
    with pytest.raises(ValueError, match="threshold"):
        share.combine({1: bytes(33)}, 2)


def test_coefficients_are_drawn_below_the_prime_by_rejection():
    class Scripted:
        def __init__(self, *draws: int) -> None:
            self.draws = list(draws)

        def take(self, count: int) -> bytes:
            return self.draws.pop(0).to_bytes(count, "big")

    entropy = Scripted(share.PRIME, 2**257 - 1, share.PRIME - 1)
    assert share._field_element(entropy) == share.PRIME - 1
    assert entropy.draws == []
