"""Flower 1.41's own SecAgg+ as the known-bad: both attacks open its updates, and not ours.

An adversary test that cannot break a protocol known to be broken shows nothing about ours. The
attacks run against Flower's unmodified client functions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rogue import VICTIM, federation, halt, to_site
from schedule import kind_of

from common.crypto import labels
from common.crypto.mask import add_stream
from common.errors import Code
from common.protocol.wire import Survivors, Unmask, unpack_body, unpack_from_site
from common.secagg.masking import Lane, stream_key

mod = pytest.importorskip(
    "flwr.client.mod.secure_aggregation.secaggplus_mod", reason="flwr is not installed"
)
utils = pytest.importorskip("flwr.common.secure_aggregation.secaggplus_utils")

RING = 2**32
NODES = {100 + i: i for i in range(5)}
TARGET = 102


@pytest.fixture(scope="module")
def flower():
    """What Flower's code needs, imported once; its keys are Flower's own."""
    from flwr.common import ConfigRecord, bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto import shamir, symmetric_encryption
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.supercore.primitives import asymmetric

    class Parts:
        record, to_array, parameters = ConfigRecord, bytes_to_ndarray, ndarrays_to_parameters
        combine, shared = shamir.combine_shares, symmetric_encryption.generate_shared_key
        names, keys = Key, asymmetric

    return Parts


def folded(seed: bytes) -> int:
    """Flower's seed: the XOR of the key's 32-bit words."""
    return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))


def pair_seed(flower) -> bytes:
    private, _ = flower.keys.generate_key_pairs()
    _, public = flower.keys.generate_key_pairs()
    return flower.shared(private, public)


# ---------------------------------------------------------------- attack 1: 28 bits


def test_flowers_pair_masks_have_twenty_eight_bits(flower):
    seen = 0
    for _ in range(200):
        seen |= folded(pair_seed(flower))
    assert seen == 0x7F7F7F7F
    assert seen.bit_count() == 28


def test_flowers_pair_mask_is_found_by_search_and_the_update_read(flower):
    """The search over the 14 low bits of the 28; the other half only makes it longer."""
    seed = pair_seed(flower)
    update = np.arange(1, 9, dtype=np.int64)
    weight = np.array([123_456], np.int64)  # in clear on Flower's wire, as num_examples
    masks = utils.pseudo_rand_gen(seed, RING, [(1,), (8,)])
    masked = [(part + mask) % RING for part, mask in zip((weight, update), masks, strict=True)]
    top = folded(seed) & 0x7F7F0000
    found = []
    for guess in range(2**14):
        candidate = top | (guess & 0x7F) | ((guess >> 7) << 8)
        generator = np.random.RandomState(candidate)  # noqa: TID251 - Flower's generator
        if (masked[0][0] - generator.randint(0, RING - 1, 1, dtype=np.int64)[0]) % RING == weight[
            0
        ]:
            found.append((masked[1] - generator.randint(0, RING - 1, 8, dtype=np.int64)) % RING)
    assert any(np.array_equal(guess, update) for guess in found)


def same_fold(secret: bytes) -> bytes:
    """Another secret that Flower's folding cannot tell from this one."""
    words = np.frombuffer(secret, "<u4").copy()
    words[0] ^= 0xA5A5A5A5
    words[1] ^= 0xA5A5A5A5
    return words.tobytes()


def stream(secret: bytes) -> np.ndarray:
    lane = Lane(0, 32, 16)
    words = lane.zeros()
    add_stream(words, stream_key(secret, labels.PAIR_STREAM, lane, bytes(32)), subtract=False)
    return words


def test_two_seeds_with_one_fold_give_flower_one_mask_and_us_two(flower):
    seed = pair_seed(flower)
    twin = same_fold(seed)
    assert twin != seed
    theirs = [utils.pseudo_rand_gen(s, RING, [(16,)])[0] for s in (seed, twin)]
    assert np.array_equal(*theirs)
    ours = [stream(s[:32]) for s in (seed, twin)]
    assert not np.array_equal(*ours)


def test_the_same_search_finds_nothing_of_ours():
    secret = bytes(range(32))
    masked = stream(secret)
    top = folded(secret) & 0xFFFFC000
    for guess in range(2**14):
        fold = (top | guess).to_bytes(4, "little")
        if guess % 64 == 0:
            assert not np.array_equal(stream(fold.ljust(32, b"\0")), masked)
        generator = np.random.RandomState(top | guess)  # noqa: TID251 - Flower's generator
        assert generator.randint(0, RING - 1, 1, dtype=np.int64)[0] != masked[0]
    assert np.array_equal(stream(secret), masked)


# ---------------------------------------------------------------- attack 2: both lists


