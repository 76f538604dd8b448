"""Layers that stay at each hospital, in whole simulations, against the algorithm in numpy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client.build import build_model
from client.personal import PersonalLayers
from client.tasks.personal import personal_names
from client.training import LocalTrainer
from common.bundle import Bundle
from common.cli import main
from common.config import load
from common.crypto.seal import Vault
from common.errors import Code, ConfigError, StorageError
from common.study import Study
from common.tensors import Layout, TensorSpec, load_tensors
from common.world import MemoryJournal, SeededEntropy

SITES = ("east", "north", "south", "west")
ROUNDS, STEPS, RATE, HIDDEN = 6, 4, 0.5, 3
LOW, HIGH = 0.0, 100.0
FAULTS = (
    {"round": 3, "site": "east", "fault": "drop"},
    {"round": 5, "site": "west", "fault": "crash"},
)


def write_data(folder: Path) -> None:
    """The same patients everywhere, and at two of four hospitals the opposite label."""
    draw = np.random.default_rng(5)
    for name, count in (("train", 40), ("test", 20)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["hospital", "patient", "a", "b", "label", "sex"])
            for at, site in enumerate(SITES):
                for number in range(count):
                    a, b = draw.uniform(LOW, HIGH, 2)
                    score = (1 if at < 2 else -1) * (a - b) + draw.normal(0, 5)
                    label = "yes" if score > 0 else "no"
                    who = f"{site}-{name}-{number}"
                    out.writerow([site, who, f"{a:.4f}", f"{b:.4f}", label, "fm"[number % 2]])


def study_file(folder: Path, *, personal=("head",), rounds=ROUNDS, faults=(), **sections) -> Path:
    write_data(folder)
    features = [{"name": n, "low": LOW, "high": HIGH} for n in ("a", "b")]
    task = {"kind": "tabular", "labels": ["no", "yes"], "features": features, "hidden": [HIDDEN]}
    study = {
        "format": "wardround-study/1",
        "name": "own-heads",
        "task": task,
        "training": {
            "rounds": rounds,
            "local_steps": STEPS,
            # Every step sees every patient: nothing is left to chance.
            "expected_batch": 1000,
            "micro_batch": 1000,
            "spare_rounds": 2,
            "optimizer": {"name": "sgd", "learning_rate": RATE},
            "personal": list(personal),
        },
        "aggregation": {"ring_bits": 32},
        "privacy": {"mode": "none"},
        "evaluation": {"every": rounds},
        "sites": [{"id": site} for site in SITES],
        "simulation": {
            "data": {"files": ["train.csv"], "test_files": ["test.csv"], "groups": ["sex"]},
            "split": {"by": "column", "column": "hospital"},
            "faults": list(faults),
        },
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(study | sections))
    return path


def play(folder: Path, **changes) -> Path:
    torch.set_num_threads(1)
    assert main(["simulate", str(study_file(folder, **changes)), "--out", str(folder / "run")]) == 0
    return folder / "run"


def told(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def models(run: Path) -> dict[str, dict[str, np.ndarray]]:
    return {site: load_tensors(run / "model" / site / "model.safetensors") for site in SITES}


# ------------------------------------------------------------------------ the oracle


def patients(run: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    facts = json.loads((run / "model" / SITES[0] / "task.json").read_text())
    mean, deviation = (np.array(facts[key]) for key in ("mean", "deviation"))
    found = {site: ([], []) for site in SITES}
    with (run.parent / "train.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            part = (np.array([float(row["a"]), float(row["b"])]) - LOW) / (HIGH - LOW)
            found[row["hospital"]][0].append((part - mean) / deviation)
            found[row["hospital"]][1].append(int(row["label"] == "yes"))
    return {
        site: (torch.tensor(np.array(rows), dtype=torch.float64), torch.tensor(labels))
        for site, (rows, labels) in found.items()
    }


def loss_of(named, data):
    rows, labels = data
    hidden = torch.relu(rows @ named["hidden1.weight"].T + named["hidden1.bias"])
    outputs = hidden @ named["output.weight"].T + named["output.bias"]
    return torch.nn.functional.cross_entropy(outputs, labels)


def oracle(run: Path, absent, personal: frozenset[str]) -> dict[str, dict[str, np.ndarray]]:
    """FedAvg over the common tensors; the others go on from where they were at their hospital."""
    first = Bundle.load(run / "state" / "bundle").initial
    start = {n: torch.tensor(np.array(v), dtype=torch.float64) for n, v in first.items()}
    data = patients(run)
    common = {n: v for n, v in start.items() if n not in personal}
    own = {site: {n: start[n] for n in personal} for site in SITES}
    for number in range(1, ROUNDS + 1):
        updates = []
        for site in SITES:
            if (number, site) in absent:
                continue
            named = {**common, **own[site]}
            for _ in range(STEPS):
                leaves = {n: v.clone().requires_grad_() for n, v in named.items()}
                loss_of(leaves, data[site]).backward()
                named = {n: (v - RATE * v.grad).detach() for n, v in leaves.items()}
            own[site] = {n: named[n] for n in personal}
            updates.append({n: named[n] - common[n] for n in common})
        common = {n: v + sum(u[n] for u in updates) / len(updates) for n, v in common.items()}
    return {s: {n: v.numpy() for n, v in {**common, **own[s]}.items()} for s in SITES}


def absences(run: Path) -> set[tuple[int, str]]:
    rounds = [entry for entry in told(run)["rounds"] if entry["kind"] == "train"]
    return {(entry["turn"], site) for entry in rounds for site in entry["dropouts"]}


HEAD = frozenset({"output.weight", "output.bias"})


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    return play(tmp_path_factory.mktemp("troubled"), faults=FAULTS)


def furthest(found, expected) -> float:
    return max(
        float(np.abs(found[site][name] - expected[site][name]).max())
        for site in SITES
        for name in expected[site]
    )


def test_a_run_with_a_dropout_and_a_crash_is_fedavg_with_heads_that_stay(troubled):
    absent = absences(troubled)
    assert {site for _, site in absent} == {"east", "west"}
    found = models(troubled)
    assert furthest(found, oracle(troubled, absent, HEAD)) < 2e-4
    # Controls: with everything common, and with everybody there, they are other models.
    assert furthest(found, oracle(troubled, absent, frozenset())) > 0.05
    assert furthest(found, oracle(troubled, set(), HEAD)) > 0.005


def test_the_sum_holds_the_common_layers_alone(troubled):
    bundle = Bundle.load(troubled / "state" / "bundle")
    assert bundle.personal == ("output.bias", "output.weight")
    assert [spec.name for spec in bundle.layout.specs] == ["hidden1.bias", "hidden1.weight"]
    assert bundle.terms({site: bytes(32) for site in SITES}).layout == bundle.layout
    found = models(troubled)
    for name in bundle.initial:
        alike = all(np.array_equal(found[site][name], found["east"][name]) for site in SITES)
        assert alike == (name not in HEAD)
    card = (troubled / "MODEL_CARD.md").read_text()
    assert "9 trained parameters, and 8 that stay at each hospital" in card


def test_hospitals_that_contradict_each_other_are_each_served(troubled, tmp_path):
    """Two hospitals label the opposite way: one head for all of them cannot be right."""
    common = play(tmp_path, personal=(), rounds=30)
    (tmp_path / "own").mkdir()
    own = play(tmp_path / "own", rounds=30)
    scores = [
        {site: found["accuracy"] for site, found in told(run)["final_metrics"]["per_site"].items()}
        for run in (own, common)
    ]
    assert min(scores[0].values()) >= 0.8
    assert min(scores[1].values()) <= 0.6
    verdict = json.loads((own / "state" / "conclusion.json").read_text())["lines"]
    assert "everybody's patients" not in " ".join(verdict)
    groups = told(own)["final_metrics"]["subgroups"]
    assert set(groups) == {"sex:f", "sex:m"}
    assert min(one["accuracy"] for one in groups.values()) >= 0.9


def test_each_hospitals_model_can_be_asked(troubled, tmp_path, capsys):
    answers = []
    for site in ("east", "south"):
        out = tmp_path / f"{site}.csv"
        words = ["predict", str(troubled / "model" / site), str(troubled.parent / "test.csv")]
        assert main([*words, "--out", str(out)]) == 0
        answers.append(out.read_text())
    assert answers[0] != answers[1]
    capsys.readouterr()


NORMS = {
    "kind": "imaging",
    "labels": ["normal", "pneumonia"],
    "size": 16,
    "network": {"kind": "resnet", "widths": [8], "blocks": 1, "groups": 4},
}


def test_norms_are_the_scales_and_biases_of_normalising_layers(tmp_path):
    path = study_file(tmp_path, personal=("norms",), task=NORMS)
    document = json.loads(path.read_text())
    document["simulation"]["data"].pop("groups")
    path.write_text(json.dumps(document))
    built = build_model(load(path, Study))
    assert built.personal
    assert all("norm" in name for name in built.personal)
    assert {n for n in built.initial if "norm" in n} == set(built.personal)


def test_the_head_of_a_pretrained_network_is_its_classifier():
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.LayerNorm = torch.nn.LayerNorm(3)
            self.classifier = torch.nn.Linear(3, 2)

    module = Encoder()
    names = [name for name, _ in module.named_parameters()]
    head = personal_names(module, names, "classifier", ["head"])
    assert head == ("classifier.bias", "classifier.weight")
    both = personal_names(module, names, "classifier", ["head", "norms"])
    assert both == ("LayerNorm.bias", "LayerNorm.weight", *head)


# ------------------------------------------------------------------------ privacy


def private(epsilon=3.0) -> dict:
    return {"mode": "local", "epsilon": epsilon, "delta": 1e-4, "clip_norm": 0.5}


def test_under_local_privacy_the_whole_step_is_clipped_and_noised(tmp_path, monkeypatch):
    """One norm and one noise over common and own layers: what stays is as private as what goes."""
    seen = []
    real = LocalTrainer._private_step

    def watched(self, engine, noise_multiplier):
        real(self, engine, noise_multiplier)
        # 1000 patients are counted on and 40 are there: almost all of a step is noise.
        seen.append({n: p.grad.clone() for n, p in self._parameters.items()})

    monkeypatch.setattr(LocalTrainer, "_private_step", watched)
    run = play(tmp_path, privacy=private())
    facts = json.loads((run / "privacy.json").read_text())["mechanism"]
    std = facts["noise_multiplier"] * 0.5 / 1000
    spread = torch.stack([step["output.weight"] for step in seen]).std()
    assert float(spread) == pytest.approx(std, rel=0.15)
    assert {"output.weight", "hidden1.weight"} <= set(seen[0])


def test_the_budget_of_a_private_run_holds(tmp_path):
    run = play(tmp_path, privacy=private())
    assert all(site["spent"] <= 3.0 for site in told(run)["epsilon"].values())


# ------------------------------------------------------------------------ refusals


REFUSED = {
    "joint": (
        {"privacy": {**private(), "mode": "joint"}},
        "training.personal: must be absent with privacy.mode: joint",
    ),
    "scaffold": (
        {"aggregation": {"optimizer": {"name": "scaffold"}}},
        "must not be scaffold with training.personal",
    ),
    "average": ({"aggregation": {"average": 0.5}}, "fit the last model"),
    "gate": (
        {"acceptance": {"tolerance": 0.1}, "evaluation": {"every": 1}},
        "cannot be rolled back",
    ),
    "twice": ({"personal": ("head", "head")}, "is listed twice"),
    "unknown": ({"personal": ("neck",)}, "training.personal.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_with_own_layers_is_refused_by_key(name, tmp_path, capsys):
    changes, words = REFUSED[name]
    path = study_file(tmp_path, **changes)
    assert main(["plan", str(path)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


LAYERS = {
    "no norms": ({}, ("norms",), "the network has no norms that learn"),
    "all of it": ({"hidden": []}, ("head",), "nothing would be common"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_not_there_are_refused_before_a_round(name, tmp_path, capsys):
    changes, personal, words = LAYERS[name]
    path = study_file(tmp_path, personal=personal)
    document = json.loads(path.read_text())
    document["task"] |= changes
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=words) as refused:
        build_model(load(path, Study))
    assert refused.value.code is Code.PERSONAL_LAYERS
    assert main(["plan", str(path)]) == 2
    assert "WR-2111" in capsys.readouterr().err


def test_a_plan_says_what_stays(tmp_path, capsys):
    assert main(["plan", str(study_file(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert "stay at each hospital" in shown
    assert "9 in a 32-bit ring" in shown


# ------------------------------------------------------------------------ what is kept


LAYOUT = Layout((TensorSpec("own", (2,)),))
FIRST = {"own": np.array([1.0, 2.0], np.float32), "common": np.zeros(3, np.float32)}


def layers(journal, owner="north"):
    vault = Vault(bytes(32), SeededEntropy("vault"))
    return PersonalLayers(journal, vault, owner, LAYOUT, FIRST)


def test_layers_change_only_with_a_round_that_counted():
    journal = MemoryJournal()
    kept = layers(journal)
    sent = kept.keep(4, {}, np.array([9, 9, 9, 0.5, -1], np.float32))
    assert sent.tolist() == [9, 9, 9]
    assert kept.own()["own"].tolist() == [1, 2]
    kept.settle(3)  # another round was the last that counted
    assert kept.own()["own"].tolist() == [1, 2]
    kept.keep(5, {}, np.array([9, 9, 9, 0.5, -1], np.float32))
    kept = layers(journal)  # a crash between
    kept.settle(5)
    assert kept.own()["own"].tolist() == [1.5, 1]


def test_what_lies_in_the_journal_is_sealed_and_bound_to_its_hospital():
    journal = MemoryJournal()
    kept = layers(journal)
    kept.keep(1, {}, np.array([0.25, 0.75], np.float32))
    plain = np.array([1.25, 2.75], "<f4").tobytes()
    assert plain not in (journal.get_blob("personal-next") or b"")
    with pytest.raises(StorageError):
        layers(journal, owner="south").settle(1)


def test_statistics_are_still_everybodys(troubled):
    facts = [json.loads((troubled / "model" / s / "task.json").read_text()) for s in SITES]
    assert all(fact["mean"] == facts[0]["mean"] for fact in facts)
    assert len(facts[0]["deviation"]) == 2
