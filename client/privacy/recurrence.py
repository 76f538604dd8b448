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

__all__ = ["GRUSteps", "LSTMSteps", "Recurrence"]


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
        return gradient.flatten(0, 1).T @ before.flatten(0, 1), None, None


class _LSTMLoop(torch.autograd.Function):
    """The loop of an LSTM, forwards and backwards, in place and in float32, time first inside.

    Written out because autograd's graph over single steps costs three times as much.
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
            gates = projected.transpose(0, 1).float().contiguous()
            if gates.data_ptr() == projected.data_ptr():
                gates = gates.clone()
            hiddens = gates.new_zeros(steps + 1, batch, size)
            cells, tanhs = torch.zeros_like(hiddens), torch.empty_like(hiddens[1:])
            turned = weight.float().t()
            for t, gate in enumerate(gates.unbind(0)):
                gate.addmm_(hiddens[t], turned)
                gate[:, : 2 * size].sigmoid_()
                enter, forget, fresh, leave = gate.chunk(4, 1)
                fresh.tanh_()
                leave.sigmoid_()
                cell = torch.mul(forget, cells[t], out=cells[t + 1])
                cell.addcmul_(enter, fresh)
                torch.mul(leave, torch.tanh(cell, out=tanhs[t]), out=hiddens[t + 1])
        ctx.save_for_backward(gates, cells, tanhs, weight)
        ctx.kind = projected.dtype
        ctx.set_materialize_grads(False)
        shown = [states.transpose(0, 1) for states in (hiddens[1:], cells[1:], hiddens[:-1])]
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
        gates, cells, tanhs, weight = ctx.saved_tensors
        weight = weight.float()
        steps, batch, size = tanhs.shape
        found, through = _gate_slopes(gates, cells, tanhs)
        outer = [None if d is None else d.transpose(0, 1).float() for d in (d_hiddens, d_cells)]
        d_cell = gates.new_zeros(batch, size)
        for t in range(steps - 1, -1, -1):
            d_hidden = gates.new_zeros(batch, size) if outer[0] is None else outer[0][t]
            if t + 1 < steps:
                d_hidden = torch.addmm(d_hidden, found[t + 1].flatten(1), weight)
                d_cell.mul_(gates[t + 1][:, size : 2 * size])
            d_cell.addcmul_(d_hidden, through[t])
            if outer[1] is not None:
                d_cell.add_(outer[1][t])
            found[t, :, :3].mul_(d_cell.unsqueeze(1))
            found[t, :, 3].mul_(d_hidden)
        total = found.flatten(2).transpose(0, 1).to(ctx.kind)
        return total, total, None


def _gate_slopes(gates: Tensor, cells: Tensor, tanhs: Tensor) -> tuple[Tensor, Tensor]:
    """How gates move the cell (the last one: the hidden state), and the cell the hidden state.

    Shapes: gates (T, B, 4H) after their functions, cells (T + 1, B, H), tanhs (T, B, H); returns
        (T, B, 4, H) and (T, B, H).
    """
    enter, forget, fresh, leave = gates.chunk(4, 2)
    slopes = gates.new_empty(*gates.shape[:2], 4, tanhs.shape[2])
    torch.mul(enter * fresh, 1 - enter, out=slopes[:, :, 0])
    torch.mul(forget * cells[:-1], 1 - forget, out=slopes[:, :, 1])
    torch.mul(enter, 1 - fresh.square(), out=slopes[:, :, 2])
    torch.mul(leave * tanhs, 1 - leave, out=slopes[:, :, 3])
    return slopes, leave * (1 - tanhs.square())


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
