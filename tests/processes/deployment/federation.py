"""A whole federation of real processes on this machine, and what can be done to it.

    with Federation(tmp_path, sites=4, rounds=6) as fed:
        fed.start()
        fed.wait_rounds(2)
        fed.kill("coordinator")
        fed.start("coordinator")
        fed.finish()

The coordinator is the real `wardround server run`. Hospitals are `numpy_hospital.py`: the
product's own daemon with a numpy trainer; or, with `real=True`, the real `wardround client run`.
Between every hospital and the coordinator runs a `Line` in this process.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from line import Line
from numpy_hospital import MARK, OPTIONS, update_of

import common
from client.approval import Approval
from client.config import SiteConfig
from client.enrol import join, key_of, pinned
from client.folders import HospitalFolder
from client.hospital import roster_for
from client.privacy.ledger import Ledger
from common.audit import verify_folder
from common.bundle import Bundle, resolve
from common.config import load
from common.integrity import code_digest
from common.offer import open_offer
from common.secagg.quantise import quantise_layout, to_signed
from common.study import Study
from common.tensors import load_tensors, state_digest
from common.world import SystemEntropy, WallClock, make_folder
from server.config import CoordinatorConfig
from server.deploy import RunFolder, run_folder
from server.enrol import admit, coordinator_key, initialise, invite, publish, revoke

HERE = Path(__file__).parent
CODE = Path(common.__file__).parents[1]
COORDINATOR = "coordinator"
NAMES = ("east", "north", "south", "west", "hill", "lake", "park", "port", "ridge", "vale")
# Below the range that connections leave from, so that nobody else ends up on a port while the
# coordinator that owns it is dead.
PORTS = range(31000, 31999)
STUDY: dict[str, Any] = {
    "format": "wardround-study/1",
    "name": "tiny",
    "task": {"kind": "diagnosis", "labels": ["no", "yes"]},
    "model": {"backbone": "package:nothing/model", "tuning": "head"},
    "training": {
        "rounds": 6,
        "local_steps": 2,
        "sampling_rate": 0.1,
        "expected_batch": 20,
        "spare_rounds": 60,
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
    },
    "aggregation": {"optimizer": {"name": "fedavgm", "learning_rate": 0.5, "momentum": 0.5}},
    "privacy": {
        "mode": "local",
        "epsilon": 50,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "noise_multiplier": 4.0,
    },
    "evaluation": {"every": 3},
    "deadlines": {
        "handshake_s": 60,
        "train_s": 60,
        "upload_s": 60,
        "agree_s": 60,
        "unmask_s": 60,
    },
}


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections laid over sections; None removes a key."""
    found = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = merged(found[key], value)
        else:
            found[key] = value
        if found[key] is None:
            del found[key]
    return found


_BUNDLES: dict[tuple[str, int], Bundle] = {}


