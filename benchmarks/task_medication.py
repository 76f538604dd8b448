"""Drugs from diagnosis codes with a knowledge graph, beside frequency and logistic regression.

    python benchmarks/task_medication.py [--seeds 5] [--lines FILE]  a quarter of the patients
    python benchmarks/task_medication.py --validate                  held-out training patients
    python benchmarks/task_medication.py --quick                     one seed, fewer steps, central

1,343 unit stays of 1,066 patients of the eICU demo with their ICD-9 and ICD-10 codes, and which of
72 ATC groups (third level) were given. A seed divides patients by a keyed hash into training and
test (three to one); with --validate, training patients once more. Everything was chosen with
--validate.

Rows: `frequency` ranks drugs by how often they are given; `logistic` is one regression for each
drug on the codes of the training part, with their categories and chapters (scikit-learn; its
penalty was chosen with --validate, too). `central` is ours with all records in one place, with and
without the graph, and with the MSE objective; `federated` a whole simulation with masks over five
sites (four regions of hospitals, and those whose region is not told); `joint, eps 3` and `local,
eps 3` the same under differential privacy, over the chapters of ICD-10 alone.

PRAUC, Jaccard and F1 are means over stays (GAMENet's definitions; Jaccard and F1 of drugs whose
probability is at least a half). `interact` is the part of pairs recommended together that interact:
unknown, because none of the sources at hand states interactions. `unfit` is the part of recommended
drugs that PharmacotherapyDB's curators found not indicated for one of the patient's diseases, where
nothing speaks for them. The graph: PharmacotherapyDB, SIDER's indications, ATC codes of compounds
(GAMENet), and our table of the diseases' ICD codes. Goal: `central` beats both baselines on PRAUC.

--lines keeps a line for each row and seed, as soon as it is known; what stands there is not run
again. Data: ../shared/data, or the folder in WARDROUND_DATA.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from quality import cpu_seconds, data_folder
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from client.data.intake import receive
from client.data.records import Record
from client.devices import choose_device
from client.federation import Federation, build_learner
from client.knowledge.codes import ancestors
from client.knowledge.files import FREE_LICENCES, write_edges
from client.knowledge.graph import KnowledgeGraph
from client.knowledge.reasons import contraindications, interaction_rate
from client.knowledge.recipes import cook, disease_code_edges
from client.knowledge.visits import known_codes
from client.privacy.noise import SecureNoise
from client.saved import SavedRows
from client.tasks import medication
from client.training import LocalTrainer, TrainingSettings
from common.config import load
from common.strategy import model_tensors, released
from common.study import Study
from common.tasks.medication import MedicationTask
from common.world import SeededEntropy
from server.simulate import simulate
from server.table import Silent

Scores = NDArray[np.float64]

PENALTY = 0.03
SIDER = "CC-BY-NC-SA-4.0"
RECIPES = {
    "pharmacotherapydb": "pharmacotherapydb_indications.tsv",
    "sider-indications": "sider4_indications.tsv.gz",
    "drug-atc": "drug-atc.csv.gz",
}
WHOLE = ("icd9:categories", "icd10:categories", "icd9:chapters", "icd10:chapters")
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1.0}
CENTRAL = {
    "training": {"rounds": 20, "local_steps": 15, "expected_batch": 32, "optimizer": ADAMW},
    "aggregation": {"average": 0.9},
}
FEDERATED = {
    "training": {"rounds": 20, "local_steps": 8, "expected_batch": 16, "optimizer": ADAMW},
    "aggregation": {"average": 0.9},
}
JOINT = {
    "training": {
        "rounds": 30,
        "local_steps": 1,
        "sampling_rate": 0.5,
        "expected_batch": 80,
        "micro_batch": 64,
    },
    "aggregation": {"optimizer": {"name": "fedadam", "learning_rate": 0.03}, "average": 0.8},
    "privacy": {"mode": "joint", "epsilon": 3, "delta": 1e-4, "clip_norm": 0.5},
    "quorum": {"colluders": 1, "survivors": 5},
}
LOCAL = {
    "training": {
        "rounds": 5,
        "local_steps": 4,
        "sampling_rate": 0.5,
        "expected_batch": 80,
        "micro_batch": 64,
        "optimizer": {"name": "sgd", "learning_rate": 4.0},
    },
    "privacy": {"mode": "local", "epsilon": 3, "delta": 1e-4, "clip_norm": 0.5},
}
SMALL: dict[str, Any] = {"codes": WHOLE, "width": 4, "heads": 1}
GRAPH: dict[str, Any] = {"width": 4, "steps": 6}
PRIVATE: dict[str, Any] = {"codes": ("icd10:chapters",), "width": 4, "heads": 1}
ROWS: Mapping[str, dict[str, Any]] = {
    "frequency": {},
    "logistic": {},
    "central": {"task": SMALL, **CENTRAL},
    "central, graph": {"task": {**SMALL, "graph": GRAPH}, **CENTRAL},
    "central, MSE": {"task": {**SMALL, "objective": "mse"}, **CENTRAL},
    "federated": {"task": SMALL, **FEDERATED},
    "joint, eps 3": {"task": PRIVATE, **JOINT},
    "local, eps 3": {"task": PRIVATE, **LOCAL},
}


# ---------------------------------------------------------------------- records


def _rows(name: str) -> list[dict[str, str]]:
    path = data_folder().parent / "eicu_demo" / name
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def part(patient: str, seed: int, *, test: bool) -> str | None:
    """`train`, `test`, or None: not for this run."""
    draws = hashlib.sha256(f"{seed} {patient}".encode()).digest()
    if draws[0] < 64:  # a quarter
        return "test" if test else None
    return "test" if not test and draws[1] < 64 else "train"


def tables(folder: Path, seed: int, *, test: bool) -> tuple[str, ...]:
    """Write train.csv and test.csv; returns every drug group of the data, sorted."""
    regions = {row["hospitalid"]: row["region"] for row in _rows("hospital.csv.gz")}
    stays = _rows("derived_medrec.csv.gz")
    home: dict[str, str] = {}
    for row in stays:
        region = regions.get(row["hospitalid"], "") or "untold"
        home.setdefault(row["uniquepid"], region.lower())
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["patient", "site", "codes", "drugs"])
            for row in stays:
                person = row["uniquepid"]
                if part(person, seed, test=test) == name:
                    writer.writerow([person, home[person], row["icd"], row["atc"]])
    return tuple(sorted({drug for row in stays for drug in row["atc"].split()}))


def knowledge(folder: Path) -> KnowledgeGraph:
    """The graph, also written to knowledge.tsv; nothing of it leaves this machine."""
    source, counts = data_folder().parent / "drug_kg", Counter[str]()
    edges = [edge for name, file in RECIPES.items() for edge in cook(name, source / file, counts)]
    graph = KnowledgeGraph([*edges, *disease_code_edges()])
    write_edges(folder / "knowledge.tsv", graph.edges(), licences=FREE_LICENCES | {SIDER})
    return graph


def study(
    folder: Path, name: str, seed: int, labels: Sequence[str], digest: str, *, quick: bool
) -> Path:
    """The study of a row, written where it can be loaded."""
    row = json.loads(json.dumps(ROWS[name]))
    task = {"codes": WHOLE, "max_codes": 96, **row.pop("task", {})}
    if quick and "training" in row:
        row["training"]["rounds"] = 4
    if "graph" in task:
        task["graph"] |= {"files": ["knowledge.tsv"], "digest": digest}
    document = {
        "format": "wardround-study/1",
        "name": "medrec",
        "task": {"kind": "medication", "labels": list(labels), **task},
        "privacy": {"mode": "none"},
        "training": {"rounds": 1},
        **row,
        "evaluation": {"every": row.get("training", {}).get("rounds", 1)},
        "simulation": {
            "data": {"files": ["train.csv"], "test_files": ["test.csv"]},
            "split": {"by": "column", "column": "site"},
            "seed": seed,
        },
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# ---------------------------------------------------------------------- models


def frequency(train: Sequence[Record], test: Sequence[Record], labels: Sequence[str]) -> Scores:
    """Every stay gets each drug's share of the training stays."""
    given = Counter(drug for record in train for drug in record.labels)
    shares = np.array([given[drug] / len(train) for drug in labels])
    return np.tile(shares, (len(test), 1))


