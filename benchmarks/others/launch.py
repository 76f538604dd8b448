"""Runs simulators one after another, a process tree each, and watches what a tree occupies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from others import harness

HERE = Path(__file__).resolve().parent
# Looking at the memory of a large tree costs CPU; at most this share of one core goes into it.
WATCH_SHARE = 0.05
# How far the last model's loss may be from a plain loop's. The order of the rows and of the sum
# moves it by less than 1e-4; a missing round by 5e-4 and more, a missing hospital by 4e-4 or so.
LOSS_TOLERANCE = 3e-4
QUIET = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Contender:
    """A simulator: what it is called, what starts it, what it protects while it is measured."""

    name: str
    command: tuple[str, ...]
    protected: bool = False
    path: str = ""


OTHERS = (
    ("flwr", "flower.py", "flwr (ray)"),
    ("nvflare", "flare.py", "nvflare"),
    ("pfl", "pfl_research.py", "pfl-research"),
)


def contenders(pythons: dict[str, str]) -> list[Contender]:
    """The others, each with the interpreter that was named for it or with ours."""
    return [
        Contender(label, (pythons.get(name) or sys.executable, str(HERE / script)))
        for name, script, label in OTHERS
    ]


def ours(script: Path) -> Contender:
    """Our own simulator, measured the same way."""
    told = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = os.pathsep.join(str(Path(p).resolve()) for p in told)
    command = (sys.executable, str(script), "--ours")
    return Contender("wardround", command, protected=True, path=path)


def measure(contender: Contender, rounds: int, reference: float, limit_s: float) -> dict[str, Any]:
    """What a contender did, or `{"reason": ...}` in one line where it did not.

    Guarantee: no process that it started is left behind.
    """
    harness.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="wr-") as folder:
        found = _run(contender, rounds, Path(folder), limit_s)
        _end_orphans()
    if "reason" not in found and abs(found["loss"] - reference) > LOSS_TOLERANCE:
        found["reason"] = f"did other work: loss {found['loss']:.4f}, plain loop {reference:.4f}"
    on = contender.protected
    return {"secure_aggregation": on, "journal": on, "ledger": on, **found}


def _run(contender: Contender, rounds: int, folder: Path, limit_s: float) -> dict[str, Any]:
    paths = [str(HERE.parent), *([contender.path] if contender.path else [])]
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    out, err = folder / "out", folder / "err"
    began = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            child = subprocess.Popen(
                [*contender.command, "--rounds", str(rounds)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        except OSError as error:
            return {"reason": f"interpreter does not start: {error.strerror}"}
        peak, processes = _watch(child, began + limit_s)
    if child.returncode is None:
        child.kill()
        child.wait()
        return {"reason": f"not done after {limit_s:.0f} s"}
    found = _last_json(out)
    if child.returncode != 0 or not found:
        return {"reason": _last_line(err) or f"ended with status {child.returncode}"}
    if "reason" in found:
        return found
    whole = time.monotonic() - began
    return {**found, "peak_gb": peak / 1e9, "processes": processes, "whole_run_s": whole}


def _watch(child: subprocess.Popen[bytes], deadline: float) -> tuple[int, int]:
    """Peak memory in bytes and most processes at once, until the child ends or time is up."""
    peak = processes = 0
    while child.poll() is None and time.monotonic() < deadline:
        began = time.monotonic()
        pids = harness.living(child.pid)
        peak, processes = max(peak, harness.memory_bytes(pids)), max(processes, len(pids))
        time.sleep(max(0.1, (time.monotonic() - began) / WATCH_SHARE))
    return peak, processes


def _end_orphans() -> None:
    """Ends what a contender left running: all children of this process, which adopted them."""
    for pid in harness.living(os.getpid()):
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _last_json(path: Path) -> dict[str, Any]:
    for line in reversed(path.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return {}


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line[:100] for line in reversed(lines) if line), "")


def table(found: dict[str, dict[str, Any]], rounds: int) -> list[str]:
    """The lines of the comparison."""
    heads = (
        f"{'':22s} {'wall s':>8s} {'CPU s':>8s} {'first s':>8s} {'its CPU s':>10s} {'peak GB':>8s}",
        f"{'processes':>10s}  secure aggregation, journal, ledger",
    )
    lines = [
        f"Whole process trees, {rounds} rounds; per later round, CPU is user + system of all.",
        "".join(heads),
    ]
    for name, row in found.items():
        label = f"{name} {row.get('version', '')}"
        if "reason" in row:
            lines.append(f"{label:22s} {row['reason']}")
            continue
        lines.append(
            f"{label:22s} {row['wall_s_per_round']:8.3f} {row['cpu_s_per_round']:8.3f}"
            f" {row['first_round_s']:8.2f} {row['first_round_cpu_s']:10.2f} {row['peak_gb']:8.2f}"
            f" {row['processes']:9d}  {'on' if row['ledger'] else 'off'}"
        )
    return lines
