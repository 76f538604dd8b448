"""The benchmark over FLamby's tables: its records, its figures, its lines."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "task_tabular", ROOT / "benchmarks" / "task_tabular.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (module.DATA / "flamby_results").is_dir():
        pytest.skip(f"no FLamby results in {module.DATA}")
    torch.set_num_threads(1)
    return module


def test_the_rows_are_divided_as_flamby_divides_them(benchmark):
    heart = Counter((row["site"], row["part"]) for row in benchmark.heart_rows())
    sizes = [(heart[site, "train"], heart[site, "test"]) for site in benchmark.HOSPITALS]
    assert sizes == [(199, 104), (172, 89), (30, 16), (85, 45)]
    tcga = Counter((row["site"], row["part"]) for row in benchmark.tcga_rows())
    sizes = [(tcga[site, "train"], tcga[site, "test"]) for site in benchmark.REGIONS]
    assert sizes == [(248, 63), (156, 40), (164, 42), (129, 33), (129, 33), (40, 11)]


def test_validating_never_sees_a_test_row(benchmark):
    rows = benchmark.tcga_rows()
    kept = {row["patient"] for row in benchmark.validating(rows)}
    assert kept == {row["patient"] for row in rows if row["part"] == "train"}
    parts = Counter(row["part"] for row in benchmark.validating(rows))
    assert parts["test"] > 100
    assert parts["train"] > 500


def pair(time, event, risk):
    return {"T": str(time), "E": str(event)}, {"risk": str(risk)}


def test_the_c_index_is_harrells(benchmark):
    ordered = [pair(1, 1, 0.9), pair(2, 1, 0.5), pair(3, 0, 0.1)]
    assert benchmark.concordance(ordered) == 1
    assert benchmark.concordance([pair(1, 1, 0.1), pair(2, 0, 0.9)]) == 0
    assert benchmark.concordance([pair(1, 1, 0.4), pair(2, 0, 0.4)]) == 0.5
    # Who left before the event says nothing of the order.
    assert benchmark.concordance([*ordered, pair(0.5, 0, 0.0)]) == 1
    assert benchmark.concordance([pair(1, 0, 0.1), pair(2, 0, 0.9)]) == 0.5


def test_the_published_figures_are_those_of_the_papers_seeds(benchmark):
    heart = benchmark.published("heart")
    assert heart["Pooled Training"]["pooled"] == pytest.approx((0.795, 0.003), abs=1e-3)
    assert heart["FedAvg100"]["mean"] == pytest.approx((0.685, 0.028), abs=1e-3)
    assert set(benchmark.PUBLISHED.values()) - set(heart) == {"Local 4", "Local 5"}


def test_a_finished_line_is_not_run_again(benchmark, monkeypatch, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    words = ["task_tabular.py", "--quick", "--lines", str(lines), "--only"]
    for row in ("heart/fedavg", "heart/local 0", "tcga/joint"):
        monkeypatch.setattr(sys, "argv", [*words, row])
        assert benchmark.main() == 0
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["method"] for line in found] == ["fedavg", "local 0", "joint"]
    assert all(0 < line["figures"]["pooled"] < 1 for line in found)
    assert found[0]["figures"]["pooled"] > 0.7
    monkeypatch.setattr(benchmark, "one", None)
    monkeypatch.setattr(sys, "argv", [*words, "heart/fedavg"])
    assert benchmark.main() == 0
    assert "0.748 ± 0.027 yes" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "heart/fedprox"])
    with pytest.raises(TypeError):
        benchmark.main()  # the control: another row is run
