"""What the counted statistics are worth: UCI heart disease at its four hospitals.

    python benchmarks/normalisation.py [--seeds 5] [--rounds 20] [--json FILE]

Four ways to normalise, everything else equal (federated averaging by the product's trainer,
logistic regression, no noise on training): `global` counts mean and deviation over all hospitals
as the statistics round does; `noised` is the same under differential privacy at --epsilon;
`per site` is the usual preprocessing, where every hospital takes its own; `bounds` scales by the
declared bounds alone. Accuracy: `mean` over the four hospitals' test patients, and `pooled`.

Records as in FLamby (Ogier du Terrail et al. 2022): columns 10 to 12 dropped, then incomplete
rows; 740 patients, 13 inputs. A third of each hospital's patients are its test patients.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.records import Record
from client.privacy.noise import SecureNoise
from client.tasks import tabular
from client.tasks.rows import NormalisedRowsLearner, initial_tensors, rows_learner
from client.training import LocalTrainer, TrainingSettings
from common.accountant import solve_noise_multiplier
from common.statistics import STATISTIC_SCALE, StatisticsLayout
from common.study import Study
from common.tensors import Layout
from common.world import SeededEntropy

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[2] / "shared" / "data"))
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
WAYS = ("global", "noised", "per site", "bounds")
# (name, column, low, high), and the columns that become one input per value but the first.
NUMBERS = (
    ("age", 0, 18, 100),
    ("sex", 1, 0, 1),
    ("trestbps", 3, 60, 240),
    ("chol", 4, 0, 600),
    ("fbs", 5, 0, 1),
    ("thalach", 7, 40, 220),
    ("exang", 8, 0, 1),
    ("oldpeak", 9, -3, 7),
)
CHOICES = (("cp", 2, (2, 3, 4)), ("restecg", 6, (1, 2)))
INPUTS = (
    *((name, low, high) for name, _, low, high in NUMBERS),
    *((f"{name}_{value}", 0, 1) for name, _, values in CHOICES for value in values),
)


def records(folder: Path, hospital: str) -> list[Record]:
    """One hospital's complete rows; each is a patient of its own."""
    found = []
    lines = (folder / f"processed.{hospital}.data").read_text().split()
    for number, line in enumerate(lines, start=1):
        cells = line.split(",")
        kept = [cells[at] for at in (*range(10), 13)]
        if "?" in kept:
            continue
        values = [float(cells[at]) for _, at, _, _ in NUMBERS]
        values += [float(float(cells[at]) == v) for _, at, choices in CHOICES for v in choices]
        label = "disease" if float(cells[13]) > 0 else "healthy"
        patient = f"{hospital}-{number}"
        found.append(Record(patient, "", label, None, hospital, number, tuple(values)))
    return found


def study() -> Study:
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "heart",
            "task": {
                "kind": "tabular",
                "labels": ("healthy", "disease"),
                "features": tuple(
                    {"name": name, "low": float(low), "high": float(high)}
                    for name, low, high in INPUTS
                ),
            },
            "privacy": {"mode": "none"},
            "sites": tuple({"id": hospital} for hospital in HOSPITALS),
        }
    )


def learners(folder: Path, seed: int) -> dict[str, NormalisedRowsLearner]:
    """Every hospital's learner; the seed chooses test patients and nothing else."""
    stream = np.random.default_rng(seed)
    made = {}
    for hospital in HOSPITALS:
        rows = records(folder, hospital)
        order = [rows[int(at)] for at in stream.permutation(len(rows))]
        cut = math.ceil(len(rows) * 0.66)
        made[hospital] = rows_learner(
            tabular, study(), order[:cut], order[cut:], device=torch.device("cpu")
        )
    return made


def statistics(
    way: str, sites: dict[str, NormalisedRowsLearner], seed: int, epsilon: float
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Mean and deviation that each hospital normalises by."""
    layout = StatisticsLayout(len(INPUTS))
    count = len(sites)
    words = {name: site.statistic_words() for name, site in sites.items()}
    if way == "bounds":
        return dict.fromkeys(sites, layout.initial())
    if way == "per site":
        return {name: layout.resolve(own, 1) for name, own in words.items()}
    if way == "noised":
        sigma = solve_noise_multiplier(epsilon, 1e-4, sampling_rate=1.0, steps=1)
        layout = StatisticsLayout(len(INPUTS), sigma)
        noise = SecureNoise(SeededEntropy(f"statistics {seed}"))
        std = sigma * layout.sensitivity * STATISTIC_SCALE
        words = {
            name: np.rint(noise.add_gaussian(own.astype(np.float64), std)).astype(np.int64)
            for name, own in words.items()
        }
    total = np.sum(list(words.values()), axis=0)
    return dict.fromkeys(sites, layout.resolve(total, count))


def run(way: str, folder: Path, seed: int, rounds: int, epsilon: float) -> dict[str, float]:
    """Accuracy after federated averaging, each hospital weighing alike."""
    sites = learners(folder, seed)
    initial = initial_tensors(tabular, study().task)
    layout = Layout.of(initial)
    settings = TrainingSettings(
        mode="none",
        local_steps=10,
        expected_batch=16,
        micro_batch=64,
        learning_rate=0.1,
        optimizer="sgd",
    )
    known = statistics(way, sites, seed, epsilon)
    trainers = {
        name: LocalTrainer(
            site, layout, settings, SecureNoise(SeededEntropy(f"{seed} {name}")), "cpu"
        )
        for name, site in sites.items()
    }
    flat = layout.flatten(initial)
    for number in range(1, rounds + 1):
        moved = [
            trainer.train({**layout.unflatten(flat), **known[name]}, number)
            for name, trainer in trainers.items()
        ]
        flat = flat + np.mean(moved, axis=0, dtype=np.float32)
    right, counts = [], []
    for name, trainer in trainers.items():
        words = trainer.measure({**layout.unflatten(flat), **known[name]}, rounds + 1)
        cells = words[:-1].reshape(2, 2) / STATISTIC_SCALE
        right.append(float(np.trace(cells)))
        counts.append(float(cells.sum()))
    each = [hits / count for hits, count in zip(right, counts, strict=True)]
    return {"mean": float(np.mean(each)), "pooled": sum(right) / sum(counts)}


def table(folder: Path, seeds: int, rounds: int, epsilon: float) -> list[dict[str, Any]]:
    rows = []
    for way in WAYS:
        found = [run(way, folder, seed, rounds, epsilon) for seed in range(seeds)]
        row: dict[str, Any] = {"normalisation": way}
        for key in ("mean", "pooled"):
            values = [result[key] for result in found]
            row[key], row[f"{key}_sd"] = float(np.mean(values)), float(np.std(values))
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "fed_heart_disease")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=1.0, help="of `noised`, delta 1e-4")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = table(options.data, options.seeds, options.rounds, options.epsilon)
    print(f"{'normalisation':14} {'mean':>6} {'sd':>6} {'pooled':>7} {'sd':>6}")
    for row in rows:
        print(
            f"{row['normalisation']:14} {row['mean']:6.3f} {row['mean_sd']:6.3f} "
            f"{row['pooled']:7.3f} {row['pooled_sd']:6.3f}"
        )
    if options.json:
        told = {"seeds": options.seeds, "rounds": options.rounds, "epsilon": options.epsilon}
        options.json.write_text(json.dumps({**told, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
