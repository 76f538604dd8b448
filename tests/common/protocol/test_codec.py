"""The wire: every message survives the codec, and nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.crypto.digest import decode, encode
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ProtocolError
from common.protocol import codec, wire
from common.protocol.codec import dump_record, load_record
from common.secagg.masking import Lane

MAX_BYTES = 1 << 22
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = (*wire.FROM_COORDINATOR, *wire.STATEMENTS, *wire.UPLOADS)
NESTED = (
    wire.Signed,
    wire.Witness,
    wire.Header,
    wire.Link,
    wire.Head,
    wire.Receipt,
    wire.Encapsulations,
)
ALL = pytest.mark.parametrize("kind", [*KINDS, *NESTED], ids=lambda kind: kind.__name__)
PACKED = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


# ------------------------------------------------------------------ messages of every kind
def filler(count: int):
    return st.binary(min_size=count, max_size=count)


DIGESTS = filler(32)
SITES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
NUMBERS = st.integers(0, 2**31)
SIGNED = st.builds(wire.Signed, st.binary(min_size=1, max_size=80), filler(64))
WITNESSES = st.builds(wire.Witness, st.integers(0, 2**62), DIGESTS)
LANES = st.builds(Lane, st.integers(0, 7), st.sampled_from([24, 32, 64]), st.integers(1, 2**36))
BUFFERS = st.binary(max_size=64).map(memoryview)
HEADERS = st.builds(
    wire.Header, DIGESTS, DIGESTS, DIGESTS, NUMBERS, st.text(max_size=16), NUMBERS, DIGESTS, DIGESTS,
    st.lists(LANES, max_size=4).map(tuple), st.lists(st.integers(-1000, 1000), max_size=5).map(tuple),
)  # fmt: skip


def maps(values):
    return st.dictionaries(SITES, values, max_size=3)


def lists(values, most=3):
    return st.lists(values, max_size=most).map(tuple)


LINKS = st.builds(wire.Link, HEADERS, maps(DIGESTS), maps(DIGESTS), lists(SIGNED), lists(BUFFERS))
SPECIAL = {
    "keys": lists(SIGNED), "members": lists(SITES), "site": SITES, "peer": SITES,
    "epoch": NUMBERS, "round": NUMBERS, "version": NUMBERS, "turn": NUMBERS,
    "kind": st.text(max_size=16), "code": st.text(max_size=16), "culprit": st.text(max_size=63),
    "x25519": filler(32), "x25519_secret": filler(32), "mlkem": filler(1184), "mlkem_seed": filler(64),
    "digests": maps(DIGESTS), "ciphertexts": maps(filler(1088)), "statement": SIGNED, "head": SIGNED,
    "receipt": SIGNED, "statements": lists(SIGNED), "confirmations": lists(SIGNED),
    "receipts": lists(SIGNED), "agreements": lists(SIGNED), "burns": lists(SIGNED),
    "refusals": lists(SIGNED),
    "tags": maps(filler(16)), "header": DIGESTS, "own": filler(64), "pairs": maps(filler(112)),
    "ledger": WITNESSES, "witnessed": maps(WITNESSES), "shares": maps(filler(114)),
    "planes": lists(BUFFERS, 8), "self_shares": maps(filler(49)), "recovery_shares": maps(filler(49)),
    "link": st.none() | LINKS, "base": st.none() | BUFFERS, "counter": st.integers(0, 2**62),
    "lanes": lists(LANES, 4), "exponents": lists(st.integers(-1000, 1000)), "roots": maps(DIGESTS),
    "sums": lists(BUFFERS), "body": st.binary(min_size=1, max_size=80), "signature": filler(64),
}  # fmt: skip
PER_KIND = {
    wire.RunKeys: {"keys": lists(SIGNED)},
    wire.Ready: {"blob": st.binary(min_size=16, max_size=60)},
    wire.Participants: {"heads": lists(SIGNED)},
    wire.Link: {"header": HEADERS, "heads": maps(DIGESTS)},
    wire.Witness: {"head": DIGESTS},
}


def messages(kind: type):
    chosen = {**SPECIAL, **PER_KIND.get(kind, {})}
    return st.builds(kind, **{f.name: chosen.get(f.name, DIGESTS) for f in fields(kind)})


def packed(kind: type, message) -> bytes:
    if kind in wire.STATEMENTS:
        return wire.pack_statement(kind, wire.Signed(encode(dump_record(message)), bytes(64)))
    return wire.pack(message)


def unpacked(kind: type, payload: bytes):
    if kind in wire.FROM_COORDINATOR:
        return wire.unpack_from_coordinator(payload, MAX_BYTES)
    found, message = wire.unpack_from_site(payload, MAX_BYTES)
    assert found is kind
    return wire.unpack_body(kind, message) if kind in wire.STATEMENTS else message


def repacked(payload: bytes) -> bytes | None:
    """The bytes again, if either side accepts them; None if both refuse."""
    try:
        return wire.pack(wire.unpack_from_coordinator(payload, MAX_BYTES))
    except ProtocolError:
        pass
    try:
        kind, message = wire.unpack_from_site(payload, MAX_BYTES)
    except ProtocolError:
        return None
    return wire.pack_statement(kind, message) if kind in wire.STATEMENTS else wire.pack(message)


@PACKED
@given(data=st.data())
@QUICK
def test_every_message_survives_the_wire(kind, data):
    message = data.draw(messages(kind))
    assert unpacked(kind, packed(kind, message)) == message


@ALL
@given(data=st.data())
@QUICK
def test_every_record_survives_its_encoding(kind, data):
    message = data.draw(messages(kind))
    assert load_record(kind, decode(encode(dump_record(message)), max_bytes=MAX_BYTES)) == message


@PACKED
@given(data=st.data())
@settings(QUICK, max_examples=25)
def test_altered_bytes_are_refused_or_are_another_message_in_its_only_form(kind, data):
    payload = bytearray(packed(kind, data.draw(messages(kind))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        action = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
        if action == "flip":
            payload[at] ^= data.draw(st.integers(1, 255))
        elif action == "cut" and len(payload) > 1:
            del payload[at]
        elif action == "insert":
            payload.insert(at, data.draw(st.integers(0, 255)))
        else:
            payload[at], payload[-1] = payload[-1], payload[at]
    again = repacked(bytes(payload))
    assert again is None or again == payload


@given(st.binary(max_size=200))
@settings(QUICK, max_examples=200)
def test_random_bytes_are_refused_with_a_protocol_error(payload):
    assert repacked(payload) is None


_VALUES = st.recursive(
    st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@PACKED
@given(values=st.lists(_VALUES, max_size=11))
@QUICK
def test_fields_of_a_wrong_type_are_refused_with_a_protocol_error(kind, values):
    payload = encode((kind.__name__, *values))
    again = repacked(payload)
    assert again is None or again == payload


def test_the_two_directions_know_only_their_own_messages():
    for kind in KINDS:
        payload = encode((kind.__name__,))
        theirs = (
            wire.unpack_from_site if kind in wire.FROM_COORDINATOR else wire.unpack_from_coordinator
        )
        with pytest.raises(ProtocolError) as error:
            theirs(payload, MAX_BYTES)
        assert error.value.code is Code.MALFORMED


def test_a_message_longer_than_its_bound_is_refused_before_it_is_read():
    payload = wire.pack(wire.BurnRequest(bytes(32), bytes(32), 1))
    assert wire.unpack_from_coordinator(payload, len(payload)).round == 1
    with pytest.raises(ProtocolError) as error:
        wire.unpack_from_coordinator(payload, len(payload) - 1)
    assert error.value.code is Code.OVERSIZED


# ------------------------------------------------------------------------ bounds of fields
def accepted(field: codec.Field, value: object) -> bool:
    try:
        field.load(value)
    except ValueError:
        return False
    return True


BOUNDED = [
    (codec.DIGEST, [bytes(32)], [bytes(31), bytes(33), "x" * 32, 5, ()]),
    (codec.SIGNATURE, [bytes(64)], [bytes(63), bytes(65)]),
    (codec.ROUND, [0, 2**31], [-1, 2**31 + 1, b"", "1"]),
    (codec.SITE, ["a", "a" * 63, "site-01"], ["", "a" * 64, "A", "-a", "a-", "a b", "é", b"a", 1]),
    (codec.octets(2, 3), [bytes(2), memoryview(bytes(3))], [bytes(1), bytes(4)]),
    (codec.buffer(3), [b"", memoryview(bytes(3))], [bytes(4), "abc", 3]),
    (codec.integer(-2, 2), [-2, 2], [-3, 3, True, 1.0, "1"]),
    (codec.text(2), ["", "ab"], ["abc", b"ab", 1]),
    (codec.sequence(codec.ROUND, 2), [(), (1, 2)], [(1, 2, 3), (-1,), [1], 1]),
    (codec.mapping(codec.ROUND, maximum=1), [{}, {"a": 1}], [{"a": 1, "b": 2}, {"A": 1}, {"a": -1}, {1: 1}, ()]),
    (codec.optional(codec.ROUND), [(), (1,)], [(1, 2), None, (-1,), 1]),
    (codec.record(wire.Witness), [(0, bytes(32))], [(0,), (0, bytes(32), 0), (-1, bytes(32)), (0, bytes(31)), 1]),
    (wire.LANE, [(0, 24, 1), (7, 64, 2**36)], [(8, 24, 1), (0, 23, 1), (0, 25, 1), (0, 24, 0), (0, 24), 1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "good", "bad"), BOUNDED, ids=[str(i) for i in range(len(BOUNDED))]
)
def test_every_wire_type_takes_its_last_value_and_not_the_next(field, good, bad):
    assert [accepted(field, value) for value in good] == [True] * len(good)
    assert [accepted(field, value) for value in bad] == [False] * len(bad)


@ALL
def test_every_field_of_every_record_has_a_bound(kind):
    for name, field in kind.FIELDS:
        assert not accepted(field, ((),) * 5000), name
        assert not accepted(field, -(2**100)), name
        assert not accepted(field, {f"s{i}": () for i in range(600)}), name
        if (kind.__name__, name) not in {("Signed", "body"), ("Ready", "blob")}:
            assert not accepted(field, b"\0" * 30), name
        assert not accepted(field, "Ä" * 64), name


@ALL
def test_the_table_names_every_field_of_the_record_in_order(kind):
    assert [name for name, _ in kind.FIELDS] == [f.name for f in fields(kind)]


@ALL
def test_a_field_more_or_less_is_refused(kind):
    count = len(kind.FIELDS)
    for values in ((), (0,) * (count - 1), (0,) * (count + 1)):
        with pytest.raises(ValueError, match="number of fields"):
            load_record(kind, values)


# ------------------------------------------------------------------------------ statements
def test_every_statement_has_a_label_of_its_own_and_a_signature_holds_for_one_kind_only():
    signed_kinds = [kind for kind in (*wire.STATEMENTS, *NESTED) if hasattr(kind, "LABEL")]
    labels = [kind.LABEL for kind in signed_kinds]
    assert len(labels) == len(set(labels)) == 12
    key = SiteKey.from_seed(bytes(range(32)))
    burn = wire.sign(key, wire.Burn(bytes(32), bytes(32), 1, "site-01"))
    holds = [verify(key.public, burn.signature, label, burn.body) for label in labels]
    assert holds == [label == wire.Burn.LABEL for label in labels]


def test_every_statement_that_counts_names_its_signer():
    for kind in (*wire.STATEMENTS, wire.Head, wire.Receipt, wire.Encapsulations):
        assert "site" in dict(kind.FIELDS), kind.__name__


def test_a_statement_in_another_form_is_refused():
    body = encode(dump_record(wire.Burn(bytes(32), bytes(32), 1, "site-01")))
    assert wire.unpack_body(wire.Burn, wire.Signed(body, bytes(64))).round == 1
    for other in (body + b"\0", body[:-1], encode(list(decode(body, max_bytes=999))[:3]), b"x"):
        with pytest.raises(ProtocolError) as error:
            wire.unpack_body(wire.Burn, wire.Signed(other, bytes(64)))
        assert error.value.code is Code.MALFORMED
    with pytest.raises(ProtocolError):
        wire.unpack_body(wire.Established, wire.Signed(body, bytes(64)))


def test_errors_of_the_codec_never_carry_payload():
    secret = "patient-4711"
    payload = encode(("Hello", secret.encode(), secret))
    with pytest.raises(ProtocolError) as error:
        wire.unpack_from_site(payload, MAX_BYTES)
    assert secret not in str(error.value)
    assert error.value.__cause__ is None


def test_a_changed_field_is_a_changed_message():
    burn = wire.Burn(bytes(32), bytes(32), 1, "site-01")
    others = [
        replace(burn, study=bytes([1]) + bytes(31)), replace(burn, run=bytes([1]) + bytes(31)),
        replace(burn, round=2), replace(burn, site="site-02"),
    ]  # fmt: skip
    assert len({encode(dump_record(m)) for m in (burn, *others)}) == 5
