"""The server optimisers: the papers' steps, the same bits, exact means and exponents."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common import strategy
from common.errors import AbortedRound, Code
from common.strategy import (
    OptimizerSettings,
    ServerOptimizer,
    control,
    initial_exponents,
    mean_update,
    model_tensors,
    next_exponents,
    released,
)

NAMES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")


@dataclass(frozen=True)
class Shape:
    name: str
    shape: tuple[int, ...]


def one(value):
    return {"w": np.array([value], np.float32)}


def reference(name, cfg, updates):
    """Algorithm 2 and FedAvgM, one scalar, in Python floats (float64), from x = 1.

    FedYogi jumps where v equals the squared update: such inputs give None.
    """
    x, m, v = 1.0, 0.0, cfg.tau**2
    for d in updates:
        if name == "fedavg":
            x += cfg.learning_rate * d
            continue
        if name == "fedavgm":
            m = cfg.momentum * m + d
            x += cfg.learning_rate * m
            continue
        m = cfg.beta1 * m + (1 - cfg.beta1) * d
        if name == "fedadagrad":
            v = v + d * d
        elif name == "fedyogi":
            if abs(v - d * d) <= 1e-4 * v:
                return None
            v = v - (1 - cfg.beta2) * d * d * math.copysign(1.0, v - d * d)
        else:
            v = cfg.beta2 * v + (1 - cfg.beta2) * d * d
        x += cfg.learning_rate * m / (math.sqrt(v) + cfg.tau)
    return x


# ------------------------------------------------------------------ hand-computed steps


def test_fedavg_adds_the_mean_update():
    optimizer = ServerOptimizer(OptimizerSettings())
    state = optimizer.apply(optimizer.initial(one(1.0)), one(0.25))
    assert set(state) == {"w"}
    assert state["w"] == np.float32(1.25)


def test_fedavgm_carries_its_velocity_forward():
    optimizer = ServerOptimizer(OptimizerSettings("fedavgm", learning_rate=0.5, momentum=0.5))
    state = optimizer.apply(optimizer.initial(one(1.0)), one(1.0))
    assert (state["w"], state["optimizer/m/w"]) == (1.5, 1.0)
    state = optimizer.apply(state, one(1.0))
    assert (state["w"], state["optimizer/m/w"]) == (2.25, 1.5)


def test_scaffold_reads_the_variates_changes_off_the_mean_update():
    """c + part * mean(-c - update / reach), which is option II's mean of changes."""
    optimizer = ServerOptimizer(OptimizerSettings("scaffold", learning_rate=0.5, reach=4.0))
    state = optimizer.apply(optimizer.initial(one(1.0)), one(2.0), part=0.5)
    assert (state["w"], state["optimizer/c/w"]) == (2.0, -0.25)
    state = optimizer.apply(state, one(1.0))
    assert (state["w"], state["optimizer/c/w"]) == (2.5, -0.25)
    assert control(state) == {"w": np.float32(-0.25)}
    assert set(model_tensors(state)) == {"w"}


@pytest.mark.parametrize("reach", [0.0, -1.0, math.inf, math.nan])
def test_scaffold_needs_to_know_how_far_the_hospitals_steps_reach(reach):
    with pytest.raises(ValueError, match="reach"):
        OptimizerSettings("scaffold", reach=reach)


# tau 1, so v starts at 1; beta1 = beta2 = 1/2; one update of 2: m = 1 and
# adam: v = 1/2 + 4/2 = 2.5 | yogi: v = 1 - 4/2 * sign(1 - 4) = 3 | adagrad: v = 1 + 4 = 5
@pytest.mark.parametrize(("name", "v"), [("fedadam", 2.5), ("fedyogi", 3.0), ("fedadagrad", 5.0)])
def test_the_adaptive_optimisers_take_algorithm_2s_first_step(name, v):
    cfg = OptimizerSettings(name, learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0)
    optimizer = ServerOptimizer(cfg)
    start = optimizer.initial(one(1.0))
    assert (start["optimizer/m/w"], start["optimizer/v/w"]) == (0.0, 1.0)
    state = optimizer.apply(start, one(2.0))
    assert state["optimizer/m/w"] == 1.0
    assert state["optimizer/v/w"] == v
    assert state["w"] == pytest.approx(1.0 + 1.0 / (math.sqrt(v) + 1.0), rel=1e-7)


def test_yogi_shrinks_its_second_moment_when_updates_become_small():
    cfg = OptimizerSettings("fedyogi", beta2=0.5, tau=1.0)
    optimizer = ServerOptimizer(cfg)
    state = optimizer.apply(optimizer.initial(one(1.0)), one(0.5))
    assert state["optimizer/v/w"] == 1.0 - 0.125


