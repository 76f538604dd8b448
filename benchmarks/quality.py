"""How good the private model is: Medical Abstracts, 5 classes, 10 hospitals, MiniLM head.

The settings are those of configs/quality/*.yaml, frozen before the test set was read. Each row is
a study over several seeds of the split; the federated rows are whole simulations with masks,
noise, ledger and audit. `central` is the recipe of the study without privacy with all records in
one place: as many rounds, steps and patients a step, and the same optimisers.

    python benchmarks/quality.py [--seeds 3] [--json FILE]     official test set, once
    python benchmarks/quality.py --validate [STUDY ...]        held-out part of the training file;
                                                               the test set is not opened

Data: ../shared/data/medical_abstracts, or the folder above it in WARDROUND_DATA. Features are
computed once and kept in memory: about four CPU minutes with the test set, two without.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from client.devices import choose_device
from client.federation import Federation, build_learner
from client.privacy.noise import SecureNoise
from client.tasks.diagnosis import DiagnosisLearner
from client.training import LocalTrainer, TrainingSettings
from common.config import load
from common.metrics import scoring_of, words_from_counts
from common.strategy import model_tensors, released
from common.study import Study
from common.world import SeededEntropy
from server.simulate import simulate
from server.table import Silent

ROOT = Path(__file__).resolve().parents[1]
FROZEN = ROOT / "configs" / "quality"
# Accuracy to reach, by study: an absolute floor, or how far below central it may be.
FLOORS = {"quality-eps8": 0.585, "quality-eps3": 0.56}
WITHIN_OF_CENTRAL = {"quality-none": 0.01}


@dataclass(frozen=True)
class Outcome:
    """One seed of one row."""

    seed: int
    accuracy: float
    macro_f1: float
    patients: int
    epsilon: float | None
    sigma: float | None
    rounds: int
    verified: bool


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    outcomes: tuple[Outcome, ...]
    cpu_seconds: float

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(outcome, field) for outcome in self.outcomes)

    def deviation(self, field: str) -> float:
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def data_folder() -> Path:
    root = Path(os.environ.get("WARDROUND_DATA") or ROOT.parent / "shared" / "data")
    return root / "medical_abstracts"


@contextmanager
def features_kept() -> Iterator[None]:
    """Compute each note's features once in this process; every run then sees the same ones."""
    compute = vars(DiagnosisLearner)["_features"]
    kept: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}

    def features(learner: DiagnosisLearner, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        known = kept.setdefault(id(learner.network), {})  # networks live as long as the process
        fresh = [row for row in dict.fromkeys(rows) if row not in known]
        if fresh:
            known.update(zip(fresh, compute(learner, fresh), strict=True))
        if not rows:
            empty: torch.Tensor = compute(learner, rows)
            return empty
        return torch.stack([known[row] for row in rows])

    with patch.object(DiagnosisLearner, "_features", features):
        yield


def frozen_at(settings: Path) -> str | None:
    """The commit that holds these settings as they are; None where there is no checkout.

    The test set is measured for committed settings alone: whoever changed one would have seen it.
    """
    asked = ["git", "-C", str(ROOT), "status", "--porcelain", "--", str(settings)]
    status = subprocess.run(asked, capture_output=True, text=True, check=False)
    if status.returncode:
        return None
    if status.stdout:
        sys.exit(f"{settings} has changes that are not committed: the test set stays closed")
    asked = ["git", "-C", str(ROOT), "log", "-1", "--format=%h of %cI", "--", str(settings)]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def write_test(source: Path, target: Path, *, patient: str) -> None:
    """The official test set with a patient column: each of its rows is a patient."""
    with (
        gzip.open(source, "rt", encoding="utf-8", newline="") as old,
        target.open("w", encoding="utf-8", newline="") as new,
    ):
        rows = csv.DictReader(old)
        writer = csv.DictWriter(new, [patient, *(rows.fieldnames or ())])
        writer.writeheader()
        for number, row in enumerate(rows, start=1):
            writer.writerow({patient: f"test-{number:04d}", **row})


def seeded(study: Study, seed: int, *, data: Path, test: Path | None) -> dict[str, Any]:
    """The study's document with this seed and these files; nothing else changes."""
    document = study.model_dump(mode="json")
    document["simulation"]["seed"] = seed
    document["simulation"]["data"] = {
        "files": [str(data / "train_from_ohsumed.csv.gz")],
        "test_files": [] if test is None else [str(test)],
    }
    return document


def federated(study: Path, out: Path, seed: int) -> Outcome:
    """A whole simulation, measured exactly on all held-out patients."""
    concluded = simulate(study, out, view=Silent(), device="cpu", compare=False)
    told: Mapping[str, Any] = concluded.summary
    measured = told["final_metrics"]["everywhere"]
    spent = [site["spent"] for site in told["epsilon"].values() if site["spent"] is not None]
    facts = json.loads((out / "privacy.json").read_text(encoding="utf-8"))
    return Outcome(
        seed,
        measured["accuracy"],
        measured["macro_f1"],
        measured["n"],
        max(spent, default=None),
        facts["mechanism"]["noise_multiplier"] if "mechanism" in facts else None,
        told["rounds_completed"],
        concluded.good and not told["rounds_aborted"],
    )


def central(
    config: Path, seed: int, *, noise_multiplier: float | None = None, epsilon: float | None = None
) -> Outcome:
    """The study's recipe with all records at one place, measured exactly on the same patients.

    A noise multiplier makes it DP-SGD, of the epsilon that is told.
    """
    federation = Federation(load(config, Study), config, device="cpu")
    study, bundle = federation.study, federation.build_bundle()
    parts = [federation.divide(site, None) for site in federation.sites]
    train = [record for part in parts for record in part.train]
    held_out = [record for part in parts for record in part.held_out]
    learner = build_learner(study, train, held_out, choose_device("cpu"))
    settings = TrainingSettings.from_study(
        study, noise_multiplier=noise_multiplier, evaluation_noise=None
    )
    whole = replace(settings, expected_batch=settings.expected_batch * len(parts))
    noise = SecureNoise(SeededEntropy(f"central {seed}"))
    trainer = LocalTrainer(learner, bundle.layout, whole, noise, "cpu")
    optimizer = bundle.optimizer()
    state = optimizer.initial(bundle.initial)
    for number in range(1, study.training.rounds + 1):
        update = np.asarray(trainer.train(model_tensors(state), number), np.float32)
        state = optimizer.apply(state, bundle.layout.unflatten(update))
    weights = released(state)
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(weights[name]))
    accuracy, f1 = measured(study, learner.measure())
    return Outcome(
        seed,
        accuracy,
        f1,
        learner.held_out_count(),
        epsilon,
        noise_multiplier,
        study.training.rounds,
        verified=True,
    )


