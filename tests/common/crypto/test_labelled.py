"""What is encoded once for many keys is what each key would have encoded itself."""

from __future__ import annotations

import enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.crypto.digest import encode, expand, hkdf_expand, labelled, opening
from common.protocol.wire import Signed, Upload, claims, pack
from common.secagg.masking import Lane, stream_key, stream_keys

PART = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=20),
    st.integers(-(2**127), 2**127 - 1),
    st.lists(st.binary(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=3),
)


@given(st.text(max_size=20), st.lists(PART, max_size=5))
def test_labelled_is_the_encoding_of_label_and_parts(label, parts):
    assert labelled(label, *parts) == encode((label, *parts))
    assert encode((label, *parts)).startswith(opening(label, len(parts)))
    assert expand(bytes(32), label, *parts) == hkdf_expand(bytes(32), labelled(label, *parts))


def test_labelled_refuses_what_the_encoding_refuses():
    class Plain(bytes):
        pass

    class Word(enum.StrEnum):
        ONE = "one"

    for strange in (True, None, 1.5, Plain(b"x"), Word.ONE):
        with pytest.raises(TypeError):
            labelled("label", strange)


def test_many_stream_keys_are_single_ones_in_order():
    lane, secrets = Lane(0, 24, 10), [bytes([i]) * 32 for i in range(5)]
    keys = stream_keys(secrets, "label", lane, bytes(32))
    assert keys == [stream_key(secret, "label", lane, bytes(32)) for secret in secrets]
    assert len(set(keys)) == 5


def test_a_message_claims_its_own_kind_and_no_other():
    upload = pack(Upload(Signed(b"body", bytes(64)), (memoryview(b"plane"),)))
    assert claims(upload, Upload)
    assert not claims(upload[1:], Upload)
    assert not claims(encode(("Uploads", b"", ())), Upload)
    assert not claims(encode(("Upload", b"")), Upload)
