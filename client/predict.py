"""Reads records from a file and writes what a saved model tells of each."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from client.data.intake import receive_inputs
from client.data.records import Record
from client.data.tables import TableColumns, read_table
from common.config import load
from common.errors import Code, DataError, StorageError
from common.outcomes import Classes, LabelSet, Number, Outcome
from common.study import Task
from common.tasks.cases import CaseRules
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.medication import MedicationTask

__all__ = [
    "CASES_FILE",
    "MODEL_FORMAT",
    "TASK_FILE",
    "WEIGHTS_FILE",
    "Answer",
    "Prediction",
    "header",
    "predict",
]

TASK_FILE: Final = "task.json"
WEIGHTS_FILE: Final = "model.safetensors"
CASES_FILE: Final = "cases.json"
"""What of a hospital's system a model is asked about, beside its weights."""
MODEL_FORMAT: Final = "wardround-model/1"

_BATCH: Final = 64


Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One record's answer: where it stands, and what is told (client/tasks/outcomes.py).

    `place` is the line in the file, or the stay in the hospital's system.
    """

    place: int | str
    patient: str | None
    answer: Answer


def predict(
    model_folder: Path,
    file: Path,
    out: Path,
    *,
    beside: Sequence[Path] = (),
    knowledge: Path | None = None,
    text: str = "text",
    patient: str | None = None,
    device: str = "auto",
) -> int:
    """Classify every record of `file` and write `out` (.csv or .ndjson); returns how many.

    Args:
        model_folder: a folder that training wrote (any folder with a sequence classifier works).
        file: CSV, Parquet or NDJSON with a text column, or with the columns of the model's task; or
            a hospital's site.yaml, whose system is then asked for every stay that the study takes.
        out: must not exist; appears whole or not at all.
        beside: further files of the same records, for a model that reads measurements by the hour.
        knowledge: the folder of the graph that a model reads, where it does not lie in its own.
        text: the column with the notes; another task's model names its own columns.
        patient: a column to carry over into the output, or None.
        device: auto, cpu or cuda[:N].

    Raises:
        DataError: the folder is not a model, the file cannot be used, `out` is already there; the
            model's study has no rules for a system, or the site none.
        StorageError: `out` cannot be written.
    """
    if out.suffix.lower() not in {".csv", ".ndjson", ".jsonl"}:
        message = f"{out}: predictions are written as .csv or .ndjson."
        raise DataError(Code.DATA_FORMAT, message, remedy="Name an output that ends in .csv.")
    if out.exists():
        raise DataError(Code.OUTPUT_EXISTS, f"{out}: is already there.")
    system = file.suffix.lower() in {".yaml", ".yml"}
    if system and beside:
        message = f"{beside[0]}: the hours of a stay come out of the system that {file.name} names."
        raise DataError(Code.DATA_FORMAT, message, remedy="Leave out --with.")
    classify: _Predictor
    if (model_folder / TASK_FILE).is_file():
        rows = _Rows(model_folder, device, knowledge)
        classify = rows
        if not system:
            records = receive_inputs(rows.task, [file, *beside], patient=patient)
    elif beside:
        message = f"{beside[0]}: this model reads one file of notes."
        raise DataError(Code.DATA_FORMAT, message, remedy="Leave out --with.")
    else:
        classify = _Classifier(model_folder, device)
        if not system:
            records = read_table(file, TableColumns(text=text, patient=patient), labels=None)
    if system:
        task = rows.task if isinstance(classify, _Rows) else None
        records = _stays(model_folder, file, task)
    answers = classify(records, keep_patient=system or patient is not None, by_stay=system)
    _write(out, answers, ("stay" if system else "line", "patient", *classify.header))
    return len(records)


def _stays(model_folder: Path, site: Path, task: Task | None) -> tuple[Record, ...]:
    """The stays of the system that a site.yaml names, as the model's study takes them."""
    from client.config import SiteConfig
    from client.data.intake import System, receive_unanswered

    named = load(site, SiteConfig).data.system
    if named is None:
        raise DataError(Code.DATA_FORMAT, f"{site}: names no system; give its tables themselves.")
    path = model_folder / CASES_FILE
    if not path.is_file():
        raise DataError(Code.NO_CASES, f"{model_folder}: the study of this model read tables.")
    try:
        rules = CaseRules.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        message = f"{path}: not the rules of a study ({type(error).__name__})."
        raise DataError(Code.MODEL_STATE, message) from None
    return receive_unanswered(task, rules, System.of(named, site)).records


