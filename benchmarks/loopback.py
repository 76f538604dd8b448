"""A whole real federation on this machine: a coordinator and four hospital daemons, over TLS.

Medical Abstracts (../shared/data), its rows divided four ways, MiniLM `head`, epsilon 8, `local`
or `joint`.
One hospital is killed with -9 in mid-run and started again as a supervisor would; another one's
line is cut for several rounds. Every step is the command that a person types.

    python benchmarks/loopback.py [--rounds 30] [--mode local|joint] [--keep DIR] [--json FILE]

Prints a line for every round: who was in the sum, how long it took; then what the coordinator and
the hospitals say at the end. Seconds depend on the machine; the first round computes the frozen
model's features of every note.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "processes" / "deployment")]

from line import Line  # noqa: E402 - lies with the process tests

from common.invite import Join  # noqa: E402

SITES = ("north", "south", "east", "west")
KILLED, CUT = "south", "west"
HELD_OUT = 0.2
DEADLINES = "{handshake_s: 20, train_s: 120, upload_s: 20, agree_s: 20, unmask_s: 20}  # loopback\n"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Federation:
    """The folders and processes of one run."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self.line = Line(port)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def types(self, *words: object) -> str:
        """What a person types; a command that fails ends the benchmark."""
        command = [sys.executable, "-m", "common.cli", *map(str, words)]
        done = subprocess.run(
            command, cwd=self.home, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, name: str) -> None:
        words = ["server", "run", "bundle", "--linger", "0.05"]
        if name in SITES:
            words = ["client", "run", "--config", f"{name}/site.yaml"]
        with (self.home / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "common.cli", *words],
                cwd=self.home, env=ENVIRONMENT, stdout=out, stderr=out,
            )  # fmt: skip

    def enrol(self) -> None:
        self.types(
            *("server", "init", "--name", "Benchmark", "--host", "127.0.0.1"),
            *("--port", self.port, "--dns", "localhost"),
        )
        for site in SITES:
            port = self.line.port if site == CUT else self.port
            url = f"localhost:{port}"
            self.types("server", "invite", f"Hospital {site}", "--site", site, "--url", url)
            (self.home / site).mkdir()
            self.types("client", "join", f"{site}.invite", "--config", f"{site}/site.yaml")
            words = Join.load(self.home / f"{site}.join").words
            self.types("server", "admit", f"{site}.join", "--words", words)

    def write(self, source: Path, rounds: int, mode: str) -> None:
        """Every hospital's records and settings, and the study of the quality benchmark."""
        with gzip.open(source, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
        rows.sort(key=lambda row: hashlib.sha256(row["doc_id"].encode()).digest())
        for index, site in enumerate(SITES):
            with (self.home / site / "notes.csv").open("w", newline="") as out:
                names = ["doc_id", "text", "label_name"]
                writer = csv.DictWriter(out, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows[index :: len(SITES)])
            config = self.home / site / "site.yaml"
            text = config.read_text().replace("data/records.csv", "notes.csv")
            config.write_text(text.replace("  epsilon: 3", "  epsilon: 8"))
        batch = round(len(rows) * (1 - HELD_OUT) / len(SITES))
        study = (ROOT / "configs" / "quality" / "eps8.yaml").read_text().split("simulation:")[0]
        study = study.replace("expected_batch: 311", f"expected_batch: {batch}")
        study = study.replace("rounds: 30", f"rounds: {rounds}").replace("quality-eps8", "loopback")
        if mode == "joint":
            # The step is the server's: what was the hospitals' rate becomes its own.
            study = study.replace("  optimizer: {name: sgd, learning_rate: 2.0}\n", "")
            study = study.replace("momentum: 0.8}", "momentum: 0.8, learning_rate: 2.0}")
            study = study.replace("mode: local", "mode: joint")
        sites = ", ".join(f"{{id: {site}}}" for site in SITES)
        (self.home / "study.yaml").write_text(f"{study}sites: [{sites}]\ndeadlines: {DEADLINES}")

    def agree(self) -> None:
        self.types("study", "build", "study.yaml", "--out", "bundle")
        self.types("server", "publish", "bundle")
        for site in SITES:
            config = f"{site}/site.yaml"
            self.types("client", "approve", "bundle", "--config", config, "--by", f"Dr. {site}")

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.home / "coordinator/status.json").read_text())
            return found
        return {"completed": 0, "phase": "", "round": 0}

    def until(self, rounds: int) -> None:
        while self.status()["completed"] < rounds and self.running["coordinator"].poll() is None:
            time.sleep(0.2)

    def history(self) -> Iterator[dict[str, Any]]:
        [folder] = (self.home / "coordinator" / "runs").iterdir()
        for line in (folder / "history.jsonl").read_text().splitlines():
            yield json.loads(line)

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait(30)


def disturbed(federation: Federation, rounds: int, say: Callable[[str], None]) -> None:
    """The run with its accidents, at about a quarter and at half of it."""
    for name in ("coordinator", *SITES):
        federation.start(name)
    federation.until(1)
    say("first round complete")
    federation.until(rounds // 4)
    federation.running[KILLED].kill()
    say(f"{KILLED}: kill -9 in round {federation.status()['round']}")
    time.sleep(10)
    federation.start(KILLED)
    say(f"{KILLED}: started again")
    federation.until(rounds // 2)
    federation.line.cut()
    say(f"{CUT}: line cut in round {federation.status()['round']}")
    federation.until(rounds * 2 // 3)
    federation.line.mend()
    say(f"{CUT}: line mended in round {federation.status()['round']}")
    federation.running["coordinator"].wait(1800)
    say("the coordinator ended")


def show(federation: Federation) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": [], "measured": {}}
    print("round  kind        in the sum  missing   seconds  bytes up")
    for entry in federation.history():
        if "measured" in entry:
            told = entry["measured"]
            found["measured"][told["turn"]] = told["metrics"]["accuracy"]
            print(f"       accuracy after round {told['turn']}: {told['metrics']['accuracy']:.3f}")
            continue
        one = entry["round"]
        found["rounds"].append(one)
        missing = one["code"] or ",".join(one["dropouts"]) or "-"
        print(
            f"{one['round']:5}  {one['kind']:10}  {one['survivors']:10}  {missing:8}  "
            f"{one['seconds']:7.1f}  {one['bytes_up']:8}"
        )
    print((federation.home / "coordinator.out").read_text())
    for site in SITES:
        print(federation.types("client", "status", "--config", f"{site}/site.yaml"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--mode", choices=("local", "joint"), default="local")
    parser.add_argument("--port", type=int, default=34443)
    parser.add_argument("--keep", type=Path, default=None, help="where everything is left")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    data = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data"))
    source = data / "medical_abstracts" / "train_from_ohsumed.csv.gz"
    if not source.exists():
        print(f"{source.name} is not here; set WARDROUND_DATA")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        home = options.keep or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        federation = Federation(home, options.port)
        federation.enrol()
        federation.write(source, options.rounds, options.mode)
        federation.agree()
        began = time.monotonic()
        try:
            disturbed(
                federation,
                options.rounds,
                lambda t: print(f"{time.monotonic() - began:7.1f} s  {t}"),
            )
        finally:
            federation.end()
        found = show(federation)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
