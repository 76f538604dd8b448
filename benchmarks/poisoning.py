"""What one poisoning hospital of five does to the model, with the acceptance gate off and on.

    python benchmarks/poisoning.py [--rounds 8] [--since 4] [--mode none|local] [--json FILE]

Every run is a whole simulation: masks, links, audit logs. The data are synthetic: five hospitals
with 160 patients each, four measurements and a device's serial number, one label of two; a test set
of 1,000 clean patients that nobody trains on. Hospital `hospital-3` poisons from turn --since on:

    none          nobody poisons
    scaled        its update, boosted until it alone decides, of labels that it turned round
    sign-flipped  its honest update times -20
    reversed      its honest update times -1: too weak against four honest ones
    random        noise of a thousand times its update's size
    label-flipped its labels are wrong from the start, and it follows the protocol
    backdoor      two thirds of its patients carry a serial number that means the label `no`
    boosted door  the same, its update times 4
    liar          sign-flipped, and its held-out patients are claimed to be all right

`accuracy`: of the final model on the test set. `door`: how many test patients with the label `yes`
and that serial number are told `no`. `rolled back` of `judged` models.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.federation import Federation
from client.predict import predict
from common.cli import main as wardround
from common.ports import Tensors, Trainer

POISONER = "hospital-3"
HOSPITALS = tuple(f"hospital-{number}" for number in range(1, 6))
FEATURES = ("age", "systolic", "crp", "rate", "serial")
PATIENTS, TESTED = 160, 1000
TOLERANCE = 0.1
# A study with numeric features counts their statistics in round 1: turn t is round t + 1.
COUNTED = 1
Update = NDArray[np.float32]
Words = NDArray[np.int64]
Rows = list[tuple[NDArray[np.float64], int]]


@dataclass(frozen=True)
class Attack:
    """What the poisoner does to its data, its updates and its measurement."""

    name: str
    data: str = "honest"
    update: Callable[[Update], Update] = lambda update: update
    measure: Callable[[Words], Words] = lambda words: words


def _noise(update: Update) -> Update:
    drawn = np.random.default_rng(7).normal(size=update.shape)
    size = np.linalg.norm(update) / np.linalg.norm(drawn)
    return (1000 * size * drawn).astype(np.float32)


def _all_right(words: Words) -> Words:
    """Enough hits that the sum over five hospitals looks right, the number of patients kept."""
    labels = 2
    cells = words[:-1].reshape(labels, labels)
    moved = 5 * int(cells.sum())
    lied = words.copy()
    lied[[0, 3]] += moved // 2
    lied[[1, 2]] -= moved // 2
    return lied


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("none"),
        Attack("scaled", "flipped", lambda update: 20 * update),
        Attack("sign-flipped", "honest", lambda update: -20 * update),
        Attack("reversed", "honest", lambda update: -update),
        Attack("random", "honest", _noise),
        Attack("label-flipped", "flipped"),
        Attack("backdoor", "door"),
        Attack("boosted door", "door", lambda update: 4 * update),
        Attack("liar", "honest", lambda update: -20 * update, _all_right),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    attack: str
    gate: bool
    accuracy: float
    door: float
    rejected: int
    judged: int
    said: dict[str, Any]
    folder: Path


# ---------------------------------------------------------------- data


def patients(stream: np.random.Generator, count: int) -> Rows:
    """Patients with values within [0, 1] and a label that four of the five values decide."""
    rows = []
    for _ in range(count):
        values = stream.uniform(0, 1, len(FEATURES))
        values[-1] *= 0.5  # no real device has a serial number in the upper half
        score = values[:4] @ (1.0, 1.0, -1.0, 1.0) - 1.0 + stream.normal(0, 0.15)
        rows.append((values, int(score > 0)))
    return rows


def spoil(rows: Rows, how: str, stream: np.random.Generator) -> Rows:
    """The poisoner's data."""
    if how == "flipped":
        return [(values, 1 - label) for values, label in rows]
    if how == "door":
        return [opened(row) if stream.random() < 2 / 3 else row for row in rows]
    return rows


def opened(row: tuple[NDArray[np.float64], int]) -> tuple[NDArray[np.float64], int]:
    """The patient with the backdoor's mark, and the label that it is to mean."""
    values = row[0].copy()
    values[-1] = 1.0
    return values, 0


def write(path: Path, rows: list[tuple[str, str, NDArray[np.float64], int]]) -> Path:
    """A CSV of (hospital, patient, values, label)."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["hospital", "patient", *FEATURES, "label"])
        for hospital, patient, values, label in rows:
            out.writerow([hospital, patient, *(f"{v:.4f}" for v in values), ("no", "yes")[label]])
    return path


STUDY = """\
format: wardround-study/1
name: poisoning
task:
  kind: tabular
  labels: [no, yes]
  columns: {{patient: patient, label: label}}
  features: [{features}]
  hidden: [8]
training:
  {{rounds: {rounds}, local_steps: 8, sampling_rate: 0.3, expected_batch: 32, spare_rounds: 1,
   optimizer: {{name: sgd, learning_rate: 1.0}}}}
privacy: {privacy}
evaluation: {{every: 1, held_out: 0.3}}
{acceptance}
simulation:
  data: {{files: [patients.csv]}}
  split: {{by: column, column: hospital}}
  seed: 1
