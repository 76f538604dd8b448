"""Several kinds of input beside each alone: who dies in hospital, from the first day.

    python benchmarks/task_multimodal.py [--seeds 5] [--lines FILE]  test patients
    python benchmarks/task_multimodal.py --validate                 held-out training patients
    python benchmarks/task_multimodal.py --quick                    one seed, fewer steps, central

A linked set: unit stays of the eICU demo with their text (history, exam, notes, home drugs, first
day's treatments) and whether the patient left the hospital alive; by stay, the hourly measurements
of the YAIB demo's length-of-stay cohort (29 of them, first 24 hours) and its age, sex, height and
weight. 2,195 stays, 194 deaths; 5 in 100 stays have no measurements: they stay in, with those
inputs missing. Patients are parted into training and test as the text's authors did.

Rows: `text`, `numbers`, `series` alone, `all` together; each `central` (all records in one place)
and `federated` (hospitals by region: four, whole simulations with masks, no privacy mode); and
`all, eps 8` and `all, joint, eps 3`, the same with joint noise and fewer parameters; `all, local,
eps 3`, where every hospital noises alone. Goal: `all` has a higher AUROC than
its best single input, central and federated; central, the difference is told with a 95 % interval
of a bootstrap over test stays. `all, text hidden` (and so on) is the model of `all`, central, when
nobody has that input: what a missing one costs. Target, steps and learning rates were chosen on
training patients; those of the federated rows once more, after first runs on test patients (one
seed each) with five times as many steps, where `all` was below `series`, and with a larger private
model.

--lines keeps a line for each row and seed, as soon as it is known; what stands there is not run
again. Data: ../shared/data, or the folder in WARDROUND_DATA.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from quality import cpu_seconds, data_folder
from sklearn.metrics import roc_auc_score

from client.data.records import Record
from client.devices import choose_device
from client.federation import Federation, build_learner
from client.privacy.noise import SecureNoise
from client.tasks import multimodal
from client.tasks.rows import inputs_of
from client.training import LocalTrainer, TrainingSettings
from common.config import load
from common.statistics import DEVIATION, MEAN, StatisticsLayout
from common.strategy import model_tensors, released
from common.study import Study
from common.world import SeededEntropy
from server.simulate import simulate
from server.table import Silent

SINGLE = ("text", "numbers", "series")
# Public bounds of the measurements that most stays have.
SERIES: Mapping[str, tuple[float, float, str]] = {
    "hr": (20, 220, "linear"),
    "sbp": (40, 260, "linear"),
    "dbp": (20, 160, "linear"),
    "map": (25, 200, "linear"),
    "resp": (0, 60, "linear"),
    "o2sat": (60, 100, "linear"),
    "temp": (32, 42, "linear"),
    "fio2": (21, 100, "linear"),
    "glu": (20, 1000, "log"),
    "urine": (0, 2000, "linear"),
    "na": (110, 170, "linear"),
    "k": (2, 8, "linear"),
    "bicar": (5, 50, "linear"),
    "crea": (0.2, 15, "log"),
    "bun": (2, 200, "log"),
    "ca": (4, 14, "linear"),
    "hgb": (4, 18, "linear"),
    "wbc": (0.1, 100, "log"),
    "plt": (5, 1000, "log"),
    "inr_pt": (0.8, 12, "log"),
    "lact": (0.3, 30, "log"),
    "bili": (0.1, 40, "log"),
    "alb": (0.5, 6, "linear"),
    "ast": (5, 15000, "log"),
    "ck": (10, 100000, "log"),
    "tnt": (0.01, 15, "log"),
    "po2": (30, 550, "log"),
    "pco2": (15, 130, "log"),
    "ph": (6.8, 7.8, "linear"),
}
NUMBERS = {"age": (18, 90), "height": (120, 220), "weight": (30, 250)}
INPUTS: Mapping[str, dict[str, Any]] = {
    "text": {
        "column": "text",
        "max_tokens": 320,
        "encoder": {"buckets": 4096, "width": 32, "kernels": [1, 2], "channels": 64},
    },
    "numbers": {
        "features": [{"name": n, "low": a, "high": b} for n, (a, b) in NUMBERS.items()],
        "categories": [{"name": "sex", "values": ["Female", "Male"]}],
        "hidden": [16],
    },
    "series": {
        "stay": "stay_id",
        "time": "time",
        "hours": 24,
        "width": 32,
        "features": [
            {"name": n, "low": a, "high": b, "scale": s} for n, (a, b, s) in SERIES.items()
        ],
    },
}
# With noise, fewer parameters: a vector's noise grows with the root of their number.
SMALL: Mapping[str, dict[str, Any]] = {
    "text": {
        "column": "text",
        "max_tokens": 192,
        "encoder": {"buckets": 512, "width": 8, "kernels": [1], "channels": 16},
    },
    "numbers": {**INPUTS["numbers"], "hidden": [8]},
    "series": {**INPUTS["series"], "width": 12},
}
STEPS = {"central": 100, "quick": 30}
LABELS = ("survived", "died")
STATUS = {"Alive": "survived", "Expired": "died"}
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05}
FEDERATED = {
    "training": {
        "rounds": 8,
        "local_steps": 8,
        "sampling_rate": 0.08,
        "expected_batch": 32,
        "optimizer": ADAMW,
    },
    "privacy": {"mode": "none"},
}
PRIVATE = {
    "training": {
        "rounds": 30,
        "local_steps": 1,
        "sampling_rate": 0.3,
        "expected_batch": 96,
        "micro_batch": 64,
    },
    "aggregation": {"optimizer": {"name": "fedadam", "learning_rate": 0.03}},
    "privacy": {"mode": "joint", "epsilon": 8, "delta": 1e-4, "clip_norm": 1.0},
    "quorum": {"colluders": 1, "survivors": 4},
}
JOINT = {
    **PRIVATE,
    "privacy": {"mode": "joint", "epsilon": 3, "delta": 1e-4, "clip_norm": 1.0},
}
LOCAL = {
    "training": {
        "rounds": 15,
        "local_steps": 1,
        "sampling_rate": 0.5,
        "expected_batch": 160,
        "micro_batch": 64,
        "optimizer": {"name": "sgd", "learning_rate": 2.0},
    },
    "privacy": {"mode": "local", "epsilon": 3, "delta": 1e-4, "clip_norm": 1.0},
    "quorum": {"colluders": 1, "survivors": 4},
}
PRIVATELY = {"all, eps 8": PRIVATE, "all, joint, eps 3": JOINT, "all, local, eps 3": LOCAL}
ROWS = (
    *((f"{name}, central", name) for name in (*SINGLE, "all")),
    *((f"{name}, federated", name) for name in (*SINGLE, "all")),
    *((name, "all") for name in PRIVATELY),
)


# ---------------------------------------------------------------------- records


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def tables(folder: Path) -> dict[str, Path]:
    """The linked tables, by part, and the hours beside them."""
    from pyarrow import parquet

    source = data_folder().parent
    cohort = source / "yaib_demo" / "demo_data" / "los" / "eicu_demo"
    known = {str(r["stay_id"]): r for r in parquet.read_table(cohort / "sta.parquet").to_pylist()}
    notes = _rows(source / "eicu_demo" / "derived_text_dx.csv.gz")
    stays = {r["patientunitstayid"]: r for r in _rows(source / "eicu_demo" / "patient.csv.gz")}
    hours = parquet.read_table(cohort / "dyn.parquet", columns=["stay_id", "time", *SERIES])
    parquet.write_table(hours, folder / "hours.parquet")
    home: dict[str, str] = {}
    for note in notes:
        region = note["region"] if note["region"] in {"Midwest", "South", "West"} else "Northeast"
        home.setdefault(stays[note["patientunitstayid"]]["uniquepid"], region.lower())
    paths = {"hours": folder / "hours.parquet"}
    for part in ("train", "test"):
        paths[part] = folder / f"{part}.csv"
        with paths[part].open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["patient", "site", "stay_id", "text", *NUMBERS, "sex", "label"])
            for note in notes:
                stay = note["patientunitstayid"]
                label = STATUS.get(stays[stay]["hospitaldischargestatus"])
                if note["split"] != part or label is None:
                    continue
                person, fixed = stays[stay]["uniquepid"], known.get(stay, {})
                values = ["" if fixed.get(n) is None else fixed[n] for n in (*NUMBERS, "sex")]
                own = stay if stay in known else ""
                row = [person, home[person], own, note["text_tx"], *values, label]
                writer.writerow(row)
    return paths


def study(folder: Path, which: str, seed: int, changes: Mapping[str, Any], *, test: bool) -> Path:
    """A study of some inputs, written where it can be loaded."""
    paths = tables(folder)
    names = SINGLE if which == "all" else (which,)
    private = changes.get("privacy", {}).get("mode") in {"joint", "local"}
    files = [str(paths["train"])]
    held = [str(paths["test"])] if test else []
    if "series" in names:
        files.append(str(paths["hours"]))
        held += [str(paths["hours"])] * test
    document = {
        "format": "wardround-study/1",
        "name": "linked",
        "task": {
            "kind": "multimodal",
            "labels": list(LABELS),
            **{name: (SMALL if private else INPUTS)[name] for name in names},
            "width": 8 if private else 32,
        },
        "privacy": {"mode": "none"},
        "training": {"rounds": 1},
        **changes,
        "evaluation": {"every": changes.get("training", {}).get("rounds", 1), "score_bins": 256},
        "simulation": {
            "data": {"files": files, "test_files": held},
            "split": {"by": "column", "column": "site"},
            "seed": seed,
        },
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# ---------------------------------------------------------------------- central


def hidden(record: Record, name: str) -> Record:
    """A record that lacks one kind of input."""
    if name == "text":
        return replace(record, text="")
    if name == "series":
        return replace(record, series=None)
    return replace(
        record, values=(float("nan"),) * len(record.values), codes=("",) * len(record.codes)
    )


def central(config: Path, seed: int, steps: int) -> tuple[dict[str, list[float]], list[int]]:
    """Each test stay's score, as it is and with each input hidden, and whether it died."""
    federation = Federation(load(config, Study), config, device="cpu")
    study_, bundle = federation.study, federation.build_bundle()
    parts = [federation.divide(site, None) for site in federation.sites]
    train = [record for part in parts for record in part.train]
    test = [record for part in parts for record in part.held_out]
    learner = build_learner(study_, train, (), choose_device("cpu"))
    settings = TrainingSettings(
        mode="none",
        local_steps=steps,
        expected_batch=64,
        sampling_rate=64 / len({record.patient for record in train}),
        micro_batch=128,
        optimizer="adamw",
        learning_rate=ADAMW["learning_rate"],
        weight_decay=ADAMW["weight_decay"],
    )
    noise = SecureNoise(SeededEntropy(f"central {seed}"))
    trainer = LocalTrainer(learner, bundle.layout, settings, noise, "cpu")
    task, own = study_.task, {}
    if task.features:
        words = learner.statistic_words()
        own = StatisticsLayout(len(words) // 3).resolve(words, 1)
    optimizer = bundle.optimizer()
    state = optimizer.initial(bundle.initial)
    update = np.asarray(trainer.train({**model_tensors(state), **own}, 1), np.float32)
    weights = released(optimizer.apply(state, bundle.layout.unflatten(update)))
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(weights[name]))
    learner.module.eval()

    def scores(records: Sequence[Record]) -> list[float]:
        encoded = multimodal.encode(task, records)
        none = np.zeros(0, np.float32)
        inputs = inputs_of(encoded, own.get(MEAN, none), own.get(DEVIATION, none))
        parts_ = zip(*(tensor.split(128) for tensor in inputs), strict=True)
        with torch.no_grad():
            told = torch.cat([learner.module(*part) for part in parts_]).double()
        return [round(gap, 6) for gap in (told[:, 1] - told[:, 0]).tolist()]

    found = {"": scores(test)}
    if len(task.modalities) > 1:
        for name in task.modalities:
            found[name] = scores([hidden(record, name) for record in test])
    return found, [LABELS.index(record.label or "") for record in test]