def logistic(
    task: Any, train: Sequence[Record], test: Sequence[Record], penalty: float = PENALTY
) -> Scores:
    """One regression for each drug on codes, categories and chapters."""

    def groups(record: Record) -> set[str]:
        return {name for code in known_codes(task, record) for name in ancestors(code)}

    place = {name: at for at, name in enumerate(sorted(set().union(*map(groups, train))))}

    def columns(records: Sequence[Record]) -> Scores:
        found = np.zeros((len(records), len(place)))
        for row, record in enumerate(records):
            found[row, [place[name] for name in groups(record) if name in place]] = 1
        return found

    known, asked = columns(train), columns(test)
    scores = np.zeros((len(test), len(task.labels)))
    for at, drug in enumerate(task.labels):
        given = np.array([drug in record.labels for record in train])
        if given.all() or not given.any():
            scores[:, at] = given.mean()
            continue
        fitted = LogisticRegression(C=penalty, max_iter=500).fit(known, given)
        scores[:, at] = fitted.predict_proba(asked)[:, 1]
    return scores


def central(config: Path, seed: int, test: Sequence[Record]) -> Scores:
    """Our network with all training records in one place, by the study's own settings."""
    federation = Federation(load(config, Study), config, device="cpu")
    study_, bundle = federation.study, federation.build_bundle()
    parts = [federation.divide(site, None) for site in federation.sites]
    train = [record for part in parts for record in part.train]
    learner = build_learner(study_, train, (), choose_device("cpu"))
    settings = TrainingSettings.from_study(study_, noise_multiplier=None, evaluation_noise=None)
    whole = replace(
        settings, sampling_rate=settings.expected_batch / len({r.patient for r in train})
    )
    noise = SecureNoise(SeededEntropy(f"central {seed}"))
    trainer = LocalTrainer(learner, bundle.layout, whole, noise, "cpu")
    optimizer = bundle.optimizer()
    state = optimizer.initial(bundle.initial)
    for number in range(1, study_.training.rounds + 1):
        update = np.asarray(trainer.train(model_tensors(state), number), np.float32)
        state = optimizer.apply(state, bundle.layout.unflatten(update))
    weights = released(state)
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(weights[name]))
        learner.module.eval()
        (codes,) = medication.encode(cast("MedicationTask", study_.task), test).tensors
        found: Scores = torch.sigmoid(learner.module(codes)).double().numpy()
    return found


