from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.crypto import labels
from common.crypto.digest import tree_digest
from common.crypto.mask import add_stream, add_streams
from common.errors import Code, DataError, ProtocolError
from common.secagg.masking import (
    Lane,
    add_packed,
    masked_planes,
    pack,
    planes_over,
    stream_key,
    unpack,
)
from common.secagg.quantise import BLOCK_WORDS, limit, quantise_layout, to_signed
from common.secagg.quorum import colluders, quorum

BITS = [24, 32, 64]
UH1 = b"u" * 32


def secret_of(*who: object) -> bytes:
    return repr(who).encode().ljust(32, b".")[:32]


def peers(site: int, parties: int, lane: Lane) -> tuple[list[bytes], list[int]]:
    """The stream keys of one site, its self mask first, and their signs."""
    keys = [stream_key(secret_of("self", site), labels.SELF_STREAM, lane, UH1)]
    signs = [1]
    for peer in range(parties):
        if peer != site:
            low, high = sorted((site, peer))
            secret = secret_of("pair", low, high)
            keys.append(stream_key(secret, labels.PAIR_STREAM, lane, UH1))
            signs.append(1 if site < peer else -1)
    return keys, signs


def random_words(rng: np.random.Generator, lane: Lane, parties: int) -> np.ndarray:
    bound = limit(lane.bits, parties)
    values = rng.integers(-bound, bound, size=lane.length, endpoint=True, dtype=np.int64)
    values[:2] = (bound, -bound)
    return values


def aggregate(values: list[np.ndarray], survivors: tuple[int, ...], lane: Lane) -> np.ndarray:
    """A round's arithmetic: mask, pack, add up, and take off what no survivor cancels."""
    parties = len(values)
    total = lane.zeros()
    for site in survivors:
        words = values[site].astype(np.int64).view(np.uint64).astype(lane.word)
        add_streams(words, *peers(site, parties, lane))
        add_packed(total, pack(words, lane.bits), lane.bits)
    for site in survivors:
        own = stream_key(secret_of("self", site), labels.SELF_STREAM, lane, UH1)
        add_stream(total, own, subtract=True)
        for dropped in set(range(parties)) - set(survivors):
            low, high = sorted((site, dropped))
            key = stream_key(secret_of("pair", low, high), labels.PAIR_STREAM, lane, UH1)
            add_stream(total, key, subtract=site < dropped)
    return to_signed(total, lane.bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("parties", [3, 4, 5, 6])
def test_masks_cancel_for_every_set_of_survivors(bits, parties):
    rng = np.random.default_rng(parties)
    lane = Lane(1, bits, 17)
    values = [random_words(rng, lane, parties) for _ in range(parties)]
    least = quorum(parties, colluders(parties))
    for size in range(least, parties + 1):
        for survivors in itertools.combinations(range(parties), size):
            expected = sum(values[site] for site in survivors)
            assert np.array_equal(aggregate(values, survivors, lane), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 20), st.sampled_from(BITS), st.data())
