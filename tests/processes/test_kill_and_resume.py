"""Real processes, killed with -9 at real moments; a disk that is full. Nothing is lost.

A parent imports everything once and forks a process for every attempt, so that twenty real
kills cost no more than a few runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from client.privacy.ledger import Ledger
from common.audit import verify_folder
from common.world import WallClock

HOSPITALS = ("east", "north", "south", "west")
STUDY = {
    "training": {"rounds": 3, "local_steps": 1, "spare_rounds": 12},
    "evaluation": {"every": 3},
    "simulation": {"faults": [{"round": 2, "site": "north", "fault": "drop"}]},
}

_FORKS = """
import json, os, resource, signal, sys
from common.cli import main
import client.federation, client.training, client.export, client.build, client.budget
import server.simulate, server.figures, matplotlib.backends.backend_agg
import client.tasks.diagnosis, opacus, torch, transformers
from common.accountant import epsilon
torch.set_num_threads(1)

count, limit, how = 0, None, None

def watch(name):
    real = getattr(os, name)
    def called(*args, **more):
        global count, limit
        count += 1
        if limit is not None and count >= limit:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stop":
                limit = None
                raise KeyboardInterrupt
            if how == "full" and name in ("write", "pwrite"):
                raise OSError(28, "No space left on device")
        return real(*args, **more)
    setattr(os, name, called)

def attempt(words, at, mode, told):
    global limit, how, count
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return status
    out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1); os.dup2(out, 2)
    if mode == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
    else:
        for name in ("write", "pwrite", "fsync", "replace", "unlink", "rename"):
            watch(name)
        limit, how = at, mode
    try:
        status = main(words)
        sys.stdout.flush()
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        status = 99
    with open(told + ".count", "w") as stream:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        stream.write(str(count))
    os._exit(status)

for line in sys.stdin:
    job = json.loads(line)
    if job["mode"] == "here":  # what this process computes once, no fork computes again
        out, sys.stdout = sys.stdout, open(job["told"], "w")
        status = main(job["words"])
        sys.stdout.close()
        sys.stdout = out
        print(json.dumps({"killed": 0, "exit": status}), flush=True)
        continue
    status = attempt(job["words"], job["at"], job["mode"], job["told"])
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status)
    print(json.dumps({"killed": killed, "exit": None if killed else os.WEXITSTATUS(status)}))
    sys.stdout.flush()
