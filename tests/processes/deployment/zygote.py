"""Imports everything once and forks a process for every start: a restart costs milliseconds.

Standard input brings one JSON object a line, standard output answers each with one:
    {"start": ["coordinator", [words]] | ["hospital", site.yaml], "out": path,
     "full": path or null} -> {"pid": n}
    {"wait": pid, "seconds": s} -> {"status": exit status, negative for a signal, or null}
At the end of input everything that was started is killed.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import stat
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
MODULES = [
    "client.app",
    "client.config",
    "client.enrol",
    "client.flower",
    "client.folders",
    "client.hospital",
    "client.link",
    "client.operate",
    "common.accountant",
    "common.cli",
    "common.logs",
    "dp_accounting.pld",
    "numpy_hospital",
    "prometheus_client",
    "server.app",
    "server.deploy",
    "server.operate_cli",
    "server.service",
    "uvicorn",
    "uvicorn.protocols.http.h11_impl",
]


def _child(kind: str, what: Any) -> int:
    if kind == "coordinator":
        from common.cli import main

        return main([str(word) for word in what])
    from numpy_hospital import main as hospital

    return hospital(Path(what))


def _fill_by(mark: Path) -> None:
    """While the mark is there, writing to files fails as on a full disk."""
    for name in ("write", "pwrite"):
        real = getattr(os, name)

        def write(handle: int, *rest: Any, real: Any = real) -> int:
            if stat.S_ISREG(os.fstat(handle).st_mode) and mark.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(real(handle, *rest))

        setattr(os, name, write)


def _start(kind: str, what: Any, out: str, full: str | None) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    status = 99
    try:
        if os.getppid() != parent:
            os._exit(98)
        os.setsid()
        told = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(told, 1)
        os.dup2(told, 2)
        os.close(null)
        os.close(told)
        if full is not None:
            _fill_by(Path(full))
        try:
            status = _child(kind, what)
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:  # noqa: BLE001 - told, and the process ends
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.01)


def main() -> None:
    sys.stdout = sys.stderr  # nothing but answers goes to the pipe
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in MODULES:
        importlib.import_module(name)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    children: set[int] = set()
    for line in sys.stdin:
        job = json.loads(line)
        if "start" in job:
            kind, what = job["start"]
            # The child must not hold the pipe that says that this process lives.
            pid = _start(kind, what, job["out"], job["full"])
            children.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"status": _wait(job["wait"], job["seconds"])}
            if answer["status"] is not None:
                children.discard(job["wait"])
        print(json.dumps(answer), file=answers, flush=True)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
