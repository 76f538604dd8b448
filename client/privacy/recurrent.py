"""Recurrent layers whose patients can be told apart.

A fused recurrent layer hides its time steps from hooks, and packed sequences reorder patients.
Here the input projection is an ordinary Linear over all steps at once, and the loop over time
is written out (`recurrence`). Sequences are padded, never packed, and come with lengths.
Numerically these layers are `torch.nn.LSTM` and `torch.nn.GRU` (batch first, zero first states,
no dropout).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Final, Self

import torch
from torch import Tensor, nn

from client.privacy.recurrence import GRUSteps, LSTMSteps, Projection, Recurrence

__all__ = ["LoopGRU", "LoopLSTM", "last_valid"]

_BATCH_TIME_FEATURES: Final = 3


class _Direction(nn.Module):
    """One layer in one direction."""

    def __init__(self, inputs: int, steps: Recurrence, *, bias: bool) -> None:
        super().__init__()
        self.input = Projection(inputs, steps.gates * steps.hidden, bias=bias)
        bound = 1.0 / math.sqrt(steps.hidden)
        for parameter in self.input.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.recurrent = steps

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """(B, T, inputs) to what the loop returns."""
        projected: Tensor = self.input(values)
        given = [projected]
        if isinstance(self.recurrent, GRUSteps):
            given.append(self.recurrent.addend(projected))
        given[-1] = _with_place(given[-1])
        states: tuple[Tensor, ...] = self.recurrent(*given)
        return states


def _with_place(tensor: Tensor) -> Tensor:
    """A tensor that has a place in the graph, though nothing before it may learn."""
    if tensor.requires_grad or not torch.is_grad_enabled():
        return tensor
    return tensor.detach().requires_grad_()


class _Stack(nn.Module):
    """Layers over layers, in one direction or both."""

    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError("sizes and layers must be positive")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.has_bias, self.directions = bias, 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            _Direction(
                input_size if not layer else hidden_size * self.directions,
                self._steps(),
                bias=bias,
            )
            for layer in range(num_layers)
            for _ in range(self.directions)
        )

    def _steps(self) -> Recurrence:
        raise NotImplementedError

    @classmethod
    def from_fused(cls, fused: nn.RNNBase) -> Self:
        """A layer with the weights of torch's own, batch first.

        Raises:
            ValueError: the fused layer has dropout or a projection, or is of another kind.
        """
        if fused.mode != {4: "LSTM", 3: "GRU"}[cls.gates] or fused.dropout or fused.proj_size:
            raise ValueError("not a plain layer of this kind: no dropout, no projection")
        made = cls(
            fused.input_size,
            fused.hidden_size,
            fused.num_layers,
            bias=fused.bias,
            bidirectional=fused.bidirectional,
        )
        made.load_fused(fused.state_dict())
        return made

    def load_fused(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state dict of torch's own layer."""
        with torch.no_grad():
            for suffix, cell in self._named_cells():
                cell.input.weight.copy_(state[f"weight_ih_{suffix}"])
                cell.recurrent.weight.copy_(state[f"weight_hh_{suffix}"])
                if not self.has_bias:
                    continue
                outer, inner = state[f"bias_ih_{suffix}"], state[f"bias_hh_{suffix}"]
                if cell.recurrent.bias is None:
                    cell.input.bias.copy_(outer + inner)
                else:
                    cell.input.bias.copy_(outer)
                    cell.recurrent.bias.copy_(inner)

    def fused_state(self) -> dict[str, Tensor]:
        """The state dict that torch's own layer loads."""
        state: dict[str, Tensor] = {}
        for suffix, cell in self._named_cells():
            state[f"weight_ih_{suffix}"] = cell.input.weight.detach().clone()
            state[f"weight_hh_{suffix}"] = cell.recurrent.weight.detach().clone()
            if self.has_bias:
                outer, inner = cell.input.bias.detach().clone(), cell.recurrent.bias
                state[f"bias_ih_{suffix}"] = outer
                state[f"bias_hh_{suffix}"] = (
                    torch.zeros_like(outer) if inner is None else inner.detach().clone()
                )
        return state

    def _named_cells(self) -> list[tuple[str, _Direction]]:
        named = []
        for at, cell in enumerate(self.cells):
            assert isinstance(cell, _Direction)  # noqa: S101 - made above
            layer, direction = divmod(at, self.directions)
            named.append((f"l{layer}" + "_reverse" * direction, cell))
        return named

    def _run(
        self, values: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The top layer's hidden states, and of every layer and direction all states."""
        if values.dim() != _BATCH_TIME_FEATURES:
            raise ValueError("sequences have the shape (batch, time, features)")
        backwards = None if self.directions == 1 else _reversal(values, lengths)
        every: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                given = values if not direction else _reordered(values, backwards)
                states = self.cells[layer * self.directions + direction](given)
                hiddens = states[0]
                outputs.append(hiddens if not direction else _reordered(hiddens, backwards))
                every.append(states)
            values = outputs[0] if self.directions == 1 else torch.cat(outputs, 2)
            if lengths is not None:
                past = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]
                values = values.masked_fill(past.unsqueeze(2), 0.0)
        return values, every

    @staticmethod
    def _final(every: list[tuple[Tensor, ...]], lengths: Tensor | None, part: int) -> Tensor:
        """(layers * directions, B, H): one kind of state at each row's last valid step."""
        if lengths is None:
            return torch.stack([states[part][:, -1] for states in every])
        return torch.stack([last_valid(states[part], lengths) for states in every])


