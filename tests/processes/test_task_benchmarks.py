"""benchmarks/tasks.py: every task's program runs, and what it has measured is not run again."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "tasks.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("tasks", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tasks"]


@pytest.mark.parametrize(
    ("returned", "output", "expected"),
    [
        (0, "row 0.9\n", "ran"),
        (1, "row 0.1\n", "a goal missed"),
        (0, "skipped: there is no data\n", "skipped"),
        (1, "Traceback (most recent call last):\nKeyError: 1\n", "FAILED (1)"),
        (2, "usage: task.py\n", "FAILED (2)"),
        (-9, "", "FAILED (-9)"),
    ],
)
def test_a_missed_goal_is_not_a_crash_and_a_crash_is_not_a_missed_goal(
    benchmark, returned, output, expected
):
    assert benchmark.verdict(returned, output) == expected


def run(folder, *words):
    told = subprocess.run(
        [sys.executable, str(PROGRAM), "--quick", "--lines", str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.returncode, told.stdout


def test_every_task_runs_quickly_and_no_run_is_done_twice(benchmark, tmp_path):
    returned, output = run(tmp_path)
    closing = output.rpartition("ended\n")[2].splitlines()
    assert [line.split()[0] for line in closing] == list(benchmark.TASKS)
    assert returned == 0, output
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    if not kept:
        pytest.skip("no task has its data here")
    assert run(tmp_path)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == kept
    name = min(kept)
    (tmp_path / name).write_bytes(b"")
    run(tmp_path, "--only", name.removesuffix(".jsonl"))
    assert (tmp_path / name).read_bytes() != b""  # the control: what is missing is run
