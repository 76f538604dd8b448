"""Rounds of a real deployment on loopback, against stock Flower on the same work in one run.

    python benchmarks/deployment.py [--quick] [--large] [--no-stock] [--json FILE]

Ours: `wardround server run` and hospitals of the product's own daemon with a numpy trainer
(tests/processes/deployment), TLS 1.3, every message signed, every update masked. Stock:
flower-superlink, flower-supernode, TLS, node authentication, an app of four message types a round
(benchmarks/stock). Small rounds: 16 parameters. Large: 110 million, ring of 24 bits, three
hospitals; stock sends the same model as float32 in an ArrayRecord of 200 arrays. Both average: a
server optimiser with slots has a state of two or three models.

A round's seconds run from the end of one round to the end of the next; the first is left out: it
waits for hospitals to start. CPU is user and system time of the coordinator's processes (stock:
SuperLink, SuperExec and ServerApp) over the last round. Peaks are the greatest resident size of
one process (VmHWM). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "processes" / "deployment")]

from federation import COORDINATOR, Federation, free_port  # noqa: E402
from others import harness  # noqa: E402

LARGE = 110_000_000
TENSORS = 200
MIB = 1 << 20
ROLE = "WARDROUND_ROLE"
AVERAGING = {"optimizer": {"name": "fedavg", "learning_rate": 1.0, "momentum": None}}
# A round of a large model takes minutes where the machine is shared.
PATIENT = dict.fromkeys(("handshake_s", "train_s", "upload_s", "agree_s", "unmask_s"), 1800)


# ---------------------------------------------------------------------------- measuring


class Watch:
    """Memory and CPU of every process that descends from some roots, seen ten times a second.

    A process belongs to the root that its environment names, so that one whose parent ended (as
    Flower's apps' do) is still counted. One that was reaped by its parent counts there.
    """

    def __init__(self, roots: Mapping[str, int]) -> None:
        self._roles = {pid: name for name, pid in roots.items()}
        self._seen: dict[int, tuple[int, float]] = {}
        self.peaks: dict[str, int] = dict.fromkeys(roots, 0)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self._look()

    def _look(self) -> None:
        with self._lock:
            fields = harness.tree(os.getpid())
            for pid, told in fields.items():
                name = self._roles.get(pid) or role_of(pid)
                if name not in self.peaks:
                    continue
                self._roles[pid] = name
                used = sum(int(ticks) for ticks in told[harness.TIMES]) / harness.TICKS
                self._seen[pid] = (int(told[harness.PARENT]), used)
                self.peaks[name] = max(self.peaks[name], peak_of(pid))
            for pid in [pid for pid in self._seen if pid not in fields]:
                parent = self._seen[pid][0]
                if parent in fields and parent != os.getpid():
                    del self._seen[pid]  # its parent has its seconds now

    def cpu(self) -> dict[str, float]:
        """Seconds so far, by root."""
        self._look()
        found = dict.fromkeys(self.peaks, 0.0)
        for pid, (_, used) in self._seen.items():
            found[self._roles[pid]] += used
        return found

    def stop(self) -> dict[str, int]:
        self._done.set()
        self._thread.join()
        return self.peaks


def role_of(pid: int) -> str:
    """Whose process this is, by what its environment says."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(ROLE.encode() + b"="):
                return entry.partition(b"=")[2].decode()
    return ""


