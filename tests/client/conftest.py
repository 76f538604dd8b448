"""Tiny random encoders of several families, and notes to read with them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.data.records import Record
from common.study import Study

WORDS = [
    "a",
    "no",
    "fever",
    "cough",
    "wheeze",
    "chest",
    "pain",
    "swollen",
    "legs",
    "smoker",
    "since",
    "childhood",
    "of",
    "the",
    "and",
    "patient",
    "with",
    "sudden",
    "onset",
    "sputum",
    "green",
    "heart",
    "lung",
    "clear",
    "denies",
    "##s",
    "##ing",
    "##ed",
    "old",
    "man",
    "woman",
    ".",
    ",",
]
LABELS = ("pneumonia", "asthma", "heart failure")


def _save_model(folder: Path, family: str, words: int) -> None:
    import torch
    import transformers as hf

    common = {"vocab_size": words, "pad_token_id": 1}
    layers = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
    }
    torch.manual_seed(7)
    wide = 0.3
    match family:
        case "bert" | "sentence-bert":
            model = hf.BertModel(hf.BertConfig(**common, **layers, initializer_range=wide))
        case "roberta":
            config = hf.RobertaConfig(
                **common, **layers, initializer_range=wide, bos_token_id=2, eos_token_id=3
            )
            model = hf.RobertaModel(config, add_pooling_layer=False)
        case "electra":
            config = hf.ElectraConfig(**common, **layers, embedding_size=16, initializer_range=wide)
            model = hf.ElectraModel(config)
        case "distilbert":
            model = hf.DistilBertModel(
                hf.DistilBertConfig(
                    **common,
                    dim=16,
                    n_layers=2,
                    n_heads=2,
                    hidden_dim=32,
                    max_position_embeddings=40,
                    initializer_range=wide,
                )
            )
        case "modernbert":
            model = hf.ModernBertModel(
                hf.ModernBertConfig(
                    **common,
                    **layers,
                    bos_token_id=2,
                    eos_token_id=3,
                    cls_token_id=2,
                    sep_token_id=3,
                    initializer_range=wide,
                    local_attention=8,
                )
            )
        case _:
            raise ValueError(family)
    model.save_pretrained(folder)
    if family == "sentence-bert":
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path, list[str]], int]
) -> Callable[[str], Path]:
    """The folder of a tiny random encoder of a family, made once."""
    import torch

    torch.set_num_threads(1)
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            _save_model(folder, family, save_tokenizer(folder, WORDS))
            made[family] = folder
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def study_of() -> Callable[..., Study]:
    """A valid study around a backbone."""

    def make(
        backbone: Path | str,
        tuning: str = "head",
        *,
        task: dict[str, object] | None = None,
        model: dict[str, object] | None = None,
        labels: tuple[str, ...] = LABELS,
    ) -> Study:
        return Study.model_validate(
            {
                "format": "wardround-study/1",
                "name": "tiny",
                "task": {"kind": "diagnosis", "labels": labels, "max_tokens": 12, **(task or {})},
                "model": {
                    "backbone": str(backbone),
                    "tuning": tuning,
                    "precision": "float32",
                    **(model or {}),
                },
                "privacy": {"mode": "none"},
                "sites": tuple({"id": f"site-{i}"} for i in range(3)),
            }
        )

    return make


@pytest.fixture(scope="session")
def notes() -> tuple[Record, ...]:
    """Six notes of four patients; the second note is long, patients one and three have two."""
    long = "patient with wheeze since childhood , no fever , no cough , chest clear . " * 3
    swollen = (
        "legs swollen and old heart , denies chest pain , denies cough , lung clear , no fever"
    )
    rows = (
        ("p1", "old man with fever and green sputum .", "pneumonia"),
        ("p2", long, "asthma"),
        ("p1", "cough , chest pain , fever .", "pneumonia"),
        ("p3", "woman with swollen legs , heart failure .", "heart failure"),
        ("p4", "wheezing smoker", "asthma"),
        ("p3", swollen, "heart failure"),
    )
    return tuple(
        Record(who, text, label, None, "notes.csv", line)
        for line, (who, text, label) in enumerate(rows, start=2)
    )