# ------------------------------------------------------------------- against a reference


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    updates=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12),
    rate=st.sampled_from([1e-2, 0.3, 1.0]),
    tau=st.sampled_from([1e-3, 1e-2, 1.0]),
)
def test_every_optimiser_follows_the_float64_reference(name, updates, rate, tau):
    cfg = OptimizerSettings(name, learning_rate=rate, momentum=0.8, beta2=0.9, tau=tau)
    optimizer = ServerOptimizer(cfg)
    state = optimizer.initial(one(1.0))
    for update in updates:
        state = optimizer.apply(state, one(update))
    expected = reference(name, cfg, updates)
    assume(expected is not None)
    assert float(state["w"][0]) == pytest.approx(expected, rel=2e-4, abs=2e-4)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_the_reference_tells_the_adaptive_optimisers_apart(name):
    others = [other for other in NAMES if other != name]
    cfg = OptimizerSettings(name, learning_rate=0.3, tau=1e-2, momentum=0.8, beta2=0.9)
    updates = [0.5, -0.1, 0.3, 0.02]
    mine = reference(name, cfg, updates)
    assert all(abs(mine - reference(other, cfg, updates)) > 2e-3 for other in others)


# --------------------------------------------------------------------------- same bits


def walk(name, chunk, monkeypatch, rounds=5):
    monkeypatch.setattr(strategy, "_CHUNK", chunk)
    rng = np.random.default_rng(7)
    shapes = {"b": (), "a.weight": (37, 11), "c": (1000,)}
    optimizer = ServerOptimizer(OptimizerSettings(name, learning_rate=0.1))
    tensors = {k: rng.standard_normal(s).astype(np.float32).reshape(s) for k, s in shapes.items()}
    state = optimizer.initial(tensors)
    for _ in range(rounds):
        mean = {
            k: (rng.standard_normal(s) * 1e-3).astype(np.float32).reshape(s)
            if s
            else np.float32(rng.standard_normal()).reshape(())
            for k, s in shapes.items()
        }
        state = optimizer.apply(state, mean)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_how_the_work_is_cut(name, monkeypatch):
    assert len({walk(name, chunk, monkeypatch) for chunk in (1, 7, 64, 1 << 16)}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_equal_single_rounded_float32_operations(name):
    """Every operation rounds once to float32: exact rationals, rounded, give the same bits."""
    cfg = OptimizerSettings(name, learning_rate=0.1, tau=1e-2)
    optimizer = ServerOptimizer(cfg)
    rng = np.random.default_rng(3)
    weights, update = rng.standard_normal((2, 200)).astype(np.float32)
    state = optimizer.apply(optimizer.initial({"w": weights}), {"w": update})
    got = state["w"]
    for index in range(200):
        assert got[index] == slow_step(name, cfg, weights[index], update[index])


def f32(value):
    """The float32 nearest to an exact rational (numpy rounds a float64; go through 1/2 ulp)."""
    guess = np.float32(float(value))
    best = [
        guess,
        np.nextafter(guess, np.float32(np.inf)),
        np.nextafter(guess, np.float32(-np.inf)),
    ]
    return min(best, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


def slow_step(name, cfg, x, d):
    ex = lambda value: Fraction(float(value))  # noqa: E731
    mul = lambda a, b: f32(ex(a) * ex(b))  # noqa: E731
    add = lambda a, b: f32(ex(a) + ex(b))  # noqa: E731
    rate, tau = np.float32(cfg.learning_rate), np.float32(cfg.tau)
    if name == "fedavg":
        return add(x, mul(rate, d))
    if name == "fedavgm":
        return add(x, mul(rate, add(mul(np.float32(cfg.momentum), 0.0), d)))
    rest1, rest2 = np.float32(1 - cfg.beta1), np.float32(1 - cfg.beta2)
    m = mul(rest1, d)
    v, square = mul(tau, tau), mul(d, d)
    if name == "fedadagrad":
        v = add(v, square)
    elif name == "fedyogi":
        v = add(v, mul(mul(rest2, square), float(np.sign(ex(square) - ex(v)))))
    else:
        v = add(mul(np.float32(cfg.beta2), v), mul(rest2, square))
    denominator = add(np.sqrt(v), tau)
    return add(x, f32(ex(mul(rate, m)) / ex(denominator)))


def test_apply_leaves_its_inputs_alone_and_shares_no_memory():
    optimizer = ServerOptimizer(OptimizerSettings("fedadam"))
    weights = one(1.0)
    state = optimizer.initial(weights)
    before = {k: v.copy() for k, v in state.items()}
    after = optimizer.apply(state, one(0.5))
    assert all(np.array_equal(state[k], before[k]) for k in state)
    assert not any(np.shares_memory(after[k], state[k]) for k in state)
    assert not np.shares_memory(state["w"], weights["w"])
    assert set(model_tensors(after)) == {"w"}
    assert {a.dtype for a in after.values()} == {np.dtype(np.float32)}


def test_a_model_that_leaves_the_finite_numbers_aborts_the_round():
    optimizer = ServerOptimizer(OptimizerSettings(learning_rate=10.0))
    with pytest.raises(AbortedRound) as caught:
        optimizer.apply(optimizer.initial(one(3e38)), one(3e38))
    assert caught.value.code is Code.MODEL_DIVERGED


def test_a_process_that_flushes_subnormals_is_refused(monkeypatch):
    class Flushing:
        smallest_subnormal = np.float32(0)

    optimizer = ServerOptimizer(OptimizerSettings())
    optimizer.apply(optimizer.initial(one(1.0)), one(1.0))
    monkeypatch.setattr(np, "finfo", lambda _: Flushing)
    with pytest.raises(AbortedRound) as caught:
        optimizer.apply(one(1.0), one(1.0))
    assert caught.value.code is Code.ARITHMETIC_FLUSHES


@pytest.mark.parametrize(
    ("state", "update"),
    [
        ({"w": np.zeros(2, np.float32)}, {"v": np.zeros(2, np.float32)}),
        ({"w": np.zeros(2, np.float32)}, {}),
        ({"w": np.zeros(2, np.float32)}, {"w": np.zeros((2, 1), np.float32)}),
        ({"w": np.zeros(2, np.float32)}, {"w": np.zeros(2)}),
        (
            {"w": np.zeros(2, np.float32), "optimizer/m/w": np.zeros(2, np.float32)},
            {"w": np.zeros(2, np.float32)},
        ),
    ],
)
def test_a_state_and_an_update_that_do_not_match_are_a_bug(state, update):
    with pytest.raises(ValueError, match=r"match|shape|float32"):
        ServerOptimizer(OptimizerSettings()).apply(state, update)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"momentum": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"tau": 0.0},
        {"tau": 1e-30},
    ],
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r".+"):
        OptimizerSettings(**wrong)