def federated(config: Path, out: Path, test: Sequence[Record]) -> Scores:
    """The model that a whole simulation leaves."""
    simulate(config, out, view=Silent(), device="cpu", compare=False)
    saved = SavedRows(out / "model", "cpu", config.parent)
    found: Scores = torch.sigmoid(saved.outputs(test)).double().numpy()
    return found


# ---------------------------------------------------------------------- figures


def figures(
    graph: KnowledgeGraph, task: Any, test: Sequence[Record], scores: Scores
) -> dict[str, float | None]:
    """What is told of a row; means over the test stays that were given anything."""
    labels = np.array(task.labels)
    truth = np.array([[drug in record.labels for drug in labels] for record in test])
    told = scores >= 0.5
    some = truth.any(axis=1)
    both, either = (truth & told).sum(1), (truth | told).sum(1)
    recommended = [tuple(labels[row]) for row in told]
    unfit = sum(
        len({flag.label for flag in contraindications(graph, known_codes(task, record), drugs)})
        for record, drugs in zip(test, recommended, strict=True)
    )
    return {
        "prauc": float(
            np.mean(
                [
                    average_precision_score(t, s)
                    for t, s in zip(truth[some], scores[some], strict=True)
                ]
            )
        ),
        "jaccard": float((both / np.maximum(either, 1))[some].mean()),
        "f1": float((2 * both / np.maximum(truth.sum(1) + told.sum(1), 1))[some].mean()),
        "drugs": float(told.sum(1).mean()),
        "unfit": unfit / max(int(told.sum()), 1),
        "interact": interaction_rate(graph, recommended),
    }


