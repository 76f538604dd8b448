"""What one measured process tree tells about itself: moments, CPU seconds, memory.

A platform's script calls `begin` first, `ready` when its imports are done, `round_done` wherever
its server learns that a round is over (in any process of the tree), and `told` at the end.
CPU seconds are those of the whole tree, user and system, children that ended included; they are
read when the first and the last round end, so that reading them is not measured. (A process
whose parent ignores its end would take its seconds along; nobody's does between those moments.)
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")
TREE, NOTES = "WARDROUND_TREE", "WARDROUND_NOTES"
# Where the fields that follow the command's name stand in /proc/PID/stat (proc(5)).
STATE, PARENT, TIMES = 0, 1, slice(11, 15)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, so that none is lost."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tree(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat of a process and of all that descend from it."""
    fields: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields[int(entry.name)] = stat.rpartition(")")[2].split()
    found = {root} & set(fields)
    grown = True
    while grown:
        more = {pid for pid, f in fields.items() if int(f[PARENT]) in found} - found
        found |= more
        grown = bool(more)
    return {pid: fields[pid] for pid in found}


def living(root: int) -> list[int]:
    """Those of the tree that run (zombies do not)."""
    return [pid for pid, fields in tree(root).items() if fields[STATE] != "Z"]


def cpu_seconds(root: int) -> float:
    """User and system time of the tree, with what its members inherited from ended children."""
    return sum(int(t) for fields in tree(root).values() for t in fields[TIMES]) / TICKS


def memory_bytes(pids: list[int]) -> int:
    """Memory of some processes; pages that they share are counted once.

    Pages of files count in full even where other processes use them too (proportional set sizes
    would credit us with half of the libraries that whoever watches has loaded as well).
    """
    total = 0
    files: dict[tuple[str, ...], int] = {}
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        try:
            rollup, maps = (folder / "smaps_rollup").read_text(), (folder / "smaps").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(_size(line) for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
        for key, size in _file_pages(maps):
            files[key] = max(files.get(key, 0), size)
    return total + sum(files.values())


def _file_pages(maps: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Of /proc/PID/smaps (proc(5)), what is mapped from files: where in which file, bytes."""
    key: tuple[str, ...] = ()
    resident = 0
    for line in maps.splitlines():
        if line.startswith("Rss:"):
            resident = _size(line)
        elif line.startswith("Anonymous:"):
            if key[-1] != "0" and resident:
                yield key, resident - _size(line)
        elif not line[0].isupper():
            _, _, *at = line.split(maxsplit=5)[:5]
            key = tuple(at)  # offset, device, inode


def _size(line: str) -> int:
    return 1024 * int(line.split()[1])


def begin(description: str | None, *needed: str) -> int:
    """Reads `--rounds`, makes this process the root of its tree, checks what it needs.

    Returns: the number of rounds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=20)
    rounds: int = parser.parse_args().rounds
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(json.dumps({"reason": f"not installed: {', '.join(missing)}"}))
        sys.exit(0)
    start()
    return rounds


def start() -> None:
    """Makes this process the root of its tree."""
    adopt_orphans()
    handle, path = tempfile.mkstemp(prefix="notes-", suffix=".jsonl", dir=Path.cwd())
    os.close(handle)
    os.environ[TREE], os.environ[NOTES] = str(os.getpid()), path


def ready() -> None:
    """Imports are done: the wait for the first round begins."""
    _note(0, last=False)


def round_done(number: int, rounds: int) -> None:
    """Round `number` (from 1) is over: its aggregate is the model."""
    _note(number, last=number == rounds)


def _note(number: int, *, last: bool) -> None:
    note = {"round": number, "wall": time.monotonic()}
    if number <= 1 or last:
        note["cpu"] = cpu_seconds(int(os.environ[TREE]))
    with Path(os.environ[NOTES]).open("a") as notes:
        notes.write(json.dumps(note) + "\n")


def told(rounds: int, loss: float, distribution: str | None = None) -> None:
    """Prints what was measured, one JSON line.

    Raises: ValueError where a round was not noted, or not once.
    """
    path = Path(os.environ[NOTES])
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    if [note["round"] for note in notes] != list(range(rounds + 1)):
        raise ValueError(f"asked for {rounds} rounds, saw {[note['round'] for note in notes]}")
    later = rounds - 1
    found = {
        "version": importlib.metadata.version(distribution) if distribution else "",
        "first_round_s": notes[1]["wall"] - notes[0]["wall"],
        "first_round_cpu_s": notes[1]["cpu"] - notes[0]["cpu"],
        "wall_s_per_round": (notes[-1]["wall"] - notes[1]["wall"]) / later,
        "cpu_s_per_round": (notes[-1]["cpu"] - notes[1]["cpu"]) / later,
        "cpu_s_to_last_round": notes[-1]["cpu"],
        "loss": loss,
    }
    print(json.dumps(found), flush=True)
