"""Every layer's rule, in both engines, against autograd of one patient at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import client.privacy.bookkeeping
import client.privacy.rules
from client.privacy.engine import OpacusEngine, PerSampleEngine, choose_engine
from client.privacy.patients import Patients, squared
from client.privacy.recurrence import GRUSteps, LSTMSteps
from client.privacy.recurrent import LoopGRU, LoopLSTM
from common.errors import Code, RefusedError

torch.set_num_threads(1)
ENGINES = [PerSampleEngine, OpacusEngine]
OWNERS = {
    "one row each": np.arange(6),
    "several rows each": np.array([0, 1, 0, 2, 2, 0]),
    "one patient without rows": np.array([0, 3, 3, 1, 0, 1]),
    "a single patient": np.zeros(6, np.int64),
}


def learning(module):
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def one_by_one(module, losses_of, owner, clip):
    """The clipped sum by plain autograd, and the largest norm."""
    trainable, norms = learning(module), []
    total = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for patient in np.unique(owner):
        loss = losses_of(np.flatnonzero(owner == patient)).mean()
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        found = {n: g for n, g in zip(trainable, gradients, strict=True) if g is not None}
        norms.append(size(found))
        for name, gradient in found.items():
            total[name] += gradient * min(1.0, clip / max(norms[-1], 1e-30))
    return total, max(norms)


def size(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def error(engine_type, module, losses_of, owner, clip):
    """The relative error of an engine's clipped sum."""
    expected, _ = one_by_one(module, losses_of, owner, clip)
    engine = engine_type(module, learning(module), clip)
    try:
        patients = int(owner.max()) + 1
        found = engine.clipped_sum(losses_of(np.arange(len(owner))), owner, patients).gradients
    finally:
        engine.close()
    return size({n: found[n] - expected[n] for n in found}) / size(expected)


