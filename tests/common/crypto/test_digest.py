from __future__ import annotations

import enum
import hashlib
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from common.crypto import labels
from common.crypto.digest import (
    CHUNK_BYTES,
    TreePart,
    decode,
    digest,
    encode,
    encode_parts,
    expand,
    tensors_digest,
    tree_digest,
    tree_root,
)
from common.errors import Code, ProtocolError

INTS = st.integers(-(2**127), 2**127 - 1)
SCALARS = st.one_of(st.binary(max_size=40), st.text(max_size=20), INTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(tuple), st.dictionaries(SCALARS, inner, max_size=5)
    ),
    max_leaves=25,
)


def read(data, **limits):
    return decode(data, **{"max_bytes": 1 << 20, **limits})


@given(VALUES)
def test_decoding_undoes_encoding(value):
    assert read(encode(value)) == value
    assert read(memoryview(encode(value)), views=True) == value


@given(VALUES, VALUES)
def test_two_values_share_an_encoding_only_if_they_are_equal(one, other):
    assert (encode(one) == encode(other)) == (one == other)


@given(VALUES, st.data())
def test_a_mutated_encoding_is_refused_or_means_something_else(value, data):
    original = encode(value)
    changed = bytearray(original)
    at = data.draw(st.integers(0, len(original) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = read(bytes(changed))
    except ProtocolError:
        return
    assert decoded != value
    assert encode(decoded) == bytes(changed)


@given(
    st.lists(
        st.one_of(
            st.sampled_from([b"b", b"s", b"i", b"l", b"d"]),
            st.integers(0, 3).map(lambda n: n.to_bytes(8, "big")),
            st.binary(max_size=16),
        ),
        max_size=20,
    ).map(b"".join)
)
def test_bytes_that_decode_are_exactly_what_their_value_encodes_to(data):
    try:
        value = read(data)
    except ProtocolError:
        return
    assert encode(value) == data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Code.MALFORMED),
        (encode(1) + b"\0", Code.MALFORMED),
        (encode(1)[:-1], Code.MALFORMED),
        (b"x" + bytes(8), Code.MALFORMED),
        (b"s" + (1).to_bytes(8, "big") + b"\xff", Code.MALFORMED),
        (b"s" + (2).to_bytes(8, "big") + b"\xc0\x80", Code.MALFORMED),
        (b"b" + (2**63).to_bytes(8, "big"), Code.MALFORMED),
        (b"d" + (2).to_bytes(8, "big") + encode(2) + encode(0) + encode(1) + encode(0), None),
        (b"d" + (2).to_bytes(8, "big") + (encode(1) + encode(0)) * 2, Code.MALFORMED),
        (b"d" + (1).to_bytes(8, "big") + encode(()) + encode(0), Code.OVERSIZED),
    ],
)
def test_what_is_not_canonical_is_refused(data, code):
    with pytest.raises(ProtocolError) as caught:
        read(data)
    assert caught.value.code is (code or Code.MALFORMED)


def test_sorted_keys_are_the_control_that_is_accepted():
    data = b"d" + (2).to_bytes(8, "big") + encode(1) + encode(0) + encode(2) + encode(0)
    assert read(data) == {1: 0, 2: 0}