# ------------------------------------------------------------------- means and exponents


SHAPES = (Shape("a", (2, 2)), Shape("b", (3,)), Shape("c", ()))


def test_the_mean_is_the_sum_over_scale_and_weights():
    signed = np.array([16, -16, 8, 0, 3, 6, -9, 1], np.int64)
    mean = mean_update(signed, SHAPES, {"a": 3, "b": 0, "c": -1}, [1.0, 0.5])
    assert mean["a"].tolist() == [
        [np.float32(16 / 8 / 1.5), np.float32(-16 / 8 / 1.5)],
        [np.float32(1 / 1.5), 0.0],
    ]
    assert mean["b"].tolist() == [2.0, 4.0, -6.0]
    assert mean["c"].shape == ()
    assert mean["c"] == np.float32(2 / 1.5)
    assert {m.dtype for m in mean.values()} == {np.dtype(np.float32)}


def test_the_mean_does_not_depend_on_the_order_of_the_weights():
    weights = [0.1, 0.2, 0.3]
    signed = np.arange(1, 2**22, 997, dtype=np.int64)
    shape = (Shape("a", (signed.size,)),)
    plain = [functools.reduce(operator.add, w) for w in (weights, weights[::-1])]
    assert plain[0] != plain[1], "the control: a plain float sum depends on it"
    seen = []
    for order in (weights, weights[::-1], sorted(weights)):
        divisors = []
        real = math.ldexp
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strategy.math, "ldexp", lambda x, e: divisors.append(x) or real(x, e))  # noqa: B023
            mean_update(signed, shape, {"a": 5}, order)
        seen.append(divisors)
    assert seen[0] == seen[1] == seen[2]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20),
    exponent=st.integers(-20, 40),
    weight=st.floats(0.25, 100),
)
def test_the_mean_is_the_exact_quotient_rounded(words, exponent, weight):
    mean = mean_update(
        np.array(words, np.int64), (Shape("a", (len(words),)),), {"a": exponent}, [weight]
    )
    for got, word in zip(mean["a"], words, strict=True):
        exact = Fraction(word) / (Fraction(2) ** exponent * Fraction(weight))
        assert got == pytest.approx(float(exact), rel=2**-23)