def test_masks_cancel_for_random_numbers_of_parties_and_dropouts(parties, bits, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lane = Lane(2, bits, data.draw(st.integers(2, 40)))
    values = [random_words(rng, lane, parties) for _ in range(parties)]
    order = data.draw(st.permutations(range(parties)))
    size = data.draw(st.integers(quorum(parties, colluders(parties)), parties))
    survivors = tuple(sorted(order[:size]))
    expected = sum(values[site] for site in survivors)
    assert np.array_equal(aggregate(values, survivors, lane), expected)


@pytest.mark.parametrize("bits", BITS)
def test_one_stream_left_in_the_sum_is_the_control_that_stays_unreadable(bits):
    rng = np.random.default_rng(1)
    lane = Lane(1, bits, 64)
    values = [random_words(rng, lane, 4) for _ in range(4)]
    total = aggregate(values, (0, 1, 2), lane)
    words = total.view(np.uint64).astype(lane.word)
    add_stream(words, peers(0, 4, lane)[0][0], subtract=False)
    assert not np.array_equal(to_signed(words, bits), sum(values[:3]))


# ---------------------------------------------------------------------------------- lanes
def test_no_two_lanes_share_a_stream():
    lanes = [
        Lane(number, bits, length) for number in (0, 1) for bits in BITS for length in (64, 65)
    ]
    keys = {
        stream_key(secret, label, lane, uh1)
        for secret in (b"a" * 32, b"b" * 32)
        for label in (labels.SELF_STREAM, labels.PAIR_STREAM)
        for lane in lanes
        for uh1 in (UH1, b"v" * 32)
    }
    assert len(keys) == len(lanes) * 8
    first = np.zeros(64, np.uint32)
    second = first.copy()
    add_stream(first, stream_key(b"a" * 32, labels.SELF_STREAM, lanes[0], UH1), subtract=False)
    add_stream(second, stream_key(b"a" * 32, labels.SELF_STREAM, lanes[2], UH1), subtract=False)
    assert not np.intersect1d(first, second).size


def test_a_key_used_for_two_lanes_is_the_control_that_shows_their_difference():
    key = stream_key(b"a" * 32, labels.SELF_STREAM, Lane(0, 32, 64), UH1)
    one, two = np.full(64, 7, np.uint32), np.full(64, 9, np.uint32)
    add_stream(one, key, subtract=False)
    add_stream(two, key, subtract=False)
    assert np.array_equal(two - one, np.full(64, 2, np.uint32))


@pytest.mark.parametrize("arguments", [(0, 16, 4), (0, 0, 4), (-1, 32, 4), (0, 32, -1)])
def test_a_lane_has_a_known_width(arguments):
    with pytest.raises(ValueError, match="lane"):
        Lane(*arguments)


# --------------------------------------------------------------------------------- planes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [0, 1, 5, BLOCK_WORDS, BLOCK_WORDS + 1])
def test_packing_keeps_every_word_modulo_its_ring(bits, length):
    rng = np.random.default_rng(length)
    lane = Lane(0, bits, length)
    words = rng.integers(0, 2 ** (8 * lane.word.itemsize), length, dtype=np.uint64)
    words = words.astype(lane.word)
    planes = pack(words, bits)
    assert tuple(plane.nbytes for plane in planes) == lane.plane_bytes
    assert sum(lane.plane_bytes) == length * {24: 3, 32: 4, 64: 8}[bits]
    expected = words & np.array((1 << bits) - 1, np.uint64).astype(lane.word)
    assert np.array_equal(unpack([plane.tobytes() for plane in planes], bits, length), expected)
    total = words.copy()
    add_packed(total, [memoryview(plane) for plane in planes], bits)
    assert np.array_equal(total, words + expected)


def test_the_planes_of_24_bits_are_the_low_two_bytes_then_the_high_one():
    low, high = pack(np.array([0xAA_01_02_03, 0xBB_04_05_06], np.uint32), 24)
    assert low.tobytes() == bytes.fromhex("03020605")
    assert high.tobytes() == bytes.fromhex("0104")


@pytest.mark.parametrize("bits", BITS)
def test_planes_of_another_length_are_refused_before_anything_is_added(bits):
    lane = Lane(0, bits, 8)
    good = [bytes(size) for size in lane.plane_bytes]
    wrong = [
        [],
        good[:-1],
        [*good, b""],
        [*good[:-1], good[-1] + b"\x01"],
        [*good[:-1], good[-1][:-1]],
        [*good[:-1], bytes(lane.word.itemsize)],  # one word: numpy alone would broadcast it
    ]
    total = lane.zeros()
    add_packed(total, good, bits)
    for planes in wrong:
        with pytest.raises(ProtocolError) as caught:
            add_packed(total, planes, bits)
        assert caught.value.code is Code.BAD_PLANES
    assert not total.any()
    with pytest.raises(ValueError, match="lane"):
        add_packed(np.zeros(8, np.uint64 if bits != 64 else np.uint32), good, bits)


def test_a_one_word_plane_is_the_control_that_numpy_broadcasts():
    assert np.add(np.zeros(8, np.uint32), np.ones(1, np.uint32)).tolist() == [1] * 8


# ------------------------------------------------------------------------------ one pass
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("size", [0, 1, BLOCK_WORDS - 1, 2 * BLOCK_WORDS + 77])
def test_one_pass_is_exactly_the_composition(bits, size):
    update = np.random.default_rng(size).normal(size=size).astype(np.float32)
    sizes = [size // 3, 0, size // 3, size - 2 * (size // 3)]
    exponents = [18, 3, 18, 25]
    keys, signs = peers(1, 4, Lane(0, bits, size))
    layout = {"exponents": exponents, "sizes": sizes, "bits": bits, "parties": 4}
    words = quantise_layout(update, **layout)
    add_streams(words, keys, signs)
    expected = pack(words, bits)
    planes, root = masked_planes(update, **layout, keys=keys, signs=signs)
    reused = [np.full_like(plane, 1) for plane in planes]
    again, same_root = masked_planes(update, **layout, keys=keys, signs=signs, out=reused)
    for plane, one, two in zip(expected, planes, again, strict=True):
        assert np.array_equal(plane, one)
        assert np.array_equal(plane, two)
    assert all(np.shares_memory(a, b) or not size for a, b in zip(again, reused, strict=True))
    assert root == same_root == tree_digest(expected)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("size", [0, 1, 7, 5 * BLOCK_WORDS + 77])
def test_masking_over_the_update_is_the_same_and_leaves_no_plain_word_at_32_bits(bits, size):
    update = np.random.default_rng(size).normal(size=size).astype(np.float32)
    keys, signs = peers(1, 4, Lane(0, bits, size))
    layout = {"exponents": [18], "sizes": [size], "bits": bits, "parties": 4}
    expected, root = masked_planes(update, **layout, keys=keys, signs=signs)
    consumed = update.copy()
    over = planes_over(consumed, bits)
    planes, same_root = masked_planes(consumed, **layout, keys=keys, signs=signs, out=over)
    assert root == same_root
    assert all(np.array_equal(one, two) for one, two in zip(planes, expected, strict=True))
    if bits == 32:
        assert np.shares_memory(planes[0], consumed) or not size
        assert not np.any(consumed.view(np.uint32) == update.view(np.uint32))
    for wrong in (update.astype(np.int32), update.astype(np.float64), update.reshape(-1, 1)):
        with pytest.raises((TypeError, ValueError)):
            planes_over(wrong, bits)


def test_one_pass_refuses_what_its_parts_refuse():
    update = np.zeros(4, np.float32)
    layout = {"exponents": [0], "sizes": [4], "parties": 3, "keys": [b"k" * 32], "signs": [1]}
    with pytest.raises(ProtocolError):
        masked_planes(update, bits=24, out=[np.zeros(4, np.uint32)], **layout)
    update[3] = np.nan
    with pytest.raises(DataError):
        masked_planes(update, bits=24, **layout)


# ---------------------------------------------------------------------------- uniformity
def chi_square(planes: list[np.ndarray]) -> float:
    """The statistic of all bytes against the uniform distribution: mean 255, s.d. 22.6."""
    data = np.concatenate([plane.view(np.uint8) for plane in planes])
    counts = np.bincount(data, minlength=256)
    mean = data.size / 256
    return float(((counts - mean) ** 2 / mean).sum())


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("kind", ["zeros", "gaussian"])
def test_masked_words_are_uniform_and_unmasked_or_half_masked_ones_are_not(bits, kind):
    size = 200_000
    update = np.zeros(size, np.float32)
    if kind == "gaussian":
        update = np.random.default_rng(0).normal(size=size).astype(np.float32)
    layout = {"exponents": [12], "sizes": [size], "bits": bits, "parties": 3}
    keys, signs = peers(0, 3, Lane(0, bits, size))
    six_sigma = 255 + 6 * 22.6
    for count in range(1, len(keys) + 1):
        planes, _ = masked_planes(update, **layout, keys=keys[:count], signs=signs[:count])
        assert chi_square(planes) < six_sigma
    # The controls: no mask at all, and a mask of 16 bits a word.
    words = quantise_layout(update, **layout)
    assert chi_square(pack(words, bits)) > six_sigma
    half = np.zeros(size, np.uint32)
    add_stream(half, keys[0], subtract=False)
    assert chi_square(pack(words + (half & np.uint32(0xFFFF)), bits)) > six_sigma