"""


class Forks:
    """The parent process; `run` forks one `wardround` and returns how it ended and what it said."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "told.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=Path(__file__).parents[2],
        )

    def run(self, *words, at=None, mode="count"):
        job = {"words": [str(w) for w in words], "at": at, "mode": mode, "told": str(self._told)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        return ended["killed"], ended["exit"], self._told.read_text(errors="replace")

    @property
    def calls(self):
        return int(Path(f"{self._told}.count").read_text())

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    parent = Forks(tmp_path_factory.mktemp("forks"))
    yield parent
    parent.close()


def require_whole(out, *, rounds=3):
    """The run is complete, every round released at most once, nobody above the cap, evidence closed."""
    told = json.loads((out / "state" / "conclusion.json").read_text())["summary"]
    assert told["rounds_completed"] == rounds
    assert told["audit_verified"] is True
    assert told["coordinator_saw"]["plain_updates"] == 0
    report = verify_folder(out)
    assert report.complete, [str(problem) for problem in report.problems]
    attempts = 0
    for name in HOSPITALS:
        ledger = Ledger.open_existing(
            out / "state" / "sites" / name / "ledger.sqlite", clock=WallClock()
        )
        rows = ledger.history()
        spent = ledger.spent()
        ledger.close()
        charges = {
            r.sequence: r.body for r in rows if r.kind == "charge" and r.body["part"] == "train"
        }
        tries = Counter(body["round"] for body in charges.values())
        attempts = max(attempts, *tries.values())
        assert spent.epsilon <= 8
        # What left the hospital was paid for, once for every attempt.
        assert all(
            len({b["attempt"] for b in charges.values() if b["round"] == n}) == c
            for n, c in tries.items()
        )
    assert (out / "model" / "model.safetensors").is_file()
    return attempts


@pytest.fixture(scope="module")
def clean(forks, tiny_bert, write_study, tmp_path_factory):
    """(study, how many calls that change the disk a run makes)."""
    folder = tmp_path_factory.mktemp("clean")
    study = write_study(folder, tiny_bert, STUDY)
    killed, status, told = forks.run(
        "simulate", study, "--out", folder / "first", "--no-alone", mode="here"
    )
    assert (killed, status) == (False, 0), told
    killed, status, told = forks.run("simulate", study, "--out", folder / "second", "--no-alone")
    assert (killed, status) == (False, 0), told
    assert require_whole(folder / "second") == 1
    return study, forks.calls


def test_a_run_killed_at_twelve_moments_in_a_row_is_finished_by_resume(clean, forks, tmp_path):
    study, calls = clean
    out = tmp_path / "out"
    steps = max(20, calls // 16)
    words = ("simulate", study, "--out", out, "--no-alone")
    kills = 0
    for turn in range(12):
        killed, status, told = forks.run(*words, at=steps + 7 * turn, mode="kill")
        assert killed == signal.SIGKILL or status == 0, told
        kills += killed == signal.SIGKILL
        words = ("resume", out)
        if not killed:
            break
    assert kills >= 8
    killed, status, told = forks.run("resume", out)
    assert (killed, status) == (False, 0), told
    require_whole(out)


@pytest.mark.parametrize("part", range(9))
def test_a_run_killed_once_anywhere_is_finished_by_resume(clean, forks, tmp_path, part):
    study, calls = clean
    out = tmp_path / "out"
    at = 8 + (calls - 10) * part // 8
    killed, _, told = forks.run("simulate", study, "--out", out, "--no-alone", at=at, mode="kill")
    assert killed == signal.SIGKILL, told
    killed, status, told = forks.run("resume", out)
    assert (killed, status) == (False, 0), told
    assert require_whole(out) <= 2, "a kill costs at most one more attempt of one round"


def test_a_real_command_line_is_killed_and_resumed(make_study, tmp_path):
    study = make_study({**STUDY, "training": {**STUDY["training"], "rounds": 12}})
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "common.cli"]
    cwd = Path(__file__).parents[2]
    process = subprocess.Popen(
        [*command, "simulate", study, "--out", out, "--no-alone"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 3/"):
            process.kill()
            break
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    done = subprocess.run(
        [*command, "resume", out, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds_completed"] == 12
    require_whole(out, rounds=12)


@pytest.mark.parametrize("part", range(5))
def test_a_full_disk_is_told_and_the_run_resumes(clean, forks, tmp_path, part):
    study, calls = clean
    out = tmp_path / "out"
    at = 8 + (calls - 40) * part // 4
    killed, status, told = forks.run(
        "simulate", study, "--out", out, "--no-alone", at=at, mode="full"
    )
    assert (killed, status) == (False, 7), told
    assert "Traceback" not in told
    assert "WR-" in told
    assert "what to do" in told
    if (out / "state" / "study.yaml").exists():
        assert f"wardround resume {out}" in told
        killed, status, told = forks.run("resume", out)
        assert (killed, status) == (False, 0), told
        require_whole(out)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_an_interrupted_run_says_how_to_go_on(clean, forks, tmp_path, part):
    study, calls = clean
    out = tmp_path / "out"
    words = ("simulate", study, "--out", out, "--no-alone")
    killed, status, told = forks.run(*words, at=int(calls * part), mode="stop")
    assert (killed, status) == (False, 130), told
    assert "Traceback" not in told
    assert told.splitlines()[-1] == f"Next: wardround resume {out}"
    killed, status, told = forks.run("resume", out)
    assert (killed, status) == (False, 0), told
    require_whole(out)


@pytest.mark.parametrize("size", [4096, 16384])
def test_a_file_that_may_not_grow_is_told_and_the_run_resumes(clean, forks, tmp_path, size):
    study, _ = clean
    out = tmp_path / "out"
    killed, status, told = forks.run(
        "simulate", study, "--out", out, "--no-alone", at=size, mode="size"
    )
    assert (killed, status) == (False, 7), told
    assert "Traceback" not in told
    assert "what to do" in told
    killed, status, told = forks.run("resume", out)
    assert (killed, status) == (False, 0), told
    require_whole(out)


def test_two_processes_cannot_share_a_folder(make_study, wardround, tmp_path):
    from common.world import FileJournal

    study = make_study(STUDY)
    out = tmp_path / "out"
    first = FileJournal(out / "state" / "coordinator" / "journal")
    (out / "state" / "study.yaml").write_bytes(study.read_bytes())
    origin = {"config": str(study), "compare": False}
    (out / "state" / "origin.json").write_text(json.dumps(origin))
    status, _, problems = wardround("resume", out)
    first.close()
    assert status == 7
    assert "WR-6003" in problems
    assert "Traceback" not in problems
