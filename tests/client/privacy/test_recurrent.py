"""The written-out recurrent layers are torch's own in numbers, and keep patients apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from client.privacy import products, recurrence
from client.privacy.engine import PerSampleEngine
from client.privacy.recurrent import LoopGRU, LoopLSTM, last_valid
from common.errors import Code, RefusedError

torch.set_num_threads(1)
LENGTHS = torch.tensor([9, 3, 1, 6])
PAIRS = [(LoopLSTM, nn.LSTM), (LoopGRU, nn.GRU)]


def states_of(final):
    return list(final) if isinstance(final, tuple) else [final]


def run(layer, values, lengths, *, packed=False):
    """Outputs, final states, and the gradients of a loss over all of them."""
    values = values.clone().requires_grad_()
    if packed and lengths is not None:
        given = pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False)
        output, final = layer(given)
        output, _ = pad_packed_sequence(output, batch_first=True)
    else:
        output, final = layer(values) if packed else layer(values, lengths)
    loss = (output * torch.linspace(-1, 1, output.shape[-1])).sum()
    loss = loss + sum((state**2).sum() for state in states_of(final))
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(loss, [values, *parameters])
    return [output, *states_of(final), gradients[0]], dict(
        zip([name for name, _ in layer.named_parameters()], gradients[1:], strict=True)
    )


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_outputs_states_and_gradients_are_those_of_the_fused_layer(
    ours, theirs, layers, bidirectional, bias, lengths
):
    torch.manual_seed(1)
    fused = theirs(5, 7, layers, bias=bias, bidirectional=bidirectional, batch_first=True)
    layer = ours.from_fused(fused)
    values = torch.randn(4, 9, 5)
    found, own = run(layer, values, lengths)
    wanted, other = run(fused, values, lengths, packed=True)
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    for suffix, cell in layer._named_cells():
        at = next(i for i, c in enumerate(layer.cells) if c is cell)
        for mine, name in (("input", "ih"), ("recurrent", "hh")):
            left, right = own[f"cells.{at}.{mine}.weight"], other[f"weight_{name}_{suffix}"]
            assert torch.allclose(left, right, atol=1e-5, rtol=1e-5)
            key = f"cells.{at}.{mine}.bias"
            if key in own:
                assert torch.allclose(
                    own[key], other[f"bias_{name}_{suffix}"], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("there", [True, False], ids=["onednn", "none"])
def test_large_products_are_exact_whoever_computes_them(monkeypatch, there):
    if there and products._LINEAR is None:
        pytest.skip("this PyTorch has no such operation")
    if not there:
        monkeypatch.setattr(products, "_LINEAR", None)
    torch.manual_seed(1)
    fused = nn.LSTM(16, 96, batch_first=True)
    layer, values = LoopLSTM.from_fused(fused), torch.randn(24, 12, 16)
    assert products.fits(layer.cells[0].recurrent.weight, 24) == there
    found, own = run(layer, values, None)
    wanted, other = run(fused, values, None, packed=True)
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    for name, reference in (("input", "weight_ih_l0"), ("recurrent", "weight_hh_l0")):
        assert torch.allclose(own[f"cells.0.{name}.weight"], other[reference], rtol=1e-4, atol=1e-4)
    engine = PerSampleEngine(layer, dict(layer.named_parameters()), 0.1)
    alone = torch.zeros_like(fused.weight_hh_l0)
    for row in values:
        # Ours has one bias where torch has two that get the same gradient.
        parts = torch.autograd.grad(fused(row[None])[0].sum(), list(fused.parameters())[:3])
        norm = sum(float(part.double().square().sum()) for part in parts) ** 0.5
        alone += parts[1] * min(1.0, 0.1 / norm)
    losses = layer(values)[0].sum((1, 2))
    sums = engine.clipped_sum(losses, np.arange(24), 24).gradients
    assert torch.allclose(sums["cells.0.recurrent.weight"], alone, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_projection_is_torchs_linear_layer_forwards_and_backwards(bias):
    torch.manual_seed(4)
    layer = recurrence.Projection(40, 256, bias=bias)
    plain = nn.Linear(40, 256, bias=bias)
    plain.load_state_dict(layer.state_dict())
    assert products.fits(layer.weight, 8 * 32) == (products._LINEAR is not None)
    found = []
    for one in (layer, plain):
        values = torch.randn(8, 32, 40, generator=torch.Generator().manual_seed(5))
        values = values.transpose(0, 1).requires_grad_()  # as padded sequences may lie
        outputs = one(values)
        (outputs.sin() * torch.arange(256)).sum().backward()
        found.append((outputs.detach(), values.grad, *(p.grad for p in one.parameters())))
    for left, right in zip(*found, strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-2)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_weights_go_to_the_fused_layer_and_back(ours, theirs):
    torch.manual_seed(2)
    layer = ours(5, 7, 2, bidirectional=True)
    fused = theirs(5, 7, 2, bidirectional=True, batch_first=True)
    fused.load_state_dict(layer.fused_state())
    values = torch.randn(3, 6, 5)
    assert torch.allclose(layer(values)[0], fused(values)[0], atol=1e-6)
    back = ours.from_fused(fused)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in layer.state_dict().items())


def test_other_kinds_and_options_are_not_taken_for_plain_layers():
    for fused in (nn.GRU(3, 4), nn.LSTM(3, 4, 2, dropout=0.1), nn.LSTM(3, 4, proj_size=2)):
        with pytest.raises(ValueError, match="plain"):
            LoopLSTM.from_fused(fused)
    with pytest.raises(ValueError, match="plain"):
        LoopGRU.from_fused(nn.RNN(3, 4))
    with pytest.raises(ValueError, match="positive"):
        LoopLSTM(3, 0)
    with pytest.raises(ValueError, match="batch, time"):
        LoopLSTM(3, 4)(torch.zeros(5, 3))


@pytest.mark.parametrize("ours", [LoopLSTM, LoopGRU])
def test_padding_and_other_rows_change_nothing(ours):
    torch.manual_seed(3)
    layer = ours(5, 7, 2, bidirectional=True)
    values = torch.randn(4, 9, 5)
    output, final = layer(values, LENGTHS)
    other = values.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 1e3
        assert not bool(output[row, length:].any())
    other[0] = 7.0
    again, states = layer(other, LENGTHS)
    assert torch.equal(output[1:], again[1:])
    for left, right in zip(states_of(final), states_of(states), strict=True):
        assert torch.equal(left[:, 1:], right[:, 1:])
    # Control: the last step of a padded row is not its last valid one.
    assert not torch.allclose(last_valid(output, LENGTHS)[1], output[1, -1])


def test_a_row_without_steps_is_zero():
    states = torch.ones(2, 3, 4)
    assert last_valid(states, torch.tensor([0, 3])).sum(1).tolist() == [0, 4]


@pytest.mark.parametrize("ours", [LoopLSTM, LoopGRU])
def test_a_packed_sequence_does_not_enter(ours):
    layer = ours(5, 7)
    packed = pack_padded_sequence(torch.randn(4, 9, 5), LENGTHS, batch_first=True, enforce_sorted=False)  # fmt: skip
    with pytest.raises((ValueError, TypeError, AttributeError)):
        layer(packed)


def test_without_gradients_and_in_bfloat16_it_runs_and_learns_nothing():
    torch.manual_seed(4)
    layer = LoopLSTM(5, 7)
    values = torch.randn(4, 9, 5)
    with torch.no_grad():
        assert not layer(values)[0].requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = layer(values)[0]
    assert torch.allclose(coarse.float(), layer(values)[0], atol=0.05)


def test_a_flattened_time_axis_is_refused_where_each_step_would_be_clipped_by_itself():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = LoopLSTM(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            output = self.layer(x)[0]
            return self.head(output.reshape(-1, 4)).reshape(len(x), -1).sum(1)

    module = Flat()
    engine = PerSampleEngine(module, dict(module.named_parameters()), 1.0)
    with pytest.raises(RefusedError, check=lambda raised: raised.code is Code.BATCH_LOST):
        engine.clipped_sum(module(torch.randn(4, 6, 3)), np.arange(4), 4)