def peak_of(pid: int) -> int:
    """The greatest resident size so far, in bytes; 0 where the process is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------------------- ours


def shapes(size: int, tensors: int) -> dict[str, tuple[int, ...]]:
    each = size // tensors
    return {f"t{at:03}": (each,) for at in range(tensors)}


def ours(root: Path, *, sites: int, rounds: int, size: int, tensors: int) -> dict[str, Any]:
    """Seconds of every round, and what the last one cost."""
    study: dict[str, Any] = {"evaluation": {"every": rounds}, "deadlines": PATIENT}
    if size > MIB:
        study["aggregation"] = AVERAGING
    options = {"cheap": size > MIB, "heartbeat_s": 10.0}
    fed = Federation(
        root,
        sites=sites,
        rounds=rounds,
        study=study,
        shapes=shapes(size, tensors),
        options=options,
        direct=True,
    )
    with fed:
        fed.start()
        pids = {name: process.pid for name, process in fed.processes.items()}
        watch, cpu, marks = Watch(pids), [], []
        for number in range(1, rounds + 1):
            fed.wait_rounds(number, 1800)
            marks.append(time.monotonic())
            cpu.append(watch.cpu())
        fed.finish(1800)
        for site in fed.sites:
            fed.until(lambda site=site: fed.has_model(site), 600, "the model")
        peaks = watch.stop()
        seconds = [r["seconds"] for r in fed.rounds() if r["kind"] == "train"]
    walls = [after - before for before, after in pairwise(marks)]
    last = {name: cpu[-1][name] - cpu[-2][name] for name in pids}
    return {
        "seconds": seconds,
        "wall_s": statistics.median(walls),
        "coordinator_cpu_s": last[COORDINATOR],
        "hospital_cpu_s": max(last[site] for site in fed.sites),
        "coordinator_peak": peaks[COORDINATOR],
        "hospital_peak": max(peaks[site] for site in fed.sites),
    }


# ---------------------------------------------------------------------------- stock


def settings() -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
    }


@contextmanager
def started(root: Path, name: str, command: list[object], env: Mapping[str, str]) -> Iterator[int]:
    """A process group of stock Flower's; killed at the end."""
    with (root / f"{name}.out").open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env={**env, ROLE: name},
            cwd=root,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def make_keys(root: Path, hospitals: int) -> None:
    """TLS of the product's own authority, and a P-384 key for each node."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    from common.config import load
    from common.world import SystemEntropy
    from server.config import CoordinatorConfig
    from server.enrol import initialise

    plain = {
        "format": "wardround-coordinator/1",
        "state": "keys",
        "names": ["localhost", "127.0.0.1"],
    }
    (root / "keys.yaml").write_text(json.dumps(plain))
    config = load(root / "keys.yaml", CoordinatorConfig)
    now = int(time.time())  # noqa: TID251
    initialise(config, root / "keys", now=now, entropy=SystemEntropy())
    for number in range(hospitals):
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()
        )
        public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        (root / f"node{number}.key").write_bytes(private)
        (root / f"node{number}.pub").write_bytes(public)


def flwr(root: Path, env: Mapping[str, str], *words: object) -> None:
    """One call of Flower's command line, again while the SuperLink starts."""
    for _ in range(30):
        done = subprocess.run(
            ["flwr", *(str(word) for word in words)],
            env=dict(env),
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and "rror" not in done.stdout:
            return
        time.sleep(1)
    raise RuntimeError(f"flwr {words}: {done.stdout}{done.stderr}")


def stock(root: Path, *, sites: int, rounds: int, size: int, tensors: int) -> dict[str, Any]:
    """The same of stock Flower."""
    root.mkdir(parents=True)
    make_keys(root, sites)
    port, tls = free_port(), root / "keys" / "tls"
    env = {**settings(), "FLWR_HOME": str(root / "home")}
    (root / "home").mkdir()
    (root / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "localhost:{port}"\n'
        f'root-certificates = "{tls / "ca.crt"}"\n'
    )
    shutil.copytree(HERE / "stock", root / "app")
    link = ["flower-superlink", "--ssl-certfile", tls / "server.crt"]
    link += ["--ssl-keyfile", tls / "server.key", "--ssl-ca-certfile", tls / "ca.crt"]
    link += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    link += ["--host", "127.0.0.1", "--port", port]
    notes = root / "notes.jsonl"
    pids: dict[str, int] = {}
    with ExitStack() as stack:
        pids[COORDINATOR] = stack.enter_context(started(root, COORDINATOR, link, env))
        for number in range(sites):
            flwr(root, env, "supernode", "register", f"node{number}.pub", "bench")
        for number in range(sites):
            node = ["flower-supernode", "--root-certificates", tls / "ca.crt"]
            node += ["--superlink", f"localhost:{port}", "--port", free_port()]
            node += ["--auth-supernode-private-key", root / f"node{number}.key"]
            pids[f"node{number}"] = stack.enter_context(started(root, f"node{number}", node, env))
        watch = Watch(pids)
        told = f'rounds={rounds} hospitals={sites} dim={size} tensors={tensors} notes="{notes}"'
        flwr(root, env, "run", root / "app", "bench", "--run-config", told)
        cpu: list[dict[str, float]] = []
        end = time.monotonic() + 3600
        while len(cpu) <= rounds:
            lines = notes.read_text().splitlines() if notes.exists() else []
            if len(lines) > len(cpu):
                cpu.append(watch.cpu())
            elif time.monotonic() > end:
                raise RuntimeError(f"stock Flower does not finish: {root}")
            else:
                time.sleep(0.05)
        peaks = watch.stop()
    marks = [json.loads(line)["at"] for line in notes.read_text().splitlines()]
    walls = [after - before for before, after in pairwise(marks[1:])]
    hospitals = [name for name in pids if name != COORDINATOR]
    return {
        "seconds": [after - before for before, after in pairwise(marks)],
        "wall_s": statistics.median(walls),
        "coordinator_cpu_s": cpu[-1][COORDINATOR] - cpu[-2][COORDINATOR],
        "hospital_cpu_s": max(cpu[-1][name] - cpu[-2][name] for name in hospitals),
        "coordinator_peak": peaks[COORDINATOR],
        "hospital_peak": max(peaks[name] for name in hospitals),
    }


# ---------------------------------------------------------------------------- the table


def show(rows: list[tuple[str, dict[str, Any]]]) -> None:
    heads = ("round s", "coord CPU", "hosp CPU", "coord MiB", "hosp MiB")
    widths = (8, 10, 9, 10, 9)
    told = (f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    print(f"{'':34}", *told)
    for name, row in rows:
        print(
            f"{name:34} {row['wall_s']:8.2f} {row['coordinator_cpu_s']:10.2f}"
            f" {row['hospital_cpu_s']:9.2f} {row['coordinator_peak'] / MIB:10.0f}"
            f" {row['hospital_peak'] / MIB:9.0f}"
        )


def judge(name: str, value: float, most: float, unit: str = "") -> bool:
    print(f"{name:44} {value:8.2f} {unit}  goal <= {most:g} {'met' if value <= most else 'MISSED'}")
    return value <= most


def small(root: Path, *, quick: bool, with_stock: bool) -> dict[str, Any]:
    rounds = 6 if quick else 15
    found = {
        f"ours, {sites} hospitals": ours(
            root / f"ours-{sites}", sites=sites, rounds=rounds, size=16, tensors=1
        )
        for sites in (3, 10)
    }
    if with_stock:
        found["stock, 3 hospitals"] = stock(
            root / "stock-3", sites=3, rounds=2 if quick else 3, size=16, tensors=1
        )
    show(list(found.items()))
    judge("few hospitals, round", found["ours, 3 hospitals"]["wall_s"], 2.0, "s")
    judge("ten hospitals, round", found["ours, 10 hospitals"]["wall_s"], 4.0, "s")
    return found


def large(root: Path, *, size: int, with_stock: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sites in (3, 5):
        folder = root / f"large-{sites}"
        found[f"ours, {sites} hospitals"] = ours(
            folder, sites=sites, rounds=3, size=size, tensors=TENSORS
        )
        shutil.rmtree(folder)
    if with_stock:
        found["stock, 3 hospitals"] = stock(
            root / "large-stock", sites=3, rounds=2, size=size, tensors=TENSORS
        )
    show(list(found.items()))
    three, five = found["ours, 3 hospitals"], found["ours, 5 hospitals"]
    model = 4 * size
    judge("coordinator peak / MiB", three["coordinator_peak"] / MIB, (2 * model + 400e6) / MIB)
    judge("coordinator peak, 5 over 3", five["coordinator_peak"] / three["coordinator_peak"], 1.05)
    judge("hospital peak / MiB", three["hospital_peak"] / MIB, (4 * model + 1e9) / MIB)
    if with_stock:
        other = found["stock, 3 hospitals"]
        judge("wall, over stock", three["wall_s"] / other["wall_s"], 0.5)
        cpu = three["coordinator_cpu_s"] / other["coordinator_cpu_s"]
        judge("coordinator CPU, over stock", cpu, 0.5)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--large", action="store_true", help="the large model instead")
    parser.add_argument("--size", type=int, default=LARGE, help="its parameters")
    parser.add_argument("--no-stock", action="store_true", help="ours alone")
    parser.add_argument("--folder", type=Path, default=None, help="where everything is written")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    harness.adopt_orphans()
    root = Path(tempfile.mkdtemp(prefix="deployment-", dir=given.folder))
    try:
        if given.large:
            found = large(root, size=given.size, with_stock=not given.no_stock)
        else:
            found = small(root, quick=given.quick, with_stock=not given.no_stock)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
