"""Every task's figures, one program after another: all of benchmarks/task_*.py.

    python benchmarks/tasks.py --lines FOLDER [--seeds N] [--only TASK ...] [--side-by-side 2]
    python benchmarks/tasks.py --quick            one seed, a few steps: does every one of them run

FOLDER keeps what each program has measured, TASK.jsonl; started again, only what is not there is
run. Each task's output goes to FOLDER/TASK.txt as it comes (without a folder: nowhere) and is
printed whole when the task is done; the closing table says how each one ended. A program ends with
1 where a goal is missed: that is a figure, not a failure of this one, which ends with 1 where a
program crashed. A task whose data is absent says so and is counted as skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
TASKS: Final = tuple(sorted(path.stem.removeprefix("task_") for path in HERE.glob("task_*.py")))
CRASHED: Final = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How one task's program ended. `minutes` are of wall clock."""

    task: str
    verdict: str
    minutes: float
    output: str


def verdict(returned: int, output: str) -> str:
    """What a program's end means."""
    if returned not in (0, 1) or CRASHED in output:
        return f"FAILED ({returned})"
    if output.startswith("skipped"):
        return "skipped"
    return "a goal missed" if returned else "ran"


def command(task: str, options: argparse.Namespace) -> list[str]:
    """The command line of one task's program."""
    words = [sys.executable, str(HERE / f"task_{task}.py")]
    if options.quick:
        words.append("--quick")
    if options.seeds is not None:
        words += ["--seeds", str(options.seeds)]
    if options.lines is not None:
        words += ["--lines", str(options.lines / f"{task}.jsonl")]
    return words


def run(task: str, options: argparse.Namespace) -> Ended:
    """One task's program, to its end."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
    )
    with subprocess.Popen(
        command(task, options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        kept: list[str] = []
        for line in process.stdout:
            kept.append(line)
            if options.lines is not None:
                with (options.lines / f"{task}.txt").open("a", encoding="utf-8") as out:
                    out.write(line)
    output = "".join(kept)
    told = verdict(process.returncode, output)
    return Ended(task, told, (time.monotonic() - began) / 60, output)


def table(found: Sequence[Ended]) -> str:
    """How every task ended."""
    rows = [f"{'task':12} {'minutes':>8}  ended"]
    rows += [f"{one.task:12} {one.minutes:8.1f}  {one.verdict}" for one in found]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=Path, help="folder of results; what is there is not redone")
    parser.add_argument("--seeds", type=int, help="for every task; each program has its own number")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--side-by-side", type=int, default=2, help="programs at a time")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    options = parser.parse_args()
    if options.lines is not None:
        options.lines.mkdir(parents=True, exist_ok=True)
    found = []
    with ThreadPoolExecutor(options.side_by_side) as pool:
        for ended in pool.map(lambda task: run(task, options), options.only):
            print(f"== {ended.task}\n{ended.output}", flush=True)
            found.append(ended)
    print(table(found))
    return 1 if any(one.verdict.startswith("FAILED") for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