class _Predictor:
    """A saved model: its answers, record by record, and the columns that they fill."""

    header: tuple[str, ...]

    def __call__(
        self, records: Sequence[Record], *, keep_patient: bool, by_stay: bool = False
    ) -> Iterator[Prediction]:
        for first in range(0, len(records), _BATCH):
            chunk = records[first : first + _BATCH]
            for record, answer in zip(chunk, self._answers(chunk), strict=True):
                patient = record.patient if keep_patient else None
                yield Prediction(record.encounter if by_stay else record.line, patient, answer)

    def _answers(self, records: Sequence[Record]) -> list[Answer]:
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
        labels = tuple(str(names[index]) for index in sorted(names))
        many = model.config.problem_type == "multi_label_classification"
        self._outcome = LabelSet(labels) if many else Classes(labels)
        self.header = header(self._outcome)

    def _answers(self, records: Sequence[Record]) -> list[Answer]:
        import numpy as np
        import torch

        from client.tasks.outcomes import answers
        from client.tasks.text import batch_inputs

        encoded = self._encode([record.text for record in records])
        logits = []
        with torch.inference_mode():
            for first in range(0, len(encoded.rows), _BATCH):
                ids, mask = batch_inputs(encoded.rows[first : first + _BATCH], self._pad)
                inputs = self._inputs(ids.to(self._device), mask.to(self._device))
                logits.append(self._model(**inputs).logits.double().cpu().numpy())
        sums = np.add.reduceat(np.concatenate(logits), encoded.starts[:-1], axis=0)
        return answers(self._outcome, torch.from_numpy(sums / np.diff(encoded.starts)[:, None]))


class _Rows(_Predictor):
    """A saved network of a task's own, and its normalisation."""

    def __init__(self, folder: Path, device: str, knowledge: Path | None = None) -> None:
        from client.knowledge.shelf import graph_choice, graph_of
        from client.saved import SavedRows

        self._saved = SavedRows(folder, device, knowledge)
        self.task = self._saved.task
        choice = graph_choice(self.task)
        self._graph = None if choice is None else graph_of(choice)
        self.header = header(self.task.outcome)
        if self._graph is not None:
            medication = isinstance(self.task, MedicationTask)
            self.header += ("reasons", "flags") if medication else ("named",)

    def _answers(self, records: Sequence[Record]) -> list[Answer]:
        from client.tasks.outcomes import answers

        found = answers(self.task.outcome, self._saved.outputs(records))
        if self._graph is None:
            return found
        if isinstance(self.task, DiagnosisTask) and self.task.graph is not None:
            from client.knowledge.mentions import mentions_of

            known = mentions_of(self.task.graph)
            named = [[node.name for node in known.nodes(record.text)] for record in records]
            return [answer | {"named": names} for answer, names in zip(found, named, strict=True)]
        from client.knowledge.reasons import advice
        from client.knowledge.visits import known_codes

        return [
            answer | advice(self._graph, known_codes(self.task, record), answer["probabilities"])
            for record, answer in zip(records, found, strict=True)
        ]


def _write(out: Path, answers: Iterable[Prediction], names: Sequence[str]) -> None:
    """Write to a file beside `out`, then rename."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise _unwritable(out, error) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            lines = _csv if out.suffix.lower() == ".csv" else _ndjson
            lines(stream, answers, names)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def header(outcome: Outcome) -> tuple[str, ...]:
    """The columns that an answer fills, after its line and patient."""
    if isinstance(outcome, Classes):
        return ("label", *(f"p({label})" for label in outcome.labels))
    if isinstance(outcome, LabelSet):
        return ("labels", *(f"p({label})" for label in outcome.labels))
    if isinstance(outcome, Number):
        return ("value",)
    return ("risk", *(f"survives {edge:g}" for edge in outcome.edges), "survives later")


def _csv(stream: IO[str], answers: Iterable[Prediction], names: Sequence[str]) -> None:
    writer = csv.writer(stream)
    writer.writerow(names)
    for found in answers:
        writer.writerow([found.place, found.patient or "", *_cells(found.answer)])


def _cells(answer: Answer) -> Iterator[str]:
    for name, told in answer.items():
        if isinstance(told, dict):
            yield from (f"{share:.6f}" for share in told.values())
        elif isinstance(told, list):
            yield ("; " if name in {"reasons", "flags", "named"} else ";").join(told)
        else:
            yield told if isinstance(told, str) else f"{told:.6g}"


def _ndjson(stream: IO[str], answers: Iterable[Prediction], names: Sequence[str]) -> None:
    for found in answers:
        entry: dict[str, Any] = {names[0]: found.place}
        if found.patient is not None:
            entry["patient"] = found.patient
        for name, told in found.answer.items():
            shares = isinstance(told, dict)
            entry[name] = {k: round(v, 6) for k, v in told.items()} if shares else told
        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _unwritable(out: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(Code.MODEL_OUTPUT, f"{out}: cannot be written ({reason}).")
