"""Reads notes or numbers from a file and writes the likeliest label and all probabilities."""

from __future__ import annotations

import csv
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from client.data.records import Record
from client.data.tables import TableColumns, read_table
from common.errors import Code, DataError, StorageError
from common.statistics import normalised, scaled
from common.tensors import load_tensors

__all__ = ["TABULAR_FILE", "WEIGHTS_FILE", "Prediction", "predict"]

TABULAR_FILE: Final = "tabular.json"
WEIGHTS_FILE: Final = "model.safetensors"

_BATCH: Final = 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """One note's answer: its place in the file, the likeliest label, and all probabilities."""

    line: int
    patient: str | None
    label: str
    probabilities: dict[str, float]


def predict(
    model_folder: Path,
    file: Path,
    out: Path,
    *,
    text: str = "text",
    patient: str | None = None,
    device: str = "auto",
) -> int:
    """Classify every record of `file` and write `out` (.csv or .ndjson); returns how many.

    Args:
        model_folder: a folder that training wrote (any folder with a sequence classifier works).
        file: CSV, Parquet or NDJSON with a text column, or with a tabular model's features.
        out: must not exist; appears whole or not at all.
        text: the column with the notes; a tabular model names its own columns.
        patient: a column to carry over into the output, or None.
        device: auto, cpu or cuda[:N].

    Raises:
        DataError: the folder is not a model, the file cannot be used, `out` is already there.
        StorageError: `out` cannot be written.
    """
    if out.suffix.lower() not in {".csv", ".ndjson", ".jsonl"}:
        message = f"{out}: predictions are written as .csv or .ndjson."
        raise DataError(Code.DATA_FORMAT, message, remedy="Name an output that ends in .csv.")
    if out.exists():
        raise DataError(Code.OUTPUT_EXISTS, f"{out}: is already there.")
    columns = TableColumns(text=text, patient=patient)
    classify: _Predictor
    if (model_folder / TABULAR_FILE).is_file():
        tabular = _TabularClassifier(model_folder)
        columns = TableColumns(None, patient, numbers=tabular.columns)
        records = read_table(file, columns, labels=None)
        classify = tabular
    else:
        records = read_table(file, columns, labels=None)
        classify = _Classifier(model_folder, device)
    answers = classify(records, keep_patient=patient is not None)
    _write(out, answers, classify.labels)
    return len(records)


class _Predictor:
    """A saved model: probabilities of its labels, record by record."""

    labels: tuple[str, ...]

    def __call__(self, records: Sequence[Record], *, keep_patient: bool) -> Iterator[Prediction]:
        for first in range(0, len(records), _BATCH):
            chunk = records[first : first + _BATCH]
            for record, row in zip(chunk, self._probabilities(chunk), strict=True):
                best = max(range(len(row)), key=row.__getitem__)
                yield Prediction(
                    line=record.line,
                    patient=record.patient if keep_patient else None,
                    label=self.labels[best],
                    probabilities=dict(zip(self.labels, row, strict=True)),
                )

    def _probabilities(self, records: Sequence[Record]) -> list[list[float]]:
        raise NotImplementedError


