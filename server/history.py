"""The rounds of a run so far, one line each in a file: for the report and the learning curve.

The model that a round made is measured in the round that follows, so its metrics come in a line
of their own and are put back where they belong.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.errors import Code, StorageError
from common.metrics import Metrics
from server.report import RoundResult

__all__ = ["History"]


class History:
    """What became of every round, kept in a file.

    Guarantee: a crash loses at most the line being written; what is left of it is cut off.
    Raises StorageError where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rounds: dict[int, RoundResult] = {}
        self._metrics: dict[int, Metrics] = {}
        self._rejected: set[int] = set()
        try:
            self._load()
        except OSError as error:
            raise self._failed(error) from None

    @property
    def rounds(self) -> tuple[RoundResult, ...]:
        """Every round in order, each with the metrics of the model it made."""
        return tuple(
            replace(
                entry,
                metrics=self._metrics.get(entry.turn),
                rejected=entry.turn in self._rejected,
            )
            if entry.kind == "train" and entry.code is None
            else entry
            for _, entry in sorted(self._rounds.items())
        )

    def knows(self, number: int) -> bool:
        """Whether the protocol's round `number` is here."""
        return number in self._rounds

    def add(self, entry: RoundResult) -> None:
        """Keep a round that ended."""
        self._append({"round": asdict(entry)})
        self._rounds[entry.round] = entry

    def measured(self, turn: int, metrics: Metrics, *, rejected: bool = False) -> None:
        """Keep what the model after training round `turn` measured, and what the gate said."""
        if turn not in self._metrics:
            told = {"turn": turn, "metrics": asdict(metrics), "rejected": rejected}
            self._append({"measured": told})
            self._metrics[turn] = metrics
            if rejected:
                self._rejected.add(turn)

    def of_model(self, turn: int) -> Metrics | None:
        """The metrics of the model that stood after training round `turn`.

        Where the gate rolled back to an earlier one: that one's. None where nobody measured it.
        """
        while turn > 0 and turn in self._rejected:
            turn -= 1
        return self._metrics.get(turn)

    def _load(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n") or not self._take(line):
                break
            whole += len(line)
        if whole < len(data):
            os.truncate(self._path, whole)

    def _take(self, line: bytes) -> bool:
        try:
            found: dict[str, Any] = json.loads(line)
            if "round" in found:
                entry = RoundResult.from_json(found["round"])
                self._rounds[entry.round] = entry
            else:
                told = found["measured"]
                self._metrics[int(told["turn"])] = Metrics.from_json(told["metrics"])
                if told["rejected"]:
                    self._rejected.add(int(told["turn"]))
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _append(self, value: dict[str, Any]) -> None:
        line = memoryview(json.dumps(value, allow_nan=False).encode() + b"\n")
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(handle).st_size
                try:
                    while line:
                        line = line[os.write(handle, line) :]
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> StorageError:
        reason = error.strerror or type(error).__name__
        return StorageError(Code.JOURNAL_WRITE, f"{self._path}: cannot be kept ({reason}).")
