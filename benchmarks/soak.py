"""Five hundred tiny rounds on loopback: what grows, and how much.

    python benchmarks/soak.py [--rounds 500] [--sites 3] [--json FILE]

The coordinator and every hospital are real processes (tests/processes/deployment). After every
tenth round the resident memory (private pages), open descriptors and threads of the coordinator and
of one hospital are read, and the bytes of their journals and of everything that they keep. The
slope is a line fitted through the second half of the run, where nothing is loaded any more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "processes" / "deployment")]

import numpy as np  # noqa: E402
from federation import COORDINATOR, Federation, ended, require_whole  # noqa: E402

MIB = 1 << 20
SLOPE_GOAL = 5.0
EVERY = 10


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def use_of(pid: int) -> dict[str, float]:
    """Private memory, descriptors and threads of a process."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1])
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    threads = next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"mib": private / 1024, "files": files, "threads": threads}


def look(fed: Federation, pids: dict[str, int]) -> dict[str, Any]:
    """Everything at one moment."""
    site = fed.sites[0]
    journals = {
        COORDINATOR: fed.run_folder.journal,
        "hospital": fed.study_folder(site).journal,
    }
    homes = {COORDINATOR: fed.state, "hospital": fed.home(site)}
    return {
        who: {
            **use_of(pids[COORDINATOR if who == COORDINATOR else site]),
            "journal_kib": size_of(journals[who]) / 1024,
            "state_kib": size_of(homes[who]) / 1024,
        }
        for who in journals
    }


def slope(rounds: list[int], values: list[float]) -> float:
    """Per hundred rounds, over the second half."""
    half = len(rounds) // 2
    return float(100 * np.polyfit(rounds[half:], values[half:], 1)[0])


def show(marks: list[tuple[int, dict[str, Any]]], seconds: float) -> bool:
    """The table; whether the goals are met."""
    rounds = [number for number, _ in marks]
    kinds = ("mib", "files", "threads", "journal_kib", "state_kib")
    print(f"{rounds[-1]} rounds in {seconds:.0f} s, {seconds / rounds[-1]:.2f} s each")
    met = True
    for who in (COORDINATOR, "hospital"):
        print(who)
        heads = ("round", "MiB", "files", "threads", "journal KiB", "all KiB")
        print(*(f"{head:>12}" for head in heads))
        for number, told in marks:
            if number % 100 == 0 or number in {rounds[0], rounds[-1]}:
                row = [told[who][kind] for kind in kinds]
                print(f"{number:>12}", *(f"{value:>12.1f}" for value in row))
        for kind in kinds:
            grown = slope(rounds, [told[who][kind] for _, told in marks])
            goal = SLOPE_GOAL if kind == "mib" else 1.0 if kind in {"files", "threads"} else None
            verdict = (
                "" if goal is None else f"  goal < {goal:g}: {'met' if grown < goal else 'MISSED'}"
            )
            met &= goal is None or grown < goal
            print(f"  {kind:12} {grown:+8.2f} per 100 rounds{verdict}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where everything is written")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-", dir=given.folder))
    marks: list[tuple[int, dict[str, Any]]] = []
    study = {"evaluation": {"every": 50}}
    try:
        with Federation(
            root, sites=given.sites, rounds=given.rounds, study=study, direct=True
        ) as fed:
            fed.start()
            pids = {name: process.pid for name, process in fed.processes.items()}
            fed.wait_rounds(EVERY, 300)
            start = time.monotonic()
            for number in range(EVERY, given.rounds + 1, EVERY):
                fed.wait_rounds(number, 600)
                marks.append((fed.completed(), look(fed, pids)))
            seconds = time.monotonic() - start
            ended(fed, seconds=600)
            require_whole(fed)
    finally:
        if given.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    if given.json is not None:
        given.json.write_text(json.dumps(marks, indent=1))
    return 0 if show(marks, seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