class LoopLSTM(_Stack):
    """An LSTM, batch first, for private and plain training alike.

    Shapes: input (B, T, input_size), lengths (B,) int64 or None for T everywhere; output
        (B, T, directions * H), zero past a row's length; final hidden and cell states
        (layers * directions, B, H) at each row's last valid step.
    Guarantee: as `torch.nn.LSTM` on packed sequences, to 1e-5; a row depends on no other.
    """

    gates = 4

    def _steps(self) -> Recurrence:
        return LSTMSteps(self.hidden_size, bias=False)

    def forward(
        self, values: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs and final states, as `torch.nn.LSTM` returns them."""
        output, every = self._run(values, lengths)
        return output, (self._final(every, lengths, 0), self._final(every, lengths, 1))


class LoopGRU(_Stack):
    """A GRU, batch first, for private and plain training alike.

    Shapes: as `LoopLSTM`, without cell states.
    Guarantee: as `torch.nn.GRU` on packed sequences, to 1e-5; a row depends on no other.
    """

    gates = 3

    def _steps(self) -> Recurrence:
        return GRUSteps(self.hidden_size, bias=self.has_bias)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final states, as `torch.nn.GRU` returns them."""
        output, every = self._run(values, lengths)
        return output, self._final(every, lengths, 0)


def last_valid(states: Tensor, lengths: Tensor) -> Tensor:
    """The state at each row's last valid step, (B, T, H) to (B, H); zero for an empty row."""
    at = (lengths - 1).clamp(min=0)
    picked = states[torch.arange(len(states), device=states.device), at]
    return picked.masked_fill((lengths == 0).unsqueeze(1), 0.0)


def _reversal(values: Tensor, lengths: Tensor | None) -> Tensor:
    """For each row the order of its steps backwards, padding left in place, (B, T)."""
    steps = torch.arange(values.shape[1], device=values.device)
    if lengths is None:
        return steps.flip(0).expand(values.shape[:2])
    turned = lengths[:, None] - 1 - steps
    return torch.where(turned >= 0, turned, steps)


def _reordered(values: Tensor, order: Tensor | None) -> Tensor:
    assert order is not None  # noqa: S101 - both directions have an order
    return values.gather(1, order.unsqueeze(2).expand_as(values))
