"""Joint and local privacy side by side, and what the quorum buys: for whoever writes a study.

Both columns make the same steps on the same patients for the same epsilon; what differs is how
often noise is added, how many rounds that takes, and whom a patient must trust.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from common.errors import ConfigError
from common.plan import CostModel, Plan, plan
from common.secagg import quorum as quorums
from common.study import Study

__all__ = ["Comparison", "ModeRow", "QuorumRow", "compare", "render_comparison"]

_LOCAL_STEPS: Final = 10
_MOST_ROUNDS: Final = 10_000
_CLEARLY: Final = 0.8
_MANY_BYTES: Final = 50e9


@dataclass(frozen=True, slots=True)
class ModeRow:
    """The study in one mode.

    Units:
        epsilon: of the training, all spare rounds included, against everybody the mode's promise
            covers. noise_to_signal: of one step's mean gradient, L2 noise over the largest
            possible signal. bytes: up and down, one hospital, all rounds.
    """

    mode: str
    noise_multiplier: float
    epsilon: float
    noise_to_signal: float
    rounds: int
    steps: int
    bytes: int
    trusts: str


@dataclass(frozen=True, slots=True)
class QuorumRow:
    """Joint privacy under one quorum.

    Units:
        noise: standard deviation of the noise when nobody drops out, over that of DP-SGD in one
            place. dropouts: hospitals that a round can lose.
    """

    colluders: int
    quorum: int
    honest: int
    noise: float
    dropouts: int
    chosen: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both modes, the quorums, and what we would choose."""

    modes: tuple[ModeRow, ...]
    quorums: tuple[QuorumRow, ...]
    recommended: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


def compare(
    study: Study,
    planned: Plan,
    *,
    patients: Mapping[str, int] | None = None,
    cost: CostModel | None = None,
) -> Comparison | None:
    """The study in both modes; None where it has no privacy mode, or only one mode is possible.

    Args:
        study: with its sites.
        planned: what `plan` says of it.
        patients: patients by hospital, where they may be known.
        cost: as for `plan`.
    """
    if planned.training is None:
        return None
    parameters, sites = planned.parameters, planned.sites or None
    other = _joint_form(study) if study.privacy.mode == "local" else _local_form(study)
    try:
        alternative = plan(other, parameters, sites=sites, patients=patients, cost=cost)
    except ConfigError:
        return None
    rows = {p.mode: _row(s, p) for s, p in ((study, planned), (other, alternative))}
    joint, local = rows["joint"], rows["local"]
    better = joint.noise_to_signal <= _CLEARLY * local.noise_to_signal
    light = joint.bytes <= max(_MANY_BYTES, 2 * local.bytes)
    less = local.noise_to_signal / joint.noise_to_signal
    if better and light:
        reason = f"{less:.1f} times less noise at the same epsilon; {joint.trusts}"
    elif better:
        reason = (
            f"joint has {less:.1f} times less noise, but would move {_size(joint.bytes)} through "
            "every hospital's line; train fewer parameters (lora, bitfit, head) to use it"
        )
    else:
        reason = "joint noise is hardly smaller here, and local privacy trusts nobody"
    return Comparison(
        (joint, local),
        _quorums(study, planned.parties),
        "joint" if better and light else "local",
        reason,
    )


def _form(study: Study, **sections: dict[str, Any]) -> Study:
    """The study with some keys of its sections changed, without its simulation."""
    data = study.model_dump(exclude={"simulation"})
    for name, changes in sections.items():
        data[name] = {**data[name], **changes}
    for site in data["sites"]:
        site["weight"] = 1.0
    if not data["sites"]:
        data["simulation"] = study.model_dump(include={"simulation"})["simulation"]
        data["simulation"].update(faults=(), dropouts_per_round=0)
    return Study.model_validate(data)


def _joint_form(study: Study) -> Study:
    training = study.training
    steps = training.rounds * training.local_steps
    rounds = min(steps, _MOST_ROUNDS)
    return _form(
        study,
        training={"rounds": rounds, "local_steps": 1, "proximal": 0.0, "optimizer": {}},
        privacy={"mode": "joint"},
        aggregation={"ring_bits": None},
        evaluation={"every": _every(study, training.local_steps, rounds)},
    )


def _local_form(study: Study) -> Study:
    steps = study.training.rounds
    local = min(_LOCAL_STEPS, steps)
    rounds = math.ceil(steps / local)
    every = 1 if study.acceptance is not None else max(1, study.evaluation.every // local)
    return _form(
        study,
        training={"rounds": rounds, "local_steps": local},
        privacy={"mode": "local"},
        aggregation={"ring_bits": None},
        evaluation={"every": min(every, rounds)},
    )


def _every(study: Study, steps: int, rounds: int) -> int:
    return 1 if study.acceptance is not None else min(study.evaluation.every * steps, rounds)


def _row(study: Study, planned: Plan) -> ModeRow:
    training = planned.training
    if training is None:
        raise AssertionError("both forms have a privacy mode")
    parties, honest = planned.parties, study.honest(planned.parties)
    root = training.noise_multiplier * math.sqrt(planned.parameters) / training.expected_batch
    joint = planned.mode == "joint"
    trusts = (
        f"it counts on {honest} honest hospitals among the {planned.quorum} of a quorum"
        if joint
        else "it counts on nobody but the hospital itself"
    )
    return ModeRow(
        planned.mode,
        training.noise_multiplier,
        training.epsilon,
        root / math.sqrt(parties * honest if joint else parties),
        planned.rounds,
        planned.rounds * training.local_steps,
        planned.rounds * (planned.bytes_up + planned.bytes_down),
        trusts,
    )


def _quorums(study: Study, parties: int) -> tuple[QuorumRow, ...]:
    """Every larger quorum at the study's colluders, and fewer colluders at its quorum."""
    chosen = (study.colluders(parties), study.quorum_size(parties))
    found = {(chosen[0], q) for q in range(quorums.quorum(parties, chosen[0]), parties + 1)}
    for colluders in range(1, chosen[0]):
        found.add((colluders, max(chosen[1], quorums.quorum(parties, colluders))))
    return tuple(
        QuorumRow(c, q, q - c, math.sqrt(parties / (q - c)), parties - q, (c, q) == chosen)
        for c, q in sorted(found, key=lambda pair: (pair[1] - pair[0], pair))
    )


# ------------------------------------------------------------------------------ rendering


def render_comparison(comparison: Comparison) -> str:
    """The comparison as a text table."""
    lines = ["", "  both modes, the same steps and epsilon"]
    heads = ("", "sigma", "epsilon", "noise/signal of a step", "rounds", "bytes per hospital")
    table = [heads]
    for row in comparison.modes:
        bytes_ = _size(row.bytes)
        values = (f"{row.noise_multiplier:g}", f"{row.epsilon:.3f}", f"{row.noise_to_signal:.3f}")
        table.append((row.mode, *values, str(row.rounds), bytes_))
    lines += _aligned(table)
    lines += ["", "  what the quorum buys joint noise (1 is DP-SGD in one place)"]
    table = [("colluders", "quorum", "honest", "noise", "dropouts", "")]
    for line in comparison.quorums:
        counts = (str(line.colluders), str(line.quorum), str(line.honest))
        mark = "this study" if line.chosen else ""
        table.append((*counts, f"{line.noise:.2f}", str(line.dropouts), mark))
    lines += _aligned(table)
    lines += ["", f"  recommended: {comparison.recommended}: {comparison.reason}"]
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "    "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"  # noqa: PLR2004
