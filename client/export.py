"""Writes a trained model as a Hugging Face folder that loads without this software."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.tasks.backbone import Backbone
from client.tasks.network import Plan, bare_model, network_for
from common.errors import Code, DataError, StorageError
from common.ports import Tensors
from common.study import Lora, Study

__all__ = ["export_model"]

_LORA_A = ".lora_A.default.weight"
_LORA_B = ".lora_B.default.weight"


def export_model(folder: Path, study: Study, backbone: Backbone, state: Tensors) -> None:
    """Write config.json, model.safetensors and the tokenizer of the trained classifier.

    `AutoModelForSequenceClassification.from_pretrained(folder)` then gives this study's
    predictions. Adapters are merged into the weights they adapt.

    Args:
        folder: must not exist; appears whole or not at all.
        study: the terms the state was trained under.
        backbone: the study's backbone.
        state: the trained tensors, by the layout's names.

    Raises:
        DataError: the tensors do not belong to this study, or the folder is already there.
        StorageError: the folder cannot be written.
    """
    if folder.exists():
        raise DataError(Code.OUTPUT_EXISTS, f"{folder}: is already there.")
    names = network_for(study, backbone, torch.device("cpu")).names
    if set(names) != set(state):
        raise _foreign(min(set(names) ^ set(state)))
    model = bare_model(Plan.of(study), backbone)
    _load(model, state, study.model.lora)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        saved: Any = model
        saved.save_pretrained(temporary)
        backbone.tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755 & ~_umask())
        temporary.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(model: Any, state: Tensors, lora: Lora) -> None:
    """Copy the trained tensors into the stock model, adapters merged."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in sorted(state.items()):
            if name.endswith(_LORA_B):
                continue
            if name.endswith(_LORA_A):
                target, change = _merged(name, state, lora)
                _fit(parameters, target, change).add_(torch.from_numpy(change))
            else:
                _fit(parameters, name, value).copy_(torch.from_numpy(np.array(value, np.float32)))


def _merged(name: str, state: Tensors, lora: Lora) -> tuple[str, np.ndarray[Any, Any]]:
    stem = name.removesuffix(_LORA_A)
    down, up = state[name], state.get(stem + _LORA_B)
    if up is None or up.shape[-1:] != down.shape[:1]:
        raise _foreign(name)
    change = (up.astype(np.float64) @ down.astype(np.float64)) * (lora.alpha / lora.rank)
    return f"{stem}.weight", change.astype(np.float32)


def _fit(parameters: Mapping[str, Any], name: str, value: np.ndarray[Any, Any]) -> Any:
    """The model's parameter that `value` goes to; a bias next to an adapter keeps its name."""
    plain = name.replace(".base_layer.", ".")
    found = parameters.get(plain)
    if found is None or tuple(found.shape) != tuple(value.shape):
        raise _foreign(name)
    return found


def _foreign(name: str) -> DataError:
    return DataError(Code.MODEL_STATE, f"the tensor {name} does not belong to this study's model.")


def _unwritable(folder: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(Code.MODEL_OUTPUT, f"{folder}: cannot be written ({reason}).")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