def federated(config: Path, out: Path) -> float:
    """The AUROC of a whole simulation, exact, on all held-out patients."""
    concluded = simulate(config, out, view=Silent(), device="cpu", compare=False)
    auroc: float = concluded.summary["final_metrics"]["everywhere"]["auroc"]
    return auroc


def auroc_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """The area under the curve of these scores."""
    return float(roc_auc_score(truth, scores))


# ---------------------------------------------------------------------- table


def known(path: Path | None) -> Iterator[dict[str, Any]]:
    """The lines of an earlier run."""
    if path is not None and path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def run(name: str, which: str, seed: int, *, test: bool, quick: bool) -> list[dict[str, Any]]:
    """The lines of one row and seed."""
    began = cpu_seconds()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name.endswith("central"):
            config = study(folder, which, seed, {}, test=test)
            found, truth = central(config, seed, STEPS["quick" if quick else "central"])
            died = np.array(truth)
            lines: list[dict[str, Any]] = [
                {
                    "row": name if not lacks else f"all, {lacks} hidden",
                    "auroc": auroc_of(np.array(scores), died),
                    "scores": scores,
                    "truth": truth,
                }
                for lacks, scores in found.items()
            ]
        else:
            changes = PRIVATELY.get(name, FEDERATED)
            config = study(folder, which, seed, changes, test=test)
            lines = [{"row": name, "auroc": federated(config, folder / "out")}]
    spent = round(cpu_seconds() - began, 1)
    told = {"seed": seed, "test": test, "quick": quick}
    return [{**line, **told, "cpu_seconds": 0 if at else spent} for at, line in enumerate(lines)]