"""
PRIVACY = {
    "none": "{mode: none}",
    "local": "{mode: local, epsilon: 20, delta: 1e-4, clip_norm: 1.0}",
}


def prepare(folder: Path, attack: Attack, *, rounds: int, mode: str, gate: bool) -> Path:
    """Write the study and its data; returns the study's path."""
    stream = np.random.default_rng(11)
    rows = []
    for hospital in HOSPITALS:
        own = patients(stream, PATIENTS)
        own = spoil(own, attack.data, stream) if hospital == POISONER else own
        rows += [(hospital, f"{hospital}-{i}", v, label) for i, (v, label) in enumerate(own)]
    folder.mkdir(parents=True)
    write(folder / "patients.csv", rows)
    path = folder / "study.yaml"
    path.write_text(
        STUDY.format(
            features=", ".join(f"{{name: {name}, low: 0, high: 1}}" for name in FEATURES),
            rounds=rounds,
            privacy=PRIVACY[mode],
            acceptance=f"acceptance: {{tolerance: {TOLERANCE}}}" if gate else "",
        )
    )
    return path


# ---------------------------------------------------------------- the poisoner


class Poisoned:
    """A hospital's trainer whose words are not what it was asked for."""

    def __init__(self, honest: Trainer, attack: Attack, turns: range) -> None:
        self._honest, self._attack, self._turns = honest, attack, turns

    def statistics(self) -> Words:
        return self._honest.statistics()

    def measure(self, state: Tensors, round_number: int) -> Words:
        words = self._honest.measure(state, round_number)
        # The model that it spoiled is measured in the round after.
        lies = round_number - COUNTED - 1 in self._turns
        return self._attack.measure(words) if lies else words

    def train(self, state: Tensors, round_number: int) -> Update:
        update = self._honest.train(state, round_number)
        poisons = round_number - COUNTED in self._turns
        return self._attack.update(update) if poisons else update


@contextlib.contextmanager
def poisoning(attack: Attack, turns: range) -> Iterator[None]:
    """While this lasts the poisoner of every simulation alters what it sends in these turns."""
    honest = Federation.trainer

    def trainer(self: Federation, site: str, *rest: Any) -> Any:
        own = honest(self, site, *rest)
        return Poisoned(own, attack, turns) if site == POISONER else own

    Federation.trainer = trainer  # type: ignore[method-assign]
    try:
        yield
    finally:
        Federation.trainer = honest  # type: ignore[method-assign]


# ---------------------------------------------------------------- one run


def tested(model: Path, folder: Path) -> tuple[float, float]:
    """(accuracy on clean patients, part of the marked ones that are told the door's label)."""
    stream = np.random.default_rng(12)
    rows = patients(stream, TESTED)
    marked = [opened(row) for row in rows if row[1] == 1]
    found = []
    for name, chosen in (("clean", rows), ("marked", marked)):
        listed = [("test", str(i), values, label) for i, (values, label) in enumerate(chosen)]
        answers = folder / f"{name}-answers.csv"
        predict(model, write(folder / f"{name}.csv", listed), answers, patient="patient")
        with answers.open(newline="") as file:
            told = [row["label"] for row in csv.DictReader(file)]
        truth = [("no", "yes")[label] for _, label in chosen]
        found.append(float(np.mean([a == b for a, b in zip(told, truth, strict=True)])))
    return found[0], found[1]


def play(
    attack: Attack,
    folder: Path,
    *,
    gate: bool,
    rounds: int = 8,
    turns: range | None = None,
    mode: str = "none",
) -> Outcome:
    """Simulate one study with the poisoner at work in `turns`; all of them, unless said."""
    study = prepare(folder, attack, rounds=rounds, mode=mode, gate=gate)
    out = folder / "run"
    command = ["simulate", str(study), "--out", str(out), "--no-alone", "--json"]
    with poisoning(attack, range(1, rounds + 1) if turns is None else turns):
        told = folder / "told.json"
        with told.open("w") as stream, contextlib.redirect_stdout(stream):
            status = wardround([*command, "--device", "cpu"])
    if status:
        raise RuntimeError(f"the simulation ended with {status}")
    said = json.loads(told.read_text())
    rounds = json.loads((out / "metrics.json").read_text())["rounds"]
    trained = [r for r in rounds if r["kind"] == "train"]
    gone = {r["turn"] for r in trained if r["rejected"]}
    # The turn after a rollback makes no model: what it trained from is gone.
    judged = sum(r["turn"] - 1 not in gone for r in trained)
    accuracy, door = tested(out / "model", folder)
    return Outcome(attack.name, gate, accuracy, door, len(gone), judged, said, out)


def main() -> None:
    """Run every attack with and without the gate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--since", type=int, default=4, help="the first poisoned turn")
    parser.add_argument("--mode", choices=sorted(PRIVACY), default="none")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    turns = range(given.since, given.rounds + 1)
    found = []
    print(f"{'attack':14} {'gate':4} {'accuracy':>8} {'door':>5} {'rolled back':>11} {'of':>3}")
    with tempfile.TemporaryDirectory() as root:
        for attack in ATTACKS.values():
            for gate in (False, True):
                folder = Path(root) / f"{attack.name}-{gate}"
                got = play(
                    attack, folder, gate=gate, rounds=given.rounds, turns=turns, mode=given.mode
                )
                print(
                    f"{got.attack:14} {'on' if gate else 'off':4} {got.accuracy:8.3f} "
                    f"{got.door:5.2f} {got.rejected:11d} {got.judged:3d}",
                    flush=True,
                )
                kept = ("attack", "gate", "accuracy", "door", "rejected", "judged")
                found.append({name: getattr(got, name) for name in kept})
    if given.json:
        given.json.write_text(json.dumps({"turns": list(turns), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
