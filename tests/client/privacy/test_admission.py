"""Which models are let in: structure, exactness, independence; each trap beside its naive victim."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from client.privacy.admission import admit, refuse_batch_norm
from common.errors import Code, RefusedError

torch.set_num_threads(1)
LABELS = 3


class Toy:
    """A learner over a module and one tensor of inputs; patient p owns row p."""

    def __init__(self, module, data, *, losses=None):
        torch.manual_seed(0)
        self.module, self.data = module, data
        self.labels = torch.arange(len(data)) % LABELS
        self._losses = losses

    def trainable(self):
        return {n: p for n, p in sorted(self.module.named_parameters()) if p.requires_grad}

    def patient_count(self):
        return len(self.data)

    def held_out_count(self):
        return 0

    def rows_of(self, patients):
        return patients, np.arange(len(patients))

    def losses(self, rows):
        if self._losses is not None:
            return self._losses(self.module, self.data[rows], self.labels[rows])
        logits = self.module(self.data[rows])
        return functional.cross_entropy(logits, self.labels[rows], reduction="none")

    def measure(self):
        raise NotImplementedError


def refused(code: Code):
    return pytest.raises(RefusedError, check=lambda error: error.code is code)


def test_an_ordinary_model_is_admitted_and_left_as_it_was():
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, LABELS))
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    admit(Toy(module, torch.randn(5, 4)))
    assert module.training
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_a_site_without_patients_still_gets_the_checks_of_structure():
    admit(Toy(nn.Linear(4, LABELS), torch.zeros(0, 4)))
    with refused(Code.MODEL_BATCH_NORM):
        admit(Toy(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.zeros(0, 4)))


class BatchNormAct2d(nn.BatchNorm2d):
    """As image libraries subclass it."""


class FrozenBatchNorm(nn.Module):
    """As detection libraries re-implement it, without the common ancestor."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, affine=False),
        BatchNormAct2d(4),
        FrozenBatchNorm(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_batch_normalisation_of_any_make_is_refused(layer):
    for parameter in layer.parameters():
        parameter.requires_grad_(requires_grad=False)
    with refused(Code.MODEL_BATCH_NORM):
        refuse_batch_norm(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)))


def test_frozen_batch_normalisation_passes_the_usual_validator_and_leaks():
    """Control: what refusing by ancestry prevents."""
    from opacus.validators import ModuleValidator

    frozen = nn.BatchNorm1d(4)
    for parameter in frozen.parameters():
        parameter.requires_grad_(requires_grad=False)
    module = nn.Sequential(nn.Linear(4, 4), frozen).train()
    assert ModuleValidator.validate(module) == []
    assert ModuleValidator.validate(nn.Sequential(BatchNormAct2d(4))) == []
    before = frozen.running_mean.clone()
    module(torch.randn(8, 4) + 5)
    assert not torch.equal(frozen.running_mean, before)


def test_a_loss_divided_by_the_weights_of_the_batch_is_refused():
    weights = torch.tensor([1.0, 5.0, 20.0])

    def coupled(module, data, labels):
        each = functional.cross_entropy(module(data), labels, weight=weights, reduction="none")
        return each / weights[labels].sum()

    def reduced(module, data, labels):
        return functional.cross_entropy(module(data), labels, weight=weights)

    module, data = nn.Linear(4, LABELS), torch.randn(4, 4)
    with refused(Code.GRADIENT_INEXACT):
        admit(Toy(module, data, losses=coupled))
    with refused(Code.LOSS_SHAPE):
        admit(Toy(module, data, losses=reduced))

    def independent(module, data, labels):
        each = functional.cross_entropy(module(data), labels, reduction="none")
        return each * weights[labels]

    admit(Toy(module, data, losses=independent))


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_the_reduced_weighted_loss_couples_records_in_the_naive_engine():
    """Control: the gradient of record 0 changes when only record 4's label does."""
    from opacus import GradSampleModule

    weights = torch.tensor([1.0, 5.0, 20.0])
    torch.manual_seed(1)
    data, norms = torch.randn(5, 4), []
    plain = nn.Linear(4, LABELS)
    for label in (0, 2):
        module = GradSampleModule(nn.Linear(4, LABELS))
        module._module.load_state_dict(plain.state_dict())
        labels = torch.tensor([0, 1, 0, 1, label])
        functional.cross_entropy(module(data), labels, weight=weights).backward()
        norms.append(float(module._module.weight.grad_sample[0].norm()))
    assert norms[0] > 1.5 * norms[1]