def make_bundle(study: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Bundle:
    """The bundle of a study over tensors of these shapes, all zeros; no backbone is loaded."""
    initial = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    key = (json.dumps([study, shapes], sort_keys=True), 0)
    if key not in _BUNDLES:
        model = Study.model_validate_json(json.dumps(study))
        _BUNDLES[key] = resolve(model, initial, bytes(32), json.dumps({"kind": "none"}))
    return _BUNDLES[key]


# ---------------------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(CODE), str(HERE)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Zygote:
    """The process that forks processes (zygote.py)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=CODE,
        )
        self._ready = False

    def _line(self, seconds: float) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], seconds)[0]:
            raise TimeoutError("the zygote does not answer")
        line = stream.readline()
        if not line:
            raise AssertionError(f"the zygote is gone: {self._process.poll()}")
        return json.loads(line)

    def _asked(self, job: Mapping[str, Any], seconds: float = 30) -> dict[str, Any]:
        if not self._ready:
            self._line(120)
            self._ready = True
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._line(seconds)

    def start(self, kind: str, what: Any, out: Path, full: Path | None = None) -> Forked:
        job = {"start": [kind, what], "out": str(out), "full": full and str(full)}
        return Forked(self, self._asked(job)["pid"])

    def wait(self, pid: int, seconds: float) -> int | None:
        return self._asked({"wait": pid, "seconds": seconds}, seconds + 30)["status"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@dataclass
class Forked:
    """A process that the zygote forked; as much of Popen as is needed."""

    zygote: Zygote
    pid: int
    status: int | None = None

    def wait(self, seconds: float) -> int:
        if self.status is None:
            self.status = self.zygote.wait(self.pid, seconds)
        if self.status is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds)
        return self.status

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.zygote.wait(self.pid, 0)
        return self.status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


# ---------------------------------------------------------------------------- disks


class Disk:
    """A folder that can be full: a small file system of its own, where root may mount one.

    Elsewhere a mark file does it: while it is there, the processes' own writes to files fail as
    on a full disk (zygote.py); SQLite's are not reached by that.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "none", folder]
        made = subprocess.run(command, capture_output=True, check=False)
        self.mounted = made.returncode == 0
        self.mark = folder.with_name(folder.name + ".full")

    def fill(self) -> None:
        """Leave no room."""
        if not self.mounted:
            self.mark.touch()
            return
        with (self._folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def empty(self) -> None:
        """Make room again."""
        self.mark.unlink(missing_ok=True)
        (self._folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", self._folder], check=False)


# ---------------------------------------------------------------------------- the federation


class Federation:
    """A coordinator and its hospitals.

    Args:
        root: where everything lies.
        sites: how many hospitals.
        rounds: of training.
        study: sections laid over STUDY.
        shapes: the tensors that are trained.
        seed: of the hospitals' noise.
        zygote: forks processes; None: every process is started anew, as in life.
        real: hospitals are the real `wardround client run`; the bundle is then the caller's.
        bundle: the bundle, where it is not made here.
        options: what numpy_hospital.py reads.
        site_yaml: sections of every site.yaml.
        disks: parties whose state is a disk of its own, of so many MiB.
        direct: hospitals dial the coordinator itself; there are no lines.
    """

    def __init__(
        self,
        root: Path,
        *,
        sites: int = 4,
        rounds: int = 6,
        study: Mapping[str, Any] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 1,
        zygote: Zygote | None = None,
        real: bool = False,
        bundle: Bundle | None = None,
        options: Mapping[str, Any] | None = None,
        site_yaml: Mapping[str, Any] | None = None,
        disks: Mapping[str, int] | None = None,
        direct: bool = False,
    ) -> None:
        self.root, self.seed, self.zygote, self.real = root, seed, zygote, real
        self.sites = tuple(sorted(NAMES[:sites]))
        if bundle is None:
            few = {"training": {"rounds": rounds}, "evaluation": {"every": min(3, rounds)}}
            told = merged(STUDY, few)
            told = merged(merged(told, study or {}), {"sites": [{"id": s} for s in self.sites]})
            bundle = make_bundle(told, shapes or {"classifier.bias": (16,)})
        self.bundle = bundle
        self.options = {"seed": seed, **(options or {})}
        self._site_yaml = site_yaml or {}
        self._direct = direct
        self.state = root / "coordinator"
        self.config_path = root / "coordinator.yaml"
        self.lines: dict[str, Line] = {}
        self.processes: dict[str, Any] = {}
        self.started: dict[str, float] = {}
        self.linger_h = 0.005
        self.disks = {
            name: Disk(self._state_of(name), size) for name, size in (disks or {}).items()
        }
        self._enrol()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)
        for line in self.lines.values():
            line.close()
        for disk in self.disks.values():
            disk.close()

    def _state_of(self, name: str) -> Path:
        return self.state if name == COORDINATOR else self.home(name)

    # ------------------------------------------------------------ enrolment

    def _enrol(self) -> None:
        make_folder(self.root)
        plain = {
            "format": "wardround-coordinator/1",
            "state": "coordinator",
            "names": ["localhost"],
            "listen": {"host": "127.0.0.1", "port": free_port()},
            "admin": {"host": "127.0.0.1", "port": free_port(), "health": free_port()},
        }
        self.config_path.write_text(json.dumps(plain))
        self.config = load(self.config_path, CoordinatorConfig)
        now = int(time.time())  # noqa: TID251
        initialise(self.config, self.state, now=now, entropy=SystemEntropy())
        for site in self.sites:
            self._enrol_site(site, now)
        folder = self.root / "bundle"
        self.bundle.save(folder)
        publish(self.state, folder)
        for site in self.sites:
            self.approve(site)

    def _enrol_site(self, site: str, now: int) -> None:
        port = self.config.listen.port
        if not self._direct:
            self.lines[site] = Line(port)
            port = self.lines[site].port
        entropy = SystemEntropy()
        issued = invite(
            self.state,
            self.config,
            name=site.title(),
            site=site,
            url=f"localhost:{port}",
            days=7,
            now=now,
            entropy=entropy,
        )
        make_folder(self.root / site)
        joined = join(self.home(site), issued, now=now, entropy=entropy)
        admit(self.state, joined.answer, now, said=joined.answer.words)
        plain = {
            "format": "wardround-site/1",
            "site": site,
            "data": {"files": ["records.csv"]},
            "state": "state",
            "budget": {"epsilon": 60, "delta": 1e-5},
            "ceilings": {"epsilon": 60, "delta": 1e-5, "rounds": 10_000, "approved_studies": []},
            "device": "cpu",
            **self._site_yaml,
        }
        self.yaml(site).write_text(json.dumps(plain))
        (self.root / site / OPTIONS).write_text(json.dumps(self.options))

    def approve(self, site: str) -> None:
        """What `client approve` leaves behind; the review of records has tests of its own."""
        if self.real:
            from client.review import approve_study

            config = load(self.yaml(site), SiteConfig)
            now = int(time.time())  # noqa: TID251
            approve_study(self.root / "bundle", config, self.yaml(site), by="Dr. Grey", now=now)
            return
        home, digest = self.home(site), self.bundle.digest
        folder = HospitalFolder(home).study(digest)
        make_folder(folder.root.parent, mode=0o700)
        make_folder(folder.root, mode=0o700)
        make_folder(folder.bundle, mode=0o700)
        for path in (self.root / "bundle").iterdir():
            shutil.copyfile(path, folder.bundle / path.name)
        pin = pinned(home)
        signed = open_offer(folder.bundle, public=pin.coordinator, study=digest)
        roster = roster_for(self.bundle.study, signed.roster, site=site)
        privacy = self.bundle.study.privacy
        Approval(
            site,
            digest,
            code_digest(("common", "client")),
            signed.roster.digest(),
            "Dr. Grey",
            int(time.time()),  # noqa: TID251
            privacy.epsilon,
            privacy.delta,
        ).signed(key_of(home, roster[site])).save(folder.approval)

    def revoke(self, site: str) -> None:
        """As `server revoke`."""
        revoke(self.state, site)

    # ------------------------------------------------------------ places

    def home(self, site: str) -> Path:
        return self.root / site / "state"

    def yaml(self, site: str) -> Path:
        return self.root / site / "site.yaml"

    def study_folder(self, site: str) -> Any:
        return HospitalFolder(self.home(site)).study(self.bundle.digest)

    @property
    def run_folder(self) -> RunFolder:
        return run_folder(self.state, self.bundle)

    def output(self, name: str) -> str:
        path = self.root / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    # ------------------------------------------------------------ processes

    def start(self, *names: str) -> None:
        """Start processes; without names, the coordinator and every hospital."""
        for name in names or (COORDINATOR, *self.sites):
            assert not self.alive(name), f"{name} is running"
            self.started[name] = time.monotonic()
            self.processes[name] = self._launched(name)

    def _launched(self, name: str) -> Any:
        out = self.root / f"{name}.out"
        words = [
            *("server", "run", self.root / "bundle", "--config", self.config_path),
            *("--linger", self.linger_h),
        ]
        if self.zygote is not None and not (self.real and name != COORDINATOR):
            full = self.disks[name].mark if name in self.disks else None
            if name == COORDINATOR:
                return self.zygote.start("coordinator", [str(word) for word in words], out, full)
            return self.zygote.start("hospital", str(self.yaml(name)), out, full)
        if name == COORDINATOR:
            command = [sys.executable, "-m", "common.cli", *words]
        elif self.real:
            command = [sys.executable, "-m", "common.cli", "client", "run", "--config"]
            command.append(self.yaml(name))
        else:
            command = [sys.executable, HERE / "numpy_hospital.py", self.yaml(name)]
        with out.open("ab") as told:
            return subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
                env=environment(),
                cwd=self.root,
            )

    def alive(self, name: str) -> bool:
        process = self.processes.get(name)
        return process is not None and process.poll() is None

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self.processes.pop(name, None)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(20)

    def stop(self, name: str, seconds: float = 20) -> int:
        """SIGTERM; the exit status."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds)

    def ended(self, name: str, seconds: float = 60) -> int:
        """The exit status of a process that ends by itself."""
        return self.processes.pop(name).wait(seconds)

    # ------------------------------------------------------------ looking

    def status(self) -> dict[str, Any]:
        """status.json; empty before the first."""
        try:
            return json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def trains(self, site: str) -> int | None:
        """The round that a hospital trains in; of a killed one, the round that it was killed in."""
        try:
            return int((self.root / site / MARK).read_text() or -1)
        except OSError:
            return None

    def site_status(self, site: str) -> dict[str, Any]:
        """The hospital's status.json."""
        try:
            return json.loads((self.home(site) / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def log(self, name: str = COORDINATOR) -> list[dict[str, Any]]:
        """The operator's log, oldest first."""
        folder = self.state if name == COORDINATOR else self.home(name)
        path = folder / "log.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # torn by a kill
        return found

    def events(self, event: str, name: str = COORDINATOR) -> list[dict[str, Any]]:
        return [entry for entry in self.log(name) if entry.get("event") == event]

    def rounds(self) -> list[dict[str, Any]]:
        """history.jsonl: every round that ended, in order; aborted ones have a code."""
        path = self.run_folder.history
        found = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if "round" in told:
                found[told["round"]["round"]] = told["round"]
        return [found[number] for number in sorted(found)]

    def completed(self) -> int:
        """How many rounds were completed."""
        return sum(entry["code"] is None for entry in self.rounds())

    def until(self, what: Any, seconds: float = 60, told: str = "") -> None:
        """Wait until `what()` is true. Raises AssertionError, saying where everybody stands."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {told}\n{self.where()}")
            time.sleep(0.02)

    def wait_rounds(self, count: int, seconds: float = 60) -> None:
        """Until so many rounds are completed."""
        self.until(lambda: self.completed() >= count, seconds, f"{count} rounds")

    def where(self) -> str:
        """Everything that tells why nothing goes on."""
        kept = self.status()
        lines = [json.dumps({k: v for k, v in kept.items() if k != "sites"})]
        lines += [json.dumps(site) for site in kept.get("sites", ())]
        for name in (COORDINATOR, *self.sites):
            lines.append(f"--- {name}: alive {self.alive(name)}; {self.output(name)[-1500:]}")
            lines += [json.dumps(entry) for entry in self.log(name)[-8:]]
        return "\n".join(lines)

    def conclusion(self) -> dict[str, Any]:
        """What was said at the end: the summary."""
        return json.loads(self.run_folder.conclusion.read_text())["summary"]

    def finish(self, seconds: float = 120) -> dict[str, Any]:
        """Wait for the coordinator's own end, then for every hospital's model; the summary."""
        try:
            status = self.ended(COORDINATOR, seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end\n{self.where()}") from None
        assert status == 0, self.output(COORDINATOR)
        return self.conclusion()

    def model(self) -> dict[str, Any]:
        """The coordinator's final tensors."""
        return load_tensors(self.run_folder.model / "weights.safetensors")

    def has_model(self, site: str) -> bool:
        return (self.study_folder(site).model / "model.safetensors").exists()

    def site_model(self, site: str) -> dict[str, Any]:
        return load_tensors(self.study_folder(site).model / "model.safetensors")

    def survivors(self) -> dict[int, tuple[str, ...]]:
        """Round -> who was summed, of every completed training round, from the audit log."""
        found: dict[int, tuple[str, ...]] = {}
        path = self.run_folder.audit / f"{COORDINATOR}.jsonl"
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry.get("event") == "round.completed":
                fields = entry.get("fields", entry)
                found[fields["round"]] = tuple(fields["survivors"])
        return found

    def ledger(self, site: str) -> LedgerFacts:
        """What a hospital's ledger says of this study."""
        return ledger_facts(self.home(site) / "ledger.sqlite")


# ---------------------------------------------------------------------------- what must hold


@dataclass(frozen=True)
class LedgerFacts:
    """Charges for training by round, releases, and where the population stands."""

    attempts: Mapping[int, int]
    released: int
    epsilon: float
    cap: float

    @property
    def double_spent(self) -> int:
        """How often a round was paid for again: noise drawn twice for one round's number."""
        return sum(count - 1 for count in self.attempts.values())


def ledger_facts(path: Path) -> LedgerFacts:
    if not path.exists():
        return LedgerFacts({}, 0, 0.0, 0.0)
    ledger = Ledger.open_existing(path, clock=WallClock())
    try:
        rows, spent = ledger.history(), ledger.spent()
    finally:
        ledger.close()
    # A joint study reserves its whole once and draws every round from that.
    kinds = {"draw"} if any(r.kind == "draw" for r in rows) else {"charge"}
    trained = [r.body for r in rows if r.kind in kinds and _trains(r.body)]
    attempts = Counter(body["round"] for body in trained)
    released = sum(row.kind == "release" for row in rows)
    return LedgerFacts(dict(attempts), released, spent.epsilon, spent.cap)


def _trains(body: Mapping[str, Any]) -> bool:
    works = [used["work"] for used in body["uses"]] if "uses" in body else [body["work"]]
    return "train" in works


def require_sound(fed: Federation, *, away: Iterable[str] = ()) -> None:
    """Nobody paid twice for a round, or was summed in one it did not pay; all logs agree."""
    here = [site for site in fed.sites if site not in set(away)]
    others = [fed.study_folder(site).audit for site in here]
    report = verify_folder(fed.run_folder.audit, others=others)
    assert report.verified, [str(problem) for problem in report.problems]
    survivors = fed.survivors()
    train = {r["round"] for r in fed.rounds() if r["kind"] == "train" and r["code"] is None}
    for site in fed.sites:
        facts = fed.ledger(site)
        assert facts.double_spent == 0, (site, facts.attempts)
        assert facts.epsilon <= facts.cap
        counted = {n for n, names in survivors.items() if site in names and n in train}
        assert counted <= set(facts.attempts), f"{site} was summed in a round that it did not pay"


def require_whole(fed: Federation, *, away: Iterable[str] = ()) -> None:
    """The run is complete, sound, and ended in one model everywhere."""
    told = fed.conclusion()
    turns = fed.bundle.study.training.rounds
    assert told["rounds_completed"] == turns, told
    assert told["audit_verified"] is True
    assert told["coordinator_saw"]["plain_updates"] == 0
    require_sound(fed, away=away)
    final = state_digest(fed.model())
    for site in set(fed.sites) - set(away):
        assert fed.has_model(site), site
        assert state_digest(fed.site_model(site)) == final, site


def settled(fed: Federation) -> None:
    """Stop everybody where they are, before the run's end; what happened must be sound."""
    for name in (COORDINATOR, *fed.sites):
        if name in fed.processes:
            assert fed.stop(name) == 0, fed.output(name)
    require_sound(fed)


def ended(fed: Federation, *, seconds: float = 150) -> dict[str, Any]:
    """Wait for the run's end and for every hospital's model; the run's summary."""
    told = fed.finish(seconds)
    for site in fed.sites:
        if fed.alive(site):
            fed.until(lambda site=site: fed.has_model(site), 30, f"the model at {site}")
            assert fed.stop(site) == 0, fed.output(site)
    return told


def replayed(
    fed: Federation, *, survivors: Mapping[int, tuple[str, ...]] | None = None
) -> dict[str, Any]:
    """The final model, computed anew from the recorded survivors and the seeded updates alone.

    No masks, no messages, no processes: updates are quantised and added in the clear.

    Args:
        fed: whose run is over.
        survivors: who is summed in each round, instead of those that were recorded.
    """
    terms = fed.bundle.terms({site: bytes(32) for site in fed.sites})
    state, exponents = dict(terms.initial), terms.exponents
    survivors = fed.survivors() if survivors is None else survivors
    for entry in fed.rounds():
        if entry["kind"] != "train" or entry["code"] is not None:
            continue
        number = entry["round"]
        total = np.zeros(terms.layout.size, np.uint32)
        for site in survivors[number]:
            update = update_of(terms.layout, state, seed=fed.seed, site=site, round_number=number)
            total += quantise_layout(
                update * np.float32(terms.weights[site]),
                exponents=exponents,
                sizes=terms.layout.sizes,
                bits=terms.ring_bits,
                parties=len(fed.sites),
            )
        mask = np.uint32((1 << terms.ring_bits) - 1)
        signed = to_signed(total & mask, terms.ring_bits)
        state, exponents = terms.apply(state, exponents, signed, survivors[number])
    from common.strategy import model_tensors

    return model_tensors(state)


def coordinator_public(fed: Federation) -> bytes:
    return coordinator_key(fed.state).public
