"""CPU seconds of commands that do not train: user + system of a fresh process, best of some runs.

    python benchmarks/cli.py                       the table, and benchmarks/cli.json
    python benchmarks/cli.py "privacy out" "plan configs/simulation.yaml"    other command lines

The goal is 0.3 CPU-seconds: a command that answers at once is used. `python` is the floor: an
interpreter that does nothing. `{bench}` in a command line is a folder of its own, new for every
run, with spoiled studies and an enrolment that has begun (see `furnish`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOAL_S = 0.3
_CO = "--config {bench}/co/coordinator.yaml"
_ST = "--config {bench}/st/site.yaml"
_INVITE = f"server invite Mary {_CO} --out {{bench}}/mary.invite"
_HEADER = "patient,hospital,text,label"
# What may be wrong with the records: the file that a study names, and what is in it.
FAULTS = {
    "missing": None,
    "empty": "",
    "column": "patient,hospital,note,label\na-1,a,cough,pneumonia\n",
    "label": f"{_HEADER}\na-1,a,cough,influenza\n",
    "comma": f"{_HEADER}\na-1,a,cough, really,pneumonia\n",
    "few": f"{_HEADER}\na-1,a,cough,pneumonia\n",
}
DEFAULT = [
    "--help",
    "check configs/diagnosis-minilm.yaml",
    "check configs/site.yaml",
    "check gone.yaml",
    "check --frob",
    "chekc",
    "errors WR-1004",
    "doctor",
    *(f"simulate {{bench}}/{fault}.yaml --out {{bench}}/out" for fault in FAULTS),
    "plan {bench}/column.yaml",
    "study build {bench}/column.yaml",
    "resume {bench}",
    f"server init {_CO} --name Lakeland --dns wr.example.org --port 9443",
    f"server invite East {_CO} --out {{bench}}/east.invite",
    f"server roster {_CO}",
    f"server renew {_CO}",
    f"client join {{bench}}/mary.invite {_ST}",
    f"doctor {_CO} --offline",
    f"doctor {_ST} --offline",
]
_INIT = next(line for line in DEFAULT if line.startswith("server init"))
# What has to be typed before a line can be: untimed.
BEFORE = {
    "server invite": [_INIT],
    "server roster": [_INIT],
    "server renew": [_INIT],
    "client join": [_INIT, _INVITE],
    f"doctor {_CO}": [_INIT],
    f"doctor {_ST}": [_INIT, _INVITE, f"client join {{bench}}/mary.invite {_ST}"],
}


def furnish(folder: Path) -> None:
    """A study for every fault of `FAULTS`, beside its data, and one desk for each side."""
    study = (ROOT / "configs" / "simulation.yaml").read_text()
    for name, data in FAULTS.items():
        spoiled = study.replace("data/synthetic-notes.csv", f"{name}.csv")
        (folder / f"{name}.yaml").write_text(spoiled)
        if data is not None:
            (folder / f"{name}.csv").write_text(data)
    (folder / "co").mkdir()
    (folder / "st").mkdir()


@contextmanager
def ready(line: str) -> Iterator[list[str]]:
    """The words of a process, once everything that has to come before has been typed."""
    with tempfile.TemporaryDirectory() as name:
        furnish(Path(name))
        before = next((lines for key, lines in BEFORE.items() if line.startswith(key)), [])
        typed = [_words(earlier, name) for earlier in before]
        for words in typed:
            if cpu_seconds(words)[1]:
                raise SystemExit(f"could not prepare: {' '.join(words)}")
        yield _words(line, name)


def _words(line: str, folder: str) -> list[str]:
    return [sys.executable, "-m", "common.cli", *line.replace("{bench}", folder).split()]


def timed(line: str) -> tuple[float, int]:
    """CPU seconds and exit status of one command line; of the bare interpreter for an empty one."""
    if not line:
        return cpu_seconds([sys.executable, "-c", "pass"])
    with ready(line) as words:
        return cpu_seconds(words)


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
        runs = [timed(line) for _ in range(arguments.runs)]
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
