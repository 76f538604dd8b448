"""Many cheap rounds: what a joint round costs beside training, and whether hundreds run on.

Ten hospitals, a perceptron of about 0.27 million parameters, joint privacy; the real simulation
with masks, signatures, sealed journals, signed audit logs and fsynced ledgers. CPU seconds (user +
system) of the whole process per round, all parties together, without the trainers' own (sampling,
gradients, clipping), with the noise shares shown apart, and the simulation's own look at whether
uploads are readable (wire tap), which no deployment's round needs. The kernel's part is mostly the
disk's.

    python benchmarks/joint_rounds.py [--rounds 500] [--hidden 512] [--json FILE]

Also shown, of the first and the last hundred rounds: CPU, resident memory, bytes of all journals.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from client.privacy.discrete import DiscreteGaussian
from client.training import LocalTrainer
from server import simulate as simulation
from server.network import WireTap
from server.table import Silent

torch.set_num_threads(1)
SITES, PATIENTS = 10, 60
STUDY = """\
format: wardround-study/1
name: joint-rounds
task:
  kind: tabular
  labels: [no, yes]
  columns: {{patient: patient, label: label}}
  features: [{{name: a, low: 0, high: 1}}, {{name: b, low: 0, high: 1}}]
  hidden: [{hidden}, {hidden}]
training: {{rounds: {rounds}, local_steps: 1, sampling_rate: 0.5, expected_batch: 24}}
aggregation: {{optimizer: {{name: fedavgm, learning_rate: 0.1}}}}
privacy: {{mode: joint, epsilon: 8, delta: 1e-4, clip_norm: 0.5}}
evaluation: {{every: {rounds}}}
simulation:
  data: {{files: [{data}]}}
  split: {{by: iid, sites: 10}}
"""
T = TypeVar("T")


class Meter:
    """CPU seconds of some calls, and marks at the end of every round."""

    def __init__(self, journals: Path) -> None:
        self.spent: dict[str, float] = {"training": 0.0, "noise": 0.0, "tap": 0.0}
        self.marks: list[dict[str, float]] = []
        self._journals = journals

    def timed(self, name: str, work: Callable[..., T]) -> Callable[..., T]:
        """`work`, whose CPU seconds are added to `name`'s."""

        def run(*given: Any) -> T:
            began = time.process_time()
            try:
                return work(*given)
            finally:
                self.spent[name] += time.process_time() - began

        return run

    def mark(self) -> None:
        """Note where everything stands."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = (p for p in self._journals.rglob("*") if p.is_file())
        kept = sum(p.stat().st_size for p in files) if len(self.marks) % 50 == 0 else 0
        self.marks.append(
            {
                "cpu": time.process_time(),
                "kernel": usage.ru_stime,
                **self.spent,
                "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "journals": kept,
            }
        )


def write_patients(path: Path) -> None:
    """A task that can be learned, so that gradients do not vanish."""
    values = np.random.default_rng(5).random((SITES * PATIENTS, 2))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "a", "b", "label"])
        for number, (a, b) in enumerate(values):
            writer.writerow([f"p{number}", a, b, "yes" if a + b > 1 else "no"])


def run(rounds: int, hidden: int, folder: Path) -> tuple[Meter, dict[str, Any]]:
    """One simulation, metered."""
    write_patients(folder / "patients.csv")
    study_path = folder / "study.yaml"
    study_path.write_text(STUDY.format(rounds=rounds, hidden=hidden, data="patients.csv"))
    out = folder / "out"
    meter = Meter(out / "state" / "journals")
    LocalTrainer.train = meter.timed("training", LocalTrainer.train)  # type: ignore[method-assign]
    add_to = meter.timed("noise", DiscreteGaussian.add_to)
    DiscreteGaussian.add_to = add_to  # type: ignore[method-assign]
    WireTap.see = meter.timed("tap", WireTap.see)  # type: ignore[method-assign]
    keep = simulation.Keeper.completed

    def completed(self: Any, result: Any) -> None:
        keep(self, result)
        meter.mark()

    simulation.Keeper.completed = completed  # type: ignore[method-assign]
    concluded = simulation.simulate(study_path, out, view=Silent(), compare=False)
    return meter, concluded.summary


def show(meter: Meter, summary: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The table; what it was made of."""
    steps = [
        {name: b[name] - a[name] for name in ("cpu", "kernel", "training", "noise", "tap")}
        for a, b in zip(meter.marks[1:], meter.marks[2:], strict=False)
    ]
    told: dict[str, Any] = {"rounds": summary["rounds_completed"]}
    parts = {"all rounds": steps, "first 100": steps[:100], "last 100": steps[-100:]}
    print(
        f"{'ms CPU, medians':<18}{'protocol':>10}{'of it kernel':>14}{'wire tap':>10}{'noise':>8}"
        f"{'training':>10}"
    )
    for name, chosen in parts.items():
        if not chosen:
            continue
        protocol = statistics.median(s["cpu"] - s["training"] - s["tap"] for s in chosen) * 1e3
        kernel, tap, noise, training = (
            statistics.median(s[part] for s in chosen) * 1e3
            for part in ("kernel", "tap", "noise", "training")
        )
        told[name] = {"protocol": protocol, "kernel": kernel, "tap": tap, "noise": noise}
        told[name]["training"] = training - noise
        print(
            f"{name:<18}{protocol:>10.1f}{kernel:>14.1f}{tap:>10.1f}{noise:>8.1f}"
            f"{training - noise:>10.1f}"
        )
    kept = [mark["journals"] for mark in meter.marks if mark["journals"]]
    memory = [mark["mib"] for mark in meter.marks]
    print(
        f"rounds completed {summary['rounds_completed']} of {rounds}, aborted "
        f"{summary['rounds_aborted']}; audit verified {summary['audit_verified']}"
    )
    print(f"journals, KiB: {kept[0] / 1024:.0f} at first, {kept[-1] / 1024:.0f} at last")
    print(f"memory, MiB: {memory[min(20, len(memory) - 1)]:.0f} early, {memory[-1]:.0f} at last")
    return {**told, "journals": kept, "mib": memory[::50]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        meter, summary = run(arguments.rounds, arguments.hidden, Path(folder))
    told = show(meter, summary, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