class Mixing(nn.Module):
    """Subtracts the mean of the batch: every record depends on the others."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, LABELS)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class Transposing(nn.Module):
    """Sequence first with as many steps as records: every shape fits, the rows are wrong."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, LABELS)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1).tanh().sum(1)


class Functional(nn.Module):
    """Uses a parameter past its layer: no hook ever sees it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, LABELS)

    def forward(self, x):
        return self.second(functional.linear(x, self.first.weight, self.first.bias))


def test_models_that_mix_records_or_bypass_their_layers_are_refused():
    torch.manual_seed(2)
    with refused(Code.GRADIENT_INEXACT):
        admit(Toy(Mixing(), torch.randn(6, 4)))
    with refused(Code.GRADIENT_INEXACT):
        admit(Toy(Transposing(), torch.randn(3, 3, 4)))
    with refused(Code.GRADIENT_INEXACT):
        admit(Toy(Functional(), torch.randn(6, 4)))


class Counting(nn.Module):
    """Turns every record round where the batch holds two: right alone, and right for three."""

    def __init__(self, turn: float):
        super().__init__()
        self.turn = turn
        self.linear = nn.Linear(4, LABELS)

    def forward(self, x):
        return self.linear(x * (self.turn if len(x) == 2 else 1.0))


def test_a_model_that_depends_on_how_many_records_there_are_is_refused():
    """No gradient is longer than the clip norm, and yet one patient moves the sum by more."""
    torch.manual_seed(5)
    data = torch.randn(6, 4)
    with refused(Code.SENSITIVITY_EXCEEDED):
        admit(Toy(Counting(-1.0), data))
    admit(Toy(Counting(1.0), data))  # control: the same model, of every record by itself


def test_a_non_finite_record_among_the_first_does_not_stop_admission():
    data = torch.randn(5, 4)
    data[1] = math.nan
    admit(Toy(nn.Linear(4, LABELS), data))
    data[:] = math.nan
    admit(Toy(nn.Linear(4, LABELS), data))


class Packed(nn.Module):
    def __init__(self, *, pack: bool):
        super().__init__()
        from opacus.layers import DPLSTM

        self.pack = pack
        self.lstm = DPLSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, LABELS)

    def forward(self, x):
        lengths = (x[:, :, 0] != 0).sum(1)
        if self.pack:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        else:
            out, _ = self.lstm(x)
        return self.head(out[torch.arange(len(x)), lengths - 1])


class PerVisit(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, LABELS)

    def forward(self, packed):
        return packed._replace(data=self.linear(packed.data))


class PackedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.visits = PerVisit()

    def forward(self, x):
        lengths = (x[:, :, 0] != 0).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.visits(packed), batch_first=True)[0].sum(1)


def notes():
    torch.manual_seed(3)
    data = torch.randn(5, 7, 3) + 3
    for row, length in enumerate((2, 7, 4, 6, 3)):
        data[row, length:] = 0
    return data


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_sequences_and_recurrent_layers_are_refused():
    with refused(Code.PACKED_SEQUENCE):
        admit(Toy(PackedLinear(), notes()))
    with refused(Code.MODEL_RECURRENT):
        admit(Toy(Packed(pack=True), notes()))
    with refused(Code.MODEL_RECURRENT):
        admit(Toy(nn.Sequential(nn.LSTM(3, 5)), notes()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_sequences_join_different_patients_in_the_naive_engine():
    """Control: Opacus' hooks report other norms than autograd does, without a warning."""
    from opacus import GradSampleModule

    def norms(pack: bool):
        torch.manual_seed(4)
        plain, data, labels = Packed(pack=pack), notes(), torch.arange(5) % LABELS
        found = GradSampleModule(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functional.cross_entropy(found(data), labels, reduction="sum").backward()
        samples = [p.grad_sample.reshape(5, -1) for p in found.parameters() if p.requires_grad]
        return torch.cat(samples, 1).norm(dim=1)

    right, wrong = norms(pack=False), norms(pack=True)
    assert float((wrong - right).abs().max()) > 0.01 * float(right.max())
