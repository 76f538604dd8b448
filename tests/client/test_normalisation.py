"""What counting statistics together is worth, on the heart disease records of four hospitals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEEDS, ROUNDS = 3, 10


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "normalisation", ROOT / "benchmarks" / "normalisation.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(benchmark):
    folder = benchmark.DATA / "fed_heart_disease"
    if not folder.is_dir():
        pytest.skip(f"no heart disease records in {folder}")
    torch.set_num_threads(1)
    counts = [len(benchmark.records(folder, hospital)) for hospital in benchmark.HOSPITALS]
    assert counts == [303, 261, 46, 130], "not FLamby's 740 patients"
    return {row["normalisation"]: row for row in benchmark.table(folder, SEEDS, ROUNDS, 1.0)}


def test_counting_together_beats_every_hospital_for_itself(rows):
    for key in ("mean", "pooled"):
        assert rows["global"][key] >= rows["per site"][key] + 0.05


def test_under_differential_privacy_it_still_does(rows):
    """Epsilon 1 for the statistics alone; it also beats scaling by the declared bounds."""
    for key in ("mean", "pooled"):
        assert rows["noised"][key] >= rows["per site"][key] + 0.05
        assert rows["noised"][key] >= rows["bounds"][key] - 0.01


def test_the_model_is_worth_comparing(rows):
    assert rows["global"]["pooled"] > 0.77
