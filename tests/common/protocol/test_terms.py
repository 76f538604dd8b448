"""How an aggregate becomes the next model, one tensor at a time."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from world import World

from common.secagg.quantise import to_signed
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec, state_digest

SITES = ("site-01", "site-02", "site-03")


def terms_of(bits: int, *, each: int, tensors: int, optimizer: str = "fedadam"):
    specs = tuple(TensorSpec(f"t{at:02}", (each,)) for at in range(tensors))
    server = ServerOptimizer(OptimizerSettings(name=optimizer))
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in specs}
    return replace(
        World(3).terms,
        layout=Layout(specs),
        ring_bits=bits,
        initial=server.initial(zeros),
        optimizer=server,
        exponents=(12,) * tensors,
    )


def words_of(terms) -> np.ndarray:
    stream = np.random.default_rng(1)
    return stream.integers(0, 1 << terms.ring_bits, terms.layout.size, np.uint32)


@pytest.mark.parametrize("bits", [24, 32])
def test_a_sum_signed_in_pieces_gives_the_model_of_the_sum_signed_at_once(bits):
    terms = terms_of(bits, each=100_000, tensors=3)
    words, lane = words_of(terms), terms.lanes(1)[0]
    whole = to_signed(words, bits)
    assert (whole < 0).any()
    assert (whole > 0).any()
    pieces = terms.signed_sum(lane, words.tobytes())
    expected, exponents = terms.apply(terms.initial, terms.exponents, whole, SITES)
    state, following = terms.apply(terms.initial, terms.exponents, pieces, SITES)
    assert state_digest(state) == state_digest(expected)
    assert following == exponents
    other, _ = terms.apply(terms.initial, terms.exponents, whole + 1, SITES)
    assert state_digest(other) != state_digest(expected)


def test_the_next_model_is_made_in_the_memory_of_that_model():
    terms = terms_of(24, each=1 << 16, tensors=16, optimizer="fedavg")
    data, lane = words_of(terms).tobytes(), terms.lanes(1)[0]

    def most(make) -> float:
        tracemalloc.start()
        try:
            kept = terms.apply(terms.initial, terms.exponents, make(), SITES)
            return tracemalloc.get_traced_memory()[1] / (4 * terms.layout.size) if kept else 0.0
        finally:
            tracemalloc.stop()

    assert most(lambda: terms.signed_sum(lane, data)) < 1.5
    # The control: the whole sum in int64 is two models more.
    assert most(lambda: to_signed(np.frombuffer(data, np.uint32), 24)) > 2.9
