"""Writes a trained model as a folder.

A text model becomes a Hugging Face folder that loads without this software; a task's own network
becomes safetensors beside a JSON file with the terms that it follows from.
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

from client.knowledge.shelf import save_knowledge
from client.predict import CASES_FILE, MODEL_FORMAT, TASK_FILE, WEIGHTS_FILE
from client.tasks.backbone import Backbone
from client.tasks.kinds import code_of
from client.tasks.network import Plan, bare_model, network_for
from client.tasks.rows import initial_tensors
from common.errors import Code, DataError, StorageError
from common.ports import Tensors
from common.statistics import DEVIATION, MEAN
from common.study import Lora, Study
from common.tensors import save_tensors

__all__ = ["export_model", "export_rows"]

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
        _save_cases(study, temporary)

    _whole(folder, write)


def export_rows(folder: Path, study: Study, state: Tensors) -> None:
    """Write model.safetensors and task.json of a study whose task has its own network.

    The JSON holds the task's terms and, in units of the declared ranges, the statistics: with the
    weights, and the knowledge graph where its licences allow to hand it on, all that a prediction
    needs.

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
    task, count = study.task, study.feature_count
    weights = {n: v.shape for n, v in initial_tensors(code_of(task), task).items()}
    counted = {MEAN: (count,), DEVIATION: (count,)} if count else {}
    expected = {**weights, **counted}
    for name in sorted(set(expected) | set(state)):
        if name not in state or expected.get(name) != state[name].shape:
            raise _foreign(name)
    facts = {
        "format": MODEL_FORMAT,
        "task": task.model_dump(mode="json"),
        "mean": state[MEAN].tolist() if count else [],
        "deviation": state[DEVIATION].tolist() if count else [],
    }

    def write(temporary: Path) -> None:
        save_tensors(temporary / WEIGHTS_FILE, {name: state[name] for name in weights})
        (temporary / TASK_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        save_knowledge(task, temporary)
        _save_cases(study, temporary)

    _whole(folder, write)


def _save_cases(study: Study, folder: Path) -> None:
    """What of a hospital's system the model is to be asked about, where the study says it."""
    if study.cases is not None:
        rules = study.cases.model_dump_json(indent=1)
        (folder / CASES_FILE).write_text(rules + "\n", encoding="utf-8")


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