class _Classifier(_Predictor):
    """A saved model and its way of reading notes."""

    def __init__(self, folder: Path, device: str) -> None:
        import transformers
        from safetensors import SafetensorError

        from client.devices import choose_device
        from client.tasks.backbone import load_backbone
        from client.tasks.network import input_maker, saved_reading
        from client.tasks.text import Encoder

        backbone = load_backbone(str(folder.resolve()))
        try:
            model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            message = f"{folder}: does not load as a text classifier ({type(error).__name__})."
            raise DataError(Code.MODEL_FAMILY, message) from None
        self._device = choose_device(device)
        self._model = model.eval().to(self._device)
        self._inputs = input_maker(model)
        self._pad = int(backbone.tokenizer.pad_token_id or 0)
        self._encode = Encoder(backbone.tokenizer, saved_reading(model.config))
        names = model.config.id2label
        self.labels = tuple(str(names[index]) for index in sorted(names))

    def _probabilities(self, records: Sequence[Record]) -> list[list[float]]:
        import numpy as np
        import torch

        from client.tasks.text import batch_inputs

        encoded = self._encode([record.text for record in records])
        logits = []
        with torch.inference_mode():
            for first in range(0, len(encoded.rows), _BATCH):
                ids, mask = batch_inputs(encoded.rows[first : first + _BATCH], self._pad)
                inputs = self._inputs(ids.to(self._device), mask.to(self._device))
                logits.append(self._model(**inputs).logits.double().cpu().numpy())
        sums = np.add.reduceat(np.concatenate(logits), encoded.starts[:-1], axis=0)
        mean = sums / np.diff(encoded.starts)[:, None]
        powers = np.exp(mean - mean.max(axis=1, keepdims=True))
        rows: list[list[float]] = (powers / powers.sum(axis=1, keepdims=True)).tolist()
        return rows


class _TabularClassifier(_Predictor):
    """A saved model of numbers, and its normalisation."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        weights = load_tensors(folder / WEIGHTS_FILE)
        try:
            facts: Any = json.loads((folder / TABULAR_FILE).read_text(encoding="utf-8"))
            features = facts["features"]
            self.columns = tuple(str(feature["name"]) for feature in features)
            self.labels = tuple(str(label) for label in facts["labels"])
            self._low, self._high, self._mean, self._deviation = (
                np.array([feature[key] for feature in features], np.float64)
                for key in ("low", "high", "mean", "deviation")
            )
            layers = [*(f"hidden{n}" for n in range(1, len(facts["hidden"]) + 1)), "output"]
            self._layers = [(weights[f"{n}.weight"].T, weights[f"{n}.bias"]) for n in layers]
            widths = [len(features), *facts["hidden"], len(self.labels)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unfit(folder, type(error).__name__) from None
        shapes = [matrix.shape for matrix, _ in self._layers]
        if shapes != list(itertools.pairwise(widths)) or not all(self._high > self._low):
            raise _unfit(folder, "shapes or bounds")

    def _probabilities(self, records: Sequence[Record]) -> list[list[float]]:
        import numpy as np

        part = scaled(np.array([record.values for record in records]), self._low, self._high)
        values: Any = normalised(
            part, self._mean.astype(np.float32), self._deviation.astype(np.float32)
        )
        for number, (matrix, bias) in enumerate(self._layers):
            values = (np.maximum(values, 0) if number else values) @ matrix + bias
        powers = np.exp(values.astype(np.float64) - values.max(axis=1, keepdims=True))
        rows: list[list[float]] = (powers / powers.sum(axis=1, keepdims=True)).tolist()
        return rows


def _unfit(folder: Path, reason: str) -> DataError:
    return DataError(Code.MODEL_STATE, f"{folder}: not a whole model of numbers ({reason}).")


def _write(out: Path, answers: Iterable[Prediction], labels: Sequence[str]) -> None:
    """Write to a file beside `out`, then rename."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise _unwritable(out, error) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            lines = _csv if out.suffix.lower() == ".csv" else _ndjson
            lines(stream, answers, labels)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _csv(stream: IO[str], answers: Iterable[Prediction], labels: Sequence[str]) -> None:
    writer = csv.writer(stream)
    writer.writerow(["line", "patient", "label", *(f"p({label})" for label in labels)])
    for answer in answers:
        shares = [f"{answer.probabilities[label]:.6f}" for label in labels]
        writer.writerow([answer.line, answer.patient or "", answer.label, *shares])


def _ndjson(stream: IO[str], answers: Iterable[Prediction], _labels: Sequence[str]) -> None:
    for answer in answers:
        entry: dict[str, Any] = {"line": answer.line, "label": answer.label}
        if answer.patient is not None:
            entry["patient"] = answer.patient
        entry["probabilities"] = {k: round(v, 6) for k, v in answer.probabilities.items()}
        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _unwritable(out: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(Code.MODEL_OUTPUT, f"{out}: cannot be written ({reason}).")
