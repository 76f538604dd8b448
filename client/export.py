"""Writes a trained model as a folder.

A text model becomes a Hugging Face folder that loads without this software; a model of numbers
becomes safetensors beside a JSON file that says everything needed to predict.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.predict import TABULAR_FILE, WEIGHTS_FILE
from client.tasks.backbone import Backbone
from client.tasks.network import Plan, bare_model, network_for
from client.tasks.tabular import architecture, initial_tensors
from common.errors import Code, DataError, StorageError
from common.ports import Tensors
from common.statistics import DEVIATION, MEAN
from common.study import Lora, Study
from common.tensors import save_tensors

__all__ = ["export_model", "export_tabular"]

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
    _load(model, state, study.network.lora)

    def write(temporary: Path) -> None:
        saved: Any = model
        saved.save_pretrained(temporary)
        backbone.tokenizer.save_pretrained(temporary)

    _whole(folder, write)


def export_tabular(folder: Path, study: Study, state: Tensors) -> None:
    """Write model.safetensors and tabular.json of a study of kind tabular.

    The JSON holds features with their bounds, mean and deviation (in units of the declared
    range), hidden widths and labels: with the weights, all that a prediction needs.

    Args:
        folder: must not exist; appears whole or not at all.
        study: the terms the state was trained under.
        state: the trained tensors and the statistics.

    Raises:
        DataError: the tensors do not belong to this study, or the folder is already there.
        StorageError: the folder cannot be written.
    """
    if folder.exists():
        raise DataError(Code.OUTPUT_EXISTS, f"{folder}: is already there.")
    task = study.tabular
    weights = {name: value.shape for name, value in initial_tensors(task).items()}
    counted = (len(task.features),)
    expected = {**weights, MEAN: counted, DEVIATION: counted}
    for name in sorted(set(expected) | set(state)):
        if name not in state or expected.get(name) != state[name].shape:
            raise _foreign(name)
    mean, deviation = state[MEAN].tolist(), state[DEVIATION].tolist()
    facts: dict[str, Any] = json.loads(architecture(task)[1])
    facts["features"] = [
        {**feature, "mean": middle, "deviation": spread}
        for feature, middle, spread in zip(facts["features"], mean, deviation, strict=True)
    ]

    def write(temporary: Path) -> None:
        save_tensors(temporary / WEIGHTS_FILE, {name: state[name] for name in weights})
        (temporary / TABULAR_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    _whole(folder, write)


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside `folder`, then rename: it appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        write(temporary)
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