def known(path: Path | None) -> Iterator[dict[str, Any]]:
    """The lines of an earlier run."""
    if path is not None and path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def run(name: str, seed: int, *, test: bool, quick: bool) -> dict[str, Any]:
    """One line of the results."""
    began = cpu_seconds()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        labels = tables(folder, seed, test=test)
        graph = knowledge(folder)
        config = study(folder, name, seed, labels, graph.digest, quick=quick)
        task = load(config, Study).task
        train, asked = (receive(task, [folder / f"{p}.csv"]).records for p in ("train", "test"))
        if name == "frequency":
            scores = frequency(train, asked, labels)
        elif name == "logistic":
            scores = logistic(task, train, asked)
        elif name.startswith("central"):
            scores = central(config, seed, asked)
        else:
            scores = federated(config, folder / "out", asked)
        told = figures(graph, task, asked, scores)
    spent = round(cpu_seconds() - began, 1)
    return {"row": name, "seed": seed, **told, "cpu_seconds": spent, "test": test, "quick": quick}


def show(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Print the table; whether the goal was reached."""
    print(
        f"{'row':<19}{'seeds':>6}{'PRAUC':>17}{'Jaccard':>17}{'F1':>17}"
        f"{'drugs':>7}{'unfit':>7}{'interact':>9}{'CPU s':>7}"
    )
    means: dict[str, float] = {}
    for name in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == name]
        cells = []
        for key in ("prauc", "jaccard", "f1"):
            values = [line[key] for line in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        means[name] = statistics.fmean(line["prauc"] for line in own)
        drugs, unfit = (statistics.fmean(line[key] for line in own) for key in ("drugs", "unfit"))
        rate = "unknown" if own[0]["interact"] is None else f"{own[0]['interact']:.3f}"
        cpu = sum(line["cpu_seconds"] for line in own)
        print(
            f"{name:<19}{len(own):>6}{cells[0]:>17}{cells[1]:>17}{cells[2]:>17}"
            f"{drugs:>7.1f}{unfit:>7.3f}{rate:>9}{cpu:>7.0f}"
        )
    reached = True
    for other in ("frequency", "logistic"):
        if {"central", other} <= means.keys():
            pairs = [
                next(
                    s["prauc"] for s in lines if (s["row"], s["seed"]) == ("central", line["seed"])
                )
                - line["prauc"]
                for line in lines
                if line["row"] == other
            ]
            gain = statistics.fmean(pairs)
            reached &= gain > 0
            better = sum(pair > 0 for pair in pairs)
            print(
                f"goal: central above {other}: {gain:+.4f} PRAUC, better in {better} of "
                f"{len(pairs)} seeds: {'reached' if gain > 0 else 'NOT reached'}"
            )
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=None)
    parser.add_argument("--lines", type=Path, default=None, help="one line for each row and seed")
    parser.add_argument("--validate", action="store_true", help="the test patients stay unread")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    absent = [
        path
        for path in (
            data_folder().parent / "eicu_demo" / "derived_medrec.csv.gz",
            *(data_folder().parent / "drug_kg" / file for file in RECIPES.values()),
        )
        if not path.is_file()
    ]
    if absent:
        print(f"skipped: there is no {absent[0]}")
        return 0
    names = arguments.rows or (
        ["frequency", "logistic", "central"] if arguments.quick else list(ROWS)
    )
    asked = {"test": not arguments.validate, "quick": arguments.quick}
    lines = [line for line in known(arguments.lines) if all(line[k] == v for k, v in asked.items())]
    done = {(line["row"], line["seed"]) for line in lines}
    for seed in range(1 if arguments.quick else arguments.seeds):
        for name in names:
            if (name, seed) in done:
                continue
            lines.append(run(name, seed, **asked))
            if arguments.lines is not None:
                with arguments.lines.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
    reached = show(lines)
    return 0 if reached or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