def measured(study: Study, counts: NDArray[np.float64]) -> tuple[float, float]:
    """(accuracy, macro-F1) of an exact metric vector."""
    words = words_from_counts(counts)
    accuracy, f1 = scoring_of(study).read(words).scores.values()
    assert accuracy is not None
    assert f1 is not None
    return accuracy, f1


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(path: Path, seeds: Sequence[int], folder: Path, test: Path | None) -> list[Row]:
    """The rows of one study: the federation and, without privacy, the central model."""
    study = load(path, Study)
    configs = {}
    for seed in seeds:
        configs[seed] = folder / f"{study.name}-{seed}.yaml"
        document = seeded(study, seed, data=data_folder(), test=test)
        configs[seed].write_text(json.dumps(document), encoding="utf-8")
    rows = []
    if study.privacy.mode == "none":
        began = cpu_seconds()
        outcomes = tuple(central(config, seed) for seed, config in configs.items())
        rows.append(Row(f"{study.name}, central", outcomes, cpu_seconds() - began))
    began = cpu_seconds()
    outcomes = tuple(
        federated(config, folder / f"{study.name}-{seed}-run", seed)
        for seed, config in configs.items()
    )
    return [*rows, Row(study.name, outcomes, cpu_seconds() - began)]


def verdicts(rows: Sequence[Row]) -> dict[str, tuple[float, bool]]:
    """By row with a goal: the accuracy asked for, and whether it was reached."""
    means = {row.name: row.mean("accuracy") for row in rows}
    found: dict[str, tuple[float, bool]] = {}
    for name, mean in means.items():
        goal = FLOORS.get(name)
        if name in WITHIN_OF_CENTRAL:
            goal = means[f"{name}, central"] - WITHIN_OF_CENTRAL[name]
        if goal is not None:
            found[name] = (goal, mean >= goal)
    return found


