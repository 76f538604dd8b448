"""Pneumonia in chest films: PneumoniaMNIST, 5,856 films of 28 x 28, its official division.

    python benchmarks/task_imaging.py [--seeds 3] [--lines FILE] [--only ROW]
    python benchmarks/task_imaging.py --quick      one seed, a few steps: does it run
    python benchmarks/task_imaging.py --validate   the official validation part is measured instead

  central   all training films in one place, by the product's trainer
  none      5 hospitals, Dirichlet 0.5 by label; masks, no differential privacy
  local     the same hospitals, DP-SGD in each; epsilon 3, delta 1e-5
  joint     the same hospitals, noised once inside the secure sum; epsilon 3, delta 1e-5

The federated rows are whole simulations (masks, audit; with privacy noise and ledgers). Settings
were chosen on the validation part. Films are of children; each counts as a patient of its own,
since the archive does not say whose it is. AUROC is read from a histogram of 1,024 bins.

Published (Yang et al. 2023, MedMNIST v2): ResNet-18 at 28 pixels, AUROC 0.944 and
accuracy 0.854. Goals: central AUROC 0.94 and accuracy 0.85; `none` within 0.02 AUROC of central.

Each finished run is a line in --lines; what is there with the same settings is not run again.
Data: ../shared/data/pneumoniamnist, or the folder above it in WARDROUND_DATA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from client.data.images import unpack_medmnist
from client.federation import Federation, build_learner
from client.privacy.noise import SecureNoise
from client.training import LocalTrainer, TrainingSettings
from common.config import load
from common.metrics import scoring_of, words_from_counts
from common.strategy import model_tensors, released
from common.study import Study
from common.world import SeededEntropy
from server.simulate import simulate
from server.table import Silent

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[2] / "shared" / "data"))
ARCHIVE = DATA / "pneumoniamnist" / "pneumoniamnist.npz"
LABELS = ("normal", "pneumonia")
PUBLISHED = {"auroc": 0.944, "accuracy": 0.854}
GOALS = {"auroc": 0.94, "accuracy": 0.85}
WITHIN_OF_CENTRAL = 0.02
HOSPITALS = 5
_TRAIN_FILMS = 4708

Line = dict[str, Any]
Row = Literal["central", "none", "local", "joint"]
ROWS: tuple[Row, ...] = ("central", "none", "local", "joint")

_PLAIN: Line = {"kind": "resnet", "widths": [16, 32, 64], "blocks": 1, "groups": 8}
# Under noise a small network learns more: every parameter brings noise of its own.
_NOISED: Line = {"kind": "resnet", "widths": [16, 32], "blocks": 1, "groups": 8, "stem_stride": 2}
_VARIED: Line = {"shift": 0.1, "rotate": 10, "zoom": 0.1, "brightness": 0.1, "contrast": 0.2}
_ADAMW: Line = {"name": "adamw", "learning_rate": 0.003, "weight_decay": 0.05}
_PRIVACY: Line = {"epsilon": 3.0, "delta": 1e-5, "clip_norm": 0.5}
_WHOLE = {"sampling_rate": 1.0, "expected_batch": _TRAIN_FILMS / HOSPITALS, "micro_batch": 256}

SETTINGS: dict[Row, Line] = {
    "central": {
        "task": {"network": _PLAIN, "augmentation": _VARIED},
        "training": {
            "rounds": 20,
            "local_steps": 74,
            "expected_batch": 64,
            "micro_batch": 64,
            "optimizer": _ADAMW,
        },
        "aggregation": {"average": 0.5},
        "privacy": {"mode": "none"},
    },
    "none": {
        "task": {"network": _PLAIN, "augmentation": _VARIED},
        "training": {
            "rounds": 40,
            "local_steps": 30,
            "expected_batch": 64,
            "micro_batch": 64,
            "optimizer": _ADAMW,
        },
        "aggregation": {"average": 0.8},
        "privacy": {"mode": "none"},
    },
    "local": {
        "task": {"network": _NOISED},
        "training": {
            "rounds": 15,
            "local_steps": 2,
            "spare_rounds": 0,
            "optimizer": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.5},
            **_WHOLE,
        },
        "aggregation": {
            "optimizer": {"name": "fedavgm", "learning_rate": 1.0, "momentum": 0.5},
            "average": 0.7,
        },
        "privacy": {"mode": "local", **_PRIVACY},
    },
    "joint": {
        "task": {"network": _NOISED},
        "training": {"rounds": 30, "local_steps": 1, "spare_rounds": 0, **_WHOLE},
        "aggregation": {
            "optimizer": {"name": "fedavgm", "learning_rate": 2.0, "momentum": 0.8},
            "average": 0.7,
        },
        "privacy": {"mode": "joint", **_PRIVACY},
    },
}


@cache
def tables() -> Path:
    """The archive as tables and PNGs, in a folder that goes with this process."""
    folder = Path(_FOLDER.name) / "films"
    unpack_medmnist(ARCHIVE, folder, LABELS)
    return folder


_FOLDER = tempfile.TemporaryDirectory(prefix="wardround-imaging-")


def document(row: Row, seed: int, *, quick: bool, part: str = "test") -> Line:
    """The study of one row; `part` of the official division is measured."""
    chosen = SETTINGS[row]
    training = dict(chosen["training"])
    if quick:
        training |= {"rounds": 2, "local_steps": min(3, training["local_steps"])}
    return {
        "format": "wardround-study/1",
        "name": f"pneumonia-{row}",
        "task": {"kind": "imaging", "labels": list(LABELS), "size": 28, **chosen["task"]},
        "training": training,
        "aggregation": chosen["aggregation"],
        "privacy": chosen["privacy"],
        "evaluation": {"every": training["rounds"], "score_bins": 1024},
        "simulation": {
            "data": {"files": ["train.csv"], "test_files": [f"{part}.csv"]},
            "split": {"by": "dirichlet", "alpha": 0.5, "sites": HOSPITALS},
            "seed": seed,
        },
    }


def central(seed: int, *, quick: bool = False, part: str = "test") -> Line:
    """All training films in one place: AUROC and accuracy on the official test films."""
    config = _written("central", seed, quick=quick, part=part)
    began = _cpu_seconds()
    federation = Federation(load(config, Study), config, device="cpu")
    study, bundle = federation.study, federation.build_bundle()
    parts = [federation.divide(site, None) for site in federation.sites]
    train = [record for one in parts for record in one.train]
    held_out = [record for one in parts for record in one.held_out]
    learner = build_learner(study, train, held_out, torch.device("cpu"))
    settings = TrainingSettings.from_study(study, noise_multiplier=None, evaluation_noise=None)
    noise = SecureNoise(SeededEntropy(f"central {seed}"))
    trainer = LocalTrainer(learner, bundle.layout, settings, noise, "cpu")
    optimizer = bundle.optimizer()
    state = optimizer.initial(bundle.initial)
    for number in range(1, study.training.rounds + 1):
        update = np.asarray(trainer.train(model_tensors(state), number), np.float32)
        state = optimizer.apply(state, bundle.layout.unflatten(update))
    weights = released(state)
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(weights[name]))
        learner.module.eval()
        words = words_from_counts(learner.measure())
    scores = scoring_of(study).read(words).scores
    return _line(scores, learner.held_out_count(), began)


def federated(
    seed: int,
    *,
    quick: bool = False,
    privacy: Literal["none", "local", "joint"] = "none",
    part: str = "test",
) -> Line:
    """Five hospitals in a whole simulation, measured exactly on the official test films."""
    config = _written(privacy, seed, quick=quick, part=part)
    began = _cpu_seconds()
    with tempfile.TemporaryDirectory(dir=_FOLDER.name) as folder:
        out = Path(folder) / "run"
        concluded = simulate(config, out, view=Silent(), device="cpu", compare=False)
        told = concluded.summary
        facts = json.loads((out / "privacy.json").read_text(encoding="utf-8"))
    if not concluded.good or told["rounds_aborted"]:
        raise AssertionError("the run did not end well")
    measured = told["final_metrics"]["everywhere"]
    spent = [site["spent"] for site in told["epsilon"].values() if site["spent"] is not None]
    line = _line(measured, measured["n"], began)
    noise = facts["mechanism"]["noise_multiplier"] if "mechanism" in facts else None
    return {**line, "epsilon": max(spent, default=None), "noise_multiplier": noise}


def _written(row: Row, seed: int, *, quick: bool, part: str) -> Path:
    path = tables() / f"{row}-{seed}-{part}-{int(quick)}.yaml"
    path.write_text(json.dumps(document(row, seed, quick=quick, part=part)), encoding="utf-8")
    return path


def _line(scores: Any, patients: int, began: float) -> Line:
    return {
        "auroc": float(scores["auroc"]),
        "accuracy": float(scores["accuracy"]),
        "patients": patients,
        "cpu_s": round(_cpu_seconds() - began, 1),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------- the table


def run(row: Row, seed: int, *, quick: bool, part: str, lines: Path | None) -> Line:
    """One row and seed: read from `lines` where it is there with these settings, else run."""
    settings = json.dumps(document(row, seed, quick=quick, part=part), sort_keys=True)
    key = {
        "task": "imaging",
        "row": row,
        "seed": seed,
        "part": part,
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
    }
    for old in _lines(lines):
        if {name: old.get(name) for name in key} == key:
            return old
    found = (
        central(seed, quick=quick, part=part)
        if row == "central"
        else federated(seed, quick=quick, privacy=row, part=part)
    )
    line = {**key, "quick": quick, **found}
    if lines is not None:
        with lines.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    return line


def _lines(path: Path | None) -> list[Line]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def verdicts(found: dict[str, list[Line]]) -> dict[str, bool]:
    """Whether each row with a goal reached it, in the mean of its seeds."""
    means = {
        row: {name: statistics.fmean(line[name] for line in lines) for name in GOALS}
        for row, lines in found.items()
    }
    told = {}
    if "central" in means:
        told["central"] = all(means["central"][name] >= goal for name, goal in GOALS.items())
    if {"central", "none"} <= set(means):
        least = means["central"]["auroc"] - WITHIN_OF_CENTRAL
        told["none"] = means["none"]["auroc"] >= least
    return told


def show(found: dict[str, list[Line]]) -> None:
    print(f"{'row':10} {'AUROC':>15} {'accuracy':>15} {'epsilon':>8} {'goal':>5} {'CPU s':>6}")
    met = verdicts(found)
    for row, lines in found.items():
        cells = []
        for name in GOALS:
            values = [line[name] for line in lines]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        epsilon = lines[0].get("epsilon")
        told = "-" if epsilon is None else f"{epsilon:.3f}"
        goal = {True: "met", False: "NO", None: "-"}[met.get(row)]
        spent = sum(line["cpu_s"] for line in lines)
        print(f"{row:10} {cells[0]} {cells[1]} {told:>8} {goal:>5} {spent:6.0f}")
    print(f"{'published':10} {PUBLISHED['auroc']:.4f}          {PUBLISHED['accuracy']:.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1")
    parser.add_argument("--only", choices=ROWS, action="append", help="these rows alone")
    parser.add_argument("--lines", type=Path, help="results, one JSON object a line; resumed")
    parser.add_argument("--validate", action="store_true", help="do not open the test films")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    options = parser.parse_args()
    if not ARCHIVE.is_file():
        print(f"skipped: there is no {ARCHIVE}")
        return 0
    torch.set_num_threads(1)
    part = "val" if options.validate else "test"
    seeds = range(1, 2 if options.quick else options.seeds + 1)
    found = {
        row: [run(row, seed, quick=options.quick, part=part, lines=options.lines) for seed in seeds]
        for row in options.only or ROWS
    }
    show(found)
    return 0 if options.quick or options.validate or all(verdicts(found).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