def test_sizes_and_weights_that_make_no_mean_are_refused():
    with pytest.raises(ValueError, match="numbers"):
        mean_update(np.zeros(9, np.int64), SHAPES, {"a": 0, "b": 0, "c": 0}, [1.0])
    with pytest.raises(ValueError, match="weights"):
        mean_update(np.zeros(8, np.int64), SHAPES, {"a": 0, "b": 0, "c": 0}, [0.0])
    with pytest.raises(ValueError, match="exponent"):
        mean_update(np.zeros(8, np.int64), SHAPES, {"a": 500, "b": 0, "c": 0}, [1.0])


def test_the_first_exponents_make_the_public_range_just_fit():
    assert initial_exponents(SHAPES, limit=838_860, largest=1.0) == {"a": 19, "b": 19, "c": 19}
    assert initial_exponents(SHAPES, limit=1 << 20, largest=1.0)["a"] == 20
    assert initial_exponents(SHAPES, limit=1 << 20, largest=1.0000001)["a"] == 19


def slow_exponent(words, exponent, weights, largest_weight, limit):
    rms = math.sqrt(sum(int(w) ** 2 for w in words) / len(words)) * 2.0**-exponent / sum(weights)
    return math.floor(math.log2(limit / (largest_weight * max(64 * rms, 2.0**-12))))


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    exponent=st.integers(0, 30),
    largest=st.sampled_from([1.0, 2.5]),
    limit=st.sampled_from([838_860, 2**30]),
)
def test_the_next_exponents_follow_the_float_formula(words, exponent, largest, limit):
    got = next_exponents(
        np.array(words, np.int64),
        (Shape("a", (len(words),)),),
        {"a": exponent},
        weights=[1.0, largest],
        largest_weight=largest,
        limit=limit,
    )
    slow = slow_exponent(words, exponent, [1.0, largest], largest, limit)
    near = abs(math.log2(limit) % 1) < 1e-9
    assert got["a"] == slow or (near and abs(got["a"] - slow) <= 1)


def test_an_exponent_falls_exactly_at_a_power_of_two():
    """RMS 1, range 64: limit 2**20 gives exactly 14, one less gives 13."""
    words, shape = np.array([1, -1, 1, -1], np.int64), (Shape("a", (4,)),)

    def at(limit):
        return next_exponents(
            words, shape, {"a": 0}, weights=[1.0], largest_weight=1.0, limit=limit
        )

    assert at(2**20) == {"a": 14}
    assert at(2**20 - 1) == {"a": 13}


def test_a_tensor_that_stood_still_keeps_the_floor_range():
    words, shape = np.zeros(4, np.int64), (Shape("a", (4,)),)
    got = next_exponents(words, shape, {"a": 9}, weights=[1.0], largest_weight=1.0, limit=2**20)
    assert got == {"a": 32}


def test_the_square_sum_is_exact_where_int64_would_wrap():
    words = np.full(strategy._CHUNK + 5, -(2**31), np.int64)
    assert strategy._square_sum(words) == len(words) * 2**62
    assert int((words * words).sum()) != len(words) * 2**62, "the control: plain int64 wraps"
    with pytest.raises(ValueError, match="32 bits"):
        strategy._square_sum(np.array([2**32], np.int64))


# ------------------------------------------------------------------ the running average


@pytest.mark.parametrize("name", NAMES)
def test_the_average_follows_the_models_and_leaves_their_way_alone(name):
    chosen = {"learning_rate": 0.1, "tau": 0.1}
    plain = ServerOptimizer(OptimizerSettings(name, **chosen))
    averaging = ServerOptimizer(OptimizerSettings(name, average=0.5, **chosen))
    state, other = plain.initial(one(1.0)), averaging.initial(one(1.0))
    average = 1.0
    for turn in range(1, 12):
        update = one(math.sin(turn))
        state, other = plain.apply(state, update), averaging.apply(other, update)
        decay = min(0.5, (1 + turn) / (10 + turn))
        average += (1 - decay) * (float(state["w"][0]) - average)
        assert other["w"] == state["w"]
        assert float(released(other)["w"][0]) == pytest.approx(average, rel=1e-5)
    assert released(other)["w"] != other["w"]
    assert model_tensors(other)["w"] == released(other)["w"]
    assert set(model_tensors(other)) == {"w"}
    assert released(state)["w"] == state["w"]


def test_an_average_that_the_settings_do_not_ask_for_is_refused():
    averaging = ServerOptimizer(OptimizerSettings(average=0.5))
    with pytest.raises(ValueError, match="slots"):
        ServerOptimizer(OptimizerSettings()).apply(averaging.initial(one(1.0)), one(1.0))
    with pytest.raises(ValueError, match="average"):
        OptimizerSettings(average=1.0)
