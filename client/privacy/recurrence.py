"""The loop over time of a recurrent layer, written out so that patients can be told apart.

What the recurrent weight makes of a hidden state is *added* to a tensor that is at hand, so the
loss gradient of the one is that of the other: the recurrent weight's gradient is the sum over
time of that gradient times the hidden state before the step, the rule of a Linear.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from client.privacy.products import adder, affine, crossed

__all__ = ["GRUSteps", "LSTMSteps", "Projection", "Recurrence"]


class Projection(nn.Linear):
    """A recurrent layer's inputs, over all steps at once: a Linear, faster on a CPU."""

    def forward(self, values: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, gates * H)."""
        return affine(values, self.weight, self.bias)


class Recurrence(nn.Module):
    """The recurrent weight of one layer and direction, and its loop over time.

    Shapes: weight (gates * H, H); bias (gates * H,) or None. The forward pass takes the
        projected inputs (B, T, gates * H); of what it returns, the first part holds the hidden
        states (B, T, H), the last the hidden state before each step.
    """

    gates: ClassVar[int]

    def __init__(self, hidden: int, *, bias: bool) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(hidden)
        self.hidden = hidden
        shape = self.gates * hidden
        self.weight = nn.Parameter(torch.empty(shape, hidden).uniform_(-bound, bound))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    @staticmethod
    def product_of(args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What the weight is multiplied with, (B, T, H), and the tensor the product is added to."""
        return output[-1], args[-1]


class _Link(torch.autograd.Function):
    """Nothing, added to every product of a recurrent weight: the way to its summed gradient.

    The loop does not compute it, because a private step asks for output gradients alone and
    never comes here.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: torch.Size, before: list[Tensor]) -> Tensor:
        """A zero for every product, (B, T, gates * H), in the memory of one."""
        ctx.before = before
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The weight's gradient: products over rows and steps."""
        (before,) = ctx.before
        return crossed(gradient.flatten(0, 1), before.flatten(0, 1)), None, None


