"""Admission: what a model must show before it is trained under differential privacy.

The engine's guarantee rests on the model computing every record on its own. That is a fact
about code we did not write, so it is tested on the code itself, on a few of the site's patients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from client.privacy.engine import EngineKind, PerSampleEngine, choose_engine
from client.tasks.base import Learner
from common.errors import Code, RefusedError

GRADIENT_TOLERANCE = 1e-4
SENSITIVITY_TOLERANCE = 1e-3


def admit(learner: Learner, *, patients: int = 3, kind: EngineKind = "auto") -> str:
    """Refuse a model that mixes patients or whose gradients the engine cannot tell apart.

    With the engine that will train (`kind`), on up to `patients` patients, without dropout: the
    clipped sum must equal the one computed by batch-of-one autograd (relative error 1e-4), and
    leaving out any one of them must change it by at most the clip norm (0.1 % for rounding). A
    site without patients gets the checks of structure alone.

    Returns which engine trains it, and why, for people to read.

    Raises:
        RefusedError: names the first check that failed.
    """
    trainable = learner.trainable()
    refuse_batch_norm(learner.module)
    engine = choose_engine(kind, learner.module, trainable, 1.0)
    engine.close()
    told = f"{engine.name} ({engine.reason})"
    count = min(patients, learner.patient_count())
    if not count:
        return told
    mode = learner.module.training
    learner.module.eval()
    handles = [
        module.register_forward_pre_hook(_refuse_packed) for module in learner.module.modules()
    ]
    try:
        _check(learner, trainable, count, kind)
    finally:
        for handle in handles:
            handle.remove()
        learner.module.train(mode)
    return told


def refuse_batch_norm(module: nn.Module) -> None:
    """Refuse batch normalisation of any make, frozen or not: it carries records into buffers.

    The walk goes by ancestry and by name, because libraries subclass and re-implement it. An
    instance norm that tracks statistics carries records just so.
    """
    for name, layer in module.named_modules():
        batch = any("BatchNorm" in ancestor.__name__ for ancestor in type(layer).__mro__)
        if batch or getattr(layer, "track_running_stats", False):
            raise RefusedError(Code.MODEL_BATCH_NORM, f"layer {name or 'root'} normalises batches.")


def _refuse_packed(module: nn.Module, args: Any) -> None:
    if any(isinstance(value, PackedSequence) for value in args):
        raise RefusedError(
            Code.PACKED_SEQUENCE, f"a {type(module).__name__} is given a packed sequence."
        )


def _check(
    learner: Learner, trainable: dict[str, nn.Parameter], count: int, kind: EngineKind
) -> None:
    chosen = np.arange(count, dtype=np.int64)
    alone = [_reference(learner, trainable, patient) for patient in chosen]
    norms = [_norm(gradient) for gradient in alone]
    finite = [norm for norm in norms if math.isfinite(norm)]
    # A clip norm in the middle, so that some are clipped and some are not.
    clip = sorted(finite)[len(finite) // 2] if finite else 0.0
    if not clip:
        return
    expected = {name: torch.zeros_like(value) for name, value in alone[0].items()}
    for gradient, norm in zip(alone, norms, strict=True):
        if math.isfinite(norm):
            for name, value in gradient.items():
                expected[name] += value * min(1.0, clip / max(norm, clip * 1e-9))
    engine = choose_engine(kind, learner.module, trainable, clip)
    try:
        whole = _clipped(learner, engine, chosen)
        error = _norm({name: whole[name] - expected[name] for name in whole})
        if not error <= GRADIENT_TOLERANCE * max(_norm(expected), clip):
            raise RefusedError(
                Code.GRADIENT_INEXACT,
                f"the clipped sum of {count} patients is off by {error / clip:.2g} clip norms.",
            )
        for patient in chosen:
            rest = _clipped(learner, engine, np.delete(chosen, patient))
            change = _norm({name: whole[name] - rest[name] for name in whole})
            if not change <= clip * (1 + SENSITIVITY_TOLERANCE):
                raise RefusedError(
                    Code.SENSITIVITY_EXCEEDED,
                    f"one patient changes the clipped sum by {change / clip:.4g} clip norms.",
                )
    finally:
        engine.close()


def _reference(
    learner: Learner, trainable: dict[str, nn.Parameter], patient: np.int64
) -> dict[str, Tensor]:
    """One patient's gradient by plain autograd, his rows alone in the batch."""
    rows, _ = learner.rows_of(np.array([patient], np.int64))
    losses = learner.losses(rows)
    if losses.shape != (len(rows),):
        raise RefusedError(
            Code.LOSS_SHAPE,
            f"the loss has shape {tuple(losses.shape)} for {len(rows)} records.",
        )
    gradients = torch.autograd.grad(losses.mean(), list(trainable.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(trainable.items(), gradients, strict=True)
    }


def _clipped(
    learner: Learner, engine: PerSampleEngine, patients: np.ndarray[Any, np.dtype[np.int64]]
) -> dict[str, Tensor]:
    rows, owner = learner.rows_of(patients)
    if not len(rows):
        return {name: torch.zeros_like(value) for name, value in engine.trainable.items()}
    return engine.clipped_sum(learner.losses(rows), owner, len(patients)).gradients


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.detach().double().square().sum()) for g in gradients.values()))
