"""The cost of the platform: one round of ten tiny hospitals against a plain torch loop.

MLP 32-64-2, 10 hospitals x 200 rows, batch 20, one local epoch per round. On our side everything
but the noise is on: handshake, masks, signatures, sealed journals, signed audit logs, and one
fsynced ledger row per site and round. CPU seconds (user + system) per round, one process each;
the two take turns, and medians over rounds are compared, because other programs disturb both.
Peak memory is that of the process that holds all ten hospitals and the coordinator. A round
brings about 38 syncs of the disk; the kernel's part of our time is theirs, and it grows with
whatever else uses the disk (TMPDIR chooses where the run lives).

    python benchmarks/simulator.py [--rounds 20] [--turns 3] [--json FILE]
        [--flwr-python PATH] [--nvflare-python PATH] [--pfl-python PATH]

Other simulators (flwr with ray, nvflare, pfl) then run the same training for the same number of
rounds, without noise, where they are installed; the second table says so where they are not.
Their dependencies exclude each other, so each may have an interpreter of its own. Everybody,
wardround included, runs once in a process tree of its own, and the whole tree is counted: a few
of them start a process for every hospital. Their secure aggregation, journals and ledgers are off
or do not exist. A model that does not end where a plain loop ends does not count as measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from others import harness, launch, workload
from others.workload import BATCH, LABELS, ROWS, SITES, Mlp, hospital
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from client.daemon import SiteDaemon
from client.privacy.ledger import Charge, Ledger, RoundId
from client.privacy.noise import SecureNoise
from client.round.effects import Work, Worked
from client.round.machine import SiteRound
from client.training import LocalTrainer, TrainingSettings
from common.accountant import DpEvent, epsilon
from common.audit import AuditLog, write_keys
from common.crypto.identity import SiteKey
from common.crypto.seal import Vault
from common.errors import Code
from common.evidence import AuditEvidence
from common.keys import secret_file
from common.metrics import ClassScoring
from common.protocol.terms import Terms
from common.protocol.transcript import Chain
from common.protocol.wire import Witness
from common.secagg.quantise import limit
from common.secagg.quorum import colluders, quorum
from common.strategy import OptimizerSettings, ServerOptimizer, initial_exponents
from common.tensors import Layout
from common.world import (
    FileJournal,
    JournalGroup,
    SealedJournal,
    SkippingClock,
    SystemEntropy,
    WallClock,
    unix_seconds,
)
from server.driver import CoordinatorDriver
from server.network import InProcessNetwork, SiteHandle, WireTap
from server.round.effects import Aborted, Completed
from server.round.machine import CoordinatorRound
from server.round.state import Deadlines


class RowsLearner:
    """A hospital's 200 rows and its MLP."""

    def __init__(self, number: int) -> None:
        self.module: nn.Module = Mlp()
        self.inputs, self.targets = hospital(number)
        self._loss = nn.CrossEntropyLoss(reduction="none")

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(sorted(self.module.named_parameters()))

    def patient_count(self) -> int:
        return ROWS

    def held_out_count(self) -> int:
        return 0

    def rows_of(self, patients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return patients, np.arange(len(patients))

    def losses(self, rows: NDArray[np.int64]) -> torch.Tensor:
        at = torch.from_numpy(rows)
        losses: torch.Tensor = self._loss(self.module(self.inputs[at]), self.targets[at])
        return losses

    def measure(self) -> NDArray[np.float64]:
        return np.zeros(WORDS)


WORDS = ClassScoring(tuple(map(str, range(LABELS))), 8.0).length
SETTINGS = TrainingSettings(
    mode="none",
    local_steps=ROWS // BATCH,
    expected_batch=BATCH,
    micro_batch=BATCH,
    learning_rate=workload.RATE,
    optimizer="sgd",
)
# What a round would be charged under DP; noise itself is off in this benchmark.
CHARGE = (Charge("train", "train", (DpEvent(1.5, BATCH / ROWS, ROWS // BATCH),)),)


class Worker:
    """Reserve, train: a real ledger row, real training, no noise."""

    def __init__(self, ledger: Ledger, trainer: LocalTrainer, study: bytes) -> None:
        self._ledger, self._trainer, self._study = ledger, trainer, study
        self.final: Chain | None = None

    def work(self, request: Work) -> Worked:
        reservation = self._ledger.reserve_round(
            RoundId(self._study, "", request.round), CHARGE, "0" * 64
        )
        self._ledger.begin(reservation)
        update = self._trainer.train(request.state, request.round) if request.trains else None
        metrics = np.zeros(WORDS, np.int64) if request.measures else None
        return Worked(update, metrics, Witness(self._ledger.counter, self._ledger.head))

    def release(self, round_number: int) -> None:
        del round_number

    def stopped(self) -> bool:
        return False

    def finished(self, chain: Chain) -> None:
        self.final = chain


class Meter:
    """Notes CPU and wall time at every completed round."""

    def __init__(self) -> None:
        self.cpu: list[float] = [time.process_time()]
        self.kernel: list[float] = [resource.getrusage(resource.RUSAGE_SELF).ru_stime]
        self.wall: list[float] = [time.monotonic()]
        self.final: Chain | None = None

    def completed(self, result: Completed, chain: Chain) -> None:
        del result, chain
        self.cpu.append(time.process_time())
        self.kernel.append(resource.getrusage(resource.RUSAGE_SELF).ru_stime)
        self.wall.append(time.monotonic())

    def aborted(self, result: Aborted) -> None:
        raise AssertionError(result)

    def refused(self, site: str, code: Code) -> None:
        raise AssertionError((site, code))

    def over(self, chain: Chain) -> None:
        self.final = chain


class NotingMeter(Meter):
    """Tells the harness of every training round; the round after them only measures."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self._rounds = rounds

    def completed(self, result: Completed, chain: Chain) -> None:
        super().completed(result, chain)
        number = len(self.wall) - 1
        if number <= self._rounds:
            harness.round_done(number, self._rounds)


def terms_of(keys: dict[str, SiteKey], rounds: int) -> Terms:
    initial = {n: p.detach().numpy().copy() for n, p in sorted(Mlp().named_parameters())}
    optimizer = ServerOptimizer(OptimizerSettings())
    layout, count = Layout.of(initial), len(keys)
    exponents = initial_exponents(layout.specs, limit=limit(24, count), largest=1.0)
    return Terms(
        study=bytes(32),
        roster={s: k.public for s, k in keys.items()},
        quorum=quorum(count, colluders(count)),
        weights=dict.fromkeys(keys, 1.0),
        layout=layout,
        ring_bits=24,
        metric_words=WORDS,
        initial=optimizer.initial(initial),
        exponents=tuple(exponents[s.name] for s in layout.specs),
        optimizer=optimizer,
        turns=rounds,
        evaluate_every=1,
        rounds=rounds + 1,
        private=False,
        burns_tolerated=0,
    )


def platform(rounds: int, folder: Path, meter: Meter) -> None:
    entropy, clock = SystemEntropy(), SkippingClock()
    names = [f"site-{i:02d}" for i in range(SITES)]
    keys = {s: SiteKey.generate(entropy) for s in names}
    terms = terms_of(keys, rounds)
    journals = JournalGroup(folder / "journals", names)
    network = InProcessNetwork(clock, WireTap(terms.upload_bytes()), journals.settle)
    boss = SiteKey.generate(entropy)
    publics = {s: k.public for s, k in keys.items()} | {"coordinator": boss.public}
    told = write_keys(folder / "audit", publics)
    daemons: dict[str, SiteDaemon] = {}
    for number, name in enumerate(names):
        home = folder / name
        home.mkdir(parents=True)
        vault = Vault(secret_file(home / "vault.key", entropy), entropy)
        journal = SealedJournal(journals.member(name, home / "journal"), vault, name)
        ledger = Ledger.open(
            home / "ledger.sqlite", epsilon_cap=1e6, delta=1e-5, clock=WallClock(), entropy=entropy
        )
        trainer = LocalTrainer(
            RowsLearner(number), terms.layout, SETTINGS, SecureNoise(entropy), "cpu"
        )
        machine = SiteRound(
            terms, name, keys[name], entropy, ledger_contains=ledger.contains, record=None
        )
        log = _log(folder, name, keys[name], told)
        daemons[name] = SiteDaemon(
            machine,
            journal=journal,
            transport=network.from_site(name),
            worker=Worker(ledger, trainer, terms.study),
            evidence=AuditEvidence(log),
        )
        network.sites[name] = SiteHandle(
            daemons[name].start, daemons[name].receive, lambda: None, up=True
        )
    journal_c = FileJournal(folder / "coordinator")
    driver = CoordinatorDriver(
        CoordinatorRound(
            terms, Deadlines(), entropy, patience=3, record=None, blob=journal_c.get_blob
        ),
        journal=journal_c,
        transport=network,
        clock=clock,
        evidence=AuditEvidence(_log(folder, "coordinator", boss, told)),
        observer=meter,
    )
    network.driver = driver
    driver.start()
    while meter.final is None:
        network.step()


def _log(folder: Path, owner: str, key: SiteKey, told: str) -> AuditLog:
    return AuditLog.open(
        folder / "audit" / f"{owner}.jsonl",
        owner=owner,
        sign=key.sign_bytes,
        clock=unix_seconds,
        facts={"keys": told},
    )


def plain_loop(rounds: int, *, loader: bool) -> list[float]:
    """CPU seconds of each round of the same training in a plain torch loop.

    With `loader` as PyTorch's tutorials write it (DataLoader over a TensorDataset); without,
    rows are indexed by hand, which nobody's loop is faster than.
    """
    learners = [RowsLearner(i) for i in range(SITES)]
    model = Mlp()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = nn.CrossEntropyLoss()
    moments = [time.process_time()]
    for _ in range(rounds):
        total = {n: torch.zeros_like(v) for n, v in state.items()}
        for learner in learners:
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(model.parameters(), lr=workload.RATE)
            for inputs, targets in _batches(learner, loader=loader):
                optimizer.zero_grad(set_to_none=True)
                loss(model(inputs), targets).backward()
                optimizer.step()
            for n, p in model.named_parameters():
                total[n] += p.detach()
        state = {n: v / SITES for n, v in total.items()}
        moments.append(time.process_time())
    return list(np.diff(moments))


def plain_loops(rounds: int) -> dict[str, list[float]]:
    """`plain_loop` both ways, each after a warm-up."""
    plain_loop(2, loader=True)
    return {
        "loader": plain_loop(rounds, loader=True),
        "bare": plain_loop(rounds, loader=False),
    }


def plain_elsewhere(rounds: int) -> dict[str, list[float]]:
    """`plain_loops` in a process of its own, so that its imports are not charged to us."""
    command = [sys.executable, __file__, "--plain", "--rounds", str(rounds)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(told.stdout)
    return found


def _batches(learner: RowsLearner, *, loader: bool) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    if loader:
        data = TensorDataset(learner.inputs, learner.targets)
        yield from DataLoader(data, batch_size=BATCH, shuffle=True)
        return
    order = torch.randperm(ROWS)
    for start in range(0, ROWS, BATCH):
        at = order[start : start + BATCH]
        yield learner.inputs[at], learner.targets[at]


def warm_accountant(rounds: int) -> None:
    """Accountant results are cached per history, as in a plan that was shown before the run."""
    for number in range(1, rounds + 2):
        epsilon([DpEvent(1.5, BATCH / ROWS, (ROWS // BATCH) * number)], 1e-5)


def tell_ours(rounds: int) -> None:
    """Our part of the second table, as the other simulators' scripts tell theirs."""
    harness.start()
    warm_accountant(rounds)
    with tempfile.TemporaryDirectory() as folder:
        harness.ready()
        meter = NotingMeter(rounds)
        platform(rounds, Path(folder), meter)
    assert meter.final is not None
    harness.told(rounds, workload.loss_of(meter.final.state))


def beside(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everybody's part of the second table; who fails or is missing says why."""
    rounds: int = arguments.rounds
    pythons = {
        "flwr": arguments.flwr_python,
        "nvflare": arguments.nvflare_python,
        "pfl": arguments.pfl_python,
    }
    reference = workload.reference_loss(rounds)
    everybody = [launch.ours(Path(__file__).resolve()), *launch.contenders(pythons)]
    return {c.name: launch.measure(c, rounds, reference, arguments.limit) for c in everybody}


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of training (default: 20, >= 2)")
    parser.add_argument("--turns", type=int, default=3, help="runs of the first table (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    for name, label in (("flwr", "flwr and ray"), ("nvflare", "nvflare"), ("pfl", "pfl")):
        parser.add_argument(
            f"--{name}-python",
            metavar="PATH",
            default=sys.executable,
            help=f"interpreter that has {label} and torch (default: this one)",
        )
    parser.add_argument(
        "--limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="end a simulator of the second table after so long (default: 900)",
    )
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.rounds < 2:
        parser.error("--rounds: at least 2, the first is not a later round")
    return found


def main() -> int:
    arguments = arguments_of()
    torch.set_num_threads(1)
    if arguments.plain:
        print(json.dumps(plain_loops(arguments.rounds)))
        return 0
    if arguments.ours:
        tell_ours(arguments.rounds)
        return 0
    warm_accountant(arguments.rounds)
    ours: list[float] = []
    kernel: list[float] = []
    first: list[float] = []
    plain: dict[str, list[float]] = {"loader": [], "bare": []}
    for _ in range(arguments.turns):
        for name, times in plain_elsewhere(arguments.rounds).items():
            plain[name] += times
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            meter = Meter()
            platform(arguments.rounds, Path(folder), meter)
        ours += list(np.diff(meter.cpu)[1 : arguments.rounds])
        kernel += list(np.diff(meter.kernel)[1 : arguments.rounds])
        first.append(meter.wall[1] - began)
    told: dict[str, Any] = {
        "plain_ms": 1e3 * float(np.median(plain["loader"])),
        "bare_ms": 1e3 * float(np.median(plain["bare"])),
        "ours_ms": 1e3 * float(np.median(ours)),
        "kernel_ms": 1e3 * float(np.median(kernel)),
        "ratio": float(np.median(ours) / np.median(plain["loader"])),
        "ratio_to_bare": float(np.median(ours) / np.median(plain["bare"])),
        "first_round_s": first[0],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    rows = [
        ("plain torch loop (DataLoader), CPU ms per round", f"{told['plain_ms']:.1f}", ""),
        ("the same with rows indexed by hand", f"{told['bare_ms']:.1f}", ""),
        ("wardround, CPU ms per round", f"{told['ours_ms']:.1f}", ""),
        ("of it in the kernel", f"{told['kernel_ms']:.1f}", ""),
        ("ratio to the plain loop", f"{told['ratio']:.2f}", "goal <= 3"),
        ("ratio to rows indexed by hand", f"{told['ratio_to_bare']:.2f}", ""),
        ("first round after imports, wall s", f"{told['first_round_s']:.2f}", "goal <= 1"),
        ("peak memory, GB", f"{told['peak_gb']:.2f}", "goal <= 0.7"),
    ]
    for label, value, goal in rows:
        print(f"{label:50s} {value:>26s}  {goal}")
    told["beside"] = beside(arguments)
    print("", *launch.table(told["beside"], arguments.rounds), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
