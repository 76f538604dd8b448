"""FLamby's tables again: four heart disease hospitals, six breast cancer regions.

    python benchmarks/task_tabular.py [--seeds 5] [--lines FILE] [--only DATA[/METHOD]]
    python benchmarks/task_tabular.py --quick      one seed, a few steps: does it run
    python benchmarks/task_tabular.py --validate   a fifth of the training rows is measured instead

Every figure is the product's: federated rows are whole simulations (masks, statistics round,
audit; with privacy also noise and ledgers), `pooled` and `local` are what the simulator trains as
one hospital's own model, there of all records. The exported model answers for FLamby's test rows.

  heart    accuracy; 740 patients, 13 inputs, logistic regression; FLamby's split (seed 43)
  tcga     Harrell's c-index by days; 1,088 patients, 39 inputs, linear. FLamby trains Cox's loss,
           which couples patients; here discrete-time hazards, which do not

Rounds, batches, updates and learning rates are FLamby's (config_*.json, common.py) wherever it has
them, and normalisation is the secure global one. Beside each figure stands the published one (mean
and sd of five seeds), and whether ours is within one published sd, or better. `local` and `joint`
are the same models at epsilon 3, delta 1e-4; FLamby has no such row with honest accounting.

Seeds are repetitions: the network starts at the same values, batches and noise differ. Each
finished run is a line in --lines; what is there is not run again. Data: ../shared/data, or the
folder in WARDROUND_DATA. Source: Ogier du Terrail et al. 2022 (FLamby).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from client.federation import Federation
from client.holdings import read_holdings
from client.predict import predict
from common.config import load
from common.study import Study
from server.simulate import simulate
from server.table import Silent

DATA = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[2] / "shared" / "data"))
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
REGIONS = tuple(f"region-{number}" for number in range(6))
# Where a figure is counted: over all test rows, and as the mean of the hospitals'.
FIGURES = ("pooled", "mean")
PUBLISHED = {
    "pooled": "Pooled Training",
    **{f"local {at}": f"Local {at}" for at in range(6)},
    "fedavg": "FedAvg100",
    "fedprox": "FedProx100",
    "fedadam": "FedAdam100",
    "fedyogi": "FedYogi100",
    "fedadagrad": "FedAdagrad100",
    "scaffold": "Scaffold100",
}
# FLamby divides by label where every label has more rows than this.
_RARE = 2
Row = dict[str, str]
Line = dict[str, Any]

# ------------------------------------------------------------------------------------ records

# (name, column, low, high), and the columns that become one input per value but the first.
_NUMBERS = (
    ("age", 0, 18, 100),
    ("sex", 1, 0, 1),
    ("trestbps", 3, 60, 240),
    ("chol", 4, 0, 600),
    ("fbs", 5, 0, 1),
    ("thalach", 7, 40, 220),
    ("exang", 8, 0, 1),
    ("oldpeak", 9, -3, 7),
)
_CHOICES = (("cp", 2, (2, 3, 4)), ("restecg", 6, (1, 2)))


def heart_rows() -> list[Row]:
    """All complete rows with `site` and `part`, divided as FLamby divides them."""
    from sklearn.model_selection import train_test_split

    rows: list[Row] = []
    for site in HOSPITALS:
        found = []
        text = (DATA / "fed_heart_disease" / f"processed.{site}.data").read_text()
        for number, line in enumerate(text.split(), start=1):
            cells = line.split(",")
            if "?" in (*cells[:10], cells[13]):
                continue
            row = {"site": site, "patient": f"{site}-{number}"}
            row["label"] = "disease" if float(cells[13]) > 0 else "healthy"
            row |= {name: cells[at] for name, at, _, _ in _NUMBERS}
            for name, at, values in _CHOICES:
                row |= {f"{name}_{v}": str(int(float(cells[at]) == v)) for v in values}
            found.append(row)
        labels = [row["label"] for row in found]
        rare = min(labels.count(label) for label in set(labels)) <= _RARE
        _, test = train_test_split(
            np.arange(len(found)),
            test_size=1 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=None if rare else labels,
        )
        for at, row in enumerate(found):
            row["part"] = "test" if at in set(test.tolist()) else "train"
        rows += found
    return rows


def tcga_rows() -> list[Row]:
    """All patients with `site` and `part`, divided by FLamby's own file."""
    folder = DATA / "fed_tcga_brca"
    with (folder / "train_test_split.csv").open(newline="") as stream:
        parts = {row["pid"]: row["fold2"].split("_") for row in csv.DictReader(stream)}
    rows: list[Row] = []
    with (folder / "brca.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            patient = row.pop("pid")
            if patient not in parts:  # a few: FLamby leaves them out, too
                continue
            part, center = parts[patient]
            row["E"] = str(int(float(row["E"])))
            who = {"patient": f"p{len(rows)}", "site": f"region-{center}", "part": part}
            rows.append({**row, **who})
    return rows


def heart_task() -> Line:
    inputs = [(name, low, high) for name, _, low, high in _NUMBERS]
    inputs += [(f"{name}_{value}", 0, 1) for name, _, values in _CHOICES for value in values]
    return {
        "kind": "tabular",
        "labels": ["healthy", "disease"],
        "features": [{"name": n, "low": low, "high": high} for n, low, high in inputs],
    }


def tcga_task() -> Line:
    """Age is a number; everything else is a class that holds or does not, and stays 0 or 1."""
    with (DATA / "fed_tcga_brca" / "brca.csv").open(newline="") as stream:
        age, *names = next(csv.reader(stream))[1:-2]
    return {
        "kind": "tabular",
        "survival": {
            "time": "T",
            "event": "E",
            "edges": [365, 730, 1095, 1825, 2920],
            "proportional": True,
        },
        "features": [{"name": age, "low": 0, "high": 100}],
        "categories": [{"name": name, "values": ["1"]} for name in names],
    }


ROWS = {"heart": heart_rows, "tcga": tcga_rows}
TASKS = {"heart": heart_task, "tcga": tcga_task}
SITES = {"heart": HOSPITALS, "tcga": REGIONS}

# ------------------------------------------------------------------------------------ settings


def _sgd(rate: float, **more: float) -> Line:
    return {"optimizer": {"name": "sgd", "learning_rate": rate}, **more}


def _server(name: str, rate: float) -> Line:
    return {
        "optimizer": {
            "name": name,
            "learning_rate": rate,
            "beta1": 0.9,
            "beta2": 0.999,
            "tau": 1e-8,
        }
    }


# FLamby: 15 rounds of 100 updates with batches of 4, and 5 of 100 with 8; pooled 50 and 30 epochs.
SHAPE = {
    "heart": {"rounds": 15, "local_steps": 100, "expected_batch": 4},
    "tcga": {"rounds": 5, "local_steps": 100, "expected_batch": 8},
}
EPOCHS = {"heart": 50, "tcga": 30}
POOLED_RATE = {"heart": 0.001, "tcga": 0.1}
METHODS: dict[str, dict[str, tuple[Line, Line]]] = {
    "heart": {
        "fedavg": (_sgd(0.001), {}),
        "fedprox": (_sgd(0.001, proximal=0.01), {}),
        "fedadam": (_sgd(0.01), _server("fedadam", 0.01)),
        "fedyogi": (_sgd(0.003162), _server("fedyogi", 0.01)),
        "fedadagrad": (_sgd(0.003162), _server("fedadagrad", 0.316228)),
        "scaffold": (_sgd(0.001), {"optimizer": {"name": "scaffold"}}),
    },
    "tcga": {
        "fedavg": (_sgd(0.1), {}),
        "fedprox": (_sgd(0.1, proximal=0.1), {}),
        "fedadam": (_sgd(0.01), _server("fedadam", 0.1)),
        "fedyogi": (_sgd(0.01), _server("fedyogi", 0.1)),
        "fedadagrad": (_sgd(0.01), _server("fedadagrad", 1.0)),
        "scaffold": (_sgd(0.01), {"optimizer": {"name": "scaffold"}}),
    },
}
# Set before the test rows were read. On a fifth of the training rows (--validate) half or twice as
# many rounds, steps or rate did no better than chance.
PRIVATE: dict[str, dict[str, tuple[Line, Line]]] = {
    "heart": {
        "local": (
            {"rounds": 10, "local_steps": 5, "sampling_rate": 0.5, "expected_batch": 60}
            | _sgd(0.5),
            {},
        ),
        "joint": (
            {"rounds": 40, "local_steps": 1, "sampling_rate": 0.5, "expected_batch": 240},
            {"optimizer": {"name": "fedavgm", "learning_rate": 0.2, "momentum": 0.9}},
        ),
    },
    "tcga": {
        "local": (
            {"rounds": 10, "local_steps": 5, "sampling_rate": 0.5, "expected_batch": 70}
            | _sgd(0.5),
            {},
        ),
        "joint": (
            {"rounds": 40, "local_steps": 1, "sampling_rate": 0.5, "expected_batch": 420},
            {"optimizer": {"name": "fedavgm", "learning_rate": 0.2, "momentum": 0.9}},
        ),
    },
}
PRIVACY = {"epsilon": 3.0, "delta": 1e-4, "clip_norm": 1.0}


def methods(data: str) -> list[str]:
    """Every row of a table."""
    alone = [f"local {at}" for at in range(len(SITES[data]))]
    return ["pooled", *alone, *METHODS[data], *PRIVATE[data]]


def document(
    data: str, method: str, folder: Path, rows: Sequence[Row], *, quick: bool, seed: int
) -> Line:
    """The study of one row; its files lie in `folder`."""
    training, aggregation = (METHODS[data] | PRIVATE[data]).get(method, ({}, {}))
    training = {**SHAPE[data], "spare_rounds": 0, **training}
    privacy: Line = {"mode": "none"}
    sizes = dict.fromkeys(SITES[data], 0)
    for row in rows:
        sizes[row["site"]] += row["part"] == "train"
    sites = [{"id": site, "weight": float(size)} for site, size in sizes.items()]
    if method in PRIVATE[data]:
        privacy = {"mode": method, **PRIVACY}
        sites = [{"id": site} for site in SITES[data]]
    if method == "pooled" or method.startswith("local "):
        # One round, so that Adam keeps its moments, as in one place.
        size = sum(sizes.values()) if method == "pooled" else sizes[_own(data, method)]
        steps = EPOCHS[data] * -(-size // SHAPE[data]["expected_batch"])
        optimizer = {"name": "adamw", "learning_rate": POOLED_RATE[data]}
        training |= {"rounds": 1, "local_steps": steps, "optimizer": optimizer}
        sites = []
    if quick:
        training["rounds"] = min(training["rounds"], 2)
        training["local_steps"] = min(training["local_steps"], 20)
    return {
        "format": "wardround-study/1",
        "name": f"{data}-{method}".replace(" ", "-"),
        "task": TASKS[data](),
        "training": training,
        "aggregation": aggregation,
        "privacy": privacy,
        "evaluation": {"every": training["rounds"]},
        "sites": sites,
        "simulation": {
            "data": {
                "files": [str(folder / f"{data}-train.csv")],
                "test_files": [str(folder / f"{data}-test.csv")],
            },
            "split": {"by": "column", "column": "site"},
            "seed": seed,
        },
    }


def _own(data: str, method: str) -> str:
    return SITES[data][int(method.removeprefix("local "))]


# ------------------------------------------------------------------------------------ one run


def train(method: str, config: Path, folder: Path) -> Path:
    """Run one row; returns the folder of its model."""
    own = _own(load(config, Study).name.split("-")[0], method) if " " in method else "everybody"
    if method != "pooled" and " " not in method:
        concluded = simulate(config, folder / "run", view=Silent(), device="cpu", compare=False)
        if not concluded.good:
            raise AssertionError(f"the run of {config.name} did not verify")
        return folder / "run" / "model"
    study = load(config, Study)
    held = read_holdings(study, config)
    # One more hospital, that holds everybody's records, and trains alone.
    records = {**held.records, "everybody": tuple(r for s in held.records.values() for r in s)}
    tests = {**held.tests, "everybody": tuple(r for s in held.tests.values() for r in s)}
    together = replace(held, records=records, tests=tests)
    federation = Federation(study, config, device="cpu", holdings=together)
    bundle = federation.build_bundle()
    federation.divide(own, None)
    federation.export(folder / "model", federation.alone(own, bundle))
    return folder / "model"


def figures(data: str, model: Path, test: Path, out: Path) -> dict[str, float]:
    """The figure over all test rows, the mean of the hospitals', and each hospital's."""
    predict(model, test, out)
    with test.open(newline="") as truth, out.open(newline="") as told:
        pairs = list(zip(csv.DictReader(truth), csv.DictReader(told), strict=True))
    score = accuracy if data == "heart" else concordance
    found = {s: score([p for p in pairs if p[0]["site"] == s]) for s in SITES[data]}
    return {"pooled": score(pairs), "mean": statistics.fmean(found.values()), **found}


Pairs = Sequence[tuple[Mapping[str, str], Mapping[str, str]]]


def accuracy(pairs: Pairs) -> float:
    return statistics.fmean(float(truth["label"] == told["label"]) for truth, told in pairs)


def concordance(pairs: Pairs) -> float:
    """Harrell's c-index by days; of two deaths on one day neither is the earlier one."""
    time_, risk = (
        np.array([float(pair[at][name]) for pair in pairs]) for at, name in ((0, "T"), (1, "risk"))
    )
    event = np.array([truth["E"] == "1" for truth, _ in pairs])
    comparable = event[:, None] & (
        (time_[:, None] < time_) | ((time_[:, None] == time_) & ~event[None, :])
    )
    right = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    return float(right[comparable].mean()) if comparable.any() else 0.5


def one(data: str, method: str, rows: Sequence[Row], *, quick: bool, seed: int) -> dict[str, float]:
    """Train and measure one row once."""
    with tempfile.TemporaryDirectory(prefix="wardround-tabular-") as name:
        folder = Path(name)
        for part in ("train", "test"):
            kept = [row for row in rows if row["part"] == part]
            with (folder / f"{data}-{part}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(kept[0]))
                writer.writeheader()
                writer.writerows(kept)
        config = folder / "study.yaml"
        config.write_text(json.dumps(document(data, method, folder, rows, quick=quick, seed=seed)))
        model = train(method, config, folder)
        return figures(data, model, folder / f"{data}-test.csv", folder / "told.csv")


def validating(rows: Sequence[Row]) -> list[Row]:
    """The training rows alone; a fifth of them is measured. The test rows are gone."""
    kept = [row for row in rows if row["part"] == "train"]
    draw = np.random.default_rng(7).random(len(kept)) < 0.2
    parts = ["test" if held else "train" for held in draw]
    return [{**row, "part": part} for row, part in zip(kept, parts, strict=True)]


# ------------------------------------------------------------------------------------ the table


def published(data: str) -> dict[str, dict[str, tuple[float, float]]]:
    """(mean, sd) over FLamby's five seeds, by its method and figure."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for seed in range(42, 47):
        path = DATA / "flamby_results" / f"{data}_seed{seed}.csv"
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                by_seed = found.setdefault(row["Method"], {})
                by_seed.setdefault(str(seed), {})[row["Test"]] = float(row["Metric"])
    made: dict[str, dict[str, tuple[float, float]]] = {}
    for method, seeds in found.items():
        whole = [tests["Pooled Test"] for tests in seeds.values()]
        each = [
            statistics.fmean(v for name, v in tests.items() if name != "Pooled Test")
            for tests in seeds.values()
        ]
        made[method] = {
            "pooled": (statistics.fmean(whole), statistics.stdev(whole)),
            "mean": (statistics.fmean(each), statistics.stdev(each)),
        }
    return made


def table(data: str, lines: Sequence[Line]) -> Iterator[str]:
    """The table, line by line."""
    goals = published(data)
    yield f"{data}: {'accuracy' if data == 'heart' else 'c-index'}"
    yield (
        f"{'method':12} {'seeds':>5} {'all rows':>14} {'FLamby':>14} {'ok':>3} "
        f"{'hospitals':>14} {'FLamby':>14} {'ok':>3} {'CPU s':>6}"
    )
    for method in methods(data):
        mine = [line for line in lines if (line["data"], line["method"]) == (data, method)]
        if not mine:
            continue
        cells = []
        for figure in FIGURES:
            values = [line["figures"][figure] for line in mine]
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            goal = goals.get(PUBLISHED.get(method, ""), {}).get(figure)
            told = "-" if goal is None else f"{goal[0]:.3f} ± {goal[1]:.3f}"
            met = "-" if goal is None else "yes" if mean >= goal[0] - goal[1] else "NO"
            cells.append(f"{f'{mean:.3f} ± {spread:.3f}':>14} {told:>14} {met:>3}")
        spent = sum(line["cpu_seconds"] for line in mine)
        yield f"{method:12} {len(mine):5} {' '.join(cells)} {spent:6.0f}"


def known(path: Path | None) -> list[Line]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(options: argparse.Namespace) -> list[Line]:
    """Every run that was asked for: read from the lines, or run now and added to them."""
    before, found = known(options.lines), []
    for data, read in ROWS.items():
        rows = validating(read()) if options.validate else read()
        for method in methods(data):
            if options.only and options.only not in {data, f"{data}/{method}"}:
                continue
            for seed in range(1, options.seeds + 1):
                told = document(data, method, Path(), rows, quick=options.quick, seed=seed)
                parts = json.dumps([told, [row["part"] for row in rows]])
                terms = hashlib.sha256(parts.encode()).hexdigest()[:16]
                key = {"data": data, "method": method, "seed": seed, "terms": terms}
                line = next((one for one in before if key.items() <= one.items()), None)
                if line is None:
                    began = time.process_time()
                    measured = one(data, method, rows, quick=options.quick, seed=seed)
                    spent = round(time.process_time() - began, 2)
                    line = {**key, "figures": measured, "cpu_seconds": spent}
                    if options.lines is not None:
                        with options.lines.open("a") as stream:
                            stream.write(json.dumps(line) + "\n")
                found.append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of every row")
    parser.add_argument("--lines", type=Path, help="JSON lines of finished runs, read and added to")
    parser.add_argument("--only", help="one table, or one row of it: heart/fedavg")
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds of 20 updates")
    parser.add_argument("--validate", action="store_true", help="do not open the test rows")
    options = parser.parse_args()
    options.seeds = 1 if options.quick else options.seeds
    wanted = ("fed_heart_disease", "fed_tcga_brca", "flamby_results")
    absent = [name for name in wanted if not (DATA / name).is_dir()]
    if absent:
        print(f"skipped: {DATA} has no {' and no '.join(absent)}")
        return 0
    torch.set_num_threads(1)
    lines = measure(options)
    for data in ROWS:
        if any(line["data"] == data for line in lines):
            print(*table(data, lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
