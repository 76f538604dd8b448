"""The code of each kind of task, loaded when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, cast

from torch import nn

from client.data.records import Record
from client.tasks.rows import Encoded, RowsTask, described
from common.errors import Code, ConfigError
from common.study import Task
from common.tasks.custom import CustomTask

__all__ = ["GROUP", "code_of"]

GROUP: Final = "wardround.tasks"
"""Where installed packages name their tasks (entry points)."""


def code_of(task: Task) -> RowsTask:
    """The module of a task that brings its own network.

    Raises:
        TypeError: the task trains a pretrained network.
        ConfigError: TASK_ABSENT, no installed package offers the task, or its code is not whole.
    """
    if task.pretrained:
        raise TypeError(f"a task of kind {task.kind} trains a pretrained network")
    if isinstance(task, CustomTask):
        return _installed(task.name)
    name = "notes" if task.kind == "diagnosis" else task.kind
    found: Any = import_module(f"client.tasks.{name}")
    return cast("RowsTask", found)


class _Installed:
    """A task of another package, whose network's name includes the digest of its file.

    So a hospital with another version of the file has another network, and refuses the study.
    """

    def __init__(self, name: str, code: Any, file: Path) -> None:
        self._name, self._code = name, code
        self._file = hashlib.sha256(file.read_bytes()).hexdigest()

    def architecture(self, task: CustomTask) -> tuple[bytes, str]:
        """(digest, description) of the network and the file that makes it."""
        _, text = self._code.architecture(task)
        return described("custom", {"name": self._name, "file": self._file, "network": text})

    def network(self, task: CustomTask) -> nn.Module:
        """The network at its first values."""
        made: nn.Module = self._code.network(task)
        return made

    def encode(self, task: CustomTask, records: Sequence[Record]) -> Encoded:
        """The records as inputs."""
        found: Encoded = self._code.encode(task, records)
        return found

    def probes(self, task: CustomTask) -> tuple[Record, ...]:
        """Invented records."""
        found: tuple[Record, ...] = self._code.probes(task)
        return found


@cache
def _installed(name: str) -> RowsTask:
    """What one installed package offers under this name; a study brings no code."""
    offers = list(entry_points(group=GROUP, name=name))
    if len(offers) != 1:
        told = "No installed package offers" if not offers else "Several installed packages offer"
        raise ConfigError(Code.TASK_ABSENT, f"{told} the task {name}.")
    try:
        code: Any = offers[0].load()
    except (ImportError, AttributeError) as error:
        raise _unfit(name, f"does not load ({type(error).__name__})") from None
    missing = [one for one in _FUNCTIONS if not callable(getattr(code, one, None))]
    if missing:
        raise _unfit(name, f"has no function {missing[0]}")
    return _Installed(name, code, Path(code.__file__))


_FUNCTIONS: Final = ("architecture", "network", "encode", "probes")


def _unfit(name: str, reason: str) -> ConfigError:
    return ConfigError(Code.TASK_ABSENT, f"The installed task {name} {reason}.")