def interval(lines: Sequence[Mapping[str, Any]], best: str) -> tuple[float, float]:
    """95 % of the difference of `all` and the best single input, over draws of test stays."""

    def first(row: str) -> Mapping[str, Any]:
        return next(line for line in lines if line["row"] == row)

    both = [np.array(first(row)["scores"]) for row in ("all, central", best)]
    truth = np.array(first(best)["truth"])
    gaps = []
    for draw in np.random.default_rng(0).integers(len(truth), size=(1000, len(truth))):
        whole, alone = (auroc_of(scores[draw], truth[draw]) for scores in both)
        gaps.append(whole - alone)
    low, high = np.quantile(gaps, [0.025, 0.975])
    return float(low), float(high)


def show(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Print the table; whether the goals were reached, as far as they were measured."""
    means: dict[str, float] = {}
    print(f"{'row':<22}{'seeds':>6}{'AUROC':>18}{'CPU s':>8}")
    for name in dict.fromkeys(line["row"] for line in lines):
        own = [line["auroc"] for line in lines if line["row"] == name]
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        means[name] = statistics.fmean(own)
        cpu = sum(line["cpu_seconds"] for line in lines if line["row"] == name)
        print(f"{name:<22}{len(own):>6}{f'{means[name]:.4f} ± {spread:.4f}':>18}{cpu:>8.0f}")
    reached = True
    for way in ("central", "federated"):
        alone = {row: means[row] for n in SINGLE if (row := f"{n}, {way}") in means}
        if not alone or f"all, {way}" not in means:
            continue
        best = max(alone, key=lambda row: alone[row])
        gain = means[f"all, {way}"] - alone[best]
        reached &= gain > 0
        told = f"goal, {way}: all beats {best} by {gain:+.4f}"
        if way == "central":
            low, high = interval(lines, best)
            told += f" (first seed, 95 % of draws of test stays: {low:+.4f} to {high:+.4f})"
        print(f"{told}: {'reached' if gain > 0 else 'NOT reached'}")
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", choices=[name for name, _ in ROWS], default=None)
    parser.add_argument("--lines", type=Path, default=None, help="one line for each row and seed")
    parser.add_argument("--validate", action="store_true", help="the test set is not opened")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asked = {"test": not arguments.validate, "quick": arguments.quick}
    lines = [line for line in known(arguments.lines) if all(line[k] == v for k, v in asked.items())]
    done = {(line["row"], line["seed"]) for line in lines}
    for seed in range(1 if arguments.quick else arguments.seeds):
        for name, which in ROWS:
            chosen = name.endswith("central") if arguments.quick else True
            if (name, seed) in done or not chosen or name not in (arguments.rows or [name]):
                continue
            found = run(name, which, seed, **asked)
            lines += found
            if arguments.lines is not None:
                with arguments.lines.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps(line) + "\n" for line in found)
    reached = show(lines)
    return 0 if reached or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