def test_bounds_hold_before_memory_is_taken():
    endless = (2**40).to_bytes(8, "big")
    tracemalloc.start()
    for kind in (b"l", b"d", b"b", b"s"):
        with pytest.raises(ProtocolError):
            read(kind + endless + encode(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_each_bound_is_the_last_value_accepted():
    nested = ((((1,),),),)
    assert read(encode(nested), max_depth=4) == nested
    assert read(encode((1, 2, 3)), max_items=4) == (1, 2, 3)
    assert read(encode(b"abc"), max_bytes=12) == b"abc"
    for value, limits in [
        (nested, {"max_depth": 3}),
        ((1, 2, 3), {"max_items": 3}),
        (b"abc", {"max_bytes": 11}),
        ((), {"max_depth": 0}),
    ]:
        with pytest.raises(ProtocolError) as caught:
            read(encode(value), **limits)
        assert caught.value.code is Code.OVERSIZED


def test_an_error_never_carries_payload():
    secret = "patient-4711"
    raw = bytearray(encode((secret, {"k": secret})))
    raw[20] = 0xFF  # inside the first string, which is then no UTF-8
    with pytest.raises(ProtocolError) as caught:
        read(bytes(raw))
    assert "patient" not in caught.value.report()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "value", [True, None, 1.5, {1, 2}, np.int64(3), Colour.RED, {True: 1}, {(1,): 1}, (None,)]
)
def test_a_type_outside_the_table_has_no_encoding(value):
    with pytest.raises(TypeError):
        encode(value)


@pytest.mark.parametrize("value", [2**127, -(2**127) - 1, "\ud800"])
def test_a_value_outside_its_range_has_no_encoding(value):
    with pytest.raises(ValueError, match=r"128 bits|surrogates"):
        encode(value)


def test_large_byte_strings_are_views_of_the_message_and_small_ones_are_copies():
    data = encode({"large": bytes(4096), "small": bytes(4095)})
    value = read(data, views=True)
    assert isinstance(value["large"], memoryview)
    assert value["large"].obj is data
    assert value["large"].readonly
    assert isinstance(value["small"], bytes)
    assert read(bytearray(data), views=True)["large"].readonly
    assert isinstance(read(data)["large"], bytes)
    assert encode(value) == data


def test_large_byte_strings_are_encoded_without_a_copy():
    array = np.arange(5000, dtype=np.uint32)
    parts = encode_parts(("x", memoryview(array)))
    assert any(isinstance(part, memoryview) and part.nbytes == array.nbytes for part in parts)
    assert b"".join(parts) == encode(("x", array.tobytes()))
    with pytest.raises(ValueError, match="contiguous"):
        encode(memoryview(array)[::2])


def test_neighbouring_parts_do_not_run_into_each_other():
    assert digest("l", "ab", "c") != digest("l", "a", "bc")
    assert digest("l", ("a", "b")) != digest("l", "a", "b")
    assert digest("l", b"a") != digest("l", "a")
    # The control: plain concatenation, which this encoding replaces, does collide.
    assert hashlib.sha256(b"ab" + b"c").digest() == hashlib.sha256(b"a" + b"bc").digest()


@given(st.binary(min_size=16, max_size=64), st.integers(1, 200), SCALARS)
def test_expand_is_hkdf_expand(key, length, part):
    info = encode(("label", part))
    expected = HKDFExpand(hashes.SHA256(), length, info).derive(key)
    assert expand(key, "label", part, length=length) == expected


def test_labels_are_distinct_and_versioned():
    values = [value for name, value in vars(labels).items() if name.isupper()]
    assert len(set(values)) == len(values)
    assert all(value.startswith("wardround/v1/") for value in values)


# --------------------------------------------------------------------------------- trees
def slow_tree(parts: list[bytes]) -> bytes:
    leaves = [
        b"".join(
            hashlib.sha256(part[at : at + CHUNK_BYTES]).digest()
            for at in range(0, len(part), CHUNK_BYTES)
        )
        for part in parts
    ]
    return digest(
        labels.TREE, [(len(part), leaf) for part, leaf in zip(parts, leaves, strict=True)]
    )


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_a_tree_digest_covers_chunks_and_lengths(size):
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    assert tree_digest([data, b"x"]) == slow_tree([data, b"x"])
    part, tail = TreePart(), TreePart()
    for at in range(0, size, 1_000_003):
        part.update(data[at : at + 1_000_003])
    tail.update(b"x")
    assert tree_root([part, tail]) == slow_tree([data, b"x"])


def test_moving_a_byte_between_parts_changes_a_tree_digest():
    assert tree_digest([b"ab", b"c"]) != tree_digest([b"a", b"bc"])
    assert tree_digest([b""]) != tree_digest([])


# ------------------------------------------------------------------------------- tensors
def test_tensors_that_differ_in_name_type_shape_or_bytes_differ_in_digest():
    base = np.zeros((2, 3), np.float32)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.astype(np.float64)},
        {"a": base.view(np.int32)},
        {"a": base.reshape(3, 2)},
        {"a": base.reshape(6)},
        {"a": base + 1},
        {"a": np.zeros((), np.float32)},
        {"a": np.zeros((1,), np.float32)},
        {"a": np.zeros((0, 3), np.float32)},
        {"a": np.zeros((3, 0), np.float32)},
        {},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)


def test_memory_layout_and_order_of_names_do_not_matter():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.ones(2, np.int64)
    expected = tensors_digest({"a": a, "b": b})
    assert tensors_digest({"b": b, "a": np.asfortranarray(a)}) == expected
    assert tensors_digest({"b": b.astype(">i8"), "a": a}) == expected
    with pytest.raises(TypeError):
        tensors_digest({"a": np.array(["text"])})
