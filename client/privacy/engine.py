"""The engines that compute clipped sums, and which of them a study gets.

The Opacus engine holds every record's gradient of every parameter: slow and plain, it is what
tests measure the book-keeping engine by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from client.privacy.bookkeeping import (
    SLACK,
    SLACK_REDUCED,
    ClippedSum,
    PerSampleEngine,
    layers_of,
)
from client.privacy.patients import Patients, squared, weighted
from client.privacy.rules import Pairs, rule_for
from client.privacy.samplers import sampler_for

__all__ = [
    "SLACK",
    "SLACK_REDUCED",
    "ClippedSum",
    "EngineKind",
    "OpacusEngine",
    "PerSampleEngine",
    "choose_engine",
]

EngineKind = Literal["auto", "opacus", "bookkeeping"]


class OpacusEngine(PerSampleEngine):
    """The same sums, from Opacus' own gradient of every row and parameter.

    It holds rows times parameters in memory. It shares the hooks with the other engine, and
    neither norms, grouping by patient, nor sums.
    """

    name = "opacus"

    def _learn_layers(self) -> None:
        self._samplers = {layer: sampler_for(layer, name) for layer, name in self._layers.items()}

    def _sum(
        self, pairs: dict[nn.Module, Pairs], losses: Tensor, groups: Patients
    ) -> tuple[dict[str, Tensor], Tensor]:
        per_row: dict[str, Tensor] = {}
        for module, used in pairs.items():
            for activation, gradient in used:
                sampled = self._samplers[module](module, activation, gradient)
                for parameter, value in sampled.items():
                    name = self._names.get(id(parameter))
                    if name is not None:
                        per_row[name] = per_row[name] + value if name in per_row else value
        per_patient = {name: groups.total(value) for name, value in per_row.items()}
        squares = torch.zeros(groups.count, dtype=torch.float64, device=groups.device)
        for value in per_patient.values():
            squares += squared(value)
        factors, mask, contributed = self._factors(squares, losses, groups)
        sums = {name: weighted(factors, value, mask) for name, value in per_patient.items()}
        return sums, contributed


def choose_engine(
    kind: EngineKind,
    module: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    clip_norm: float,
    *,
    reduced_precision: bool = False,
) -> PerSampleEngine:
    """The engine that a study asks for; its `name` and `reason` say which and why.

    `auto` takes the book-keeping engine where it has a rule of its own for every trained layer,
    and Opacus' gradients where it has not. `bookkeeping` also trains layers that Opacus alone
    knows, by their sampler, beside its own rules.

    Raises:
        RefusedError: no engine can tell this model's patients apart.
    """
    wanted: Callable[..., PerSampleEngine] = PerSampleEngine
    reason = "asked for by the study"
    if kind == "auto":
        strange = _without_rule(module, trainable)
        reason = "every trained layer has a book-keeping rule"
        if strange:
            wanted = OpacusEngine
            reason = f"there is no book-keeping rule for {', '.join(strange)}"
    elif kind == "opacus":
        wanted = OpacusEngine
    engine = wanted(module, trainable, clip_norm, reduced_precision=reduced_precision)
    engine.reason = reason
    return engine


def _without_rule(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    layers = layers_of(module, trainable)
    return sorted({type(x).__name__ for x, name in layers.items() if rule_for(x, name) is None})
