"""SCAFFOLD in whole simulations, against the paper's algorithm in numpy with sums of its own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from client.variate import ControlVariate
from common.bundle import Bundle
from common.cli import main
from common.crypto.seal import Vault
from common.errors import Code, StorageError
from common.statistics import DEVIATION, MEAN
from common.strategy import CORRECTION, OptimizerSettings
from common.tensors import Layout, TensorSpec, load_tensors
from common.world import MemoryJournal, SeededEntropy

ROOT = Path(__file__).parents[2]
SITES = {"east": 1.0, "north": 1.0, "south": 0.5, "west": 1.0}
ROUNDS, STEPS, RATE, SERVER = 6, 8, 0.7, 0.9
LOW, HIGH = 0.0, 100.0


def write_data(folder):
    """Four hospitals that differ in what they see and in what follows from it."""
    draw = np.random.default_rng(3)
    for name, count in (("train", 30), ("test", 10)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["hospital", "patient", "a", "b", "label"])
            for at, site in enumerate(SITES):
                for number in range(count):
                    a, b = draw.uniform(10 * at, 40 + 15 * at), draw.uniform(0, 100)
                    score = (a - 45) / 20 + (at - 1.5) * (b - 50) / 25 + draw.normal(0, 0.5)
                    label = "yes" if score > 0 else "no"
                    out.writerow([site, f"{site}-{name}-{number}", f"{a:.4f}", f"{b:.4f}", label])


def study_file(folder, *, name="scaffold", faults=(), rounds=ROUNDS, **sections):
    write_data(folder)
    features = [{"name": n, "low": LOW, "high": HIGH} for n in ("a", "b")]
    sgd = {"name": "sgd", "learning_rate": RATE}
    study = {
        "format": "wardround-study/1",
        "name": "drift",
        "task": {"kind": "tabular", "labels": ["no", "yes"], "features": features},
        "training": {
            "rounds": rounds,
            "local_steps": STEPS,
            # Every step sees every patient: nothing is left to chance.
            "expected_batch": 1000,
            "micro_batch": 1000,
            "spare_rounds": 2,
            "optimizer": sgd,
        },
        "aggregation": {"optimizer": {"name": name, "learning_rate": SERVER}, "ring_bits": 32},
        "privacy": {"mode": "none"},
        "evaluation": {"every": rounds},
        "sites": [{"id": site, "weight": weight} for site, weight in SITES.items()],
        "simulation": {
            "data": {"files": ["train.csv"], "test_files": ["test.csv"]},
            "split": {"by": "column", "column": "hospital"},
            "faults": list(faults),
        },
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(study | sections))
    return path


def play(folder, **changes):
    torch.set_num_threads(1)
    assert main(["simulate", str(study_file(folder, **changes)), "--out", str(folder / "run")]) == 0
    return folder / "run"


# ------------------------------------------------------------------------ the paper's algorithm


def patients(folder, statistics):
    """Every hospital's (rows with a one, one-hot labels), normalised as the model says."""
    found = {site: ([], []) for site in SITES}
    with (folder / "train.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            part = (np.array([float(row["a"]), float(row["b"])]) - LOW) / (HIGH - LOW)
            rows, labels = found[row["hospital"]]
            rows.append([*((part - statistics[MEAN]) / statistics[DEVIATION]), 1.0])
            labels.append([row["label"] == "no", row["label"] == "yes"])
    return {site: (np.array(r), np.array(t, float)) for site, (r, t) in found.items()}


def gradient(data, x):
    rows, truth = data
    outputs = rows @ x.T
    told = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    told /= told.sum(axis=1, keepdims=True)
    return (told - truth).T @ rows / len(rows)


def scaffold(data, absent, rounds=ROUNDS, *, corrected=True):
    """Algorithm 1 with option II, weighted: updates and changes of variates are summed apart."""
    x = np.zeros((2, 3))
    c, own = np.zeros_like(x), {site: np.zeros_like(x) for site in SITES}
    for number in range(1, rounds + 1):
        present = [site for site in SITES if (number, site) not in absent]
        moves, changes = np.zeros_like(x), np.zeros_like(x)
        for site in present:
            y = x.copy()
            for _ in range(STEPS):
                y -= RATE * (gradient(data[site], y) + corrected * (c - own[site]))
            following = own[site] - c + (x - y) / (STEPS * RATE)
            moves += SITES[site] * (y - x)
            changes += SITES[site] * (following - own[site])
            own[site] = following
        x = x + SERVER * moves / sum(SITES[site] for site in present)
        c = c + changes / sum(SITES.values())
    return x, c, own


def trained(run):
    """The model as the oracle writes it: (2, 3), weights and bias."""
    weights = load_tensors(run / "model" / "model.safetensors")
    return np.column_stack([weights["output.weight"], weights["output.bias"]])


def statistics_of(run):
    facts = json.loads((run / "model" / "task.json").read_text())
    return {MEAN: np.array(facts["mean"]), DEVIATION: np.array(facts["deviation"])}


# Round 1 counts the statistics, so training round r is the study's round r + 1.
FAULTS = (
    {"round": 3, "site": "east", "fault": "drop"},
    {"round": 5, "site": "west", "fault": "crash"},
)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("troubled")
    return play(folder, faults=FAULTS)


def absences(run):
    """(training round, site) of everybody whose update is not in a sum."""
    found = set()
    for entry in json.loads((run / "metrics.json").read_text())["rounds"]:
        if entry["kind"] == "train":
            found |= {(entry["turn"], site) for site in entry["dropouts"]}
    return found


def test_a_run_with_a_dropout_and_a_crash_is_the_papers_algorithm(troubled):
    absent = absences(troubled)
    assert {site for _, site in absent} == {"east", "west"}
    data = patients(troubled.parent, statistics_of(troubled))
    expected, _, _ = scaffold(data, absent)
    assert trained(troubled) == pytest.approx(expected, abs=2e-4)
    # Controls: without correction, and with everybody there, it is another model.
    assert np.abs(trained(troubled) - scaffold(data, absent, corrected=False)[0]).max() > 0.02
    assert np.abs(trained(troubled) - scaffold(data, set())[0]).max() > 0.002


def test_the_secure_sum_carries_nothing_more_than_with_fedavg(troubled, tmp_path):
    plain = play(tmp_path, name="fedavg", faults=FAULTS)
    told = [json.loads((run / "metrics.json").read_text()) for run in (troubled, plain)]
    sums = [run["coordinator_saw"]["masked_updates"] for run in told]
    assert sums[0] == sums[1]
    layouts = [Bundle.load(run / "state" / "bundle").layout for run in (troubled, plain)]
    assert layouts[0] == layouts[1]


def test_hospitals_that_differ_reach_the_common_optimum(tmp_path):
    """Without correction they stop elsewhere: where their own optima pull them."""
    found = {}
    for name in ("scaffold", "fedavg"):
        (tmp_path / name).mkdir()
        run = play(tmp_path / name, name=name, rounds=40)
        data = patients(tmp_path / name, statistics_of(run))
        pulls = [SITES[site] * gradient(data[site], trained(run)) for site in SITES]
        found[name] = float(np.linalg.norm(np.sum(pulls, axis=0)))
    assert found["scaffold"] < 0.3 * found["fedavg"]


_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from common.cli import main
import server.simulate
real = server.simulate.SimulatedRun.completed
def completed(self, result, chain):
    real(self, result, chain)
    if result.round == 4:
        os.kill(os.getpid(), signal.SIGKILL)
server.simulate.SimulatedRun.completed = completed
main(["simulate", sys.argv[1], "--out", sys.argv[2], "--no-alone"])
"""


def test_a_killed_run_goes_on_with_every_hospitals_variate(tmp_path):
    study, out = study_file(tmp_path), tmp_path / "run"
    words = [sys.executable, "-W", "ignore", "-c", _KILLED, str(study), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, cwd=ROOT, env=environment, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    kept = [path.read_bytes() for path in out.rglob("*variate*") if path.is_file()]
    assert kept, "the variates lie in the hospitals' journals"
    assert main(["resume", str(out)]) == 0
    data = patients(tmp_path, statistics_of(out))
    absent = absences(out)
    assert trained(out) == pytest.approx(scaffold(data, absent)[0], abs=2e-4)


def test_with_local_privacy_it_runs_within_its_budget(tmp_path):
    privacy = {"mode": "local", "epsilon": 8, "delta": 1e-4, "clip_norm": 1.0}
    run = play(
        tmp_path,
        rounds=3,
        privacy=privacy,
        training={
            "rounds": 3,
            "local_steps": 2,
            "sampling_rate": 0.5,
            "expected_batch": 15,
            "spare_rounds": 0,
            "optimizer": {"name": "sgd", "learning_rate": 0.1},
        },
    )
    assert json.loads((run / "privacy.json").read_text())["epsilon_spent"] <= 8


# ------------------------------------------------------------------------ what is refused


def _refused(folder, capsys, **sections):
    assert main(["check", str(study_file(folder, **sections))]) != 0
    told = capsys.readouterr()
    return told.out + told.err


def test_joint_privacy_is_refused_with_the_reason(tmp_path, capsys):
    joint = {"mode": "joint", "epsilon": 8, "delta": 1e-4, "clip_norm": 1.0}
    told = _refused(tmp_path, capsys, privacy=joint)
    assert "must not be scaffold with privacy.mode: joint, where a round is one step" in told


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({"optimizer": {"name": "adamw", "learning_rate": 0.1}}, "training.optimizer"),
        ({"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.5}}, "without momentum"),
        ({"optimizer": {"name": "sgd", "weight_decay": 0.1}}, "weight_decay"),
        ({"proximal": 0.1, "optimizer": {"name": "sgd"}}, "training.proximal"),
    ],
)
def test_steps_that_are_not_plain_are_refused(tmp_path, capsys, training, where):
    assert where in _refused(tmp_path, capsys, training={"rounds": ROUNDS, **training})


def test_a_gate_is_refused(tmp_path, capsys):
    told = _refused(
        tmp_path, capsys, acceptance={"tolerance": 0.2}, rounds=1, evaluation={"every": 1}
    )
    assert "control variates cannot be rolled back" in told


# ------------------------------------------------------------------------ a hospital's own part

LAYOUT = Layout((TensorSpec("w", (2,)),))


def variate(journal, *, owner="east", key=b"k" * 32):
    settings = OptimizerSettings("scaffold", reach=2.0)
    vault = Vault(key, SeededEntropy("vault"))
    return ControlVariate(journal, vault, owner, LAYOUT, settings)


def state(*c):
    return {"w": np.zeros(2, np.float32), "optimizer/c/w": np.array(c, np.float32)}


def correction(found):
    return list(found.given(state(0, 0))[CORRECTION + "w"])


def test_a_variate_counts_once_its_round_does_and_not_before():
    journal = MemoryJournal()
    variate(journal).keep(2, state(1, 1), np.array([4, -2], np.float32))
    # 0 - c - update / 2
    assert correction(variate(journal)) == [0, 0]
    variate(journal).settle(2)
    assert correction(variate(journal)) == [3, 0]


@pytest.mark.parametrize("counted", [0, 1, 3])
def test_a_variate_of_a_round_that_did_not_count_is_forgotten(counted):
    journal = MemoryJournal()
    variate(journal).keep(2, state(1, 1), np.array([4, -2], np.float32))
    variate(journal).settle(counted)
    variate(journal).settle(2)
    assert correction(variate(journal)) == [0, 0]


def test_a_round_told_twice_changes_nothing():
    journal = MemoryJournal()
    variate(journal).keep(2, state(1, 1), np.array([4, -2], np.float32))
    variate(journal).settle(2)
    variate(journal).keep(3, state(0, 0), np.array([2, 2], np.float32))
    variate(journal).settle(2)  # round 3 was burned: the link is still round 2's
    assert correction(variate(journal)) == [3, 0]


def test_a_variate_lies_sealed_and_opens_for_its_owner_alone():
    journal = MemoryJournal()
    secret = np.array([123.5, -7.25], np.float32)
    variate(journal).keep(2, state(0, 0), secret)
    variate(journal).settle(2)
    kept = b"".join(journal.blobs.values())
    assert kept
    assert (-secret / 2).tobytes() not in kept
    for stranger in ({"owner": "west"}, {"key": b"x" * 32}):
        with pytest.raises(StorageError) as caught:
            correction(variate(journal, **stranger))
        assert caught.value.code is Code.BROKEN_VAULT