class _LSTMLoop(torch.autograd.Function):
    """The loop of an LSTM, forwards and backwards, in place and in float32, time first inside.

    Written out because autograd's graph over single steps costs three times as much. Every tanh(x)
    is taken as 2 sigmoid(2 x) - 1, which costs a tenth on a CPU: the doubled arguments are had by
    doubling weights once, and by keeping twice the cell state and half the hidden state.
    Shapes: projected and link (B, T, 4H), gates in torch's order; returns hidden states, cell
        states, and the hidden states before each step, (B, T, H) each.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, link: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden, cell and earlier hidden states."""
        del link
        batch, steps, size = projected.shape[0], projected.shape[1], weight.shape[1]
        with torch.autocast(projected.device.type, enabled=False):
            gates = torch.empty(steps, batch, 4 * size, device=projected.device)
            gates.copy_(projected.transpose(0, 1))
            gates[:, :, 2 * size : 3 * size].mul_(2)
            hiddens, cells = (gates.new_empty(steps + 1, batch, size) for _ in range(2))
            leaned = torch.empty_like(hiddens[1:])
            for states in (hiddens, cells):
                states[0] = 0
            doubled = weight.float() * 2
            doubled[2 * size : 3 * size] *= 2
            _steps_forward(gates, hiddens, cells, leaned, doubled)
            hiddens.mul_(2)
        ctx.save_for_backward(gates, cells, leaned, weight)
        ctx.kind = projected.dtype
        ctx.set_materialize_grads(False)
        shown = [states.transpose(0, 1) for states in (hiddens[1:], cells[1:] / 2, hiddens[:-1])]
        ctx.mark_non_differentiable(shown[2])
        return shown[0], shown[1], shown[2]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_hiddens: Tensor | None, d_cells: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of every gate before its function, for the input and the product alike."""
        if d_hiddens is None and d_cells is None:
            return None, None, None
        gates, cells, leaned, weight = ctx.saved_tensors
        found, through = _gate_slopes(gates, cells, leaned)
        forget = gates[:, :, weight.shape[1] : 2 * weight.shape[1]]
        # What arrives from outside becomes, step by step, all that arrives.
        d_hidden = torch.empty_like(leaned)
        if d_hiddens is None:
            d_hidden.zero_()
        else:
            d_hidden.copy_(d_hiddens.transpose(0, 1))
        outer = None if d_cells is None else d_cells.transpose(0, 1).float()
        _steps_backward(found, through, forget, d_hidden, outer, weight.float())
        total = found.flatten(2).transpose(0, 1).to(ctx.kind)
        return total, total, None


def _steps_forward(
    gates: Tensor, hiddens: Tensor, cells: Tensor, leaned: Tensor, weight: Tensor
) -> None:
    """Fill in the gates, half the hidden states, twice the cell states and their sigmoids.

    Shapes: gates (T, B, 4H), which hold the inputs' part, the new value's doubled; hiddens and
        cells (T + 1, B, H), leaned (T, B, H), weight (4H, H).
    """
    parts = [part.unbind(0) for part in gates.chunk(4, 2)]
    after = zip(
        gates.unbind(0),
        *parts,
        hiddens.unbind(0)[1:],
        cells.unbind(0)[1:],
        leaned.unbind(0),
        strict=True,
    )
    add = adder(weight, gates.shape[1])
    hidden, cell = hiddens[0], cells[0]
    for gate, enter, forget, fresh, leave, next_hidden, next_cell, lean in after:
        torch.sigmoid(add(gate, hidden), out=gate)
        cell = torch.mul(forget, cell, out=next_cell)
        cell.addcmul_(enter, fresh, value=4).sub_(enter, alpha=2)
        torch.sigmoid(cell, out=lean)
        hidden = torch.mul(leave, lean, out=next_hidden)
        hidden.sub_(leave, alpha=0.5)


def _steps_backward(
    found: Tensor,
    through: Tensor,
    forget: Tensor,
    d_hidden: Tensor,
    outer: Tensor | None,
    weight: Tensor,
) -> None:
    """Turn slopes into gradients, from the last step to the first.

    Shapes: found (T, B, 4, H), through, forget and d_hidden (T, B, H), outer the same or None.
    """
    flat = found.flatten(2).unbind(0)
    inner, leave = found[:, :, :3].unbind(0), found[:, :, 3].unbind(0)
    slopes, forgets, hiddens = through.unbind(0), forget.unbind(0), d_hidden.unbind(0)
    outers = None if outer is None else outer.unbind(0)
    add = adder(weight.t(), len(hiddens[0]))
    d_cell = torch.zeros_like(hiddens[0])
    broad = d_cell.unsqueeze(1)
    for t in range(len(flat) - 1, -1, -1):
        hidden = hiddens[t]
        if t + 1 < len(flat):
            hidden = add(hidden, flat[t + 1])
            d_cell.mul_(forgets[t + 1])
        d_cell.addcmul_(hidden, slopes[t])
        if outers is not None:
            d_cell.add_(outers[t])
        inner[t].mul_(broad)
        leave[t].mul_(hidden)


def _gate_slopes(gates: Tensor, cells: Tensor, leaned: Tensor) -> tuple[Tensor, Tensor]:
    """How gates move the cell (the last one: the hidden state), and the cell the hidden state.

    Shapes: gates (T, B, 4H) and twice the cells (T + 1, B, H) as the forward loop leaves them,
        leaned (T, B, H); returns (T, B, 4, H) and (T, B, H).
    """
    enter, _, fresh, leave = gates.chunk(4, 2)
    slopes = torch.addcmul(gates, gates, gates, value=-1)
    slopes = slopes.view(*slopes.shape[:2], 4, -1)
    slopes[:, :, 0].mul_(fresh.mul(2).sub_(1))
    slopes[:, :, 1].mul_(cells[:-1]).mul_(0.5)
    slopes[:, :, 2].mul_(enter).mul_(4)
    through = torch.addcmul(leaned, leaned, leaned, value=-1).mul_(leave).mul_(4)
    slopes[:, :, 3].mul_(leaned.mul(2).sub_(1))
    return slopes, through


class LSTMSteps(Recurrence):
    """The loop of an LSTM; its biases are the projection's, to which the product is added."""

    gates = 4

    def forward(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, cell states, earlier hidden states, (B, T, H) each."""
        before: list[Tensor] = []
        link = _Link.apply(self.weight, projected.shape, before)
        hiddens, cells, earlier = _LSTMLoop.apply(projected, link, self.weight.detach())
        before.append(earlier)
        return hiddens, cells, earlier


class GRUSteps(Recurrence):
    """The loop of a GRU.

    A gate multiplies the product before it meets the input, so it is added to a tensor of its
    own, which holds the bias.
    """

    gates = 3

    def forward(self, projected: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states, earlier hidden states, (B, T, H) each. Shapes: both (B, T, 3H)."""
        hidden = projected.new_zeros(projected.shape[0], self.hidden)
        turned, edge = self.weight.t(), 2 * self.hidden
        hiddens = [hidden]
        for step, start in zip(projected.unbind(1), addend.unbind(1), strict=True):
            product = torch.addmm(start, hidden, turned)
            reset, keep = torch.sigmoid(step[:, :edge] + product[:, :edge]).chunk(2, 1)
            fresh = torch.tanh(step[:, edge:] + reset * product[:, edge:])
            hidden = fresh + keep * (hidden - fresh)
            hiddens.append(hidden)
        return torch.stack(hiddens[1:], 1), torch.stack(hiddens[:-1], 1).detach()

    def addend(self, projected: Tensor) -> Tensor:
        """The bias at every step, or zeros, (B, T, 3H)."""
        if self.bias is None:
            return torch.zeros_like(projected)
        return self.bias.expand_as(projected).clone()
