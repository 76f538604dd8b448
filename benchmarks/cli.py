"""CPU seconds of commands that do not train: user + system of a fresh process, best of some runs.

    python benchmarks/cli.py                       the table, and benchmarks/cli.json
    python benchmarks/cli.py "privacy out" "plan configs/simulation.yaml"    other command lines

The goal is 0.3 CPU-seconds: a command that answers at once is used. `python` is the floor: an
interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOAL_S = 0.3
DEFAULT = [
    "--help",
    "check configs/diagnosis-minilm.yaml",
    "check configs/site.yaml",
    "check gone.yaml",
    "check --frob",
    "chekc",
    "errors WR-1004",
    "doctor",
]


def cpu_seconds(words: list[str]) -> tuple[float, int]:
    """CPU seconds and exit status of one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(words, capture_output=True, env=environment, cwd=ROOT, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, run.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", default=DEFAULT, help="what follows `wardround`")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rows = []
    for line in ["", *arguments.commands]:
        call = ["-m", "common.cli", *line.split()] if line else ["-c", "pass"]
        runs = [cpu_seconds([sys.executable, *call]) for _ in range(arguments.runs)]
        best, worst = min(runs)[0], max(runs)[0]
        name = f"wardround {line}" if line else "python"
        row = {"command": name, "best_s": round(best, 3), "worst_s": round(worst, 3)}
        rows.append({**row, "exit_status": runs[0][1], "within_goal": best <= GOAL_S})
    width = max(len(str(row["command"])) for row in rows)
    print(f"{'command':<{width}}  best CPU-s  worst  exit  <= {GOAL_S}")
    for row in rows:
        print(
            f"{row['command']:<{width}}  {row['best_s']:>10.3f}  {row['worst_s']:>5.3f}"
            f"  {row['exit_status']:>4}  {'yes' if row['within_goal'] else 'NO'}"
        )
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
