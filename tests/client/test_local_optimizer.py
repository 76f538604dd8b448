"""LocalOptimizer: PyTorch's own steps, without its optimiser objects."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from client.training import LocalOptimizer, TrainingSettings

torch.set_num_threads(1)
SHAPES = ((3, 4), (5,), (2, 2))


def settings(**changes) -> TrainingSettings:
    fixed = {"mode": "none", "local_steps": 1, "expected_batch": 1.0, "micro_batch": 1}
    return TrainingSettings(**fixed, learning_rate=0.03, **changes)


def walked(make) -> list[torch.Tensor]:
    """Where seven steps lead; now and then a parameter has no gradient."""
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    for step in range(7):
        for index, parameter in enumerate(parameters):
            resting = (index == 1 and step in (0, 3)) or (index == 2 and step < 5)
            parameter.grad = None if resting else torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def theirs(optimizer, decay, momentum):
    if optimizer == "sgd":
        return lambda p: torch.optim.SGD(p, lr=0.03, momentum=momentum, weight_decay=decay)
    return lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=decay)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_pytorchs_own_bit_for_bit(optimizer, decay, momentum):
    chosen = settings(optimizer=optimizer, weight_decay=decay, momentum=momentum)
    ours = walked(lambda parameters: LocalOptimizer(parameters, chosen))
    expected = walked(theirs(optimizer, decay, momentum))
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    # Control: another decay leads elsewhere.
    other = walked(theirs(optimizer, decay + 0.01, momentum))
    assert not all(torch.equal(one, two) for one, two in zip(ours, other, strict=True))


def test_nothing_moves_without_a_gradient():
    for optimizer in ("sgd", "adamw"):
        parameter = nn.Parameter(torch.ones(3))
        loop = LocalOptimizer([parameter], settings(optimizer=optimizer, weight_decay=0.1))
        loop.step()
        assert torch.equal(parameter.detach(), torch.ones(3))
        parameter.grad = torch.ones(3)
        loop.clear()
        assert parameter.grad is None


@pytest.mark.parametrize("ours", [True, False])
def test_a_step_does_not_import_the_compiler(ours):
    """Control: `torch.optim.SGD` does."""
    made = "LocalOptimizer([p], s)" if ours else "torch.optim.SGD([p], lr=0.03)"
    code = (
        "import sys, torch\n"
        "from client.training import LocalOptimizer, TrainingSettings\n"
        "s = TrainingSettings('none', 1, 1.0, 1, 0.03, 'sgd')\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "p.grad = torch.ones(3)\n"
        f"{made}.step()\n"
        "sys.exit(7 if 'torch._dynamo' in sys.modules else 0)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert found.returncode == (0 if ours else 7), found.stderr