def show(rows: Sequence[Row], goals: Mapping[str, tuple[float, bool]]) -> None:
    head = f"{'row':24} {'accuracy':>15} {'macro-F1':>15} {'sigma':>8} {'epsilon':>8}"
    print(f"{head} {'rounds':>6} {'goal':>6} {'met':>4} {'CPU s':>6}")
    for row in rows:
        first = row.outcomes[0]
        spent = max((o.epsilon for o in row.outcomes if o.epsilon is not None), default=None)
        goal, met = goals.get(row.name, (None, None))
        print(
            f"{row.name:24} {row.mean('accuracy'):.4f} ± {row.deviation('accuracy'):.4f} "
            f"{row.mean('macro_f1'):.4f} ± {row.deviation('macro_f1'):.4f} "
            f"{'-' if first.sigma is None else f'{first.sigma:.4f}':>8} "
            f"{'-' if spent is None else f'{spent:.3f}':>8} {first.rounds:>6} "
            f"{'-' if goal is None else f'{goal:.4f}':>6} "
            f"{'-' if met is None else 'yes' if met else 'NO':>4} {row.cpu_seconds:6.0f}"
            + ("" if all(o.verified for o in row.outcomes) else "  NOT VERIFIED")
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", type=Path, help="with --validate; else the frozen")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1")
    parser.add_argument("--validate", action="store_true", help="do not open the test set")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.studies and not options.validate:
        parser.error("other studies than the frozen ones are for --validate: the test set is not")
    source = data_folder()
    wanted = ["train_from_ohsumed.csv.gz", *([] if options.validate else ["test.csv.gz"])]
    absent = [name for name in wanted if not (source / name).is_file()]
    if absent:
        print(f"skipped: {source} has no {' and no '.join(absent)}")
        return 0
    commit = None if options.validate else frozen_at(FROZEN)
    torch.set_num_threads(1)
    studies = options.studies or [FROZEN / f"{name}.yaml" for name in ("none", "eps8", "eps3")]
    began = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="wardround-quality-") as name, features_kept():
        folder, test = Path(name), None
        if not options.validate:
            test = folder / "test.csv"
            write_test(source / "test.csv.gz", test, patient="doc_id")
        for path in studies:
            rows.extend(measure(path, range(1, options.seeds + 1), folder, test))
    goals = {} if options.validate else verdicts(rows)
    where = "held-out fifth of the training file" if options.validate else "official test set"
    first = rows[0].outcomes[0]
    print(f"{where}, about {first.patients} patients; mean ± sd of {options.seeds} seeds")
    if commit is not None:
        print(f"settings: configs/quality at commit {commit}")
    show(rows, goals)
    print(f"{time.monotonic() - began:.0f} s, {cpu_seconds():.0f} CPU s in all, one thread")
    if options.json:
        document = {
            "measured_on": where,
            "settings": commit,
            "rows": [asdict(row) for row in rows],
            "goals": goals,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all(met for _, met in goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
