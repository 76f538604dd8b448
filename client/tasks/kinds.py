"""The code of each kind of task, loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from client.tasks.rows import RowsTask
from common.study import Task

__all__ = ["code_of"]


def code_of(task: Task) -> RowsTask:
    """The module of a task that brings its own network. Raises TypeError where it has none."""
    if task.pretrained:
        raise TypeError(f"a task of kind {task.kind} trains a pretrained network")
    name = "notes" if task.kind == "diagnosis" else task.kind
    found: Any = import_module(f"client.tasks.{name}")
    return cast("RowsTask", found)