def flower_round(flower, updates: dict[int, np.ndarray]) -> tuple[dict, dict, dict]:
    """Flower's client functions through a whole round, with an honest coordinator so far."""
    names = flower.names
    setup = flower.record({
        names.SAMPLE_NUMBER: 5, names.SHARE_NUMBER: 5, names.THRESHOLD: 3, names.CLIPPING_RANGE: 8.0,
        names.TARGET_RANGE: 2**22, names.MOD_RANGE: RING, names.MAX_WEIGHT: 1000.0,
    })  # fmt: skip
    states = {nid: mod.SecAggPlusState() for nid in updates}
    public = {}
    for nid, state in states.items():
        state.nid = nid
        answer = mod._setup(state, setup)
        public[nid] = (answer[names.PUBLIC_KEY_1], answer[names.PUBLIC_KEY_2])
    relayed: dict[int, tuple[list, list]] = {nid: ([], []) for nid in states}
    for nid, state in states.items():
        answer = mod._share_keys(state, {str(k): v for k, v in public.items()})
        for to, text in zip(
            answer[names.DESTINATION_LIST], answer[names.CIPHERTEXT_LIST], strict=True
        ):
            relayed[to][0].append(nid)
            relayed[to][1].append(text)
    masked = {}
    for nid, state in states.items():
        sources, texts = relayed[nid]
        asked = {names.SOURCE_LIST: sources, names.CIPHERTEXT_LIST: texts}
        answer = mod._collect_masked_vectors(state, asked, 500, flower.parameters([updates[nid]]))
        masked[nid] = [flower.to_array(part) for part in answer[names.MASKED_PARAMETERS]]
    return states, public, masked


def test_one_request_with_both_lists_opens_an_update_of_flowers(flower):
    names = flower.names
    draw = np.random.default_rng(1)
    updates = {nid: draw.normal(0, 0.05, 200).astype(np.float32) for nid in NODES}
    states, public, masked = flower_round(flower, updates)
    everybody = list(NODES)
    asked = {names.ACTIVE_NODE_ID_LIST: everybody, names.DEAD_NODE_ID_LIST: everybody}
    self_shares, key_shares = [], []
    for state in states.values():  # no client objects to being asked for both
        shares = mod._unmask(state, asked)[names.SHARE_LIST]
        self_shares.append(shares[everybody.index(TARGET)])
        key_shares.append(shares[len(everybody) + everybody.index(TARGET)])
    shapes = [part.shape for part in masked[TARGET]]
    key = flower.keys.bytes_to_private_key(flower.combine(key_shares))
    plain = [
        y - m
        for y, m in zip(
            masked[TARGET],
            utils.pseudo_rand_gen(flower.combine(self_shares), RING, shapes),
            strict=True,
        )
    ]
    for peer in NODES:
        if peer != TARGET:
            seed = flower.shared(key, flower.keys.bytes_to_public_key(public[peer][0]))
            sign = -1 if peer < TARGET else 1
            plain = [
                y + sign * m
                for y, m in zip(plain, utils.pseudo_rand_gen(seed, RING, shapes), strict=True)
            ]
    weight, words = (part % RING for part in plain)
    read = (words * (16 / 2**22) - 8) / (int(weight.reshape(-1)[0]) / 2**22)
    assert np.abs(read - updates[TARGET]).max() < 1e-4


def test_flowers_threshold_counts_one_name_three_times(flower):
    names = flower.names
    states, _, _ = flower_round(flower, {nid: np.zeros(4, np.float32) for nid in NODES})
    asked = {names.ACTIVE_NODE_ID_LIST: [TARGET] * 3, names.DEAD_NODE_ID_LIST: []}
    assert len(mod._unmask(states[100], asked)[names.SHARE_LIST]) == 3


def test_the_same_requests_open_nothing_of_ours():
    """No message carries a list of dropouts; two lists in turn, and a name thrice, are refused."""
    world = federation()
    genuine: Survivors = halt(world, "Survivors", VICTIM)
    thrice = replace(genuine, receipts=(genuine.receipts[2],) * 4)
    assert to_site(world, VICTIM, thrice).codes == [Code.SURVIVORS_UNKNOWN.label]
    assert to_site(world, VICTIM, genuine).kinds == ["Agree"]
    without_target = replace(genuine, receipts=genuine.receipts[1:])
    refused = to_site(world, VICTIM, without_target)
    assert refused.codes == [Code.SURVIVORS_EQUIVOCATED.label]
    assert refused.kinds == []
    world.play()
    world.check()
    for _, _, payload in world.wire:
        if kind_of(payload) == "Unmask":
            unmask: Unmask = unpack_body(Unmask, unpack_from_site(payload, 2**24)[1])
            assert not set(unmask.self_shares) & set(unmask.recovery_shares)