def check(module, data, *, owners=None, engines=ENGINES, loss=None):
    torch.manual_seed(9)
    weights = torch.randn_like(module(data[:1])[0])

    def losses_of(rows):
        return (
            ((module(data[rows]) * weights).flatten(1).sum(1)).sin() if loss is None else loss(rows)
        )

    for owner in owners or OWNERS.values():
        _, largest = one_by_one(module, losses_of, owner, 1.0)
        for clip in (0.3 * largest, 10 * largest):
            for engine in engines:
                assert error(engine, module, losses_of, owner, clip) < 1e-5


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (4, 9)),
    "1d, stride and padding": (nn.Conv1d(4, 6, 3, stride=2, padding=2), (4, 9)),
    "1d, groups and dilation": (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (4, 9)),
    "1d, same": (nn.Conv1d(4, 6, 4, padding="same"), (4, 9)),
    "2d": (nn.Conv2d(3, 5, 3, padding=1), (3, 6, 7)),
    "2d, oblong": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2), (4, 6, 7)),
    "2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 6)),
    "2d, pointwise": (nn.Conv2d(20, 24, 1), (20, 2, 1)),
    "3d": (nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=2), (2, 3, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_autograd_of_one_patient_at_a_time(name):
    layer, shape = CONVOLUTIONS[name]
    torch.manual_seed(1)
    layer.reset_parameters()  # made as this file was loaded, at random
    check(layer, torch.randn(6, *shape))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_a_convolution_that_pads_with_its_own_values_is_exact_and_opacus_does_not_know_it(mode):
    torch.manual_seed(2)
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    check(layer, torch.randn(6, 2, 5, 5), engines=[PerSampleEngine])
    with refused(Code.MODEL_UNSUPPORTED):
        OpacusEngine(layer, learning(layer), 1.0)
    # Control: Opacus' sampler would take it for zero-padded.
    from opacus import GradSampleModule

    values, gradient = torch.randn(1, 2, 5, 5), torch.randn(1, 3, 5, 5)
    wrong = GradSampleModule.GRAD_SAMPLERS[nn.Conv2d](layer, [values], gradient)[layer.weight][0]
    (right,) = torch.autograd.grad(layer(values), [layer.weight], gradient)
    assert float((wrong - right).norm()) > 0.1 * float(right.norm())


@pytest.mark.parametrize("ratio", [0, 1000])
def test_convolutions_and_products_are_exact_by_ghost_norms_and_by_kept_gradients(
    ratio, monkeypatch
):
    monkeypatch.setattr(client.privacy.rules, "_KEEP", ratio)
    monkeypatch.setattr(client.privacy.rules, "_KEEP_SMALL", ratio)
    torch.manual_seed(3)
    check(nn.Conv2d(4, 6, 3, groups=2), torch.randn(6, 4, 5, 5))
    check(nn.Linear(7, 5), torch.randn(6, 4, 7))
    check(LoopLSTMOutput(), torch.randn(6, 4, 3))


NORMS = {
    "layer": (nn.LayerNorm(5), (4, 5)),
    "layer, two axes": (nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer, plain rows": (nn.LayerNorm(5), (5,)),
    "layer without bias": (nn.LayerNorm(5, bias=False), (4, 5)),
    "group": (nn.GroupNorm(2, 6), (6, 4, 3)),
    "group, plain rows": (nn.GroupNorm(2, 6), (6,)),
    "instance 1d": (nn.InstanceNorm1d(3, affine=True), (3, 7)),
    "instance 2d": (nn.InstanceNorm2d(3, affine=True), (3, 4, 4)),
    "instance 3d": (nn.InstanceNorm3d(3, affine=True), (3, 2, 3, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisations_equal_autograd_of_one_patient_at_a_time(name):
    torch.manual_seed(4)
    layer, shape = NORMS[name]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0)
    check(layer, torch.randn(6, *shape) + 3)


class LoopLSTMOutput(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer or LoopLSTM(3, 4)

    def forward(self, x):
        return self.layer(x)[0]


class GroupNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.GroupNorm(3, 12), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_a_convolutional_network_with_group_norm_is_exact():
    torch.manual_seed(5)
    check(GroupNormNet(), torch.randn(6, 3, 9, 9))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [LoopLSTM, LoopGRU])
def test_recurrent_layers_are_exact_with_lengths(kind, bidirectional, layers):
    torch.manual_seed(6)
    lengths = torch.tensor([7, 2, 5, 1, 7, 4])
    data = torch.randn(6, 7, 3)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(3, 4, layers, bidirectional=bidirectional)
            self.head = nn.Linear(4, 2)

        def forward(self, x, lengths):
            output, final = self.layer(x, lengths)
            states = final if kind is LoopGRU else final[0] + final[1]
            return self.head(states[-1]).tanh().sum(1) + output.square().sum((1, 2))

    module = Last()

    def losses_of(rows):
        return module(data[rows], lengths[rows])

    for owner in OWNERS.values():
        for clip in (0.2, 1e3):
            for engine in ENGINES:
                assert error(engine, module, losses_of, owner, clip) < 1e-5


@pytest.mark.parametrize("part", ["input", "recurrent"])
@pytest.mark.parametrize("kind", [LoopLSTM, LoopGRU])
def test_a_recurrent_layer_with_a_frozen_part_is_exact(kind, part):
    torch.manual_seed(7)
    module = LoopLSTMOutput(kind(3, 4))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(f".{part}." not in name)
    check(module, torch.randn(6, 5, 3))


def swapped(rule):
    """A rule that takes the next patient's inputs: right shapes, wrong patients."""

    def wrong(layer, pairs, patients):
        return rule(layer, [(a.roll(1, 0), g) for a, g in pairs], patients)

    return wrong


def halved(rule):
    """A rule whose norms are too small, so that it clips too little."""

    def wrong(layer, pairs, patients):
        squares, finish = rule(layer, pairs, patients)
        return squares / 4, finish

    return wrong


@pytest.mark.parametrize("mistake", [swapped, halved])
@pytest.mark.parametrize(
    ("layer", "data"),
    [
        (nn.Conv2d(2, 3, 3), torch.randn(6, 2, 5, 5)),
        (nn.GroupNorm(2, 4), torch.randn(6, 4, 3)),
        (nn.Linear(3, 4), torch.randn(6, 5, 3)),
        (LoopLSTMOutput(), torch.randn(6, 5, 3)),
    ],
    ids=["convolution", "norm", "linear", "recurrent"],
)
def test_control_a_planted_mistake_in_a_rule_is_seen(mistake, layer, data, monkeypatch):
    torch.manual_seed(8)

    def losses_of(rows):
        return layer(data[rows]).flatten(1).square().sum(1)

    honest = client.privacy.bookkeeping.rule_for
    monkeypatch.setattr(
        client.privacy.bookkeeping, "rule_for", lambda layer, name: mistake(honest(layer, name))
    )
    _, largest = one_by_one(layer, losses_of, np.arange(6), 1.0)
    assert error(PerSampleEngine, layer, losses_of, np.arange(6), 0.2 * largest) > 1e-2
    monkeypatch.undo()
    assert error(PerSampleEngine, layer, losses_of, np.arange(6), 0.2 * largest) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_micro_batches_of_any_size_add_up_to_the_whole(engine, micro):
    torch.manual_seed(10)
    module = GroupNormNet()
    data = torch.randn(10, 3, 9, 9)
    owner = np.array([0, 0, 1, 2, 3, 3, 3, 4, 5, 6])
    made = engine(module, learning(module), 0.1)

    def total(first, last):
        rows = np.flatnonzero((owner >= first) & (owner < last))
        losses = module(data[rows]).square().sum(1)
        return made.clipped_sum(losses, owner[rows] - first, last - first).gradients

    whole = total(0, 7)
    parts = [total(first, min(first + micro, 7)) for first in range(0, 7, micro)]
    summed = {name: sum(part[name] for part in parts) for name in whole}
    assert size({n: whole[n] - summed[n] for n in whole}) < 1e-5 * size(whole)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(4, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            hidden = self.inner(hidden)
        else:
            hidden = checkpoint(self.inner, hidden, use_reentrant=self.reentrant)
        return self.last(hidden)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(11)
    module = Checkpointed(reentrant=False)
    check(module, torch.randn(6, 3, 4))
    engine = PerSampleEngine(module, learning(module), 0.1)
    engine.clipped_sum(module(torch.randn(6, 3, 4)).sum((1, 2)), np.arange(6), 6)
    assert not engine._captures  # what ran again in the backward pass left nothing behind


@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpointing_hides_layers_and_is_refused(frozen):
    torch.manual_seed(12)
    module = Checkpointed(reentrant=True)
    module.first.requires_grad_(not frozen)
    engine = PerSampleEngine(module, learning(module), 0.1)
    data = torch.randn(6, 4, requires_grad=frozen)
    with refused(Code.MODEL_UNSUPPORTED):
        engine.clipped_sum(module(data).sum(1), np.arange(6), 6)
    # Control: unrefused, a frozen first layer would let the hidden ones go unnoticed.
    if frozen:
        engine._graph_checked = True
        found = engine.clipped_sum(module(data).sum(1), np.arange(6), 6).gradients
        assert not bool(found["inner.0.weight"].any())
        assert bool(found["last.weight"].any())


def test_a_bad_row_is_left_out_by_every_rule_and_by_opacus():
    torch.manual_seed(13)
    module = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 2))  # fmt: skip
    data = torch.randn(6, 2, 5)
    data[2, 0, 1] = math.nan
    owner = np.array([0, 1, 1, 2, 3, 3])

    def losses_of(rows):
        return module(data[rows]).square().sum(1)

    rest = np.array([0, 3, 4, 5])
    expected, _ = one_by_one(module, lambda rows: losses_of(rest[rows]), owner[rest], 0.1)
    for engine in ENGINES:
        made = engine(module, learning(module), 0.1)
        found = made.clipped_sum(losses_of(np.arange(6)), owner, 4)
        made.close()
        assert found.contributed == 3
        assert size({n: found.gradients[n] - expected[n] for n in expected}) < 1e-5 * size(expected)


def test_squares_below_the_smallest_float_cannot_hide_a_gradient(monkeypatch):
    """Ghost norms multiply inner products: a vanished one times a huge one must not be no norm."""
    module, clip = nn.Linear(64, 64, bias=False), 1e-5
    data = torch.full((2, 2, 64), 1e17)

    def losses(rows):
        return (module(data[rows]) * 1e-23).sum((1, 2))

    def total():
        engine = PerSampleEngine(module, learning(module), clip)
        found = engine.clipped_sum(losses(np.arange(2)), np.arange(2), 2).gradients
        engine.close()
        return size(found)

    _, norm = one_by_one(module, losses, np.arange(2), clip)
    assert norm > 10 * clip
    assert total() <= 2 * clip * 1.001
    # Control: without the allowance the two are not clipped at all.
    monkeypatch.setattr(client.privacy.rules, "_LOST", 0.0)
    assert total() > 10 * clip


def test_norms_of_millions_of_values_are_exact():
    values = torch.randn(2, 3_000_001)
    exact = values.double().square().sum(1)
    assert float(((squared(values) - exact) / exact).abs().max()) < 1e-7
    # Control: one float32 norm over all of them is not.
    plain = torch.linalg.vector_norm(values, dim=1).double().square()
    assert float(((plain - exact) / exact).abs().max()) > 1e-6


def test_inner_products_are_remembered_for_the_same_values_alone():
    patients = Patients(np.arange(3), 3, torch.device("cpu"))
    values = torch.randn(3, 4, 5)
    first = patients.gram(values)
    assert patients.gram(values.view(3, 4, 5)) is first
    other = torch.randn(3, 4, 5)
    assert torch.allclose(patients.gram(other), other @ other.mT)
    assert torch.allclose(patients.gram(values), first)


# ---------------------------------------------------------------------- which engine


def refused(code: Code):
    return pytest.raises(RefusedError, check=lambda raised: raised.code is code)


class Scaled(nn.Module):
    """A layer that Opacus alone knows, between two that both know."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_auto_takes_book_keeping_where_every_layer_has_a_rule_and_says_why():
    module = GroupNormNet()
    engine = choose_engine("auto", module, learning(module), 1.0)
    assert (engine.name, type(engine)) == ("bookkeeping", PerSampleEngine)
    assert engine.reason == "every trained layer has a book-keeping rule"


def test_auto_takes_opacus_where_a_layer_has_no_rule_and_names_the_layer():
    module = Scaled()
    engine = choose_engine("auto", module, learning(module), 1.0)
    assert (engine.name, type(engine)) == ("opacus", OpacusEngine)
    assert engine.reason == "there is no book-keeping rule for RMSNorm"
    engine.close()
    module.norm.requires_grad_(requires_grad=False)
    assert choose_engine("auto", module, learning(module), 1.0).name == "bookkeeping"


@pytest.mark.parametrize("kind", ["bookkeeping", "opacus", "auto"])
def test_every_engine_is_exact_on_a_layer_that_opacus_alone_knows(kind):
    torch.manual_seed(14)
    module, data = Scaled(), torch.randn(6, 3, 4)
    check(module, data, engines=[lambda *given: choose_engine(kind, *given)])


@pytest.mark.parametrize("kind", ["bookkeeping", "opacus"])
def test_an_engine_asked_for_is_the_engine_given(kind):
    module = nn.Linear(2, 1)
    engine = choose_engine(kind, module, learning(module), 1.5, reduced_precision=True)
    assert (engine.name, engine.reason) == (kind, "asked for by the study")
    assert engine.sensitivity == pytest.approx(1.515)


@pytest.mark.parametrize("kind", ["auto", "bookkeeping", "opacus"])
@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (nn.LSTM(3, 4), Code.MODEL_RECURRENT),
        (nn.GRU(3, 4), Code.MODEL_RECURRENT),
        (nn.BatchNorm1d(3), Code.MODEL_UNSUPPORTED),
        (nn.EmbeddingBag(5, 2), Code.MODEL_UNSUPPORTED),
        (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), Code.MODEL_BATCH_NORM),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), Code.MODEL_UNSUPPORTED),
        (nn.ConvTranspose1d(2, 2, 2), Code.MODEL_UNSUPPORTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_engine_can_tell_apart_is_refused_by_all(kind, layer, code):
    with refused(code):
        choose_engine(kind, layer, learning(layer), 1.0)


def test_the_refusal_of_a_fused_recurrent_layer_names_what_to_use_instead():
    assert "LoopLSTM" in Code.MODEL_RECURRENT.remedy
    assert LSTMSteps.gates == 4
    assert GRUSteps.gates == 3


def test_a_subclass_of_a_known_layer_has_no_rule():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x))

    module = Twice(3, 3)
    with refused(Code.MODEL_UNSUPPORTED):
        choose_engine("auto", module, learning(module), 1.0)
