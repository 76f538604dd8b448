"""A saved network of a task's own, ready to be asked: one way in for answers and explanations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from client.data.records import Record
from client.devices import choose_device
from client.knowledge.shelf import read_saved_knowledge
from client.predict import MODEL_FORMAT, TASK_FILE, WEIGHTS_FILE
from client.tasks.kinds import code_of
from client.tasks.rows import inputs_of, loaded
from common.errors import Code, DataError
from common.study import Task
from common.tensors import load_tensors

__all__ = ["SavedRows"]


class SavedRows:
    """What `wardround` wrote for a task with a network of its own.

    Args:
        folder: holds task.json and model.safetensors.
        device: auto, cpu or cuda[:N].
        knowledge: the folder of the graph that the model reads, where it does not lie beside it.

    Attributes:
        mean, deviation: (F,) float32, as parts of the features' public ranges.

    Raises:
        DataError: the folder is not whole, or the model's graph is missing or another.
    """

    def __init__(self, folder: Path, device: str, knowledge: Path | None = None) -> None:
        weights = load_tensors(folder / WEIGHTS_FILE)
        try:
            facts: Any = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
            known = {MODEL_FORMAT: facts["task"]}[facts["format"]]
            self.task: Any = TypeAdapter[Task](Task).validate_json(json.dumps(known))
            self.mean, self.deviation = (
                np.array(facts[name], np.float32).reshape(len(self.task.features))
                for name in ("mean", "deviation")
            )
            read_saved_knowledge(self.task, folder, knowledge)
            self._code = code_of(self.task)
            self.device = choose_device(device)
            self.network = loaded(self._code, self.task, weights).to(self.device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{folder}: not a whole model of this software ({type(error).__name__})."
            raise DataError(Code.MODEL_STATE, message) from None

    def inputs(self, records: Sequence[Record]) -> tuple[Tensor, ...]:
        """The records as the network's inputs, on its device. Raises DataError."""
        found = inputs_of(self._code.encode(self.task, records), self.mean, self.deviation)
        return tuple(tensor.to(self.device) for tensor in found)

    def outputs(self, records: Sequence[Record]) -> Tensor:
        """What the network says of each record. Shapes: (N, outcome.outputs)."""
        with torch.inference_mode():
            found: Tensor = self.network(*self.inputs(records))
        return found
