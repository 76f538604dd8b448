from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from common.crypto.mask import BLOCK_BYTES, Streams, add_stream, add_streams

KEYS = [bytes((number,)) * 32 for number in range(1, 6)]
SIGNS = [1, -1, 1, 1, -1]
WORDS = [np.uint32, np.uint64]


def slow_stream(key: bytes, count: int, word: type) -> np.ndarray:
    """AES of every counter, one block at a time, read as little-endian words."""
    size = np.dtype(word).itemsize * count
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the definition
    blocks = b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(-(-size // 16)))
    return np.frombuffer(blocks[:size], np.dtype(word).newbyteorder("<"))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("count", [0, 1, 3, 5000])
def test_a_stream_is_aes_of_the_counters_as_little_endian_words(word, count):
    words = np.zeros(count, word)
    add_stream(words, KEYS[0], subtract=False)
    assert np.array_equal(words, slow_stream(KEYS[0], count, word))
    add_stream(words, KEYS[0], subtract=True)
    assert not words.any()


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("extra", [-1, 0, 7])
def test_threads_and_pieces_do_not_change_the_result(word, extra):
    count = 5 * BLOCK_BYTES // np.dtype(word).itemsize + extra
    start = np.arange(count, dtype=word)
    one, two, pieces = start.copy(), start.copy(), start.copy()
    add_streams(one, KEYS, SIGNS)
    add_streams(two, KEYS, SIGNS, threads=3)
    streams = Streams(KEYS, SIGNS)
    for part in np.array_split(pieces, 7):
        streams.add(part)
    assert np.array_equal(one, two)
    assert np.array_equal(one, pieces)
    by_definition = start.copy()
    for key, sign in zip(KEYS, SIGNS, strict=True):
        stream = np.zeros(count, word)
        add_stream(stream, key, subtract=False)
        by_definition += stream if sign > 0 else -stream
    assert np.array_equal(one, by_definition)


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_a_mask_added_and_subtracted_leaves_the_words(key, values):
    words = np.array(values, np.uint32)
    masked = words.copy()
    add_stream(masked, key, subtract=False)
    add_stream(masked, key, subtract=True)
    assert np.array_equal(masked, words)


def test_a_stream_key_serves_once_and_signs_are_signs():
    words = np.zeros(8, np.uint32)
    for keys, signs in [
        ([KEYS[0], KEYS[0]], [1, -1]),
        (KEYS[:2], [1]),
        (KEYS[:1], [0]),
        ([bytes(16)], [1]),
    ]:
        with pytest.raises(ValueError, match=r"key|sign"):
            add_streams(words, keys, signs)
    assert not words.any()


@pytest.mark.parametrize(
    "words",
    [
        np.zeros(8, np.int32),
        np.zeros(8, np.uint16),
        np.zeros(8, ">u4"),
        np.zeros((2, 4), np.uint32),
        np.zeros(16, np.uint32)[::2],
        np.frombuffer(bytes(32), np.uint32),
    ],
)
def test_words_are_one_writable_line_of_32_or_64_bits(words):
    with pytest.raises(TypeError, match="words"):
        add_stream(words, KEYS[0], subtract=False)
