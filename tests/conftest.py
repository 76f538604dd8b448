"""A tiny random BERT, notes to go with it, and simulations made of both."""

from __future__ import annotations

import copy
import csv
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LABELS = ("pneumonia", "asthma", "heart failure")
HOSPITALS = ("east", "north", "south", "west")
SIGNS = {
    "pneumonia": ("fever", "sputum", "green", "cough"),
    "asthma": ("wheeze", "childhood", "since", "denies"),
    "heart failure": ("swollen", "legs", "heart", "old"),
}
FILLERS = ("a", "no", "chest", "pain", "lung", "clear", "patient", "with", "and", "of")

STUDY: dict[str, Any] = {
    "format": "wardround-study/1",
    "name": "tiny",
    "task": {"kind": "diagnosis", "labels": list(LABELS), "max_tokens": 12},
    "model": {"tuning": "head", "precision": "float32"},
    "training": {
        "rounds": 3,
        "local_steps": 2,
        "sampling_rate": 0.3,
        "expected_batch": 8,
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
    },
    "privacy": {"mode": "local", "epsilon": 8, "delta": 5e-4, "clip_norm": 1.0},
    "simulation": {
        "data": {"files": ["notes.csv"]},
        "split": {"by": "column", "column": "hospital"},
        "seed": 1,
    },
}


def _save_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Save a WordPiece tokenizer of `words`; returns how many tokens it has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *words]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path, Iterable[str]], int]:
    """Saves a tokenizer; see `_save_tokenizer`."""
    return _save_tokenizer


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT of two layers and sixteen numbers a token."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny-bert")
    size = _save_tokenizer(
        folder, [*FILLERS, *(word for group in SIGNS.values() for word in group)]
    )
    torch.manual_seed(7)
    config = hf.BertConfig(
        vocab_size=size,
        pad_token_id=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=140,
        initializer_range=0.3,
    )
    hf.BertModel(config).save_pretrained(folder)
    return folder


def _write_notes(
    path: Path,
    *,
    patients: int = 30,
    hospitals: tuple[str, ...] = HOSPITALS,
    labels: tuple[str, ...] = LABELS,
    seed: int = 0,
    mark: str = "p",
) -> list[dict[str, str]]:
    """Write notes of `patients` patients at every hospital; every tenth patient has two."""
    stream = np.random.default_rng(seed)
    rows: list[dict[str, str]] = []
    for hospital in hospitals:
        for number in range(patients):
            label = labels[int(stream.integers(len(labels)))]
            signs = list(SIGNS.values())[labels.index(label) % len(SIGNS)]
            for _ in range(2 if number % 10 == 0 else 1):
                words = [str(w) for w in stream.choice(signs, 3)]
                words += [str(w) for w in stream.choice(FILLERS, 4)]
                rows.append(
                    {
                        "patient": f"{hospital}-{mark}{number}",
                        "hospital": hospital,
                        "text": " ".join(str(w) for w in stream.permutation(words)),
                        "label": label,
                    }
                )
    with path.open("w", newline="", encoding="utf-8") as stream_out:
        writer = csv.DictWriter(stream_out, ["patient", "hospital", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section; None removes a key."""
    found = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = _merged(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


@pytest.fixture(scope="session")
def write_notes() -> Callable[..., list[dict[str, str]]]:
    """Writes a file of notes; see `_write_notes`."""
    return _write_notes


@pytest.fixture(scope="session")
def merged() -> Callable[..., dict[str, Any]]:
    """Lays sections over sections; see `_merged`."""
    return _merged


def _write_study(
    folder: Path,
    backbone: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    notes: bool = True,
    **options: Any,
) -> Path:
    if notes:
        _write_notes(folder / "notes.csv", **options)
    study = _merged(_merged(STUDY, {"model": {"backbone": str(backbone)}}), changes or {})
    path = folder / "study.yaml"
    path.write_text(json.dumps(study, indent=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def write_study() -> Callable[..., Path]:
    """Writes notes.csv and study.yaml into a folder; sections are laid over those of STUDY."""
    return _write_study


@pytest.fixture
def make_study(tmp_path: Path, tiny_bert: Path) -> Callable[..., Path]:
    """The same for the test's own folder and the tiny BERT."""
    return functools.partial(_write_study, tmp_path, tiny_bert)


@pytest.fixture
def wardround(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process; returns exit status, standard output and error."""
    from common.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(word) for word in words])
        told = capfd.readouterr()
        return status, told.out, told.err

    return run
